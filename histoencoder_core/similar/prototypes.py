"""The tiles that show a cluster best: those nearest to its centroid."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from histoencoder_core.errors import ClusterError
from histoencoder_core.store import Store
from histoencoder_core.store.tables import cluster_column, distance_column, read_table

MAX_FILES = 256
"""Slides that are looked at: enough to find tiles near each centroid, however large the cohort."""

SLIDE_SHARE = 0.25
"""Largest share of a cluster's prototypes that one slide gives, as far as others have some."""


@dataclass(frozen=True, order=True)
class Prototype:
    """A tile near its cluster's centroid.

    Attributes:
        distance: Euclidean distance to the centroid, in the cluster model's space.
        slide: The slide's id.
        tile: The tile's name.
    """

    distance: float
    slide: str
    tile: str


def prototypes(
    store: Store,
    version: str,
    k: int,
    *,
    clusters: Collection[int] | None = None,
    count: int = 8,
    slides: Sequence[str] | None = None,
    max_files: int = MAX_FILES,
) -> dict[int, list[Prototype]]:
    """Find the tiles nearest to the centroids of clusters.

    Distances are read from ``clusters.parquet``, where assigning wrote them, so no features are
    read. Tiles of one slide look alike: no slide gives more than a quarter of a cluster's
    prototypes, unless the others have too few.

    Args:
        store: The store.
        version: The cluster model that slides must have been assigned with; others are passed over.
        k: Number of clusters.
        clusters: The clusters; all if None.
        count: Tiles a cluster.
        slides: The slides to look at, the most promising first; by default slides taken evenly from
            all.
        max_files: Largest number of slides looked at.

    Returns:
        By cluster, in rising order, its prototypes, nearest first; fewer than `count`, or none,
        where the slides looked at have no more.

    Raises:
        ClusterError: None of the slides was assigned by this model into k clusters.
        StoreError: A slide's clusters can't be read.
    """
    wanted = sorted(set(range(k) if clusters is None else clusters))
    if slides is None:
        known = store.slide_ids()
        slides = known[:: max(1, math.ceil(len(known) / max_files))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [
            nearest
            for nearest in pool.map(
                lambda slide: _nearest(store, slide, version, k, wanted, count), slides[:max_files]
            )
            if nearest is not None
        ]
    if not found:
        raise ClusterError(
            f"{store.root}: no slide looked at was assigned to {k} clusters by cluster model "
            f"{version} of this program. Run `histoencoder cluster`, which tells how far each tile "
            "is from its cluster's centroid."
        )
    return {c: _several_slides([t for slide in found for t in slide[c]], count) for c in wanted}


def _nearest(
    store: Store, slide: str, version: str, k: int, wanted: Sequence[int], count: int
) -> dict[int, list[Prototype]] | None:
    """The tiles of one slide nearest to each centroid; None if another model assigned them."""
    folder = store.slide(slide)
    stamp = folder.stamp("clusters")
    if stamp is None or stamp.made_from["model"] != version:
        return None
    columns = ["tile", cluster_column(k), distance_column(k)]
    table = read_table(folder.record("clusters"))
    if not {*columns} <= {*table.column_names}:
        return None
    table = table.select(columns).drop_null()
    names = table.column("tile")
    assigned, distance = (table.column(name).to_numpy() for name in columns[1:])
    nearest = {}
    for cluster in wanted:
        rows = np.flatnonzero(assigned == cluster)
        rows = rows[np.argsort(distance[rows], kind="stable")[:count]]
        nearest[cluster] = [Prototype(float(distance[r]), slide, names[r].as_py()) for r in rows]
    return nearest


def _several_slides(candidates: list[Prototype], count: int) -> list[Prototype]:
    """The nearest candidates, of which no slide has more than its share if others have enough."""
    most = max(1, math.floor(SLIDE_SHARE * count))
    taken: dict[str, int] = {}
    first: list[Prototype] = []
    rest: list[Prototype] = []
    for tile in sorted(candidates):
        taken[tile.slide] = taken.get(tile.slide, 0) + 1
        (first if taken[tile.slide] <= most else rest).append(tile)
    return sorted([*first, *rest][:count])
