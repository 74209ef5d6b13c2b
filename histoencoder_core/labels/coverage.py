"""How much of each tile's tissue a class covers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import shapely

from histoencoder_core.decoding.images import read_image
from histoencoder_core.errors import LabelError
from histoencoder_core.labels.geojson import polygonal
from histoencoder_core.labels.masks import OUTSIDE, RULES, Mask, MaskReader, open_mask
from histoencoder_core.store import SlideFolder, layout

POINTS = 32
"""Sample points along each side of a tile."""

_NO_TISSUE, _NO_CLASS = -1, -2
"""Beside the numbers of classes: background, and what nobody labelled."""

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Geometries = npt.NDArray[np.object_]

_LISTED = 12
"""Most values that a message lists."""

_FEW_TILES, _FEW_POINTS = 8, 200
"""An area of more tiles and corners is divided first."""

_STEPS = (np.arange(POINTS) + 0.5) / POINTS


@dataclass(frozen=True)
class Tissue:
    """Where a slide's tissue is, as the stage ``tiles`` found it.

    Attributes:
        mask: Boolean array of shape (height, width) over the whole slide.
        fingerprint: Of the tiles it was found with.
    """

    mask: Bools
    fingerprint: str

    def at(self, xs: Floats, ys: Floats) -> Bools:
        """Whether there is tissue at a grid of points.

        Args:
            xs: Places from left to right, 0 being the slide's left and 1 its right border.
            ys: The same from top to bottom.

        Returns:
            Boolean array of shape (ys, xs); there is none outside of the slide.
        """
        height, width = self.mask.shape
        within = ((ys >= 0) & (ys < 1))[:, None] & ((xs >= 0) & (xs < 1))
        rows = np.clip(np.floor(ys * height).astype(int), 0, height - 1)
        columns = np.clip(np.floor(xs * width).astype(int), 0, width - 1)
        return np.asarray(self.mask[np.ix_(rows, columns)] & within)


def tissue_fingerprint(folder: SlideFolder) -> str | None:
    """What `read_tissue` would give is known by; None if it would give nothing."""
    stamp = folder.stamp("tiles")
    there = folder.file(layout.THUMBNAIL_TISSUE).exists() and folder.stamp("slides") is not None
    return stamp.fingerprint if stamp is not None and there else None


def read_tissue(folder: SlideFolder) -> Tissue | None:
    """Where a slide's tissue is; None if its tiles were made by another program."""
    fingerprint = tissue_fingerprint(folder)
    if fingerprint is None:
        return None
    picture = read_image(folder.file(layout.THUMBNAIL_TISSUE))
    return Tissue(picture[..., 0] < 128, fingerprint)  # tissue is black


def shares(
    places: Ints,
    polygons: Sequence[tuple[str, shapely.Geometry]],
    mask: Mask | None,
    *,
    tissue: Tissue | None,
    slide_size: tuple[int, int] | None,
) -> tuple[list[str], Floats]:
    """The share of each tile's tissue that each class covers.

    What a polygon covers within another of a different class is taken from the outer one, as QuPath
    nests annotations. Apart from that, classes may overlap, and polygons and mask are taken
    together.

    A tile that no outline runs through is decided as a whole. Where all of a tile counts, its share
    is that of exact areas. Else the tissue, and what of it is covered, are looked up at `POINTS` ×
    `POINTS` points spread evenly over the tile.

    Args:
        places: Array of shape (tiles, 4), ``x, y, w, h`` in level-0 pixels.
        polygons: ``(label, geometry)`` in level-0 pixels.
        mask: The slide's mask. Its background is no tissue.
        tissue: Where tissue is. Where that is not known, and in a tile without any, all counts.
        slide_size: Width and height of the slide in level-0 pixels; None if not known.

    Returns:
        The classes in alphabetical order, and an array of shape (tiles, classes).

    Raises:
        LabelError: The mask can't be used.
    """
    areas = _areas(polygons)
    classes = sorted({*areas, *(mask.values.labels.values() if mask is not None else ())})
    found, pieces = _exact(places, [areas.get(label) for label in classes])
    if slide_size is None:
        if mask is None:
            return classes, found
        raise LabelError(
            f"{mask.path}: can't be laid over the slide, whose size is not known: its tiles were "
            "made by another program. Run `histoencoder tile` on the slide itself, or bring its "
            "labels as GeoJSON or CSV."
        )
    opened = contextlib.nullcontext() if mask is None else open_mask(mask.path, slide_size)
    with opened as reader:
        values = None
        if mask is not None and reader is not None:
            values = _MaskClasses(mask, reader, classes)
        cut = sorted({row for row, _ in pieces}) if tissue is not None else []
        for row in cut if values is None else range(len(places)):
            x, y, w, h = places[row]
            xs, ys = x + w * _STEPS, y + h * _STEPS
            where = xs / slide_size[0], ys / slide_size[1]
            counted = np.ones((POINTS, POINTS), bool) if tissue is None else tissue.at(*where)
            if not counted.any():
                counted[:] = True
            drawn = None if values is None else values.at(*where)
            if drawn is None and counted.all():
                continue
            if drawn is not None:
                counted &= drawn != _NO_TISSUE
            for column in range(len(classes)):
                covered = np.full((POINTS, POINTS), found[row, column] == 1)
                if (row, column) in pieces:
                    covered = shapely.contains_xy(pieces[row, column], *np.meshgrid(xs, ys))
                if drawn is not None:
                    covered |= drawn == column
                found[row, column] = covered[counted].mean() if counted.any() else 0
        if values is not None:
            values.refuse_unknown()
    return classes, found


def _areas(polygons: Sequence[tuple[str, shapely.Geometry]]) -> dict[str, shapely.Geometry]:
    """All that each class covers, less what lies in it of another class."""
    labels = np.array([label for label, _ in polygons], object)
    geometries = np.array([geometry for _, geometry in polygons], object)
    # Only frames are compared first: most outlines meet none of another class.
    inner, outer = shapely.STRtree(geometries).query(geometries)
    smaller = shapely.area(geometries[inner]) < shapely.area(geometries[outer])
    other = (labels[inner] != labels[outer]) & smaller
    inner, outer = inner[other], outer[other]
    shapely.prepare(geometries[outer])
    within = shapely.covers(geometries[outer], geometries[inner])
    bare = geometries.copy()
    for o in np.unique(outer[within]):
        nested = geometries[inner[within & (outer == o)]]
        bare[o] = shapely.difference(geometries[o], shapely.union_all(nested))
    return {label: shapely.union_all(bare[labels == label]) for label in set(labels)}


def _exact(
    places: Ints, areas: Sequence[shapely.Geometry | None]
) -> tuple[Floats, dict[tuple[int, int], shapely.Geometry]]:
    """The shares of whole tiles, and what is covered of each tile that an outline runs through."""
    x, y, w, h = places.astype(float).T
    boxes = shapely.box(x, y, x + w, y + h)
    found = np.zeros((len(places), len(areas)))
    pieces: dict[tuple[int, int], shapely.Geometry] = {}
    for column, area in enumerate(areas):
        for near, rows in _divided(area, boxes, np.arange(len(boxes))):
            shapely.prepare(near)
            whole = shapely.covers(near, boxes[rows])
            found[rows[whole], column] = 1
            cut = rows[shapely.intersects(near, boxes[rows]) & ~whole]
            for row, part in zip(cut, shapely.intersection(boxes[cut], near), strict=True):
                pieces[int(row), column] = polygonal(part)
                found[row, column] = part.area / boxes[row].area
    return found, pieces


def _divided(
    area: shapely.Geometry | None, boxes: Geometries, rows: Ints
) -> Iterator[tuple[shapely.Geometry, Ints]]:
    """Cut an area into parts near to a few tiles each, as every tile is laid over all of its part.

    Yields:
        A part, and the numbers of its tiles; tiles that the area does not meet may be left out.
    """
    if area is None or area.is_empty:
        return
    if len(rows) <= _FEW_TILES or shapely.get_num_coordinates(area) <= _FEW_POINTS:
        yield area, rows
        return
    bounds = shapely.bounds(boxes[rows])
    axis = int(np.ptp(bounds[:, :2], axis=0).argmax())
    for half in np.array_split(rows[np.argsort(bounds[:, axis], kind="stable")], 2):
        around = shapely.box(*shapely.total_bounds(boxes[half]))
        yield from _divided(polygonal(shapely.intersection(area, around)), boxes, half)


@dataclass
class _MaskClasses:
    """A mask whose values are told as numbers of classes."""

    mask: Mask
    reader: MaskReader
    classes: list[str]
    seen: set[int] = field(default_factory=set)

    def at(self, xs: Floats, ys: Floats) -> Ints:
        """Numbers of classes at a grid of points; see `MaskReader.read`."""
        told = self.mask.values
        values, places = np.unique(self.reader.read(xs, ys), return_inverse=True)
        self.seen.update(values.tolist())
        numbers = [
            self.classes.index(told.labels[value])
            if value in told.labels
            else (_NO_TISSUE if value == OUTSIDE or value in told.background else _NO_CLASS)
            for value in values.tolist()
        ]
        return np.array(numbers, np.int64)[places].reshape(len(ys), len(xs))

    def refuse_unknown(self) -> None:
        """Make sure that the meaning of all values that were met is known."""
        told = self.mask.values
        known = {*told.labels, *told.background, *told.unlabelled, OUTSIDE}
        if unknown := sorted(self.seen - known):
            found = sorted(self.seen - {OUTSIDE})
            raise LabelError(
                f"{self.mask.path}: what its {_listed(unknown)} mean is not told; found were "
                f"{_listed(found)}. Add them to labels, background or unlabelled in {RULES}. If "
                "nobody drew them, the image was scaled with smoothing: save it without."
            )


def _listed(values: list[int]) -> str:
    more = ", …" if len(values) > _LISTED else ""
    return f"values {', '.join(map(str, values[:_LISTED]))}{more}"
