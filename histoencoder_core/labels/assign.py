"""One label a tile: ``labels.parquet``."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa
import shapely

from histoencoder_core.errors import LabelError
from histoencoder_core.labels.annotations import Annotation
from histoencoder_core.store import SlideFolder, Stamp
from histoencoder_core.tiles import TileSource

ALGORITHM = 1

MIN_SHARE = 0.5
"""A tile's label is the class that covers at least this share of its area, else it has none."""


def labels_stamp(source: TileSource, annotation: Annotation) -> Stamp:
    """The stamp that a slide's labels carry if made from this annotation on these tiles."""
    return Stamp.of(
        "labels",
        algorithm=ALGORITHM,
        made_from={
            "tiles": grid_fingerprint(source),
            "annotation": annotation.content,
            "min_share": MIN_SHARE,
        },
    )


def grid_fingerprint(source: TileSource) -> str:
    """Hash of a slide's tile names and places: all of its tiles that bears on labels."""
    return hashlib.sha256(json.dumps(source.keys.to_pydict()).encode()).hexdigest()


def label_slide(folder: SlideFolder, source: TileSource, annotation: Annotation) -> Stamp:
    """Label a slide's tiles, unless that is done already.

    Args:
        folder: The slide's folder in the store.
        source: Its tiles.
        annotation: What people say of the slide. A label named for a tile wins over polygons.

    Returns:
        The stamp of ``labels.parquet``.

    Raises:
        LabelError: The annotation meets none of the slide's tiles.
        StoreError: Another program's files stand in the way.
    """
    stamp = labels_stamp(source, annotation)
    if folder.fetch("labels", stamp.fingerprint):
        folder.clear_failure("labels")
        return folder.stamp("labels") or stamp
    try:
        labels, shares = _labels(source.keys, annotation)
        labelled = sum(label is not None for label in labels)
        if not labelled and source.keys.num_rows:
            raise LabelError(
                f"{annotation.source}: labels none of the {source.keys.num_rows} tiles of "
                f"{folder.slide_id}. Coordinates must be level-0 pixels; those of a CSV must be "
                "tiles' top left corners as in metadata.parquet."
            )
        counts = {name: labels.count(name) for name in sorted({x for x in labels if x})}
        stamp = stamp.with_result(
            tiles=len(labels), labelled=labelled, labels=counts, source=annotation.source
        )
        table = source.keys.append_column("label", pa.array(labels, pa.string()))
        table = table.append_column("share", pa.array(shares, pa.float32()))
        with folder.writing("labels") as writer:
            writer.table(table, stamp)
    except Exception as error:
        folder.record_failure("labels", error, inputs=stamp.fingerprint)
        raise
    return stamp.just_made()


def _labels(keys: pa.Table, annotation: Annotation) -> tuple[list[str | None], list[float | None]]:
    names, xs, ys, ws, hs = (keys.column(n).to_pylist() for n in ("tile", "x", "y", "w", "h"))
    placed = [i for i, place in enumerate(zip(xs, ys, ws, hs, strict=True)) if None not in place]
    boxes = shapely.box(
        *(np.array([float(column[i]) for i in placed]) for column in (xs, ys)),
        np.array([float(xs[i] + ws[i]) for i in placed]),
        np.array([float(ys[i] + hs[i]) for i in placed]),
    )
    labels: list[str | None] = [None] * len(names)
    shares: list[float | None] = [None] * len(names)
    by_class: dict[str, list[shapely.Geometry]] = {}
    for label, geometry in annotation.polygons:
        by_class.setdefault(label, []).append(geometry)
    best = np.zeros(len(placed))
    for label in sorted(by_class):
        # Polygons of one class may overlap; their union counts an area once.
        area = shapely.unary_union(by_class[label])
        shapely.prepare(area)
        covered = shapely.area(shapely.intersection(boxes, area)) / shapely.area(boxes)
        for j in np.flatnonzero((covered >= MIN_SHARE) & (covered > best)):
            labels[placed[j]], shares[placed[j]] = label, float(covered[j])
            best[j] = covered[j]
    for i, (name, x, y) in enumerate(zip(names, xs, ys, strict=True)):
        said = annotation.names.get(name) or annotation.points.get((x, y))
        if said is not None:
            labels[i], shares[i] = said, 1.0
    return labels, shares
