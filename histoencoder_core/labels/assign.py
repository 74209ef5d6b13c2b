"""One label a tile: ``labels.parquet`` and its picture."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from histoencoder_core.colours import label_colours
from histoencoder_core.errors import LabelError
from histoencoder_core.labels.annotations import Annotation, Annotations
from histoencoder_core.labels.coverage import read_tissue, shares, tissue_fingerprint
from histoencoder_core.overlay import draw_tiles
from histoencoder_core.settings import LabelSettings
from histoencoder_core.slides import read_description
from histoencoder_core.store import SlideFolder, Stamp, layout
from histoencoder_core.tiles import TileSource

ALGORITHM = 2

_ROUNDING = 1e-9
"""Error of an exact area, so that half a tile is half of it."""


def labels_stamp(
    folder: SlideFolder, source: TileSource, annotation: Annotation, settings: LabelSettings
) -> Stamp:
    """The stamp that a slide's labels carry if made from this annotation on these tiles."""
    made_from: dict[str, Any] = {
        "tiles": grid_fingerprint(source),
        "annotation": annotation.content,
    }
    if annotation.has_areas:  # else nothing is measured
        made_from |= {"min_share": settings.min_share, "tissue": tissue_fingerprint(folder)}
    return Stamp.of("labels", algorithm=ALGORITHM, made_from=made_from)


def grid_fingerprint(source: TileSource) -> str:
    """Hash of a slide's tile names and places: all of its tiles that bears on labels."""
    return hashlib.sha256(json.dumps(source.keys.to_pydict()).encode()).hexdigest()


def why_due(
    folder: SlideFolder,
    source: TileSource,
    annotations: Annotations,
    settings: LabelSettings | None = None,
) -> str | None:
    """Why a slide's labels, which there are, are out of date; None if they are not.

    An annotation is read only if its files, or rows, changed since the labels were made.

    Args:
        folder: The slide's folder, with labels of ours.
        source: Its tiles.
        annotations: What there is. Where no folder is known, any annotation in one will do.
        settings: Labels made otherwise are out of date; if None, any will do.

    Raises:
        LabelError: The annotation can't be read.
    """
    stamp = folder.stamp("labels")
    assert stamp is not None
    before = stamp.made_from
    if stamp.algorithm != ALGORITHM:
        return "made with another version of the algorithm"
    if before["tiles"] != grid_fingerprint(source):
        return "the tiles have changed"
    signature = annotations.signature(folder.slide_id)
    all_known = annotations.folder is not None or stamp.result.get("source") == layout.TILES_CSV
    if all_known and stamp.result.get("seen") != {"signature": signature}:
        annotation = annotations.of(folder.slide_id)
        if annotation is None:
            return "the annotation is gone"
        if annotation.content != before["annotation"]:
            return "the annotation has changed"
    if "min_share" in before:
        if before["tissue"] != tissue_fingerprint(folder):
            return "the tissue has changed"
        if settings is not None and before["min_share"] != settings.min_share:
            return f"made with min_share = {before['min_share']:g}"
    return None


def label_annotated(
    folder: SlideFolder, source: TileSource, annotations: Annotations, settings: LabelSettings
) -> Stamp | None:
    """Label a slide's tiles from all that is said of it, unless that is done already.

    Args:
        folder: The slide's folder in the store.
        source: Its tiles.
        annotations: What there is.
        settings: How much of a tile's tissue a class must cover.

    Returns:
        The stamp of ``labels.parquet``; None if nothing is said.

    Raises:
        LabelError: The annotation can't be read or used. The failure is recorded.
        StoreError: Another program's files stand in the way.
    """
    try:
        annotation = annotations.of(folder.slide_id)
    except LabelError as error:
        signature = annotations.signature(folder.slide_id)
        with folder.locked():
            folder.record_failure("labels", error, inputs=signature)
        raise
    return None if annotation is None else label_slide(folder, source, annotation, settings)


def label_slide(
    folder: SlideFolder, source: TileSource, annotation: Annotation, settings: LabelSettings
) -> Stamp:
    """Label a slide's tiles, unless that is done already.

    What is said of a tile wins over what is drawn, and that over what is said of the whole slide.

    Args:
        folder: The slide's folder in the store.
        source: Its tiles.
        annotation: What people say of the slide.
        settings: How much of a tile's tissue a class must cover.

    Returns:
        The stamp of ``labels.parquet``.

    Raises:
        LabelError: The annotation meets none of the slide's tiles, or its mask can't be used.
        StoreError: Another program's files stand in the way.
    """
    with folder.locked():
        stamp = labels_stamp(folder, source, annotation, settings)
        if folder.fetch("labels", stamp.fingerprint):
            folder.clear_failure("labels")
            return folder.stamp("labels") or stamp
        try:
            stamp = _label(folder, source.keys, annotation, settings, stamp)
        except Exception as error:
            folder.record_failure("labels", error, inputs=stamp.fingerprint)
            raise
    return stamp.just_made()


def _label(
    folder: SlideFolder,
    keys: pa.Table,
    annotation: Annotation,
    settings: LabelSettings,
    stamp: Stamp,
) -> Stamp:
    told = _by_slide(keys, annotation)
    told |= _by_area(folder, keys, annotation, settings)
    by_tile, unmet = _by_tile(keys, annotation)
    told |= by_tile
    if not told and keys.num_rows:
        raise LabelError(
            f"{annotation.source}: labels none of the {keys.num_rows} tiles of {folder.slide_id}. "
            "Coordinates must be level-0 pixels; those of a CSV must be tiles' top left corners, "
            "and names those of tiles, as in metadata.parquet."
        )
    rows = range(keys.num_rows)
    labels = [told[i].label if i in told else None for i in rows]
    counts = Counter(label for label in labels if label is not None)
    stamp = stamp.with_result(
        tiles=len(labels),
        labelled=len(told),
        labels=dict(sorted(counts.items())),
        by=dict(sorted(Counter(it.by for it in told.values()).items())),
        rule=_rule(stamp) if annotation.has_areas else None,
        rows_without_tile=unmet or None,
        source=annotation.source,
        note=annotation.note,
        seen={"signature": annotation.signature},
    )
    table = keys.append_column("label", pa.array(labels, pa.string()))
    covered = [told[i].share if i in told else None for i in rows]
    table = table.append_column("share", pa.array(covered, pa.float32()))
    colours = label_colours(counts)
    picture = draw_tiles(
        folder,
        keys,
        [None if label is None else colours[label] for label in labels],
        legend=colours,
    )
    with folder.writing("labels") as writer:
        if picture is not None:
            writer.image(layout.THUMBNAIL_LABELS, picture, stamp)
        writer.table(table, stamp)
    return stamp


class _Told(NamedTuple):
    """A tile's label, the share of its tissue that it covers, and what it was told by."""

    label: str
    share: float
    by: str


def _by_slide(keys: pa.Table, annotation: Annotation) -> dict[int, _Told]:
    if annotation.slide_label is None:
        return {}
    return dict.fromkeys(range(keys.num_rows), _Told(annotation.slide_label, 1.0, "slide"))


def _by_area(
    folder: SlideFolder, keys: pa.Table, annotation: Annotation, settings: LabelSettings
) -> dict[int, _Told]:
    columns = [keys.column(name).to_pylist() for name in "xywh"]
    places = {i: p for i, p in enumerate(zip(*columns, strict=True)) if None not in p}
    if not places or not annotation.has_areas:
        return {}
    slide = read_description(folder)
    classes, covered = shares(
        np.array(list(places.values()), np.int64),
        annotation.polygons,
        annotation.mask,
        tissue=read_tissue(folder),
        slide_size=None if slide is None else (slide.width, slide.height),
    )
    most = covered.argmax(axis=1)  # of equals, the first in alphabetical order
    return {
        i: _Told(classes[best], float(covered[row, best]), "area")
        for row, (i, best) in enumerate(zip(places, most, strict=True))
        if covered[row, best] >= settings.min_share - _ROUNDING
    }


def _by_tile(keys: pa.Table, annotation: Annotation) -> tuple[dict[int, _Told], int]:
    """What is said of tiles by name or corner, and how many of these rows meet no tile."""
    names, xs, ys = (keys.column(name).to_pylist() for name in ("tile", "x", "y"))
    found = {}
    met = 0
    for i, (name, x, y) in enumerate(zip(names, xs, ys, strict=True)):
        by_corner, by_name = annotation.points.get((x, y)), annotation.names.get(name)
        label = by_name or by_corner
        met += (by_corner is not None) + (by_name is not None)
        if label is not None:
            found[i] = _Told(label, 1.0, "tile")
    return found, len(annotation.points) + len(annotation.names) - met


def _rule(stamp: Stamp) -> str:
    """The rule by which areas become labels, in words."""
    of = "tissue" if stamp.made_from["tissue"] is not None else "area, as its tissue is not known"
    return (
        f"the class that covers at least {100 * stamp.made_from['min_share']:g} % of a tile's {of}"
    )
