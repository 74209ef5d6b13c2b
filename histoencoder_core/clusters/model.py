"""A cluster model: the centroids of each K, as a version that stays readable.

One parquet file a version in ``<store>/_cohort/cluster_models/``; ``current.json`` names the one
that new slides are assigned with and is replaced in one step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import pairwise_distances_argmin

from histoencoder_core.errors import ClusterError
from histoencoder_core.settings import ClusterSettings
from histoencoder_core.store import Stamp, Store, files
from histoencoder_core.store.stamp import read_stamp
from histoencoder_core.store.tables import feature_list

VERSION_LENGTH = 12


@dataclass(frozen=True)
class ClusterModel:
    """k-means centroids for several K, fitted on the same features.

    Attributes:
        stamp: What it was fitted on: settings, and the fingerprints of the features it saw.
        centroids: By K, float32 array of shape (K, length).
        inertia: By K, the mean squared distance of a tile to its centroid.
    """

    stamp: Stamp
    centroids: dict[int, np.ndarray]
    inertia: dict[int, float] = field(default_factory=dict)

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

    def assign(self, features: np.ndarray) -> dict[int, np.ndarray]:
        """Find the nearest centroid of each tile.

        Args:
            features: float32 array of shape (tiles, length); a tile without features is NaN.

        Returns:
            By K, an int32 array of shape (tiles,); -1 where there are no features.
        """
        known = np.isfinite(features).all(axis=1)
        assigned = {}
        for k, centroids in self.centroids.items():
            nearest = np.full(len(features), -1, np.int32)
            if known.any():
                nearest[known] = pairwise_distances_argmin(features[known], centroids)
            assigned[k] = nearest
        return assigned


def save_model(store: Store, model: ClusterModel) -> None:
    """Write a model as a version and make it the current one."""
    stacked = np.concatenate(list(model.centroids.values()))
    ks = [k for k, centroids in model.centroids.items() for _ in centroids]
    table = pa.table(
        {
            "k": pa.array(ks, pa.int32()),
            "cluster": pa.array([c for k in model.centroids for c in range(k)], pa.int32()),
            "features": feature_list(stacked, "float32"),
        }
    )
    stamp = model.stamp.with_result(inertia={str(k): v for k, v in model.inertia.items()})
    path = store.cluster_models / f"{model.version}.parquet"
    with files.atomic_path(path) as temporary:
        pq.write_table(stamp.on_table(table), temporary, compression="zstd")
    files.write_json(store.cluster_models / "current.json", {"version": model.version})


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
        table = pq.read_table(path, columns=["k", "features"], partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise ClusterError(f"{path}: can't be read ({error}). {_remedy(store)}") from error
    ks = table.column("k").to_numpy()
    column = table.column("features").combine_chunks()
    features = np.asarray(column.values, np.float32).reshape(len(column), -1)
    centroids = {int(k): features[ks == k] for k in dict.fromkeys(ks.tolist())}
    inertia: dict[str, Any] = stamp.result.get("inertia", {})
    return ClusterModel(stamp, centroids, {int(k): float(v) for k, v in inertia.items()})


def model_versions(store: Store) -> list[str]:
    """All versions at hand, sorted by name."""
    return sorted(path.stem for path in store.cluster_models.glob("*.parquet"))


def _remedy(store: Store) -> str:
    known = ", ".join(model_versions(store)) or "none"
    return (
        f"Versions at hand: {known}. Fit a new model with `histoencoder cluster --refit`, or name "
        "one of these in current.json."
    )
