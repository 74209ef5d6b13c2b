"""Finding slide files in a folder."""

from __future__ import annotations

import configparser
import functools
import glob
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openslide

from histoencoder_core.store import layout

OPENSLIDE_SUFFIXES = frozenset(
    [".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".tif", ".tiff", ".dcm"]
)
SUFFIXES = OPENSLIDE_SUFFIXES | {".czi", ".jpg", ".jpeg"}
"""Suffixes of slide files, in lower case."""

_NOT_SLIDES = ("annotations",)


@dataclass(frozen=True)
class FoundSlide:
    """A slide file.

    Attributes:
        path: Its absolute path.
        relative: Its path relative to the folder that was searched, with forward slashes.
    """

    path: Path
    relative: str


def suffix_of(path: Path) -> str:
    """A path's suffix in lower case.

    Example:
        >>> suffix_of(Path("CMU-1.SVS"))
        '.svs'
    """
    return path.suffix.lower()


def find_slides(folder: Path) -> list[FoundSlide]:
    """Find all slides in a folder and its sub-folders.

    Hidden files and folders, the folder ``annotations``, the JPEG parts of a VMS slide and all
    but one file of a DICOM series are no slides of their own.

    Args:
        folder: Where to look.

    Returns:
        The slides, sorted by their relative path.
    """
    root = folder.resolve()
    paths: list[Path] = []
    for parent, folders, names in os.walk(root):
        if Path(parent, layout.COHORT, layout.REGISTER).is_file():
            folders.clear()  # a store: its pictures are no slides
        folders[:] = [n for n in folders if not n.startswith((".", "_")) and n not in _NOT_SLIDES]
        paths += _slides_among([Path(parent, name) for name in names])
    return [FoundSlide(path, path.relative_to(root).as_posix()) for path in sorted(paths)]


def find_pattern(pattern: str) -> list[FoundSlide]:
    """Find slides by a glob pattern, as HistoPrep's ``--input`` takes it, or in a folder.

    Args:
        pattern: A folder, a file, or a pattern with ``*``, ``?``, ``[…]`` or ``**``.

    Returns:
        The slides, sorted; relative paths start at the pattern's last fixed folder.
    """
    path = Path(pattern)
    if path.is_dir():
        return find_slides(path)
    if path.is_file():  # even if its name holds a character that patterns use
        root, matches = path.parent.resolve(), [path]
    else:
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts[:-1])
        root = Path(*fixed).resolve()
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]  # noqa: PTH207
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for match in matches:
        if match.is_file():
            # A link keeps its own name, as in a folder: what it points to may be named by a hash.
            folder = match.parent.resolve()
            by_folder[folder].append(folder / match.name)
    found = [slide for files in by_folder.values() for slide in _slides_among(files)]
    return [FoundSlide(p, Path(os.path.relpath(p, root)).as_posix()) for p in sorted(set(found))]


def parts_of(path: Path) -> list[Path]:
    """All files that a slide consists of, its own first.

    MRXS keeps its data in a folder beside it, VMS and VMU name theirs in the file itself, and a
    DICOM slide is every file of its series in the same folder.
    """
    suffix = suffix_of(path)
    if suffix == ".mrxs":
        folder = path.with_suffix("")
        return [path, *sorted(p for p in folder.rglob("*") if p.is_file())]
    if suffix in {".vms", ".vmu"}:
        return [path, *_hamamatsu_parts(path)]
    if suffix == ".dcm":
        series = _series(path)
        siblings = (p for p in sorted(path.parent.glob("*")) if suffix_of(p) == ".dcm")
        return [path, *(p for p in siblings if p != path and _series(p) == series)]
    return [path]


def _slides_among(paths: list[Path]) -> Iterator[Path]:
    """Choose the slides among files of one folder."""
    candidates = [p for p in sorted(paths) if suffix_of(p) in SUFFIXES and p.name[0] not in ".~"]
    parts = {
        part
        for path in candidates
        if suffix_of(path) in {".vms", ".vmu"}
        for part in _hamamatsu_parts(path)
    }
    series_seen = set()
    for path in candidates:
        if path in parts:
            continue
        if suffix_of(path) == ".dcm":
            series = _series(path)
            if series in series_seen:
                continue
            series_seen.add(series)
        yield path


def _hamamatsu_parts(path: Path) -> list[Path]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        parser.read_string(path.read_text("latin-1"))
    except (OSError, configparser.Error):
        return []
    named = {value for section in parser.values() for value in section.values()}
    return sorted(p for name in named if name and (p := path.with_name(Path(name).name)).is_file())


def _series(path: Path) -> str:
    """The series a DICOM file belongs to; a file that can't be opened is its own."""
    try:
        stat = path.stat()
    except OSError:  # a link to nowhere
        return str(path)
    return _dicom_series(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _dicom_series(path: str, size: int, mtime_ns: int) -> str:  # noqa: ARG001 - the cache's key
    try:
        with openslide.OpenSlide(path) as slide:
            return str(slide.properties["dicom.SeriesInstanceUID"])
    except (openslide.OpenSlideError, KeyError):
        return path
