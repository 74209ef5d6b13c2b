"""The program ``histoencoder``."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from histoencoder_core import __version__
from histoencoder_core.cli import annotate, cohort, forget, report, similar, stages
from histoencoder_core.errors import HistoEncoderError

app = typer.Typer(
    help="Whole-slide images to tiles, features, clusters and SQL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich would take "[default: …]" for markup and drop it
    context_settings={"help_option_names": ["--help"]},
)


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if version:
        typer.echo(__version__)
        raise typer.Exit


app.command("tile")(stages.tile)
app.command("extract")(stages.extract)
app.command("cluster")(stages.cluster)
app.command("label")(stages.label)
app.command("annotate")(annotate.annotate)
app.command("sql")(cohort.sql)
app.command("status")(cohort.status)
app.command("similar")(similar.similar)
app.add_typer(similar.show, name="show")
app.command("report")(report.report)
app.command("encoders")(cohort.encoders)
app.command("prune")(cohort.prune)
app.command("forget")(forget.forget)
app.command("demo")(cohort.demo)


def main() -> None:
    """Run the program; an error that a user can act on is one message and exit code 1."""
    try:
        app()
    except ValidationError as error:  # a value in the environment
        typer.secho(f"ERROR: {error.title}: {stages.first_problem(error)}", fg="red", err=True)
        sys.exit(1)
    except HistoEncoderError as error:
        typer.secho(f"ERROR: {error}", fg="red", err=True)
        sys.exit(1)
