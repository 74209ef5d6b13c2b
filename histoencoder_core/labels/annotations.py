"""Finding and reading annotations: GeoJSON, CSV, and the labels of ``tiles.csv``."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import shapely
from shapely.geometry import shape

from histoencoder_core.errors import LabelError
from histoencoder_core.slides.register import Register, plain_id
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

    A slide is named by its id, its relative path, its file name or that without the suffix. Where
    two slides have the same name, it stands for the one that has it as its id, else for the one
    that has it as its path.

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
    wanted = list(slides)
    found: dict[str, list[Path | str]] = {}
    in_tiles_csv = read_tiles_csv(store)
    in_folder = _by_slide(folder, _names(store, folder, wanted))
    for slide_id in wanted:
        sources: list[Path | str] = [*in_folder.get(slide_id, [])]
        if any(row.label for row in in_tiles_csv.get(slide_id, [])):
            sources.append(store.tiles_csv)
        if sources:
            found[slide_id] = sources
    return found


def unmatched_annotations(store: Store, folder: Path | None, slides: Iterable[str]) -> list[str]:
    """Annotations that no slide takes, most likely for a slip in a name.

    Args:
        store: The store.
        folder: Folder of annotations.
        slides: Ids of slides that annotations may be for, beside those that the store has a folder
            for or has registered.

    Returns:
        For people: GeoJSON files, and slides named in CSV files, with their files.

    Raises:
        LabelError: A CSV file can't be read.
        StoreError: ``tiles.csv`` can't be read.
    """
    names = _names(store, folder, slides)
    return [
        f"{path}: {name}" if _is_csv(path) else str(path)
        for path, told in _named_in(folder, names)
        for name in told
        if name not in names
    ]


def find_annotation(store: Store, folder: Path | None, slide_id: str) -> Annotation | None:
    """Read all that is said of a slide; None if nothing is.

    Raises:
        LabelError: A file can't be read, or says nothing that can be used.
        StoreError: ``tiles.csv`` can't be read.
    """
    sources: list[Path] = []
    polygons: list[tuple[str, shapely.Geometry]] = []
    points: dict[tuple[int, int], str] = {}
    names: dict[str, str] = {}
    slide_names = _names(store, folder, [slide_id])
    for source in _by_slide(folder, slide_names).get(slide_id, []):
        sources.append(source)
        if not _is_csv(source):
            polygons += read_geojson(source)
            continue
        for name, told in _csv_points(source).items():
            if slide_names.get(name) == slide_id:
                points |= told
    for row in read_tiles_csv(store).get(slide_id, []):
        if row.label is not None:
            names[row.tile] = row.label
    if names:
        sources.append(store.tiles_csv)
    if not sources:
        return None
    said = {
        "polygons": [[label, shapely.to_wkt(geometry)] for label, geometry in polygons],
        "points": sorted([x, y, label] for (x, y), label in points.items()),
        "names": names,
    }
    content = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    told_by = ", ".join(source.name for source in sources)
    return Annotation(told_by, content, polygons, points, names)


def _names(store: Store, folder: Path | None, slides: Iterable[str]) -> dict[str, str]:
    """The slide that each name stands for, over all slides that are known."""
    if folder is None:
        return {}
    registered = {slide_id: entry.relative for slide_id, entry in Register(store).entries().items()}
    ids = {*slides, *registered, *store.slide_ids(), *read_tiles_csv(store)}
    names = {slide_id: slide_id for slide_id in ids}
    for slide_id, relative in registered.items():
        names.setdefault(relative, slide_id)
    for slide_id, relative in registered.items():
        path = PurePosixPath(relative)
        if slide_id == plain_id(Path(relative)):
            names.setdefault(path.name, slide_id)
            names.setdefault(path.stem, slide_id)
    return names


def _by_slide(folder: Path | None, names: Mapping[str, str]) -> dict[str, list[Path]]:
    """The files of a folder of annotations, by the slides that they are of."""
    found: dict[str, list[Path]] = {}
    for path, told in _named_in(folder, names):
        for slide_id in dict.fromkeys(names[name] for name in told if name in names):
            found.setdefault(slide_id, []).append(path)
    return found


def _named_in(folder: Path | None, names: Iterable[str]) -> Iterator[tuple[Path, list[str]]]:
    """The files of a folder of annotations, each with the names of slides it gives.

    Args:
        folder: The folder.
        names: Known names; one that is a path is looked for in the folder's sub-folders.
    """
    if folder is None or not folder.is_dir():
        return
    entries = _visible(folder)
    inner = {entry.name for entry in entries if entry.is_dir()}
    parents = {PurePosixPath(name).parent for name in names if "/" in name} if inner else set()
    for path in entries:
        if path.suffix.lower() in _GEOJSON and path.is_file():
            yield path, [path.stem]
    for parent in sorted(p for p in parents if p.parts and p.parts[0] in inner):
        for path in _visible(folder / parent) if (folder / parent).is_dir() else []:
            if path.suffix.lower() in _GEOJSON and path.is_file():
                yield path, [(parent / path.stem).as_posix()]
    for path in entries:
        if _is_csv(path) and path.is_file():
            yield path, list(_csv_points(path))


def _visible(folder: Path) -> list[Path]:
    """A folder's entries, less hidden ones, such as those that macOS puts beside each file."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


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


def _csv_points(path: Path) -> dict[str, dict[tuple[int, int], str]]:
    """Labels by the slide's name and the tile's corner."""
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
