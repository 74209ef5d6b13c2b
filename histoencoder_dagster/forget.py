"""Forgetting slides in Dagster's records: partitions, events, runs, cursors, logs.

Dagster removes a partition's key, but not its history, and no storage of its own can wipe single
partitions. So its tables are changed through the connections that its storages give, on SQLite and
PostgreSQL alike. Events of a slide are deleted, and so are runs of nothing else; where a record is
of other slides too, the name is struck out (`redaction`).
"""

import argparse
import contextlib
import json
import sqlite3
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa
from dagster import RunsFilter
from dagster._core.execution.backfill import BulkActionStatus
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetEventTagsTable,
    AssetKeyTable,
    DynamicPartitionsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.runs.schema import (
    BackfillTagsTable,
    BulkActionsTable,
    KeyValueStoreTable,
    RunsTable,
    RunTagsTable,
)
from dagster._core.storage.runs.sql_run_storage import SqlRunStorage
from dagster._core.storage.schedules.schema import (
    AssetDaemonAssetEvaluationsTable,
    InstigatorsTable,
    JobTable,
    JobTickTable,
)
from dagster._core.storage.schedules.sql_schedule_storage import SqlScheduleStorage

from histoencoder_core.errors import NOTHING_FOUND, HistoEncoderError
from histoencoder_core.store import files
from histoencoder_dagster.partitions import PARTITION, RANGE_END, RANGE_START, SLIDES, UNFINISHED
from histoencoder_dagster.redaction import Redaction, covered

_UNFINISHED_BACKFILLS = [
    BulkActionStatus.REQUESTED,
    BulkActionStatus.CANCELING,
    BulkActionStatus.FAILING,
]
_BUSY_SECONDS = 30
_ROWS = 500

_Connect = Callable[[], AbstractContextManager[sa.Connection]]


def main() -> int:
    """Forget slides in the instance of DAGSTER_HOME, or tell what would be forgotten."""
    parser = argparse.ArgumentParser(prog="histoencoder forget", description=__doc__)
    parser.add_argument("slides", nargs="+", help="ids of the slides")
    parser.add_argument("--name", action="append", default=[], help="another name of one of them")
    parser.add_argument("--yes", action="store_true", help="do it")
    arguments = parser.parse_args()
    try:
        with dg.DagsterInstance.get() as instance:
            forget = forget_in_dagster if arguments.yes else found_in_dagster
            told = forget(instance, arguments.slides, arguments.name)
    except HistoEncoderError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    for what, count in told.items():
        print(f"Dagster's {what}: {count}.")
    return 0 if any(told.values()) else NOTHING_FOUND


def found_in_dagster(
    instance: dg.DagsterInstance,
    slides: Collection[str],
    names: Collection[str] = (),  # noqa: ARG001 - asked like `forget_in_dagster`
) -> dict[str, int]:
    """Tell how many partitions and events of some slides an instance holds.

    Raises:
        HistoEncoderError: The instance keeps its records elsewhere than in a database.
    """
    events, _, _ = _storages(instance)
    table = SqlEventLogStorageTable
    of_slides = table.c.partition.in_(slides)
    with events.index_connection() as connection:
        count = connection.scalar(sa.select(sa.func.count()).select_from(table).where(of_slides))
    partitions = {*slides} & {*instance.get_dynamic_partitions(SLIDES)}
    return {"partitions": len(partitions), "events": count or 0}


def forget_in_dagster(
    instance: dg.DagsterInstance, slides: Collection[str], names: Collection[str] = ()
) -> dict[str, int]:
    """Remove all that an instance holds of some slides.

    Args:
        instance: The instance.
        slides: Their ids.
        names: What else they are called: paths and names of their files.

    Returns:
        How many records of each kind were deleted or changed.

    Raises:
        HistoEncoderError: A run or a backfill is at work on one of the slides or on the cohort, or
            the instance keeps its records elsewhere than in a database.
    """
    events, runs, schedules = _storages(instance)
    redaction = Redaction(slides, names, instance.get_dynamic_partitions(SLIDES))
    _refuse_unfinished(instance, runs, redaction)
    shards = list(_event_shards(events, redaction))
    told = {"runs": _delete_runs(instance, redaction)}
    told["events"] = sum(_change_events(connect, redaction) for connect in shards)
    with events.index_connection() as connection:
        told["events"] += _change_assets(connection, redaction)
        partitions = DynamicPartitionsTable
        of_slides = partitions.c.partition.in_(redaction.slides)
        gone = connection.execute(
            partitions.delete().where(of_slides & (partitions.c.partitions_def_name == SLIDES))
        )
        told["partitions"] = gone.rowcount
    with runs.connect() as connection:
        told["runs"] += _change_runs(connection, redaction)
    with schedules.connect() as connection:
        told["ticks and cursors"] = _change_schedules(connection, redaction)
    told["logs"] = _change_logs(instance, redaction)
    changed: list[_Connect] = [*shards, runs.connect, schedules.connect]
    for connect in changed:
        _vacuum(connect)
    return told


def _storages(
    instance: dg.DagsterInstance,
) -> tuple[SqlEventLogStorage, SqlRunStorage, SqlScheduleStorage]:
    events, runs = instance.event_log_storage, instance.run_storage
    schedules = instance.schedule_storage
    if not (
        isinstance(events, SqlEventLogStorage)
        and isinstance(runs, SqlRunStorage)
        and isinstance(schedules, SqlScheduleStorage)
    ):
        raise HistoEncoderError(
            f"Dagster's records are kept by {type(events).__name__}, {type(runs).__name__} and "
            f"{type(schedules).__name__}, which can't be searched: only SQLite and PostgreSQL can."
        )
    return events, runs, schedules


def _refuse_unfinished(
    instance: dg.DagsterInstance, runs: SqlRunStorage, redaction: Redaction
) -> None:
    """Make sure that nothing writes what is about to be removed."""
    for run in instance.get_runs(RunsFilter(statuses=UNFINISHED)):
        of = covered(dict(run.tags), redaction.order)
        if not of or redaction.slides.intersection(of):
            raise HistoEncoderError(
                f"Run {run.run_id} ({run.job_name}) is {run.status.value.lower()} and reads or "
                "writes these slides. Wait until it has ended, or cancel it; stop the sensors "
                "meanwhile."
            )
    backfills = BulkActionsTable
    unfinished = backfills.c.status.in_(status.value for status in _UNFINISHED_BACKFILLS)
    with runs.connect() as connection:
        for key, body in connection.execute(
            sa.select(backfills.c.key, backfills.c.body).where(unfinished)
        ).fetchall():
            if redaction.lists(body):
                raise HistoEncoderError(
                    f"Backfill {key} is of these slides and has not ended. Wait, or cancel it."
                )


# Events -------------------------------------------------------------------------------------------


def _event_shards(events: SqlEventLogStorage, redaction: Redaction) -> Iterator[_Connect]:
    """Connections to every table of events that may hold the slides; the index comes first.

    On SQLite each run has a file of its own, of which only those are opened by Dagster that need
    be: it checks each one's schema, which takes its time for thousands.
    """
    yield events.index_connection
    if isinstance(events, SqliteEventLogStorage):
        for run_id in events.get_all_run_ids():
            if _holds(Path(events.path_for_shard(run_id)), redaction):
                yield partial(events.run_connection, run_id)


def _holds(path: Path, redaction: Redaction) -> bool:
    with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_SECONDS)) as connection:
        for name in redaction.names:
            query = "SELECT 1 FROM event_logs WHERE instr(event, ?) LIMIT 1"
            with contextlib.suppress(sqlite3.OperationalError):  # a run that wrote no event yet
                if connection.execute(query, [_escaped(name)]).fetchone():
                    return True
    return False


def _change_events(connect: _Connect, redaction: Redaction) -> int:
    table = SqlEventLogStorageTable
    with connect() as connection:
        own = sa.select(table.c.id).where(table.c.partition.in_(redaction.slides))
        if sa.inspect(connection).has_table(AssetEventTagsTable.name):
            connection.execute(
                AssetEventTagsTable.delete().where(AssetEventTagsTable.c.event_id.in_(own))
            )
        deleted = connection.execute(
            table.delete().where(table.c.partition.in_(redaction.slides))
        ).rowcount
        # A picture of the cohort may show the slide, though its record does not name it.
        drawn = table.c.partition.is_(None) & table.c.event.contains("data:image/")
        rows = connection.execute(
            sa.select(table.c.id, table.c.event, table.c.partition).where(
                _naming(table.c.event, redaction) | drawn
            )
        ).fetchall()
        changed = 0
        for number, event, partition in rows:
            kept = redaction.event(event, pictures=partition is not None)
            if kept != event:
                connection.execute(table.update().where(table.c.id == number).values(event=kept))
                changed += 1
        return deleted + changed


def _change_assets(connection: sa.Connection, redaction: Redaction) -> int:
    """Change what is kept of each asset and check beside its events."""
    assets, events, checks = AssetKeyTable, SqlEventLogStorageTable, AssetCheckExecutionsTable
    changed = 0
    for key, last, status in connection.execute(
        sa.select(assets.c.asset_key, assets.c.last_materialization, assets.c.cached_status_data)
    ).fetchall():
        values: dict[str, Any] = {}
        if status is not None and redaction.lists(status):
            values["cached_status_data"] = None  # Dagster works it out again
        newest = connection.scalar(
            sa.select(events.c.event)
            .where(events.c.asset_key == key)
            .where(events.c.dagster_event_type == "ASSET_MATERIALIZATION")
            .order_by(events.c.id.desc())
            .limit(1)
        )
        if last is not None and last != newest:  # it was the slide's, or was changed above
            values["last_materialization"] = newest
        if values:
            connection.execute(assets.update().where(assets.c.asset_key == key).values(values))
            changed += 1
    column = checks.c.evaluation_event
    for number, event in connection.execute(
        sa.select(checks.c.id, column).where(_naming(column, redaction))
    ).fetchall():
        kept = redaction.event(event)
        if kept != event:
            this = checks.c.id == number
            connection.execute(checks.update().where(this).values(evaluation_event=kept))
            changed += 1
    return changed


# Runs ---------------------------------------------------------------------------------------------


def _delete_runs(instance: dg.DagsterInstance, redaction: Redaction) -> int:
    """Delete runs of nothing but the slides, with their logs."""
    deleted = 0
    for slide_id in redaction.slides:
        for tag in (PARTITION, RANGE_START):
            for run in instance.get_runs(RunsFilter(tags={tag: slide_id})):
                if redaction.slides.issuperset(covered(dict(run.tags), redaction.order)):
                    instance.delete_run(run.run_id)
                    instance.compute_log_manager.delete_logs(prefix=[run.run_id])
                    deleted += 1
    return deleted


def _change_runs(connection: sa.Connection, redaction: Redaction) -> int:
    runs, tags, changed = RunsTable, RunTagsTable, 0
    named = sa.select(tags.c.run_id).where(
        tags.c.key.in_([PARTITION, RANGE_START, RANGE_END]) & tags.c.value.in_(redaction.slides)
    )
    for run_id, body, partition in connection.execute(
        sa.select(runs.c.run_id, runs.c.run_body, runs.c.partition).where(runs.c.run_id.in_(named))
    ).fetchall():
        kept = redaction.run(body)
        values: dict[str, str | None] = {"run_body": kept}
        if partition in redaction.slides:
            values["partition"] = None
        connection.execute(runs.update().where(runs.c.run_id == run_id).values(values))
        of_run = tags.c.run_id == run_id
        told = dict(
            connection.execute(sa.select(tags.c.key, tags.c.value).where(of_run)).fetchall()
        )
        for key, value in redaction.tags(told).items():
            if value != told[key]:
                this = of_run & (tags.c.key == key)
                connection.execute(tags.update().where(this).values(value=value))
        changed += 1
    backfills = BulkActionsTable
    for key, body in connection.execute(
        sa.select(backfills.c.key, backfills.c.body).where(_naming(backfills.c.body, redaction))
    ).fetchall():
        if redaction.lists(body):
            connection.execute(backfills.delete().where(backfills.c.key == key))
            of_backfill = BackfillTagsTable.c.backfill_id == key
            connection.execute(BackfillTagsTable.delete().where(of_backfill))
            changed += 1
    values_table = KeyValueStoreTable
    for key, value in connection.execute(
        sa.select(values_table.c.key, values_table.c.value)
    ).fetchall():
        if value and redaction.mentioned_in(f'"{value}"'):
            connection.execute(
                values_table.update()
                .where(values_table.c.key == key)
                .values(value=redaction.cursor(value))
            )
            changed += 1
    return changed


# Sensors ------------------------------------------------------------------------------------------


def _change_schedules(connection: sa.Connection, redaction: Redaction) -> int:
    changed = 0
    for table, column in (
        (InstigatorsTable, InstigatorsTable.c.instigator_body),
        (JobTable, JobTable.c.job_body),
    ):
        for number, body in connection.execute(sa.select(table.c.id, column)).fetchall():
            kept = redaction.instigator(body) if body else body
            if kept != body:
                this = table.c.id == number
                connection.execute(table.update().where(this).values({column.name: kept}))
                changed += 1
    for table, column in (
        (JobTickTable, JobTickTable.c.tick_body),
        (
            AssetDaemonAssetEvaluationsTable,
            AssetDaemonAssetEvaluationsTable.c.asset_evaluation_body,
        ),
    ):
        found = [
            number
            for number, body in _rows(connection, table.c.id, column)
            if redaction.mentioned_in(body)
        ]
        for number in found:
            connection.execute(table.delete().where(table.c.id == number))
        changed += len(found)
    return changed


# Logs, and what SQLite leaves in its files --------------------------------------------------------


def _change_logs(instance: dg.DagsterInstance, redaction: Redaction) -> int:
    """Strike the names out of what runs and sensors printed."""
    manager, changed = instance.compute_log_manager, 0
    if not isinstance(manager, LocalComputeLogManager):
        print(f"What runs printed is kept by {type(manager).__name__}, and was not looked at.")
        return 0
    for path in Path(manager._base_dir).rglob("*"):
        if path.suffix not in {".out", ".err"} or not path.is_file():
            continue
        before = path.read_text("utf-8", "surrogateescape")
        kept = redaction.prose(before)
        if kept != before:
            with files.atomic_path(path) as temporary:
                temporary.write_text(kept, "utf-8", "surrogateescape")
            changed += 1
    return changed


def _vacuum(connect: _Connect) -> None:
    """Rewrite a file of SQLite's, as its free pages and its log still hold what was deleted."""
    with connect() as connection:
        url = connection.engine.url
    if not url.drivername.startswith("sqlite") or not url.database:
        return
    try:
        with contextlib.closing(
            sqlite3.connect(url.database, isolation_level=None, timeout=_BUSY_SECONDS)
        ) as database:
            database.execute("VACUUM")
            [busy, *_] = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError as error:
        raise HistoEncoderError(f"{url.database}: {error}. {_STOP}") from error
    if busy:
        raise HistoEncoderError(f"{url.database}: is being read. {_STOP}")


_STOP = (
    "The slides' records are deleted, but their bytes may still be in the file: stop Dagster and "
    "run this again."
)


def _rows(
    connection: sa.Connection, number: sa.Column[int], column: sa.Column[str]
) -> Iterator[tuple[int, str]]:
    """All rows of a table that may be larger than memory, some at a time."""
    last = 0
    while True:
        some = connection.execute(
            sa.select(number, column).where(number > last).order_by(number).limit(_ROWS)
        ).fetchall()
        if not some:
            return
        yield from ((row_number, body) for row_number, body in some if body)
        last = some[-1][0]


def _naming(column: sa.ColumnElement[Any], redaction: Redaction) -> sa.ColumnElement[bool]:
    """Rows whose JSON may hold one of the names."""
    return sa.or_(*(column.contains(_escaped(name), autoescape=True) for name in redaction.names))


def _escaped(name: str) -> str:
    """A name as it stands in JSON."""
    return json.dumps(name)[1:-1]


if __name__ == "__main__":
    sys.exit(main())
