"""The clusters and labels of a cohort as its files tell them, to check the catalog against."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from histoencoder_core.clusters import (
    ClusterModel,
    clusters_stamp,
    current_model,
    feature_file,
    save_model,
)
from histoencoder_core.cohort.query import attached
from histoencoder_core.store import Stamp, Store
from histoencoder_core.store.tables import (
    cluster_column,
    feature_list,
    key_table,
    read_keys,
    tile_name,
)

COHORT_K = (4, 8, 16)
"""Numbers of clusters of the fixture `cohort_store`."""

Clustering = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Truth:
    """All tiles of a cohort, in arrays of shape (tiles,).

    Attributes:
        slides: Ids of their slides.
        labels: Their labels; "" where there is none.
        clusters: By K, their clusters.
    """

    slides: np.ndarray
    labels: np.ndarray
    clusters: dict[int, np.ndarray]

    def labelled(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slides, clusters and labels of the labelled tiles."""
        known = self.labels != ""
        return self.slides[known], self.clusters[k][known], self.labels[known]


def truth_of(store: Store) -> Truth:
    """Read the cohort's files, tile by tile."""
    model = current_model(store)
    assert model is not None
    slides, labels, clusters = [], [], {k: [] for k in model.centroids}
    for slide_id in store.slide_ids():
        folder = store.slide(slide_id)
        said: dict[str, str] = {}
        if folder.record("labels").exists():
            rows = pq.read_table(folder.record("labels"))
            said = {r["tile"]: r["label"] for r in rows.to_pylist() if r["label"] is not None}
        for row in pq.read_table(folder.record("clusters")).to_pylist():
            slides.append(slide_id)
            labels.append(said.get(row["tile"], ""))
            for k, numbers in clusters.items():
                numbers.append(row[f"n_clusters={k}"])
    arrays = {k: np.array(numbers) for k, numbers in clusters.items()}
    return Truth(np.array(slides), np.array(labels), arrays)


def copy_of(store: Store, place: Path) -> Store:
    """A copy that a test may change."""
    shutil.copytree(store.root, place)
    return Store(place)


def tables_of(store: Store, *, but: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """All rows of all tables and views of a published catalog, sorted."""
    with attached(store) as connection:
        names = connection.sql(
            "SELECT table_schema || '.' || table_name FROM information_schema.tables ORDER BY ALL"
        ).fetchall()
        found = {}
        for (name,) in names:
            if name not in but:
                columns = "* EXCLUDE (bytes)" if name == "internal.state" else "*"
                rows = connection.sql(f"SELECT {columns} FROM {name}").fetchall()
                found[name] = sorted(rows, key=repr)
        return found


def write_cohort_of(
    store: Store, kinds: dict[str, np.ndarray], clusters: dict[int, Clustering]
) -> None:
    """Write slides whose tiles have known labels and clusters.

    Args:
        store: Where.
        kinds: By slide, numbers that become labels; -1 for none.
        clusters: By K, what gives the clusters of tiles of these kinds.
    """
    for slide_id, numbers in kinds.items():
        places = [(512 * i, 0, 512, 512) for i in range(len(numbers))]
        keys = key_table([tile_name(*place) for place in places], list(places))
        stamp = Stamp.of("features", algorithm=1, made_from={"tiles": slide_id, "encoder": {}})
        features = np.zeros((len(numbers), 2), np.float32)
        with store.slide(slide_id).writing("features") as writer:
            table = keys.append_column("features", feature_list(features, "float32"))
            writer.table(table, stamp.with_result(space="s", encoder="e"))
    made_from = {"space": "s", "settings": {"n_clusters": sorted(clusters)}, "features": {}}
    stamp = Stamp.of("cluster_model", algorithm=1, made_from=made_from)
    stamp = stamp.with_result(encoder="e", slides=len(kinds), tiles=0)
    model = ClusterModel(stamp, {k: np.zeros((k, 2), np.float32) for k in sorted(clusters)})
    save_model(store, model)
    for slide_id, numbers in kinds.items():
        folder = store.slide(slide_id)
        file = feature_file(folder)
        assert file is not None
        keys = read_keys(file.path)
        table = keys.append_column("model", pa.array([model.version] * keys.num_rows))
        for k, of in sorted(clusters.items()):
            table = table.append_column(cluster_column(k), pa.array(of(numbers), pa.int32()))
        with folder.writing("clusters") as writer:
            writer.table(table, clusters_stamp(file, model))
        labels = [None if kind < 0 else "abc"[kind] for kind in numbers.tolist()]
        table = keys.append_column("label", pa.array(labels, pa.string()))
        table = table.append_column("share", pa.array([1.0] * keys.num_rows, pa.float32()))
        with folder.writing("labels") as writer:
            said = {"annotation": labels}
            writer.table(table, Stamp.of("labels", algorithm=1, made_from=said))
