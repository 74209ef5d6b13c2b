"""Commands that tell or tidy: sql, status, encoders, prune, demo."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from histoencoder_core.cli.tables import print_table
from histoencoder_core.clusters import current_model
from histoencoder_core.cohort import NOT_DONE, count_states, run_sql, slide_states
from histoencoder_core.errors import SettingsError, StoreError
from histoencoder_core.settings import PlatformSettings
from histoencoder_core.slides import find_in
from histoencoder_core.slides.arrivals import read_arrivals
from histoencoder_core.store import Store, layout

LISTING_SECONDS = 600.0
"""Time to wait for the list of a bucket: nobody looks again a moment later."""

OptionalStore = Annotated[
    Path | None,
    typer.Option(
        "--input_dir", "--input-dir", "-i",
        help="Folder of all outputs.  [default: HISTOENCODER_STORE, else ./store]",
    ),
]  # fmt: skip


class Format(StrEnum):
    """How a table is printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def sql(
    query: Annotated[str, typer.Argument(help='For example: "select * from cluster_purity"')],
    input_dir: OptionalStore = None,
    form: Annotated[
        Format, typer.Option("--format", "-f", help="How to print the result.")
    ] = Format.TABLE,
) -> None:
    """Ask the catalog a question in SQL; it can't be changed by it."""
    result = run_sql(_store(input_dir), query)
    if form is Format.CSV:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(result.column_names)
        writer.writerows(row.values() for row in result.to_pylist())
    elif form is Format.JSON:
        rows = [{k: _as_json(v) for k, v in row.items()} for row in result.to_pylist()]
        typer.echo(json.dumps(rows, indent=2, default=str))
    else:
        print_table(result)


def status(input_dir: OptionalStore = None) -> None:
    """Tell what is done and what is not, and why; exit code 1 if anything failed or is missing."""
    deployment = PlatformSettings()
    store = _store(input_dir)
    if not store.root.is_dir():
        raise StoreError(f"{store.root}: is not there.")
    states = slide_states(
        store,
        model=current_model(store),
        **expected(deployment),
        found=find_in(deployment.sources, seconds=LISTING_SECONDS)[0]
        if "slides" in deployment.model_fields_set
        else None,
    )
    counts = count_states(states)
    # Of eleven columns, a terminal of 80 characters would cut short the names.
    shown = [n for n in counts.column_names if n == "stage" or any(counts[n].to_pylist())]
    table = Table(*(Column(name, no_wrap=True) for name in shown), box=None)
    for row in counts.select(shown).to_pylist():
        table.add_row(*(str(value) if value else "·" for value in row.values()))
    console = Console(soft_wrap=True)
    console.print(table)
    for state in states:
        if state.state in NOT_DONE:
            what = state.state if state.kind is None else f"{state.state} ({state.kind})"
            told = f"{what}: {state.slide} {state.stage}: {state.reason or 'not made yet'}"
            console.print(told, markup=False)
    arrivals = read_arrivals(store)
    for slide_id, since in sorted(arrivals["absent"].items()):
        day = datetime.fromtimestamp(since, UTC).astimezone()
        told = f"absent: {slide_id}: its file is gone since {day:%Y-%m-%d %H:%M}; its results stay"
        console.print(told, markup=False)
    for away in arrivals["away"]:
        console.print(f"away: {away}", markup=False)
    if any(state.state in {"failed", "missing"} for state in states) or not states:
        raise typer.Exit(1)


def expected(deployment: PlatformSettings) -> dict[str, Any]:
    """What results are compared with: settings of the deployment, as far as there are any.

    Without, whatever was asked for on the command line will do.
    """
    names = ("tiling", "encoder", "labels", "annotate")
    folder = deployment.annotations_folder
    return {
        "annotations": folder if folder.is_dir() else None,
        **{n: getattr(deployment, n) for n in names if n in deployment.model_fields_set},
    }


def encoders() -> None:
    """List the encoders that can be named."""
    from histoencoder_core.features import encoder_names  # torch takes seconds to import

    table = Table("name", "what it is", box=None)
    for name, text in encoder_names().items():
        table.add_row(name, text)
    Console(soft_wrap=True).print(table)


def prune(
    input_dir: OptionalStore = None,
    slide: Annotated[
        list[str] | None, typer.Option(help="Only this slide; repeat for several.")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Only this stage's outputs; repeat for several.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove them; without it they are only listed.")
    ] = False,
) -> None:
    """Remove outputs that were made with other settings than the current ones."""
    store = _store(input_dir)
    unknown = sorted({*(stage or [])} - {*layout.STAGES})
    if unknown:
        raise SettingsError(
            f"No such stage: {', '.join(unknown)}. Stages: {', '.join(layout.STAGES)}."
        )
    stages = [name for name in layout.STAGES if stage is None or name in stage]
    removed = store.prune(slides=slide or store.slide_ids(), stages=stages, dry_run=not yes)
    for path, size in removed:
        typer.echo(f"{size / 1e6:10.1f} MB  {path.relative_to(store.root)}")
    total = sum(size for _, size in removed) / 1e6
    done = "removed" if yes else "would be removed; add --yes to do it"
    typer.echo(f"{len(removed)} outputs, {total:.1f} MB {done}.")


def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo lives.")] = Path("demo"),
) -> None:
    """Fetch a real slide, make a synthetic cohort, and run everything on them through Dagster."""
    # The orchestrator builds on this package, not the other way round: it is run, not imported.
    command = [sys.executable, "-m", "histoencoder_dagster.demo", "--folder", str(folder)]
    raise typer.Exit(subprocess.run(command, check=False).returncode)  # noqa: S603


def _as_json(value: object) -> object:
    """DuckDB's sums of integers are decimals, and JSON knows no NaN."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _store(input_dir: Path | None) -> Store:
    return Store(input_dir or PlatformSettings().store)
