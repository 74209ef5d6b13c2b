"""Fill a Dagster instance with the history of a large cohort, from one genuine batch.

The first batch of slides goes through every stage in earnest, on tiny slides of its own. Each
further batch takes over what Dagster kept of it, run by run, event by event and tag by tag, under
the names of its own slides: through Dagster's interfaces 50,000 slides would take hours.
"""

from __future__ import annotations

import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import sqlalchemy as db
import tifffile
from cohort_store import slide_name
from dagster._core.storage.event_log.schema import AssetEventTagsTable, SqlEventLogStorageTable
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.runs.schema import RunsTable, RunTagsTable
from dagster._core.storage.runs.sql_run_storage import SqlRunStorage

from histoencoder_core.settings import (
    ClusterSettings,
    EncoderSettings,
    PlatformSettings,
    TilingSettings,
)
from histoencoder_dagster import metadata
from histoencoder_dagster.definitions import platform_definitions
from histoencoder_dagster.partitions import RANGE_END, RANGE_START, SLIDES

BATCH = 25
"""Slides a run, as the platform's default."""

PIXELS = 512
PER_SLIDE = ("slides", "tiles", "features", "clusters", "annotations")
OF_COHORT = ("catalog", "cluster_statistics", "cluster_purity", "cluster_labels",
             "annotation_accuracy")  # fmt: skip
QUIET = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}

Row = dict[str, Any]


def tiny_slide(path: Path, *, seed: int) -> None:
    """Write a slide of one piece of noisy tissue, of two levels and 0.5 µm/px."""
    rng = np.random.default_rng(seed)
    pixels = np.full((PIXELS, PIXELS, 3), 243, np.uint8)
    y, x = np.mgrid[:PIXELS, :PIXELS] - PIXELS / 2
    inside = x**2 + y**2 < (0.4 * PIXELS) ** 2
    noise = rng.integers(0, 30, (PIXELS, PIXELS, 3))
    colour = np.array([200, 120, 180]) - rng.integers(0, 40, 3)
    pixels[inside] = (colour - noise)[inside]
    with tifffile.TiffWriter(path) as tiff:
        for level in range(2):
            tiff.write(
                pixels[:: 2**level, :: 2**level],
                photometric="rgb",
                tile=(128, 128),
                compression="zlib",
                subfiletype=int(level > 0),
                resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def tiny_settings(folder: Path) -> PlatformSettings:
    """A deployment of tiny slides, in which every stage takes next to no time."""
    return PlatformSettings(
        slides=(folder / "slides",),
        store=folder / "store",
        annotations=folder / "annotations",
        device="cpu",
        backend="eager",
        readers=1,
        slides_per_run=BATCH,
        settle_seconds=0,
        tiling=TilingSettings(tile_px=128, overlap=0),
        encoder=EncoderSettings(name="untrained:test_resnet", input_size=32),
        clusters=ClusterSettings(n_clusters=(2, 3)),
    )


def fill(instance: dg.DagsterInstance, slides: int, *, picture_px: int) -> None:
    """Give an instance as many partitions, each with all stages done.

    Args:
        instance: A fresh one.
        slides: Their number, a multiple of `BATCH`.
        picture_px: Longest side of the pictures in the event log.
    """
    metadata.PICTURE_PX = picture_px
    names = [slide_name(number) for number in range(slides)]
    instance.add_dynamic_partitions(SLIDES, names)
    with tempfile.TemporaryDirectory() as folder:
        run_first_batch(instance, tiny_settings(Path(folder)), names[:BATCH])
    copy_first_batch(instance, names)


def run_first_batch(
    instance: dg.DagsterInstance, settings: PlatformSettings, names: Sequence[str]
) -> None:
    """Run every stage on the first batch, each stage in one run."""
    [folder] = settings.slides
    folder.mkdir(parents=True)
    for seed, name in enumerate(names):
        tiny_slide(folder / f"{name}.tiff", seed=seed)
    defs = platform_definitions(settings)
    defs.resources["platform"].register_slides()  # type: ignore[index]
    job = defs.resolve_implicit_global_asset_job_def()
    tags = {RANGE_START: names[0], RANGE_END: names[-1]}
    before, after = PER_SLIDE[:3], PER_SLIDE[3:4]
    for assets in ([s] for s in before), (["cluster_model"],), ([s] for s in after), (OF_COHORT,):
        for selected in assets:
            keys = {dg.AssetKey(name) for name in selected}
            done = job.get_subset(
                asset_selection=keys, asset_check_selection=set()
            ).execute_in_process(
                instance=instance,
                run_config=QUIET,
                tags=tags if set(selected) & set(PER_SLIDE) else {},
            )
            assert done.success


def copy_first_batch(instance: dg.DagsterInstance, names: Sequence[str]) -> None:
    """Take over what there is of the first batch for all other slides."""
    events, runs = instance.event_log_storage, instance.run_storage
    assert isinstance(events, SqlEventLogStorage)
    assert isinstance(runs, SqlRunStorage)
    first = names[:BATCH]
    with runs.connect() as connection:
        kept = _rows(connection, RunsTable)
        run_tags = _rows(connection, RunTagsTable)
    kept = [run for run in kept if RANGE_START in run["run_body"]]
    of_runs = {run["run_id"] for run in kept}
    run_tags = [tag for tag in run_tags if tag["run_id"] in of_runs]
    with events.index_connection() as connection:
        logged = [
            row for row in _rows(connection, SqlEventLogStorageTable) if row["run_id"] in of_runs
        ]
        of_events = {row["id"] for row in logged}
        event_tags = [
            tag for tag in _rows(connection, AssetEventTagsTable) if tag["event_id"] in of_events
        ]
        following = (
            1
            + connection.execute(db.select(db.func.max(SqlEventLogStorageTable.c.id))).scalar_one()
        )
    renamed = _Renamed([*kept, *run_tags, *logged, *event_tags], [*first, *sorted(of_runs)])
    for batch in _batches(names, BATCH):
        if batch[0] == first[0]:
            continue
        new = dict(zip(first, batch, strict=True)) | {run: str(uuid.uuid4()) for run in of_runs}
        ids = {row["id"]: following + number for number, row in enumerate(logged)}
        following += len(logged)
        with runs.connect() as connection:
            connection.execute(RunsTable.insert(), renamed(kept, new))
            connection.execute(RunTagsTable.insert(), renamed(run_tags, new))
        with events.index_connection() as connection:
            rows = [row | {"id": ids[old["id"]]}
                    for row, old in zip(renamed(logged, new), logged, strict=True)]  # fmt: skip
            connection.execute(SqlEventLogStorageTable.insert(), rows)
            rows = [row | {"event_id": ids[row["event_id"]]} for row in renamed(event_tags, new)]
            connection.execute(AssetEventTagsTable.insert(), rows)
    with events.index_connection() as connection:
        if connection.dialect.name == "postgresql":  # which does not count ids that it was given
            connection.execute(
                db.text("SELECT setval(pg_get_serial_sequence('event_logs', 'id'), :last)"),
                {"last": following - 1},
            )
    for stage in PER_SLIDE:
        [newest] = instance.fetch_materializations(dg.AssetKey(stage), limit=1).records or [None]
        if newest is not None:
            events.store_asset_event(newest.event_log_entry, newest.storage_id)


class _Renamed:
    """Rows with other names in their texts; where a name stands is looked for once."""

    def __init__(self, rows: Sequence[Row], names: Sequence[str]) -> None:
        pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._parts = {
            text: pattern.split(text)
            for row in rows
            for text in row.values()
            if isinstance(text, str)
        }

    def __call__(self, rows: Sequence[Row], new: Mapping[str, str]) -> list[Row]:
        return [
            {
                column: self._text(value, new) if isinstance(value, str) else value
                for column, value in row.items()
                if column != "id"
            }
            for row in rows
        ]

    def _text(self, text: str, new: Mapping[str, str]) -> str:
        parts = self._parts[text]
        return "".join(new[part] if i % 2 else part for i, part in enumerate(parts))


def _rows(connection: db.Connection, table: db.Table) -> list[Row]:
    return [dict(row) for row in connection.execute(db.select(table)).mappings()]


def _batches(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]
