"""What SQL alone can't compute of clusters and labels: bootstraps and permutations.

Purities of every cluster are computed again and again, with something about the data drawn anew:

- ``bootstrap``: as many slides as have labels are drawn from them, with replacement (Efron, Ann.
  Stat. 7, 1979). Slides are drawn, not tiles, because tiles of a slide are not independent.
- ``all``: labels are permuted over all labelled tiles, so that clusters tell nothing of them.
- ``within_slides``: labels are permuted among each slide's tiles, so that clusters tell nothing but
  which slide a tile is of.

All purities are kept, not only what they come to at one threshold: any can be asked for in SQL. The
table is valid for the labelled slides' clusters and labels that it was computed from; the catalog
takes it in only while it has the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import coo_array

from histoencoder_core.cohort.database import numbers_of_clusters
from histoencoder_core.cohort.query import attached
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.store import Stamp, Store, files
from histoencoder_core.store.stamp import read_stamp
from histoencoder_core.store.tables import read_table

ALGORITHM = 1

REPLICATES = 200

TABLE = "purity_replicates.parquet"

_SHUFFLED = 2**24
"""Labels that are held shuffled at a time, in all replicates together."""

Ints = npt.NDArray[np.int64]


def ensure_statistics(store: Store, *, replicates: int = REPLICATES, seed: int = 0) -> Stamp | None:
    """Compute the statistics of the published catalog's data, unless that is done already.

    The catalog takes them in when it is next brought up to date.

    Args:
        store: The store, with a catalog.
        replicates: How often data are drawn anew; a p-value is at least 1 / (1 + replicates).
        seed: Seed of all that is drawn.

    Returns:
        The stamp of the table; None if no tile has both a label and a cluster.

    Raises:
        StoreError: There is no catalog.
    """
    with files.locked_to_write(store.statistics):
        started = time.perf_counter()
        with attached(store) as connection:
            data = counted_fingerprint(connection)
            if data is None:
                return None
            stamp = Stamp.of(
                "statistics",
                algorithm=ALGORITHM,
                made_from={"data": data, "replicates": replicates, "seed": seed},
            )
            before = read_statistics(store)
            if before is not None and before.fingerprint == stamp.fingerprint:
                return before
            labelled = _read(connection)
        if not len(labelled.labels):
            return None
        rng = np.random.default_rng(seed)
        parts = [
            _rows(scheme, k, counts)
            for draw in (_bootstrap, _permuted, _permuted_within_slides)
            for scheme, k, counts in draw(labelled, replicates, rng)
        ]
        stamp = stamp.with_result(
            labelled_slides=labelled.slides,
            labelled_tiles=len(labelled.labels),
            seconds=round(time.perf_counter() - started, 3),
        )
        with files.atomic_path(store.statistics / TABLE) as temporary:
            pq.write_table(stamp.on_table(pa.concat_tables(parts)), temporary, compression="zstd")
        return stamp.just_made()


def read_statistics(store: Store) -> Stamp | None:
    """The stamp of the statistics that are there; None if there are none."""
    return read_stamp(store.statistics / TABLE)


def read_replicates(store: Store) -> pa.Table:
    """The table ``scheme, k, replicate, cluster, labelled_tiles, purity``.

    Raises:
        StoreError: It can't be read.
    """
    return read_table(store.statistics / TABLE)


def counted_fingerprint(connection: duckdb.DuckDBPyConnection) -> str | None:
    """Hash of the clusters and labels that count in a catalog; None if none do.

    Args:
        connection: To the catalog.
    """
    rows = connection.execute(
        "SELECT slide, counted FROM internal.sources WHERE counted IS NOT NULL ORDER BY slide"
    ).fetchall()
    return fingerprint(rows) if rows else None


@dataclass(frozen=True)
class _Labelled:
    """The labelled tiles that count, sorted by slide.

    Attributes:
        labels: int64 array of shape (tiles,): numbers of labels.
        n_labels: How many labels there are.
        starts: int64 array of shape (slides + 1,): where each slide's tiles begin.
        clusters: By K, an unsigned array of shape (tiles,): numbers of clusters.
    """

    labels: Ints
    n_labels: int
    starts: Ints
    clusters: dict[int, npt.NDArray[np.unsignedinteger[Any]]]

    @property
    def slides(self) -> int:
        return len(self.starts) - 1

    def cells(self, k: int, tiles: slice = slice(None)) -> Ints:
        """Numbers of tiles' cells in the table clusters × labels, but for their labels."""
        return self.clusters[k][tiles].astype(np.int64) * self.n_labels


_Drawn = Iterator[tuple[str, int, Ints]]
"""Scheme, K, and numbers of tiles: an int64 array of shape (replicates, K, labels)."""


def _read(connection: duckdb.DuckDBPyConnection) -> _Labelled:
    """Read the labelled tiles that count, in an order that is always the same."""
    ks = numbers_of_clusters(connection)
    columns = "".join(f", t.k{k}" for k in ks)
    known = "".join(f" AND t.k{k} IS NOT NULL" for k in ks)
    # Numbers take a fraction of the memory that names take.
    query = f"""
        WITH counted AS (
            SELECT slide, row_number() OVER (ORDER BY slide) - 1 AS number
            FROM internal.sources WHERE counted IS NOT NULL
        ),
        named AS (
            SELECT label, row_number() OVER (ORDER BY label) - 1 AS number
            FROM (SELECT DISTINCT label FROM tiles WHERE label IS NOT NULL)
        )
        SELECT s.number AS slide, n.number AS label{columns}
        FROM tiles AS t
        JOIN counted AS s ON s.slide = t.slide
        JOIN named AS n ON n.label = t.label
        WHERE true{known}
        ORDER BY s.number, t.tile
    """  # noqa: S608 - names of columns
    table = connection.sql(query).to_arrow_table()
    slides, labels = (table.column(name).to_numpy() for name in ("slide", "label"))
    starts = np.flatnonzero(np.diff(slides, prepend=-1, append=-1))
    clusters = {k: table.column(f"k{k}").to_numpy() for k in ks}
    return _Labelled(labels, int(labels.max(initial=0)) + 1, starts, clusters)


def _bootstrap(labelled: _Labelled, replicates: int, rng: np.random.Generator) -> _Drawn:
    """Draw slides with replacement; nothing from a single slide, which tells of no other."""
    if labelled.slides < 2:
        return
    same = np.full(labelled.slides, 1 / labelled.slides)
    weights = rng.multinomial(labelled.slides, same, size=replicates)
    slide = np.repeat(np.arange(labelled.slides), np.diff(labelled.starts))
    ones = np.ones(len(slide), np.int64)
    for k in labelled.clusters:
        cells = labelled.cells(k) + labelled.labels
        shape = (labelled.slides, k * labelled.n_labels)
        counts = coo_array((ones, (slide, cells)), shape=shape).tocsr()
        drawn = (counts.T @ weights.T).T
        yield "bootstrap", k, drawn.reshape(replicates, k, labelled.n_labels)


def _permuted(labelled: _Labelled, replicates: int, rng: np.random.Generator) -> _Drawn:
    """Permute labels over all tiles: counts are those of a random table with the same margins."""
    from scipy.stats import random_table  # takes a second to import

    by_label = np.bincount(labelled.labels, minlength=labelled.n_labels)
    for k, clusters in labelled.clusters.items():
        by_cluster = np.bincount(clusters, minlength=k)
        seen = np.flatnonzero(by_cluster)
        counts = np.zeros((replicates, k, labelled.n_labels), np.int64)
        if len(seen) > 1 and np.count_nonzero(by_label) > 1:
            tables = random_table(by_cluster[seen], by_label)
            counts[:, seen] = tables.rvs(size=replicates, random_state=rng)
        else:  # only one table has these margins, and SciPy gives others
            cells = np.bincount(labelled.cells(k) + labelled.labels, minlength=counts[0].size)
            counts += cells.reshape(counts[0].shape)
        yield "all", k, counts


def _permuted_within_slides(
    labelled: _Labelled, replicates: int, rng: np.random.Generator
) -> _Drawn:
    """Permute each slide's labels among its tiles, the same way for every K."""
    counts = {k: np.zeros((replicates, k * labelled.n_labels), np.int64) for k in labelled.clusters}
    for first, last in _parts(labelled.starts, _SHUFFLED // replicates):
        tiles = slice(labelled.starts[first], labelled.starts[last])
        shuffled = np.tile(labelled.labels[tiles].astype(np.uint16), (replicates, 1))
        for slide in range(first, last):
            own = slice(*(labelled.starts[slide : slide + 2] - labelled.starts[first]))
            # Where all labels are the same there is nothing to permute.
            if np.ptp(shuffled[0, own]):
                shuffled[:, own] = rng.permuted(shuffled[:, own], axis=1)
        for k, total in counts.items():
            cells = labelled.cells(k, tiles)
            for replicate in range(replicates):
                total[replicate] += np.bincount(
                    cells + shuffled[replicate], minlength=total.shape[1]
                )
    for k, total in counts.items():
        yield "within_slides", k, total.reshape(replicates, k, labelled.n_labels)


def _parts(starts: Ints, tiles: int) -> Iterator[tuple[int, int]]:
    """Runs of slides with about so many tiles, at least one slide each."""
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + tiles, "right")) - 1)
        yield first, last
        first = last


def _rows(scheme: str, k: int, counts: Ints) -> pa.Table:
    """Purities, by replicate and cluster, of all clusters that have a labelled tile at all.

    Args:
        scheme: How data were drawn.
        k: The number of clusters.
        counts: Tiles by replicate, cluster and label.
    """
    labelled = counts.sum(axis=2)
    seen = np.flatnonzero(labelled.any(axis=0))
    labelled, most = labelled[:, seen], counts[:, seen].max(axis=2)
    replicates = len(counts)
    none = (labelled == 0).ravel()
    purity = most.ravel() / np.maximum(labelled.ravel(), 1)
    return pa.table(
        {
            "scheme": pa.array([scheme] * none.size, pa.string()),
            "k": pa.array(np.full(none.size, k, np.int32)),
            "replicate": pa.array(np.repeat(np.arange(replicates, dtype=np.int32), len(seen))),
            "cluster": pa.array(np.tile(seen.astype(np.int32), replicates)),
            "labelled_tiles": pa.array(labelled.ravel().astype(np.int32)),
            "purity": pa.array(purity, mask=none),
        }
    )
