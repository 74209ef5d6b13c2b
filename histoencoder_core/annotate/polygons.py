"""From labelled tiles to polygons: which part of the slide a tile speaks for, and merging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry.polygon import orient

Boxes = npt.NDArray[np.int64]


def own_parts(places: Boxes, size: tuple[int, int] | None = None) -> Boxes:
    """The part of the slide that each tile speaks for, such that no two overlap.

    Two tiles that overlap are cut half way between their centres, along the axis that parts them
    more. A tile at an edge owns no more than the others do: tiles are kept by the share of tissue
    in them, so on average the tissue ends at the middle of the outermost ones, and a grid's parts,
    each one step wide, add up to its area.

    Args:
        places: int64 array of shape (tiles, 4), ``x, y, w, h`` in level-0 pixels.
        size: Width and height of the slide; parts beyond it are cut off.

    Returns:
        int64 array of shape (tiles, 4), ``left, top, right, bottom`` in level-0 pixels; without an
        area for a tile that owns nothing, such as one at the place of another.
    """
    boxes = np.concatenate([places[:, :2], places[:, :2] + places[:, 2:]], axis=1)
    parts = _cut_half_way(boxes)
    for axis in (0, 1):
        _trim(parts, boxes, axis)
    _, first = np.unique(places, axis=0, return_index=True)
    again = np.setdiff1d(np.arange(len(places)), first)
    parts[again, 2:] = parts[again, :2]
    return parts if size is None else np.clip(parts, 0, [*size, *size])


def merge(parts: Boxes) -> shapely.Geometry:
    """Join boxes into valid polygons with holes, whole coordinates and as few corners as possible.

    Args:
        parts: int64 array of shape (boxes, 4), ``left, top, right, bottom``, each with an area.

    Returns:
        A Polygon or MultiPolygon, the same for the same boxes in any order.
    """
    joined = shapely.union_all(shapely.box(*parts.T))
    # A normalised ring begins in a corner, so that every point on a straight line can go.
    return shapely.simplify(shapely.normalize(joined), 0)


def as_geojson(geometry: shapely.Geometry) -> dict[str, Any]:
    """A geometry of `merge` in GeoJSON: whole numbers, closed rings, by the right-hand rule."""
    polygons = [[_ring(ring) for ring in _rings(part)] for part in shapely.get_parts(geometry)]
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


def _rings(polygon: shapely.Polygon) -> Iterator[shapely.LinearRing]:
    turned = orient(polygon)
    yield turned.exterior
    yield from turned.interiors


def _ring(ring: shapely.LinearRing) -> list[list[int]]:
    corners: list[list[int]] = shapely.get_coordinates(ring).astype(np.int64).tolist()
    return corners


def _cut_half_way(boxes: Boxes) -> Boxes:
    """Cut each two boxes that overlap: those of a pair end on either side of one line."""
    extent, centre = boxes[:, 2:] - boxes[:, :2], boxes[:, :2] + boxes[:, 2:]  # twice the centre
    drawn = shapely.box(*boxes.T)
    one, other = shapely.STRtree(drawn).query(drawn, predicate="intersects")
    apart, reach = np.abs(centre[one] - centre[other]), extent[one] + extent[other]
    # Boxes that only touch need no cut, and of equal ones the first owns all.
    cut = (one < other) & (apart < reach).all(axis=1) & (apart > 0).any(axis=1)
    one, other, axis = one[cut], other[cut], (apart / reach)[cut].argmax(axis=1)
    line = (centre[one, axis] + centre[other, axis]) // 4
    ahead = centre[one, axis] <= centre[other, axis]
    first, second = np.where(ahead, one, other), np.where(ahead, other, one)
    parts = boxes.copy()
    np.minimum.at(parts, (first, axis + 2), line)
    np.maximum.at(parts, (second, axis), line)
    return parts


def _trim(parts: Boxes, boxes: Boxes, axis: int) -> None:
    """Make no part wider around its tile's centre than those between two others usually are."""
    low, high = parts[:, axis], parts[:, axis + 2]
    start, end = boxes[:, axis], boxes[:, axis + 2]
    between = (high - low)[(low > start) & (high < end)]
    if len(between):
        usual = np.minimum(int(np.median(between)), end - start)
        left = start + (end - start - usual) // 2
        np.maximum(low, left, out=low)
        np.minimum(high, left + usual, out=high)
