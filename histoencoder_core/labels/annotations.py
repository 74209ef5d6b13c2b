"""Finding and reading annotations: GeoJSON, CSV, and the labels of ``tiles.csv``."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapely
from shapely.geometry import shape

from histoencoder_core.errors import LabelError
from histoencoder_core.store import Store
from histoencoder_core.tiles.source import read_tiles_csv

_GEOJSON = (".geojson", ".json")


@dataclass(frozen=True)
class Annotation:
    """What people say of one slide.

    Attributes:
        source: Where it is said, for people.
        content: Fingerprint of what is said.
        polygons: ``(label, geometry)`` in level-0 pixels.
        points: Labels by a tile's top left corner ``(x, y)`` in level-0 pixels.
        names: Labels by a tile's name.
    """

    source: str
    content: str
    polygons: list[tuple[str, shapely.Geometry]] = field(default_factory=list)
    points: dict[tuple[int, int], str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def find_annotations(
    store: Store, folder: Path | None, slides: Iterable[str]
) -> dict[str, list[Path | str]]:
    """Which slides are annotated, and by what, without reading the polygons.

    Args:
        store: The store, whose ``tiles.csv`` may hold labels.
        folder: Folder of ``<slide>.geojson`` and of CSV files with columns ``slide, x, y, label``.
        slides: Ids of the slides to look for.

    Returns:
        Sources by slide; a slide without any is left out.

    Raises:
        LabelError: A CSV file can't be read.
        StoreError: ``tiles.csv`` can't be read.
    """
    found: dict[str, list[Path | str]] = {}
    in_tiles_csv = read_tiles_csv(store)
    in_csv = _slides_in_csv(folder)
    for slide_id in slides:
        sources: list[Path | str] = []
        if folder is not None:
            paths = (folder / f"{slide_id}{suffix}" for suffix in _GEOJSON)
            sources += [path for path in paths if path.is_file()]
        sources += in_csv.get(slide_id, [])
        if any(row.label for row in in_tiles_csv.get(slide_id, [])):
            sources.append(store.tiles_csv)
        if sources:
            found[slide_id] = sources
    return found


def find_annotation(store: Store, folder: Path | None, slide_id: str) -> Annotation | None:
    """Read all that is said of a slide; None if nothing is.

    Raises:
        LabelError: A file can't be read, or says nothing that can be used.
        StoreError: ``tiles.csv`` can't be read.
    """
    sources = find_annotations(store, folder, [slide_id]).get(slide_id)
    if sources is None:
        return None
    polygons: list[tuple[str, shapely.Geometry]] = []
    points: dict[tuple[int, int], str] = {}
    names: dict[str, str] = {}
    for source in map(Path, sources):
        if source == store.tiles_csv:
            rows = read_tiles_csv(store)[slide_id]
            names |= {row.tile: row.label for row in rows if row.label is not None}
        elif source.suffix.lower() == ".csv":
            points |= _csv_points(source)[slide_id]
        else:
            polygons += read_geojson(source)
    said = {
        "polygons": [[label, shapely.to_wkt(geometry)] for label, geometry in polygons],
        "points": sorted([x, y, label] for (x, y), label in points.items()),
        "names": names,
    }
    content = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    told = ", ".join(Path(source).name for source in sources)
    return Annotation(told, content, polygons, points, names)


def read_geojson(path: Path) -> list[tuple[str, shapely.Geometry]]:
    """Read classified polygons as QuPath exports them.

    Args:
        path: A FeatureCollection, a Feature, or a list of Features. A Feature's label is the name
            of its classification, else its own name. Features without either, and geometries
            without an area, are passed over.

    Returns:
        ``(label, geometry)`` in level-0 pixels; polygons may have holes and several parts.

    Raises:
        LabelError: The file is no GeoJSON, or no Feature in it has a label and an area.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        features = _features(content)
        found = []
        for feature in features:
            if feature["geometry"] is None:  # GeoJSON allows a Feature that is nowhere
                continue
            label = _class_name(feature.get("properties") or {})
            geometry = shapely.make_valid(shape(feature["geometry"]))
            if label is not None and geometry.area > 0:
                found.append((label, geometry))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LabelError(
            f"{path}: can't be read as GeoJSON ({type(error).__name__}: {error}). Export the "
            "annotations from QuPath again, as a FeatureCollection."
        ) from error
    except shapely.errors.ShapelyError as error:
        raise LabelError(f"{path}: holds a geometry that can't be used ({error}).") from error
    if not found:
        raise LabelError(
            f"{path}: none of its {len(features)} features has both an area and a class. Give the "
            "annotations a classification in QuPath, or remove the file."
        )
    return found


def _features(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, list):
        return content
    if content["type"] == "Feature":
        return [content]
    if content["type"] == "FeatureCollection":
        return list(content["features"])
    raise ValueError(f"its type is {content['type']!r}")


def _class_name(properties: dict[str, Any]) -> str | None:
    classification = properties.get("classification")
    if isinstance(classification, dict):
        name = classification.get("name") or ": ".join(classification.get("names") or [])
    else:
        name = classification or properties.get("name")
    return str(name).strip() or None if name else None


def _slides_in_csv(folder: Path | None) -> dict[str, list[Path | str]]:
    found: dict[str, list[Path | str]] = {}
    if folder is None or not folder.is_dir():
        return found
    for path in sorted(folder.glob("*.csv")):
        for slide_id in _csv_points(path):
            found.setdefault(slide_id, []).append(path)
    return found


def _csv_points(path: Path) -> dict[str, dict[tuple[int, int], str]]:
    """Labels by slide and tile corner."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = {"slide", "x", "y", "label"} - set(reader.fieldnames or [])
            if missing:
                raise LabelError(
                    f"{path}: needs the columns slide, x, y, label; missing: "
                    f"{', '.join(sorted(missing))}."
                )
            points: dict[str, dict[tuple[int, int], str]] = {}
            for line in reader:
                number = reader.line_num
                slide_id, label = (line["slide"] or "").strip(), (line["label"] or "").strip()
                try:
                    corner = int(line["x"]), int(line["y"])
                except (TypeError, ValueError) as error:
                    raise LabelError(
                        f"{path}, line {number}: x and y must be a tile's top left corner in whole "
                        f"level-0 pixels ({error})."
                    ) from error
                if not slide_id or not label:
                    raise LabelError(f"{path}, line {number}: slide or label is empty.")
                points.setdefault(slide_id, {})[corner] = label
            return points
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{path}: can't be read ({error}).") from error
