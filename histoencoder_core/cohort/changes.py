"""Which slides there are, and whether anything of one has changed, without opening a file.

A slide's signature is a hash of all that can change what the catalog says of it: size,
modification time and inode of its records, of its slide's files and of its annotations, and its
entry in the register. A file that is put in place anew has another inode.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoencoder_core.decoding.images import IMAGE_FORMATS
from histoencoder_core.labels import Annotations
from histoencoder_core.slides.register import Entry
from histoencoder_core.store import Store, layout
from histoencoder_core.tiles.source import read_tiles_csv, slide_ids_with_tiles

_RECORDS = frozenset(layout.RECORD.values())
_WATCHED = _RECORDS | {layout.FAILURES, layout.DUPLICATE}
_IMAGES = tuple(IMAGE_FORMATS)
_OF_MANY_FILES = (".vms", ".vmu", ".dcm")
"""Suffixes of slides whose other files lie beside them, under names that only they tell."""


@dataclass(frozen=True)
class Signature:
    """What a slide's files look like from outside.

    Attributes:
        files: Hash over its records, its slide, its annotations and its entry in the register.
        images: Hash over its tile images; empty where its tiles are known to be our own, so that
            images tell nothing.
    """

    files: str
    images: str


@dataclass(frozen=True)
class Known:
    """What an earlier look found inside a slide's files.

    Attributes:
        signature: Its signature at the time.
        own_tiles: Whether its tiles were cut by this program.
        path: Its slide's file, if it was described.
    """

    signature: Signature
    own_tiles: bool = False
    path: str | None = None


_UNKNOWN = Known(Signature("", ""))


class Scan:
    """What all folders of a store look like from outside, at one moment."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folders = {name: _look_into(path) for name, path in _folders(store).items()}

    def records(self) -> dict[str, str]:
        """By slide that has a folder, sorted: names and prints of its records and its failures."""
        return {slide_id: self._folders[slide_id].records for slide_id in sorted(self._folders)}

    def expected(self, entries: Iterable[str]) -> list[str]:
        """All slides that results are expected of: registered, with tiles, or with results.

        Args:
            entries: Ids in the register.

        Returns:
            The ids, sorted.

        Raises:
            StoreError: ``tiles.csv`` can't be read.
        """
        with_results = {slide_id for slide_id, found in self._folders.items() if found.has_records}
        sure = {*entries, *read_tiles_csv(self._store), *with_results}
        if self._folders.keys() <= sure and not _images_in(self._store.root):
            return sorted(sure)
        return sorted({*sure, *slide_ids_with_tiles(self._store, but=sure)})

    def signatures(
        self,
        slides: Iterable[str],
        entries: Mapping[str, Entry],
        said: Annotations,
        known: Mapping[str, Known],
    ) -> dict[str, Signature]:
        """Tell slides' signatures.

        Args:
            slides: Their ids.
            entries: The register.
            said: What people say of slides.
            known: What an earlier look found inside the slides' files.

        Raises:
            StoreError: ``tiles.csv`` can't be read.
        """
        print_ = functools.cache(_print)
        folder_hash = functools.cache(_folder_hash)
        listing = read_tiles_csv(self._store)
        shared = [print_(str(self._store.tiles_csv)), _images_in(self._store.root)]
        found = {}
        for slide_id in slides:
            folder = self._folders.get(slide_id, _NOTHING)
            before = known.get(slide_id, _UNKNOWN)
            entry = entries.get(slide_id)
            path = before.path if entry is None else entry.path
            slide: list[Any] = []
            if path is not None:
                slide = [path, entry and entry.relative, print_(path)]
                if path.lower().endswith(_OF_MANY_FILES):
                    slide.append(folder_hash(os.path.dirname(path)))  # noqa: PTH120 - fast
                elif path.lower().endswith(".mrxs"):
                    slide.append(folder_hash(os.path.splitext(path)[0]))  # noqa: PTH122
            sources: list[Any] = [said.signature(slide_id)]
            if folder.has_labels:
                sources.append(said.folder is not None)  # else any annotation will do
            files = _hash([folder.records, folder.has_tiles, slide, sources])
            images = ""
            if not before.own_tiles or before.signature.files != files:
                rows = [(str(row.path), print_(str(row.path))) for row in listing.get(slide_id, ())]
                cut = _images_in(self._store.root / slide_id / layout.TILES)
                images = _hash([shared, folder.images, cut if folder.has_tiles else "", rows])
            found[slide_id] = Signature(files, images)
        return found


@dataclass(frozen=True)
class _Folder:
    """What a slide's folder holds that matters.

    Text, where tuples of numbers would do, is no work for Python's garbage collector.

    Attributes:
        records: Names and prints of records and of ``failures.json``.
        images: Names and prints of images.
        has_records: Whether there is a record.
        has_labels: Whether there are labels.
        has_tiles: Whether there is a folder of tile images.
    """

    records: str
    images: str
    has_records: bool
    has_labels: bool
    has_tiles: bool


_NOTHING = _Folder("", "", has_records=False, has_labels=False, has_tiles=False)


def _folders(store: Store) -> dict[str, str]:
    """Paths of all slides' folders."""
    try:
        with os.scandir(store.root) as entries:
            return {e.name: e.path for e in entries if layout.is_slide_id(e.name) and e.is_dir()}
    except FileNotFoundError:
        return {}


def _look_into(path: str) -> _Folder:
    names: set[str] = set()
    records, images = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name in _WATCHED:
                names.add(name)
                records.append(_print_of(entry))
            elif name == layout.TILES:
                names.add(name)
            elif _is_image(name):
                images.append(_print_of(entry))
    return _Folder(
        "".join(sorted(records)),
        "".join(sorted(images)),
        has_records=not _RECORDS.isdisjoint(names),
        has_labels=layout.LABELS in names,
        has_tiles=layout.TILES in names,
    )


def _images_in(folder: Path) -> str:
    try:
        with os.scandir(folder) as entries:
            return "".join(sorted(_print_of(e) for e in entries if _is_image(e.name)))
    except OSError:
        return ""


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGES) and not name.startswith((".", "thumbnail"))


def _folder_hash(folder: str) -> str:
    try:
        with os.scandir(folder) as entries:
            return _hash(sorted(_print_of(e) for e in entries if e.is_file()))
    except OSError:
        return ""


def _print(path: str) -> str:
    """Size, modification time and inode of a file; empty if it is not there."""
    try:
        return _of(os.stat(path))  # noqa: PTH116 - making a path for each takes its time
    except OSError:
        return ""


def _print_of(entry: os.DirEntry[str]) -> str:
    try:
        return f"{entry.name} {_of(entry.stat())}\n"
    except OSError:  # it was taken away in between, or is a link to nowhere
        return f"{entry.name}\n"


def _of(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def _hash(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
