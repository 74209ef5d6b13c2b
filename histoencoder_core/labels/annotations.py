"""Finding what people say of slides: GeoJSON, masks, CSV, and the labels of ``tiles.csv``."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import shapely

from histoencoder_core.errors import LabelError
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.labels.geojson import read_geojson
from histoencoder_core.labels.masks import RULES, Mask, MaskRule, MaskValues, read_rules
from histoencoder_core.labels.tables import Told, index_table, read_table
from histoencoder_core.slides import read_description
from histoencoder_core.slides.content import content_fingerprint
from histoencoder_core.slides.register import Register, plain_id
from histoencoder_core.store import Store
from histoencoder_core.tiles.source import read_tiles_csv

_GEOJSON = (".geojson", ".json")
_MASKS = (".png", ".tif", ".tiff")
_MASK_ENDING = "_mask"
"""What PANDA's masks have after the slide's name."""


@dataclass(frozen=True)
class Annotation:
    """What people say of one slide.

    Attributes:
        source: Where it is said, for people.
        content: Fingerprint of what is said.
        polygons: ``(label, geometry)`` in level-0 pixels.
        mask: An image of classes.
        points: Labels by a tile's top left corner ``(x, y)`` in level-0 pixels.
        names: Labels by a tile's name.
        slide_label: The label of all tiles of which nothing else is said.
        note: What was passed over, for people.
        signature: `Annotations.signature` at the time.
    """

    source: str
    content: str
    polygons: list[tuple[str, shapely.Geometry]] = field(default_factory=list)
    mask: Mask | None = None
    points: dict[tuple[int, int], str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    slide_label: str | None = None
    note: str | None = None
    signature: str | None = None

    @property
    def has_areas(self) -> bool:
        """Whether how much of a tile is covered matters."""
        return bool(self.polygons) or self.mask is not None


class Annotations:
    """All that is said of a store's slides, as it was when this was made.

    Which slides are annotated is known at once; polygons, masks and rows are read for the slide
    that is asked for. What is wrong with one slide's annotation fails that slide alone.

    Attributes:
        folder: The folder of annotations, if there is one.
        unmatched: Annotations that no slide takes, most likely for a slip in a name, for people:
            files, and slides named in tables, with their files.
        faults: What is wrong with tables and is not one slide's fault, for people.
    """

    def __init__(self, store: Store, folder: Path | None, slides: Iterable[str] = ()) -> None:
        """Find the annotations.

        A slide is named by its id, its relative path, its file name or that without the suffix.
        Where two slides have the same name, it stands for the one that has it as its id, else for
        the one that has it as its path. In a mask's name ``_mask`` may follow.

        Args:
            store: The store, whose ``tiles.csv`` may hold labels.
            folder: Folder of ``<slide>.geojson``, of masks ``<slide>.png`` or ``.tif`` with a
                ``masks.yaml``, and of CSV files with columns ``slide, label`` and ``x, y`` or
                ``tile``.
            slides: Ids of slides that annotations may be for, beside those that the store has a
                folder for or has registered.

        Raises:
            StoreError: ``tiles.csv`` can't be read.
        """
        self.folder = folder
        self.unmatched: list[str] = []
        self.faults: list[str] = []
        self._store = store
        self._listed = read_tiles_csv(store)
        self._files: dict[str, list[Path]] = {}
        self._tables: dict[str, list[tuple[Path, str, str]]] = {}
        """By slide: the tables that name it, the name they use, and a fingerprint of the rows."""
        self._read = functools.cache(read_table)
        self._broken: dict[str, str] = {}
        """By a table's file name: why it can't be read."""
        names = _names(store, {*slides, *self._listed}) if folder is not None else {}
        for path, told in _files_in(folder, names):
            slide_id = next((names[name] for name in told if name in names), None)
            if slide_id is None:
                self.unmatched.append(str(path))
            else:
                self._files.setdefault(slide_id, []).append(path)
        for path in _visible(folder):
            if path.suffix.lower() == ".csv" and path.is_file():
                self._add_table(path, names)

    def _add_table(self, path: Path, names: dict[str, str]) -> None:
        try:
            index = index_table(path)
        except LabelError as error:
            self.faults.append(str(error))
            self._broken[path.name] = str(error)
            return
        self.faults += index.faults
        for name, digest in index.digests.items():
            if name in names:
                self._tables.setdefault(names[name], []).append((path, name, digest))
            else:
                self.unmatched.append(f"{path}: {name}")

    def slides(self) -> list[str]:
        """Ids of all slides of which something is said, sorted."""
        listed = {s for s, rows in self._listed.items() if any(row.label for row in rows)}
        return sorted({*self._files, *self._tables, *listed, *self._once_in_broken})

    def sources(self, slide_id: str) -> list[Path]:
        """The files that say something of a slide."""
        tables = [path for path, _, _ in self._tables.get(slide_id, [])]
        listed = [self._store.tiles_csv] if self._tile_labels(slide_id) else []
        return [*self._files.get(slide_id, []), *dict.fromkeys(tables), *listed]

    def signature(self, slide_id: str) -> str | None:
        """What tells cheaply whether anything that is said of a slide has changed.

        Of GeoJSON and masks only size and time are looked at; of tables, the slide's own rows. The
        same thing said in another way, or a file written again, makes another signature.

        Returns:
            64 hexadecimal digits; None if nothing is said.
        """
        said: list[Any] = [[path.name, it] for path, _, it in self._tables.get(slide_id, [])]
        for path in self._files.get(slide_id, []):
            said.append([path.relative_to(self._root).as_posix(), *_size_and_time(path)])
            if _is_mask(path):
                said.append(self._told_of_mask(slide_id))
        said += [self._broken[name] for name in self._once_in_broken.get(slide_id, ())]
        said += [self._tile_labels(slide_id)] if self._tile_labels(slide_id) else []
        return fingerprint(said) if said else None

    def of(self, slide_id: str) -> Annotation | None:
        """Read all that is said of a slide; None if nothing is.

        Raises:
            LabelError: A file can't be read, contradicts another, or says nothing that can be used;
                or a table that the slide's labels were made from can't be read any more.
        """
        if broken := self._once_in_broken.get(slide_id):
            raise LabelError(self._broken[broken[0]])
        sources = self.sources(slide_id)
        if not sources:
            return None
        polygons: list[tuple[str, shapely.Geometry]] = []
        notes: list[str] = []
        masks = [path for path in sources if _is_mask(path)]
        if len(masks) > 1:
            both = " and ".join(map(str, masks))
            raise LabelError(f"{both}: are both masks of {slide_id}; remove one.")
        for path in self._files.get(slide_id, []):
            if not _is_mask(path):
                regions = read_geojson(path)
                polygons += regions.polygons
                notes += [f"{n} of class {name}" for name, n in regions.passed_over.items()]
        told = Told()
        for path, name, _ in self._tables.get(slide_id, []):
            told.add(self._read(path).get(name, Told()), str(path))
        for name, label in self._tile_labels(slide_id).items():
            told.add_name(name, label, str(self._store.tiles_csv))
        if told.mistake is not None:
            raise LabelError(told.mistake)
        mask = Mask(masks[0], self._mask_values(slide_id, masks[0])) if masks else None
        said = {
            "polygons": [[label, shapely.to_wkb(it, hex=True)] for label, it in polygons],
            "mask": mask and [content_fingerprint(mask.path), mask.values.model_dump(mode="json")],
            "points": sorted([x, y, label] for (x, y), label in told.points.items()),
            "names": told.names,
            "slide": told.slide,
        }
        return Annotation(
            ", ".join(path.name for path in sources),
            hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(),
            polygons,
            mask,
            told.points,
            told.names,
            told.slide,
            f"passed over {', '.join(notes)}" if notes else None,
            self.signature(slide_id),
        )

    @property
    def _root(self) -> Path:
        assert self.folder is not None
        return self.folder

    def _tile_labels(self, slide_id: str) -> dict[str, str]:
        """What ``tiles.csv`` says, by the tile's name."""
        rows = self._listed.get(slide_id, [])
        return {row.tile: row.label for row in rows if row.label is not None}

    @functools.cached_property
    def _once_in_broken(self) -> dict[str, list[str]]:
        """Slides whose labels came from tables that can't be read now, with their names.

        Whom else such a table speaks of can't be known.
        """
        found: dict[str, list[str]] = {}
        for slide_id in self._store.slide_ids() if self._broken else ():
            stamp = self._store.slide(slide_id).stamp("labels")
            sources = str(stamp.result.get("source")).split(", ") if stamp is not None else []
            if broken := [name for name in sources if name in self._broken]:
                found[slide_id] = broken
        return found

    @functools.cached_property
    def _rules(self) -> list[MaskRule] | LabelError:
        try:
            return read_rules(self._root / RULES)
        except LabelError as error:
            return error

    def _mask_values(self, slide_id: str, mask: Path) -> MaskValues:
        if isinstance(self._rules, LabelError):
            raise LabelError(f"{mask}: can't be read as a mask. {self._rules}") from self._rules
        slide = read_description(self._store.slide(slide_id))
        site = None if slide is None else slide.facts.get("site")
        for rule in self._rules:
            if rule.fits(slide_id, site):
                return rule.values
        raise LabelError(
            f"{mask}: no rule in {self._root / RULES} fits the slide {slide_id} of site "
            f"{site or '(none)'}. Add one."
        )

    def _told_of_mask(self, slide_id: str) -> Any:
        try:
            return self._mask_values(slide_id, Path()).model_dump(mode="json")
        except LabelError as error:
            return str(error)


def _names(store: Store, slides: Iterable[str]) -> dict[str, str]:
    """The slide that each name stands for, over all slides that are known."""
    registered = {slide_id: entry.relative for slide_id, entry in Register(store).entries().items()}
    names = {slide_id: slide_id for slide_id in {*slides, *registered, *store.slide_ids()}}
    for slide_id, relative in registered.items():
        names.setdefault(relative, slide_id)
    for slide_id, relative in registered.items():
        path = PurePosixPath(relative)
        if slide_id == plain_id(Path(relative)):
            names.setdefault(path.name, slide_id)
            names.setdefault(path.stem, slide_id)
    return names


def _files_in(folder: Path | None, names: Iterable[str]) -> Iterator[tuple[Path, list[str]]]:
    """The GeoJSON files and masks of a folder, each with names of the slide it may be of.

    Args:
        folder: The folder.
        names: Known names; one that is a path is looked for in the folder's sub-folders.
    """
    entries = _visible(folder)
    inner = {entry.name for entry in entries if entry.is_dir()}
    parents = {PurePosixPath(name).parent for name in names if "/" in name} if inner else set()
    places = [(PurePosixPath(), entries)]
    for parent in sorted(p for p in parents if p.parts and p.parts[0] in inner):
        assert folder is not None
        places.append((parent, _visible(folder / parent)))
    for parent, paths in places:
        for path in paths:
            if path.suffix.lower() in (*_GEOJSON, *_MASKS) and path.is_file():
                name = (parent / path.stem).as_posix()
                plain = name.removesuffix(_MASK_ENDING) if _is_mask(path) else name
                yield path, list(dict.fromkeys([name, plain]))


def _visible(folder: Path | None) -> list[Path]:
    """A folder's entries, less hidden ones, such as those that macOS puts beside each file."""
    if folder is None or not folder.is_dir():
        return []
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    return [folder / name for name in names]  # of ten thousands, paths take long to sort


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:  # taken away in between
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() in _MASKS
