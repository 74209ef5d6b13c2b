"""Reading annotations as QuPath writes them: GeoJSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapely
from shapely.geometry import shape

from histoencoder_core.errors import LabelError

_NAMED_BY_CLASS = {"annotation", "PathAnnotationObject", "unknown"}
"""Kinds of objects whose own name, where they have no class, is meant as one. A core of a tissue
microarray is named for its place."""


@dataclass(frozen=True)
class Regions:
    """The classified regions of one file.

    Attributes:
        polygons: ``(label, geometry)`` in level-0 pixels; a geometry is a polygon, with or without
            holes, or several.
        passed_over: How many regions each of QuPath's special classes has.
    """

    polygons: list[tuple[str, shapely.Geometry]]
    passed_over: dict[str, int]


def read_geojson(path: Path) -> Regions:
    """Read classified regions as QuPath exports them.

    Objects may be nested in one another (``childObjects``), as QuPath writes a hierarchy. A
    Feature's label is the name of its classification; an annotation without one is labelled by its
    own name. Features without either, and geometries without an area, are passed over; so are cells
    apart from their outline (``nucleusGeometry``), cores that are missing, and classes whose name
    ends with an asterisk: QuPath keeps those, such as ``Ignore*`` and ``Region*``, for what is not
    to be classified.

    Args:
        path: A FeatureCollection, a Feature, or a list of Features.

    Returns:
        The regions.

    Raises:
        LabelError: The file is no GeoJSON, or no Feature in it has a label and an area.
    """
    polygons: list[tuple[str, shapely.Geometry]] = []
    special: Counter[str] = Counter()
    features = 0
    try:
        for feature in _flat(_features(json.loads(path.read_text("utf-8")))):
            features += 1
            if feature["geometry"] is None:  # the root of a hierarchy is nowhere
                continue
            geometry = shape(feature["geometry"])
            label = _class_name(feature)
            if label is None:
                continue
            area = polygonal(shapely.make_valid(geometry))
            if area.is_empty:
                continue
            if label.endswith("*"):
                special[label] += 1
            else:
                polygons.append((label, area))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LabelError(
            f"{path}: can't be read as GeoJSON ({type(error).__name__}: {error}). Export the "
            "annotations from QuPath again, as a FeatureCollection."
        ) from error
    except shapely.errors.ShapelyError as error:
        raise LabelError(f"{path}: holds a geometry that can't be used ({error}).") from error
    if not polygons:
        passed_over = f" ({', '.join(sorted(special))} are passed over)" if special else ""
        raise LabelError(
            f"{path}: none of its {features} features has both an area and a class{passed_over}. "
            "Give the annotations a classification in QuPath, or remove the file."
        )
    return Regions(polygons, dict(special))


def _features(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, list):
        return content
    if content["type"] == "Feature":
        return [content]
    if content["type"] == "FeatureCollection":
        return list(content["features"])
    raise ValueError(f"its type is {content['type']!r}")


def _flat(features: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Features, each followed by those nested in it."""
    for feature in features:
        yield feature
        properties = feature.get("properties") or {}
        # QuPath writes the first name and reads either.
        yield from _flat(properties.get("childObjects") or properties.get("children") or [])


def _class_name(feature: dict[str, Any]) -> str | None:
    properties = feature.get("properties") or {}
    if properties.get("isMissing"):
        return None
    classification = properties.get("classification")
    kind = properties.get("objectType", "unknown")
    if isinstance(classification, dict):
        name = classification.get("name") or ": ".join(classification.get("names") or [])
    else:
        name = classification or (properties.get("name") if kind in _NAMED_BY_CLASS else None)
    return str(name).strip() or None if name else None


def polygonal(geometry: shapely.Geometry) -> shapely.Geometry:
    """What of a valid geometry has an area; an empty one if nothing has."""
    if geometry.geom_type in {"Polygon", "MultiPolygon"}:
        return geometry
    parts = [geometry]
    while any(part.geom_type == "GeometryCollection" for part in parts):
        parts = list(shapely.get_parts(parts))
    return shapely.union_all([part for part in parts if shapely.get_dimensions(part) == 2])
