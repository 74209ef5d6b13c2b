"""Gathering every slide's tables into ``<store>/_cohort/catalog.duckdb``.

The catalog holds tables, not views over files, so that user queries can run with file access off.
A refresh works on a copy: it replaces the rows of slides whose files have changed, and renames the
copy. A reader never sees a half and blocks no run.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from histoencoder_core.clusters import current_model, load_model, model_versions
from histoencoder_core.cohort import database
from histoencoder_core.cohort.arrived import read_arrived
from histoencoder_core.cohort.changes import Scan, Signature
from histoencoder_core.cohort.completeness import (
    Asked,
    StageState,
    known_cluster_labels,
    states_of,
)
from histoencoder_core.cohort.looking import SlideLook
from histoencoder_core.cohort.published import (
    Published,
    annotations_anew,
    made_for,
    read_published,
)
from histoencoder_core.cohort.query import attached
from histoencoder_core.cohort.reading import SlideRows, read_slide
from histoencoder_core.cohort.statistics import (
    counted_fingerprint,
    ensure_statistics,
    read_replicates,
    read_statistics,
)
from histoencoder_core.errors import ClusterError, kind_of
from histoencoder_core.labels import Annotations
from histoencoder_core.settings import (
    AnnotationSettings,
    EncoderSettings,
    LabelSettings,
    TilingSettings,
)
from histoencoder_core.slides import Register
from histoencoder_core.store import Store, files, layout

log = logging.getLogger(__name__)

READERS = 4
"""Threads that read slides: while one waits for the disk, another decodes."""

BATCH = 64
"""Slides that are put in at a time."""

COMMITTED = 16
"""Batches that are committed at a time."""

GROWN = 1.5
"""A file that has grown so much since it was last written from scratch is, again."""


@dataclass(frozen=True)
class CatalogSummary:
    """What a catalog holds.

    Attributes:
        path: The DuckDB file.
        slides: Number of slides.
        tiles: Number of tiles.
        labelled_tiles: Number of tiles with a label.
        completeness: The table ``completeness``.
        purity: The table ``cluster_purity``.
        read: Number of slides whose files were read; the others had not changed.
        seconds: Time taken to build it.
    """

    path: Path
    slides: int
    tiles: int
    labelled_tiles: int
    completeness: pa.Table
    purity: pa.Table
    read: int
    seconds: float

    @property
    def states(self) -> list[StageState]:
        """State of every stage of every slide, by slide and in the order of the stages."""
        order = {stage: place for place, stage in enumerate(layout.STAGES)}
        found = [StageState(**row) for row in self.completeness.to_pylist()]
        return sorted(found, key=lambda state: (state.slide, order[state.stage]))


def build_catalog(
    store: Store,
    *,
    tiling: TilingSettings | None = None,
    encoder: EncoderSettings | None = None,
    annotations: Path | None = None,
    labels: LabelSettings | None = None,
    annotate: AnnotationSettings | None = None,
) -> CatalogSummary:
    """Bring the catalog up to date.

    Only slides whose files have changed are read. All are after a refit, or when other settings
    are asked for.

    Args:
        store: The store.
        tiling: What tiles are expected; see `slide_states`.
        encoder: What features are expected; see `slide_states`.
        annotations: What labels are expected; see `slide_states`.
        labels: How they are made; see `slide_states`.
        annotate: Which K annotates; see `slide_states`.

    Returns:
        What the catalog holds.

    Raises:
        ClusterError: The current model's file is damaged.
        StoreError: ``tiles.csv`` can't be read.
    """
    started = time.perf_counter()
    store.cohort.mkdir(parents=True, exist_ok=True)
    # Of two refreshes at once, the one that looked first must not publish last.
    with files.locked_to_write(store.catalog_path):
        refresh = _Refresh(store, tiling, encoder, annotations, labels, annotate)
        before = read_published(store)
        if before is not None and before.made_for != refresh.made_for:
            before = None
        try:
            return _told(store, refresh.publish(before), started)
        except duckdb.Error as error:
            if before is None or kind_of(error) != "unexpected":  # the disk's fault
                raise
            log.warning("%s: is damaged (%s); it is written anew.", store.catalog_path, error)
            return _told(store, refresh.publish(None), started)


def _told(store: Store, read: int, started: float) -> CatalogSummary:
    """Read what the published catalog holds."""
    with attached(store) as connection:
        counts = connection.sql(
            "SELECT count(*), sum(tiles)::BIGINT, sum(labelled_tiles)::BIGINT FROM slides"
        ).fetchall()[0]
        return CatalogSummary(
            path=store.catalog_path,
            slides=counts[0],
            tiles=counts[1] or 0,
            labelled_tiles=counts[2] or 0,
            completeness=connection.sql("SELECT * FROM completeness").to_arrow_table(),
            purity=connection.sql("SELECT * FROM cluster_purity").to_arrow_table(),
            read=read,
            seconds=round(time.perf_counter() - started, 3),
        )


def forget_slides(store: Store, slides: Sequence[str]) -> None:
    """Take slides out of the catalog, for good.

    The file is written from scratch, so that no free page of it holds their rows, and whatever a
    refresh left that was killed goes too. A catalog that is damaged, or was made by another
    release, is removed: the next refresh makes it again.

    Args:
        store: The store.
        slides: Their ids.
    """
    path = store.catalog_path
    with files.locked_to_write(path):
        try:
            with attached(store) as connection:
                n_clusters = database.numbers_of_clusters(connection)
            with files.atomic_path(path) as temporary:
                shutil.copyfile(path, temporary)
                with database.opened(temporary) as connection:
                    connection.begin()
                    database.remove_slides(connection, slides)
                    _take_in_statistics(store, connection)
                    connection.execute(database.script("cluster_purity", n_clusters))
                    connection.commit()
                _write_anew(store, temporary, n_clusters)
        except duckdb.Error as error:
            log.warning("%s: can't be changed (%s); it is removed.", path, error)
            files.remove(path)


def slides_in_catalog(store: Store, slides: Sequence[str]) -> list[str]:
    """Which of some slides the published catalog knows; all, if it can't be read."""
    if not store.catalog_path.exists():
        return []
    try:
        with attached(store) as connection:
            known = connection.execute(
                "SELECT slide FROM internal.sources WHERE list_contains($1, slide)", [list(slides)]
            ).fetchall()
    except duckdb.Error:
        return list(slides)
    return [slide for (slide,) in known]


def publish_catalog(store: Store, **asked: Any) -> CatalogSummary:
    """Bring the catalog up to date, and the statistics that it takes in.

    Args:
        store: The store.
        asked: What is expected; see `build_catalog`.

    Returns:
        What the catalog holds.

    Raises:
        ClusterError: The current model's file is damaged.
        StoreError: ``tiles.csv`` can't be read.
    """
    summary = build_catalog(store, **asked)
    statistics = ensure_statistics(store)
    if statistics is not None and statistics.made_now:
        again = build_catalog(store, **asked)
        summary = replace(again, read=summary.read, seconds=summary.seconds + again.seconds)
    return summary


class _Refresh:
    """One refresh: the store as it is now, and the catalog that it calls for."""

    def __init__(
        self,
        store: Store,
        tiling: TilingSettings | None,
        encoder: EncoderSettings | None,
        annotations: Path | None,
        labels: LabelSettings | None,
        annotate: AnnotationSettings | None,
    ) -> None:
        self.store = store
        self.model = current_model(store)
        self.n_clusters = sorted(self.model.centroids) if self.model is not None else []
        self.entries = Register(store).entries()
        self.scan = Scan(store)
        self.slides = self.scan.expected(self.entries)
        self.said = Annotations(store, annotations, self.slides)
        named = known_cluster_labels(store, annotate)
        self.asked = Asked(tiling, encoder, self.model, named, self.said, labels)
        self.statistics = read_statistics(store)
        self.arrived = read_arrived(store, self.entries)
        self.made_for = made_for(self.asked)

    def publish(self, before: Published | None) -> int:
        """Write the catalog that the store calls for, and put it in place if it is another.

        Args:
            before: What the published catalog was made from; None to write it from scratch.

        Returns:
            Number of slides that were read.
        """
        known = {} if before is None else before.known
        now = self.scan.signatures(self.slides, self.entries, self.said, known)
        versions = model_versions(self.store)
        changed = [s for s in self.slides if s not in known or known[s].signature != now[s]]
        gone = sorted(known.keys() - now.keys())
        labels = self.asked.cluster_labels and self.asked.cluster_labels.fingerprint
        stored = self.statistics and self.statistics.fingerprint
        cohort = (versions, labels, stored, self.arrived.fingerprint)
        same = before is not None and before.cohort == cohort
        if same and not changed and not gone:
            return 0
        # A database is closed, and so whole, before its file is renamed.
        with files.atomic_path(self.store.catalog_path) as temporary:
            if before is not None:
                shutil.copyfile(self.store.catalog_path, temporary)
            with database.opened(temporary) as connection:
                # A commit waits for the disk, but what is not committed stays in memory.
                connection.begin()
                if before is None:
                    database.create(connection, self.n_clusters)
                    self._add_model(connection)
                else:
                    database.remove_slides(connection, [*changed, *gone])
                for number, batch in enumerate(_batched(self._read(changed)), 1):
                    self._add_slides(connection, batch, now)
                    if number % COMMITTED == 0:
                        connection.commit()
                        connection.begin()
                if before is not None and before.cohort[1] != labels:
                    self._tell_annotations_anew(connection)
                self._add_models(connection, versions)
                _take_in_statistics(self.store, connection)
                self._take_in_arrived(connection)
                connection.execute(database.script("cluster_purity", self.n_clusters))
                connection.execute("DELETE FROM internal.state")
                size = 0 if before is None else before.size
                state = [json.dumps(self.made_for), *cohort, size]
                connection.execute("INSERT INTO internal.state VALUES (?, ?, ?, ?, ?, ?)", state)
                connection.commit()
            if before is not None and temporary.stat().st_size > GROWN * before.size:
                _write_anew(self.store, temporary, self.n_clusters)
            if before is None:
                _note_size(temporary)
        return len(changed)

    def _read(self, slides: Iterable[str]) -> Iterator[SlideRows]:
        """Read slides in order, a few ahead."""
        with ThreadPoolExecutor(READERS) as pool:
            waiting: deque[Future[SlideRows]] = deque()
            for slide in slides:
                waiting.append(pool.submit(self._read_one, slide))
                if len(waiting) > BATCH:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _read_one(self, slide: str) -> SlideRows:
        look = SlideLook(self.store, slide, self.entries.get(slide))
        states = states_of(look, self.asked)
        return read_slide(look, states, self.n_clusters)

    def _add_slides(
        self,
        connection: duckdb.DuckDBPyConnection,
        batch: Sequence[SlideRows],
        now: Mapping[str, Signature],
    ) -> None:
        tiles = pa.concat_tables([rows.tiles for rows in batch])
        database.insert_tiles(connection, tiles, self.n_clusters)
        other = pa.concat_tables([rows.other_clusters for rows in batch])
        database.insert(connection, "other_clusters", other)
        sources = [
            {
                "slide": rows.slide,
                "files": now[rows.slide].files,
                "images": "" if rows.own_tiles else now[rows.slide].images,
                "own_tiles": rows.own_tiles,
                "path": rows.path,
                "clusters": rows.clusters,
                "counted": rows.counted,
                "annotations": rows.annotations,
            }
            for rows in batch
        ]
        by_table: dict[str, list[dict[str, Any]]] = {
            "slides": [rows.properties for rows in batch],
            "completeness": [asdict(state) for rows in batch for state in rows.states],
            "slide_distance": [rows.distance for rows in batch if rows.distance is not None],
            "internal.sources": sources,
        }
        for table, rows in by_table.items():
            if rows:
                names = sorted({name for row in rows for name in row})
                columns = {name: [row.get(name) for row in rows] for name in names}
                database.insert(connection, table, pa.table(columns))

    def _tell_annotations_anew(self, connection: duckdb.DuckDBPyConnection) -> None:
        """What clusters mean has changed, which bears on each slide's annotation by cluster."""
        told = annotations_anew(connection, self.asked.cluster_labels).values()
        if told:
            incoming = pa.table(
                {"slide": [t.slide for t in told], "state": [t.state for t in told],
                 "reason": pa.array([t.reason for t in told], pa.string())}
            )  # fmt: skip
            connection.register("told", incoming)
            connection.execute(
                "UPDATE completeness AS c SET state = told.state, reason = told.reason FROM told "
                "WHERE c.slide = told.slide AND c.stage = 'annotations'"
            )
            connection.unregister("told")

    def _add_model(self, connection: duckdb.DuckDBPyConnection) -> None:
        if self.model is not None:
            told = self.model.stamp.result
            row = [self.model.version, told["encoder"], self.model.untrained]
            row += [told["slides"], told["tiles"]]
            connection.execute("INSERT INTO model VALUES (?, ?, ?, ?, ?)", row)

    def _add_models(self, connection: duckdb.DuckDBPyConnection, versions: Sequence[str]) -> None:
        """Tell of all versions, those that are new in full."""
        known = {v for (v,) in connection.execute("SELECT version FROM models").fetchall()}
        for version in known - set(versions):
            connection.execute("DELETE FROM models WHERE version = ?", [version])
            connection.execute("DELETE FROM cluster_matches WHERE model = ?", [version])
        for version in versions:
            if version in known:
                continue
            try:
                model = load_model(self.store, version)
            except ClusterError as error:  # the current one can be read, or we would not be here
                log.warning("of a former cluster model nothing is told: %s", error)
                connection.execute("INSERT INTO models (version) VALUES (?)", [version])
                continue
            told = model.stamp.result
            row = [
                version, self.model is not None and version == self.model.version,
                told["encoder"], model.untrained, told["slides"], told["tiles"],
                sorted(model.centroids), model.settings.seed, told.get("previous"),
            ]  # fmt: skip
            connection.execute("INSERT INTO models VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            if model.matches is not None and model.matches.num_rows:
                same = {"model": version, "previous": told.get("previous")}
                matches = model.matches
                for name, value in same.items():
                    matches = matches.append_column(
                        name, pa.repeat(pa.scalar(value, pa.string()), matches.num_rows)
                    )
                database.insert(connection, "cluster_matches", matches)

    def _take_in_arrived(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Take in files that are no slides yet, and slides whose file is gone."""
        connection.execute(
            "DELETE FROM completeness WHERE slide NOT IN (SELECT slide FROM internal.sources)"
        )
        if self.arrived.states:
            rows = [asdict(state) for state in self.arrived.states]
            columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in rows[0]}
            database.insert(connection, "completeness", pa.table(columns))
        connection.execute("DELETE FROM absent")
        for slide_id, since in self.arrived.absent.items():
            connection.execute("INSERT INTO absent VALUES (?, ?)", [slide_id, since])


def _take_in_statistics(store: Store, connection: duckdb.DuckDBPyConnection) -> None:
    """Take in what was computed of the data that are counted now, and nothing else."""
    stamp, data = read_statistics(store), counted_fingerprint(connection)
    row: dict[str, Any] = {"state": "missing"}
    if stamp is not None:
        current = stamp.made_from["data"] == data
        row = {
            "state": "current" if current else "stale",
            "replicates": stamp.made_from["replicates"],
            "seed": stamp.made_from["seed"],
            "labelled_slides": stamp.result["labelled_slides"],
            "labelled_tiles": stamp.result["labelled_tiles"],
            "fingerprint": stamp.fingerprint,
        }
    before = connection.execute("SELECT state, fingerprint FROM statistics").fetchall()
    if before == [(row["state"], row.get("fingerprint"))]:
        return
    connection.execute("DELETE FROM statistics")
    connection.execute("DELETE FROM purity_replicates")
    if row["state"] == "current":
        database.insert(connection, "purity_replicates", read_replicates(store))
    database.insert(connection, "statistics", pa.Table.from_pylist([row]))


def _write_anew(store: Store, path: Path, n_clusters: Sequence[int]) -> None:
    """Write a catalog from scratch with the rows that it has."""
    anew = files.temporary_name(store.catalog_path)
    try:
        with database.opened(anew) as connection:
            connection.begin()
            database.create(connection, n_clusters)
            source = str(path).replace("'", "''")
            connection.execute(f"ATTACH '{source}' AS grown (READ_ONLY)")
            database.copy_tables(connection, "grown")
            connection.execute(database.script("cluster_purity", n_clusters))
            connection.commit()
        _note_size(anew)
        anew.replace(path)
    finally:
        files.remove(anew)


def _note_size(path: Path) -> None:
    """Write into a catalog how large its file is."""
    with database.opened(path) as connection:
        connection.execute("UPDATE internal.state SET bytes = ?", [path.stat().st_size])


def _batched(rows: Iterator[SlideRows]) -> Iterator[list[SlideRows]]:
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch
