"""A cluster model: the centroids of each K, as a version that stays readable.

One parquet file a version in ``<store>/_cohort/cluster_models/``; ``current.json`` names the one
that new slides are assigned with and is replaced in one step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from histoencoder_core.clusters.inputs import FeatureFile
from histoencoder_core.clusters.transform import AS_THEY_ARE, Transform, Whitening
from histoencoder_core.errors import ClusterError
from histoencoder_core.settings import ClusterSettings
from histoencoder_core.store import Stamp, Store, files
from histoencoder_core.store.stamp import read_stamp
from histoencoder_core.store.tables import feature_list

ALGORITHM = 2
"""Of the fit."""

VERSION_LENGTH = 12

NUMBERED_AFTER = "numbered_after"
"""In `Stamp.made_from`: the version whose numbers the clusters were given, if any."""

STRUCK = "struck_off"
"""In `Stamp.made_from`: number of slides it was fitted on whose names were taken off it."""

MATCH_FIELDS = (
    pa.field("previous_cluster", pa.int32()),
    pa.field("moved", pa.float64()),
    pa.field("moved_relative", pa.float64()),
    pa.field("same", pa.bool_()),
)

_KEY_FIELDS = (pa.field("k", pa.int32()), pa.field("cluster", pa.int32()))
_NO_MATCHES = pa.schema([*_KEY_FIELDS, *MATCH_FIELDS]).empty_table()

Floats = npt.NDArray[np.float32]
Assigned = dict[int, tuple[npt.NDArray[np.int32], Floats]]
"""By K, each tile's cluster and its distance to that cluster's centroid."""


@dataclass(frozen=True)
class ClusterModel:
    """k-means centroids for several K, fitted on the same features.

    Attributes:
        stamp: What it was fitted on: settings, and the fingerprints of the features it saw.
        centroids: By K, float32 array of shape (K, length) in the transformed space.
        inertia: By K, the mean squared distance of a tile to its centroid.
        distances: By K, float32 array of shape (101,): the quantiles at 0, 1, …, 100 % of the
            tiles' distances to their centroids, of all tiles it was fitted on. Empty in models of
            earlier versions of this program.
        transform: What is done to features before they are compared with the centroids.
        matches: Which cluster of the model before became which: a table of ``k, cluster,
            previous_cluster``; ``moved``, the distance between their centroids; ``moved_relative``,
            that distance in parts of the one from the former centroid to the nearest other;
            ``same``, whether that is less than a half. Empty if there was no model to match.
    """

    stamp: Stamp
    centroids: dict[int, Floats]
    inertia: dict[int, float] = field(default_factory=dict)
    distances: dict[int, Floats] = field(default_factory=dict)
    transform: Transform = AS_THEY_ARE
    matches: pa.Table = field(default_factory=lambda: _NO_MATCHES)

    @property
    def version(self) -> str:
        """The model's name: the first digits of its fingerprint."""
        return self.stamp.fingerprint[:VERSION_LENGTH]

    @property
    def space(self) -> str:
        """The space of features it can assign."""
        return str(self.stamp.made_from["space"])

    @property
    def untrained(self) -> bool:
        """Whether random weights made the features it was fitted on."""
        return self.stamp.untrained

    @property
    def settings(self) -> ClusterSettings:
        """What it was fitted with."""
        return ClusterSettings(**self.stamp.made_from["settings"])

    def assign(self, features: Floats) -> Assigned:
        """Find the nearest centroid of each tile.

        Args:
            features: float32 array of shape (tiles, length); a tile without features is NaN.

        Returns:
            By K, an int32 array of shape (tiles,) of clusters and a float32 array of shape (tiles,)
            of Euclidean distances in the transformed space; -1 and NaN where there are no features.
        """
        import torch  # takes seconds, and most who read a model assign nothing

        from histoencoder_core.clusters.engine import Centroids, computing

        known = np.isfinite(features).all(axis=1)
        points = {k: torch.from_numpy(v).double() for k, v in self.centroids.items()}
        with computing() as engine:
            rows = torch.from_numpy(features[known])
            found = engine.find(rows, Centroids(points, engine.device), self.transform)
        assigned: Assigned = {}
        for k in self.centroids:
            clusters = np.full(len(features), -1, np.int32)
            distance = np.full(len(features), np.nan, np.float32)
            clusters[known] = found.clusters[k].numpy()
            distance[known] = found.squared[k].sqrt().numpy()
            assigned[k] = clusters, distance
        return assigned


def model_stamp(inputs: list[FeatureFile], settings: ClusterSettings) -> Stamp:
    """The stamp of a model fitted on these features, its clusters numbered after no other's."""
    return Stamp.of(
        "cluster_model",
        algorithm=ALGORITHM,
        made_from={
            "space": inputs[0].space,
            "settings": settings.model_dump(mode="json", exclude_defaults=True),
            "features": {file.slide: file.fingerprint for file in inputs},
        },
        untrained=any(file.untrained for file in inputs),
    ).with_result(encoder=inputs[0].encoder)


def save_model(store: Store, model: ClusterModel) -> None:
    """Write a model as a version and make it the current one."""
    rows = [(k, cluster) for k in model.centroids for cluster in range(k)]
    parts = list(model.centroids.values())
    result: dict[str, Any] = {
        "inertia": {str(k): v for k, v in model.inertia.items()},
        "distances": {str(k): v.tolist() for k, v in model.distances.items()},
    }
    if (whitening := model.transform.whitening) is not None:
        # Its matrix is as wide as the centroids are long: its rows, then the offset, follow them.
        parts += [whitening.matrix, whitening.offset[None]]
        result["mean"] = whitening.mean.tolist()
    stacked = np.concatenate(parts)
    ks, clusters = zip(*rows, *[(None, None)] * (len(stacked) - len(rows)), strict=True)
    table = pa.table([pa.array(ks), pa.array(clusters)], schema=pa.schema(_KEY_FIELDS))
    table = table.append_column("features", feature_list(stacked, "float32"))
    if len(model.matches):
        found = {(row["k"], row["cluster"]): row for row in model.matches.to_pylist()}
        for column in MATCH_FIELDS:
            values = [found.get(key, {}).get(column.name) for key in zip(ks, clusters, strict=True)]
            table = table.append_column(column, pa.array(values, column.type))
    stamp = model.stamp.with_result(**result)
    path = store.cluster_models / f"{model.version}.parquet"
    with files.atomic_path(path) as temporary:
        pq.write_table(stamp.on_table(table), temporary, compression="zstd")
    make_current(store, model.version)


def make_current(store: Store, version: str) -> None:
    """Name the version that slides are assigned with, unless it is named already."""
    path, content = store.cluster_models / "current.json", {"version": version}
    with contextlib.suppress(FileNotFoundError, ValueError):
        if files.read_json(path) == content:
            return
    files.write_json(path, content)


def current_model(store: Store) -> ClusterModel | None:
    """The model that slides are assigned with; None before the first was fitted.

    Raises:
        ClusterError: The current model is named but its file is missing or damaged.
    """
    path = store.cluster_models / "current.json"
    try:
        version = str(files.read_json(path)["version"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"{path}: is damaged. {_remedy(store)}") from error
    return load_model(store, version)


def load_model(store: Store, version: str) -> ClusterModel:
    """Read a version.

    Raises:
        ClusterError: There is no such version, or its file is damaged.
    """
    path = store.cluster_models / f"{version}.parquet"
    stamp = read_stamp(path)
    if stamp is None:
        raise ClusterError(f"{path}: is missing or damaged. {_remedy(store)}")
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise ClusterError(f"{path}: can't be read ({error}). {_remedy(store)}") from error
    column = table.column("features").combine_chunks()
    features = np.array(column.values, np.float32).reshape(len(column), -1)
    ks = table.column("k").to_pylist()
    known = sum(k is not None for k in ks)
    places = {k: [i for i in range(known) if ks[i] == k] for k in dict.fromkeys(ks[:known])}
    settings = ClusterSettings(**stamp.made_from["settings"])
    told: dict[str, Any] = stamp.result
    whitening = None
    if known < len(features):
        mean = np.array(told["mean"], np.float32)
        whitening = Whitening(features[known:-1], features[-1], mean)
    return ClusterModel(
        stamp,
        centroids={k: features[rows] for k, rows in places.items()},
        inertia={int(k): float(v) for k, v in told.get("inertia", {}).items()},
        distances={int(k): np.array(v, np.float32) for k, v in told.get("distances", {}).items()},
        transform=Transform(settings.normalise, whitening),
        matches=_matches(table),
    )


def _matches(table: pa.Table) -> pa.Table:
    if "previous_cluster" not in table.column_names:
        return _NO_MATCHES
    matched = table.filter(table.column("previous_cluster").is_valid())
    return matched.select(_NO_MATCHES.column_names).replace_schema_metadata()


def find_version(store: Store, stamp: Stamp) -> str | None:
    """The version that was fitted on the same features with the same settings, if there is one.

    Args:
        store: The store.
        stamp: Of a model whose clusters are numbered after no other's. How a version's clusters
            are numbered does not count.
    """
    for version in model_versions(store):
        known = read_stamp(store.cluster_models / f"{version}.parquet")
        if known is None or known.algorithm != stamp.algorithm:
            continue
        if {**known.made_from, NUMBERED_AFTER: None} == {**stamp.made_from, NUMBERED_AFTER: None}:
            return version
    return None


def model_versions(store: Store) -> list[str]:
    """All versions at hand, sorted by name."""
    return sorted(path.stem for path in store.cluster_models.glob("*.parquet"))


def models_of(store: Store, slides: Collection[str]) -> list[Path]:
    """The files of all versions that name one of some slides among those they were fitted on."""
    paths = (store.cluster_models / f"{version}.parquet" for version in model_versions(store))
    stamps = {path: read_stamp(path) for path in paths}
    return [
        path
        for path, stamp in stamps.items()
        if stamp is not None and not set(slides).isdisjoint(stamp.made_from["features"])
    ]


def strike_slides(path: Path, slides: Collection[str]) -> None:
    """Take slides off the list of those that a version was fitted on.

    Its centroids, to which they have contributed, and its name stay. It counts the slides that were
    struck off, so that it is never taken for a model that was fitted without them.

    Args:
        path: The version's file.
        slides: Ids of the slides.
    """
    with files.locked_to_write(path.parent):
        stamp = read_stamp(path)
        assert stamp is not None
        seen = stamp.made_from["features"]
        kept = {name: print_ for name, print_ in seen.items() if name not in slides}
        struck = stamp.made_from.get(STRUCK, 0) + len(seen) - len(kept)
        told = stamp.model_copy(
            update={"made_from": {**stamp.made_from, "features": kept, STRUCK: struck}}
        )
        table = pq.read_table(path, partitioning=None)
        with files.atomic_path(path) as temporary:
            pq.write_table(told.on_table(table), temporary, compression="zstd")


def _remedy(store: Store) -> str:
    known = ", ".join(model_versions(store)) or "none"
    return (
        f"Versions at hand: {known}. Fit a new model with `histoencoder cluster --refit`, or name "
        "one of these in current.json."
    )
