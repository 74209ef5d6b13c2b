"""The command forget: a slide leaves the store and Dagster's records."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from histoencoder_core.cli.cohort import OptionalStore
from histoencoder_core.errors import NOTHING_FOUND, StoreError
from histoencoder_core.forgetting import still_known, traces
from histoencoder_core.settings import PlatformSettings
from histoencoder_core.slides import Register
from histoencoder_core.slides.register import Entry
from histoencoder_core.store import Store


def forget(
    slides: Annotated[list[str], typer.Argument(metavar="SLIDE...", help="Ids of the slides.")],
    input_dir: OptionalStore = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do it; without it, only tell what would be done.")
    ] = False,
) -> None:
    """Remove slides' files, catalog rows, partitions and events, and tell what still knows them."""
    deployment = PlatformSettings()
    store = Store(input_dir or deployment.store)
    registered = Register(store).read()
    entries, aliases = registered.slides, registered.aliases
    slides = [aliases.get(slide_id, slide_id) for slide_id in slides]
    slides += [alias for alias, slide_id in aliases.items() if slide_id in slides]
    found = traces(store, slides)
    if not found:
        typer.echo(f"{store.root}: holds nothing of {', '.join(slides)}.")
    for trace in found:
        typer.echo(f"{trace.path}: {trace.what}.")
    # Dagster comes first: it refuses while a run is at work on a slide.
    places = [entries[slide_id] for slide_id in slides if slide_id in entries]
    places += [entry for slide_id in slides for entry in registered.former.get(slide_id, [])]
    known = _forget_in_dagster(slides, places, yes=yes)
    if not found and not known:
        raise StoreError(
            f"{', '.join(slides)}: not known. `histoencoder status` lists all slides by their ids."
        )
    if not yes:
        typer.echo("Nothing was removed; add --yes to do it. What would still know of it:")
    else:
        for trace in found:
            trace.remove()
        typer.echo("Removed. What still knows of it:")
    inputs = [deployment.annotations_folder, *filter(None, [deployment.sheet_path])]
    for line in still_known(store, slides, entries, inputs):
        typer.echo(f"- {line}")
    if "DAGSTER_HOME" not in os.environ:
        typer.echo("- Dagster, if it ever ran: DAGSTER_HOME is not set, so it was not looked at.")


def _forget_in_dagster(slides: list[str], places: list[Entry], *, yes: bool) -> bool:
    """Whether Dagster's records held anything of the slides; with `yes` it no longer does."""
    if "DAGSTER_HOME" not in os.environ:
        return False
    names = [
        f"--name={name}"
        for entry in places
        for name in (entry.path, entry.relative, Path(entry.path).name)
    ]
    # The orchestrator builds on this package, not the other way round: it is run, not imported.
    command = [sys.executable, "-m", "histoencoder_dagster.forget", *names, *(["--yes"] * yes)]
    done = subprocess.run([*command, "--", *slides], check=False)  # noqa: S603
    if done.returncode not in {0, NOTHING_FOUND}:
        raise typer.Exit(1)
    return done.returncode == 0
