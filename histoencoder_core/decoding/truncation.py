"""Telling a file that was cut short from one that is damaged otherwise."""

from __future__ import annotations

import struct
from pathlib import Path

import tifffile

TIFF_SUFFIXES = frozenset([".svs", ".svslide", ".tif", ".tiff", ".ndpi", ".scn", ".bif"])
"""Suffixes of slides that are TIFF files, in lower case."""

_START_OF_IMAGE, _END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
_TAIL = 4096


def missing_bytes(path: Path) -> int:
    """How far a TIFF's own directories point beyond its end.

    All pages count, with the data of all their tiles or strips. What has no data, as tiles that a
    scanner left out, points nowhere.

    Args:
        path: A TIFF file; BigTIFF and Hamamatsu's form for large files are known.

    Returns:
        At least so many bytes are missing; 0 if none are, or if the file can't be understood.
    """
    size = path.stat().st_size
    try:
        with tifffile.TiffFile(path) as file:
            ends = [_end_of_data(page) for page in file.pages]
            return max(0, _next_page(file) + 1 - size, max(ends, default=0) - size)
    except Exception:  # noqa: BLE001 - tifffile raises anything; what it is, the reader will tell
        return 0


def _end_of_data(page: tifffile.TiffPage | tifffile.TiffFrame) -> int:
    pairs = zip(page.dataoffsets, page.databytecounts, strict=False)
    return max((offset + count for offset, count in pairs if offset and count), default=0)


def _next_page(file: tifffile.TiffFile) -> int:
    """Where the last readable directory says that the next one is; 0 if there is none."""
    at = file.pages.next_page_offset
    if at is None:
        return 0
    file.filehandle.seek(at)
    form: str = file.tiff.offsetformat
    return int(struct.unpack(form, file.filehandle.read(struct.calcsize(form)))[0])


def is_endless_jpeg(content: bytes) -> bool:
    """Whether a file begins as a JPEG, but has no marker of its end; zeros may follow one."""
    return content.startswith(_START_OF_IMAGE) and (
        _END_OF_IMAGE not in content.rstrip(b"\0")[-_TAIL:]
    )
