"""Assigning one slide's tiles to clusters: ``clusters.parquet`` and its picture."""

from __future__ import annotations

import itertools
import time

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from histoencoder_core.clusters.inputs import FeatureFile, feature_file
from histoencoder_core.clusters.model import ClusterModel
from histoencoder_core.colours import cluster_colour
from histoencoder_core.errors import ClusterError
from histoencoder_core.slides import read_description
from histoencoder_core.slides.describe import THUMBNAIL_DIMENSION
from histoencoder_core.slides.images import read_image
from histoencoder_core.store import SlideFolder, Stamp, layout
from histoencoder_core.store.tables import cluster_column, read_features

Pixels = npt.NDArray[np.uint8]

_Placed = tuple[int, int, int, int, int]
"""A tile's x, y, w, h and cluster."""

ALGORITHM = 1

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
                f"{file.path}: was made by {file.encoder}, but cluster model {model.version} was "
                f"fitted on features of {model.stamp.result.get('encoder')}. Extract this slide "
                "with that encoder, or fit a new model with `histoencoder cluster --refit`."
            )
        return _assign(folder, file, model, stamp)
    except Exception as error:
        folder.record_failure("clusters", error, inputs=stamp.fingerprint)
        raise


def _assign(folder: SlideFolder, file: FeatureFile, model: ClusterModel, stamp: Stamp) -> Stamp:
    started = time.perf_counter()
    keys, features = read_features(file.path)
    assigned = model.assign(features)
    table = keys
    for k, clusters in assigned.items():
        column = pa.array(clusters, pa.int32(), mask=clusters < 0)
        table = table.append_column(cluster_column(k), column)
    version = pa.array([model.version] * keys.num_rows, pa.string()).dictionary_encode()
    table = table.append_column("model", version)
    shown = max((k for k in assigned if k <= PICTURE_K), default=min(assigned))
    stamp = stamp.with_result(
        tiles=keys.num_rows,
        n_clusters=sorted(assigned),
        picture_k=shown,
        seconds=round(time.perf_counter() - started, 3),
    )
    with folder.writing("clusters") as writer:
        picture = draw_clusters(folder, keys, assigned[shown], untrained=stamp.untrained)
        if picture is not None:
            writer.image(layout.THUMBNAIL_CLUSTERS, picture, stamp)
        writer.table(table, stamp)
    return stamp.just_made()


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
    placed = _placed(keys, clusters)
    if not placed:
        return None
    canvas, scale = _canvas(folder, placed)
    overlay = canvas.copy()
    step_x, step_y = (_step(placed, axis) for axis in (0, 1))
    for x, y, w, h, cluster in placed:
        # Neighbours overlap: each colours only the part that lies nearest to its centre.
        centre_x, centre_y = x + w / 2, y + h / 2
        half_w, half_h = min(step_x, w) / 2, min(step_y, h) / 2
        left, top = round((centre_x - half_w) * scale), round((centre_y - half_h) * scale)
        right, bottom = round((centre_x + half_w) * scale), round((centre_y + half_h) * scale)
        # OpenCV colours the last corner too, which is the next tile's first.
        last = (max(left, right - 1), max(top, bottom - 1))
        cv2.rectangle(overlay, (left, top), last, cluster_colour(cluster), -1)
    picture = np.asarray(cv2.addWeighted(canvas, 0.5, overlay, 0.5, 0), np.uint8)
    if untrained:
        size = max(0.6, picture.shape[1] / 900)
        at = (10, round(30 * size))
        cv2.putText(
            picture, "UNTRAINED ENCODER", at, cv2.FONT_HERSHEY_SIMPLEX, size, (200, 0, 0), 2
        )
    return picture


def _placed(keys: pa.Table, clusters: npt.NDArray[np.int32]) -> list[_Placed]:
    """The tiles that have both a place and a cluster."""
    columns = [keys.column(name).to_pylist() for name in "xywh"]
    rows = zip(*columns, clusters.tolist(), strict=True)
    return [row for row in rows if None not in row and row[-1] >= 0]


def _canvas(folder: SlideFolder, placed: list[_Placed]) -> tuple[Pixels, float]:
    """The slide's thumbnail, or white where there is none, and its pixels a level-0 pixel."""
    slide = read_description(folder)
    if slide is not None:
        thumbnail = read_image(folder.file(layout.THUMBNAIL)).copy()
        return thumbnail, thumbnail.shape[1] / slide.width
    width, height = (max(row[i] + row[i + 2] for row in placed) for i in (0, 1))
    scale = min(1.0, THUMBNAIL_DIMENSION / max(width, height))
    shape = (max(1, round(height * scale)), max(1, round(width * scale)), 3)
    return np.full(shape, 255, np.uint8), scale


def _step(placed: list[_Placed], axis: int) -> int:
    """The grid's step along an axis: the smallest distance of two tiles."""
    values = sorted({row[axis] for row in placed})
    gaps = [b - a for a, b in itertools.pairwise(values)]
    return min(gaps, default=placed[0][axis + 2])
