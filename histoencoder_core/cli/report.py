"""The command ``report``: figures of the cohort and the page that joins them."""

from __future__ import annotations

from typing import Annotated

import typer

from histoencoder_core.cli.stages import StoreFolder
from histoencoder_core.store import Store


def report(
    input_dir: StoreFolder,
    num_clusters: Annotated[
        int | None,
        typer.Option(
            "--num-clusters",
            "-n",
            min=2,
            help="Number of clusters shown.  [default: the model's largest for purity, the largest "
            "up to 24 for pictures]",
        ),
    ] = None,
) -> None:
    """Draw the cohort's figures and write its report, as far as they are not up to date."""
    # matplotlib takes long to import
    from histoencoder_core.report.draw import draw_figures
    from histoencoder_core.report.page import write_page

    store = Store(input_dir)
    figures = draw_figures(store, num_clusters)
    for figure in figures:
        if figure.png is None or figure.svg is None:
            typer.echo(f"{figure.title} No figure: {figure.missing}")
            continue
        state = "" if figure.made_now else "  (up to date)"
        typer.echo(f"{figure.png}, .svg{state}")
    typer.echo(write_page(store, figures, num_clusters))
