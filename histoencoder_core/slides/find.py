"""Finding slide files in a folder."""

from __future__ import annotations

import configparser
import functools
import glob
import itertools
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from histoencoder_core.store import layout

OPENSLIDE_SUFFIXES = frozenset(
    [".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".tif", ".tiff", ".dcm"]
)
SUFFIXES = OPENSLIDE_SUFFIXES | {".czi", ".jpg", ".jpeg"}
"""Suffixes of slide files, in lower case."""

OF_MANY_FILES = frozenset([".mrxs", ".vms", ".vmu", ".dcm"])
"""Suffixes of slides that are more than one file."""

_NOT_SLIDES = ("annotations",)
_SLIDEDAT = "Slidedat.ini"
_MOST_INI_BYTES = 2**20
_SERIES = 0x0020000E
"""The tag ``SeriesInstanceUID``."""


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


def find_slides(
    folder: Path, *, unreadable: Callable[[OSError], None] | None = None
) -> list[FoundSlide]:
    """Find all slides in a folder and its sub-folders.

    Hidden files and folders, the folder ``annotations``, the JPEG parts of a VMS slide and all
    but one file of a DICOM series are no slides of their own. Links to folders are not followed.

    Args:
        folder: Where to look.
        unreadable: Told of each folder that can't be read; such folders are passed over.

    Returns:
        The slides, sorted by their relative path.
    """
    root = str(folder.resolve())
    found: list[str] = []
    # Text, not paths: an archive of 50,000 slides is looked through every few seconds.
    for parent, folders, names in os.walk(root, onerror=unreadable):
        if os.path.isfile(os.path.join(parent, layout.COHORT, layout.REGISTER)):  # noqa: PTH113, PTH118
            folders.clear()  # a store: its pictures are no slides
        folders[:] = [n for n in folders if not n.startswith((".", "_")) and n not in _NOT_SLIDES]
        found += [os.path.join(parent, name) for name in _slides_among(parent, names)]  # noqa: PTH118
    start = len(root.rstrip("/")) + 1
    return [_found(path, start) for path in sorted(found)]


@functools.lru_cache(maxsize=2**18)
def _found(path: str, start: int) -> FoundSlide:
    """A slide; making the paths of 50,000 of them takes half a second in each look."""
    return FoundSlide(Path(path), path[start:].replace(os.sep, "/"))


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
    found = [
        folder / name
        for folder, files in by_folder.items()
        for name in _slides_among(str(folder), [file.name for file in files])
    ]
    return [FoundSlide(p, Path(os.path.relpath(p, root)).as_posix()) for p in sorted(set(found))]


def parts_of(path: Path) -> list[Path]:
    """All files that a slide consists of, its own first.

    MRXS keeps its data in a folder beside it, VMS and VMU name theirs in the file itself, and a
    DICOM slide is every file of its series in the same folder.
    """
    suffix = suffix_of(path)
    if suffix not in OF_MANY_FILES:
        return [path]
    if suffix == ".mrxs":
        folder = path.with_suffix("")
        return [path, *sorted(p for p in folder.rglob("*") if p.is_file())]
    if suffix in {".vms", ".vmu"}:
        return [path, *_hamamatsu_parts(path)]
    series = _series(path)
    siblings = (p for p in sorted(path.parent.glob("*")) if suffix_of(p) == ".dcm")
    return [path, *(p for p in siblings if p != path and _series(p) == series)]


def missing_part(path: Path) -> str | None:
    """The name of a file that a slide needs and that is not there yet; None if all are.

    An MRXS tells its files in ``Slidedat.ini``, a VMS or VMU in itself. How many files a DICOM
    series has is told nowhere.
    """
    suffix = suffix_of(path)
    if suffix == ".mrxs":
        folder = path.with_suffix("")
        told = _ini(folder / _SLIDEDAT, "utf-8-sig")
        if told is None:
            return f"{folder.name}/{_SLIDEDAT}"
        index = told.get("HIERARCHICAL", "INDEXFILE", fallback=None)
        data = dict(told["DATAFILE"]) if told.has_section("DATAFILE") else {}
        names = [
            index,
            *(v for k, v in data.items() if k.startswith("file_") and k != "file_count"),
        ]
        return next((f"{folder.name}/{n}" for n in names if n and not (folder / n).is_file()), None)
    if suffix in {".vms", ".vmu"}:
        told = _ini(path, "latin-1")
        values = {} if told is None else {k: v for s in told.values() for k, v in s.items()}
        names = [v for k, v in sorted(values.items()) if k.startswith(("imagefile", "mapfile"))]
        return next((n for n in names if n and not path.with_name(Path(n).name).is_file()), None)
    return None


def _slides_among(folder: str, names: list[str]) -> list[str]:
    """Choose the slides among the files of one folder, by their names."""
    kept = sorted(n for n in names if n[0] not in ".~" and _suffix(n) in SUFFIXES)
    special = [name for name in kept if _suffix(name) in OF_MANY_FILES]
    if not special:
        return kept
    parts = {
        part.name
        for name in special
        if _suffix(name) in {".vms", ".vmu"}
        for part in _hamamatsu_parts(Path(folder, name))
    }
    series_seen, chosen = set(), []
    for name in kept:
        if name in parts:
            continue
        if _suffix(name) == ".dcm":
            series = _series(Path(folder, name))
            if series in series_seen:
                continue
            series_seen.add(series)
        chosen.append(name)
    return chosen


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _ini(path: Path, encoding: str) -> configparser.ConfigParser | None:
    """A text of sections and keys, in lower case; None if it is not there or is something else."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        if path.stat().st_size > _MOST_INI_BYTES:
            return None
        parser.read_string(path.read_text(encoding))
    except (OSError, UnicodeDecodeError, configparser.Error):
        return None
    return parser


def _hamamatsu_parts(path: Path) -> list[Path]:
    told = _ini(path, "latin-1")
    named = (
        {v for section in told.values() for v in section.values()} if told is not None else set()
    )
    return sorted(p for name in named if name and (p := path.with_name(Path(name).name)).is_file())


def _series(path: Path) -> str:
    """The series a DICOM file belongs to; a file that can't be read as DICOM is its own."""
    try:
        stat = path.stat()
    except OSError:  # a link to nowhere
        return str(path)
    return _dicom_series(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _dicom_series(path: str, size: int, mtime_ns: int) -> str:  # noqa: ARG001 - the cache's key
    # pydicom takes a moment to import, and few slides are DICOM.
    from pydicom.filereader import read_file_meta_info, read_partial
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    # Not by a native reader: nothing is known of the file yet, and finding it must be safe.
    try:
        if read_file_meta_info(path).TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
            return path  # to look into it would unpack it whole
        with Path(path).open("rb") as file:
            # Of a slide in a bucket, only the beginning is here.
            header = read_partial(file, stop_when=lambda tag, *_: tag > _SERIES)
        return str(header.SeriesInstanceUID)
    except Exception:  # noqa: BLE001 - whatever it is, it is found out when the slide is opened
        return path
