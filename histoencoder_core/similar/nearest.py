"""The tiles of a cohort that are most like one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from histoencoder_core.clusters import ClusterModel, current_model, feature_files
from histoencoder_core.errors import ClusterError
from histoencoder_core.similar.exact import measured, search
from histoencoder_core.similar.index import tile_index
from histoencoder_core.similar.query import QueryTile
from histoencoder_core.store import SlideFolder, Store
from histoencoder_core.store.layout import Stage
from histoencoder_core.store.tables import (
    TILE_FIELDS,
    cluster_column,
    read_keys,
    read_table,
)

log = logging.getLogger(__name__)

EXACT_TILES = 1_000_000
"""Tiles up to which each is looked at; beyond, an index tells which are worth it."""

CANDIDATES = 4
"""Tiles that the index is asked for, to one that is wanted: it knows distances only roughly."""


def similar_tiles(
    store: Store,
    query: QueryTile,
    *,
    count: int = 24,
    other_slides: bool = False,
    exact_tiles: int = EXACT_TILES,
    tell: Callable[[str], None] = log.info,
) -> pa.Table:
    """Find the tiles nearest to one by cosine distance, over all slides.

    Up to `exact_tiles` tiles, each is looked at. Beyond, an index names the most promising ones,
    whose exact distances are then taken; a few of the nearest may be missed.

    Args:
        store: The store.
        query: The tile, from `find_tile`.
        count: Number of tiles.
        other_slides: Leave out the query's own slide, where its overlapping neighbours are.
        exact_tiles: Largest number of tiles of which each is looked at.
        tell: Is told when an index has to be made, which takes minutes for millions of tiles.

    Returns:
        Table of ``rank`` (int32, from 1), ``slide``, ``tile, x, y, w, h``, ``distance`` (float32,
        0 for the same direction and 2 for the opposite), ``label`` (null where there is none) and,
        if there is a cluster model, ``n_clusters=K`` for its largest K. The query is not in it.

    Raises:
        ClusterError: The store's features can't be compared with each other.
        SettingsError: There are more than `exact_tiles` tiles, and the index library is not
            installed.
    """
    files = feature_files(store)
    if query.file not in files:
        raise ClusterError(f"{query.file.path}: has changed meanwhile; look for the tile again.")
    own = files.index(query.file)
    if sum(file.tiles for file in files) <= exact_tiles:
        if other_slides:
            del files[own]
        [found] = search(files, query.direction[None], count + 1)
    else:
        index = tile_index(store, files, tell=tell)
        but = own if other_slides else None
        candidates = index.candidates(query.direction, CANDIDATES * count + 1, but=but)
        found = measured(files, candidates, query.direction, count + 1)
    rows = [
        (files[number].slide, row, distance)
        for number, row, distance in zip(
            found.file.tolist(), found.row.tolist(), found.distance.tolist(), strict=True
        )
    ]
    rows = [row for row in rows if row[:2] != (query.file.slide, query.row)][:count]
    return _table(store, rows)


def _table(store: Store, rows: list[tuple[str, int, float]]) -> pa.Table:
    """The result: slides, rows of their features and distances, with what is known of the tiles."""
    slides = [slide for slide, *_ in rows]
    keys = {slide: read_keys(store.slide(slide).record("features")) for slide in set(slides)}
    tiles = [keys[slide].slice(row, 1) for slide, row, _ in rows]
    place = pa.concat_tables([pa.schema(TILE_FIELDS).empty_table(), *tiles]).to_pydict()
    columns = {
        "rank": pa.array(range(1, len(rows) + 1), pa.int32()),
        "slide": pa.array(slides, pa.string()),
        **{field.name: pa.array(place[field.name], field.type) for field in TILE_FIELDS},
        "distance": pa.array([distance for *_, distance in rows], pa.float32()),
    }
    named = list(zip(slides, place["tile"], strict=True))
    labels = _values(store, slides, "labels", "label")
    columns["label"] = pa.array([labels.get(name) for name in named], pa.string())
    model = current_model(store)
    if model is not None:
        column = cluster_column(max(model.centroids))
        assigned = [slide for slide in slides if _assigned_by(store.slide(slide), model)]
        clusters = _values(store, assigned, "clusters", column)
        columns[column] = pa.array([clusters.get(name) for name in named], pa.int32())
    return pa.table(columns)


def _assigned_by(folder: SlideFolder, model: ClusterModel) -> bool:
    stamp = folder.stamp("clusters")
    return stamp is not None and stamp.made_from["model"] == model.version


def _values(
    store: Store, slides: Iterable[str], stage: Stage, column: str
) -> dict[tuple[str, str], Any]:
    """A column of the slides' records, as far as they have one, by slide and tile."""
    values: dict[tuple[str, str], Any] = {}
    for slide in sorted(set(slides)):
        folder = store.slide(slide)
        if folder.stamp(stage) is not None:
            table = read_table(folder.record(stage), ["tile", column])
            told = zip(
                *(table.column(name).to_pylist() for name in table.column_names), strict=True
            )
            values |= {(slide, tile): value for tile, value in told}
    return values
