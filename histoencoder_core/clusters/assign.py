"""Assigning one slide's tiles to clusters: ``clusters.parquet`` and its picture."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from histoencoder_core.clusters.inputs import FeatureFile, feature_file
from histoencoder_core.clusters.model import Assigned, ClusterModel
from histoencoder_core.colours import cluster_colour
from histoencoder_core.errors import ClusterError
from histoencoder_core.overlay import Pixels, draw_tiles
from histoencoder_core.store import SlideFolder, Stamp, layout
from histoencoder_core.store.tables import cluster_column, distance_column, read_features

ALGORITHM = 2

OUTSIDE_PERCENTILE = 99
"""A tile lies outside of what a model saw if it is farther from its centroid than this percentage
of the tiles that the model was fitted on."""

PICTURE_K = 24
"""The picture shows the largest K up to this: more colours can't be told apart."""


def clusters_stamp(features: FeatureFile, model: ClusterModel) -> Stamp:
    """The stamp that a slide's clusters carry if this model assigns them."""
    return Stamp.of(
        "clusters",
        algorithm=ALGORITHM,
        made_from={"features": features.fingerprint, "model": model.version},
        untrained=features.untrained or model.untrained,
    ).with_result(model=model.version, encoder=features.encoder)


def assign_slide(folder: SlideFolder, model: ClusterModel) -> Stamp:
    """Assign a slide's tiles to the model's clusters, unless that is done already.

    Only this slide is touched: a new slide never renumbers the others.

    Args:
        folder: The slide's folder, with features.
        model: The cohort's model.

    Returns:
        The stamp of ``clusters.parquet``.

    Raises:
        ClusterError: The slide has no features, or they live in another space than the model.
        StoreError: Another program's files stand in the way.
    """
    with folder.locked():
        file = feature_file(folder)
        if file is None:
            raise ClusterError(f"{folder.path}: has no features; run `histoencoder extract` first.")
        stamp = clusters_stamp(file, model)
        if folder.fetch("clusters", stamp.fingerprint):
            folder.clear_failure("clusters")
            return folder.stamp("clusters") or stamp
        try:
            if file.space != model.space:
                raise ClusterError(
                    f"{file.path}: was made by {file.encoder}, but cluster model {model.version} "
                    f"was fitted on features of {model.stamp.result.get('encoder')}. Extract this "
                    "slide with that encoder, or fit a new model with `histoencoder cluster "
                    "--refit`."
                )
            return _assign(folder, file, model, stamp)
        except Exception as error:
            folder.record_failure("clusters", error, inputs=stamp.fingerprint)
            raise


def _assign(folder: SlideFolder, file: FeatureFile, model: ClusterModel, stamp: Stamp) -> Stamp:
    started = time.perf_counter()
    keys, features = read_features(file.path)
    assigned = model.assign(features)
    table = with_clusters(keys, assigned)
    version = pa.array([model.version] * keys.num_rows, pa.string()).dictionary_encode()
    table = table.append_column("model", version)
    shown = picture_k(assigned)
    stamp = stamp.with_result(
        tiles=keys.num_rows,
        n_clusters=sorted(assigned),
        picture_k=shown,
        **_outside(assigned, model),
        seconds=round(time.perf_counter() - started, 3),
    )
    with folder.writing("clusters") as writer:
        picture = draw_clusters(folder, keys, assigned[shown][0], untrained=stamp.untrained)
        if picture is not None:
            writer.image(layout.THUMBNAIL_CLUSTERS, picture, stamp)
        writer.table(table, stamp)
    return stamp.just_made()


def with_clusters(keys: pa.Table, assigned: Assigned) -> pa.Table:
    """Append each K's clusters and distances to the keys of tiles; null without features."""
    table = keys
    for k, (clusters, distances) in assigned.items():
        unknown = clusters < 0
        table = table.append_column(cluster_column(k), pa.array(clusters, mask=unknown))
        table = table.append_column(distance_column(k), pa.array(distances, mask=unknown))
    return table


def picture_k(assigned: Assigned) -> int:
    """The K whose clusters are shown in a picture."""
    return max((k for k in assigned if k <= PICTURE_K), default=min(assigned))


def _outside(assigned: Assigned, model: ClusterModel) -> dict[str, float | int | None]:
    """The share of the slide's tiles that lie outside of what the model saw, at its largest K.

    It is about 1 % on slides like those the model was fitted on. None if there are no tiles, or the
    model, of an earlier version of this program, does not tell distances.
    """
    k = max(assigned)
    distances = assigned[k][1][assigned[k][0] >= 0]
    share = None
    if k in model.distances and len(distances):
        share = float((distances > model.distances[k][OUTSIDE_PERCENTILE]).mean())
    return {"outside": share, "outside_k": k}


def draw_clusters(
    folder: SlideFolder, keys: pa.Table, clusters: npt.NDArray[np.int32], *, untrained: bool
) -> Pixels | None:
    """Lay the colours of clusters over the slide's thumbnail.

    Args:
        folder: The slide's folder.
        keys: Table of ``tile, x, y, w, h``.
        clusters: int32 array of shape (tiles,); -1 for a tile in no cluster.
        untrained: Write so into the picture.

    Returns:
        uint8 array of shape (height, width, 3); None if no tile has a place.
    """
    colours = [cluster_colour(cluster) if cluster >= 0 else None for cluster in clusters.tolist()]
    return draw_tiles(folder, keys, colours, untrained=untrained)
