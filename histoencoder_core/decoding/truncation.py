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
        At least so many bytes are missing, unless the directory itself is damaged; 0 if none are,
        or if the file can't be understood.
    """
    size = path.stat().st_size
    try:
        with tifffile.TiffFile(path) as file:
            missing = _end_of_directories(file) - size
            if missing > 0:  # what they say can't be read
                return missing
            ends = [_end_of_data(page) for page in file.pages]
            return max(0, max(ends, default=0) - size)
    except Exception:  # noqa: BLE001 - tifffile raises anything; what it is, the reader will tell
        return 0


def _end_of_data(page: tifffile.TiffPage | tifffile.TiffFrame) -> int:
    pairs = zip(page.dataoffsets, page.databytecounts, strict=False)
    return max((offset + count for offset, count in pairs if offset and count), default=0)


def _end_of_directories(file: tifffile.TiffFile) -> int:
    """Where the last directory that can be found ends, or the next begins that it names."""
    at = file.pages.next_page_offset
    if at is None:
        return 0
    form: str = file.tiff.offsetformat
    end = int(at) + struct.calcsize(form)
    if end > file.filehandle.size:
        return end
    file.filehandle.seek(at)
    following = int(struct.unpack(form, file.filehandle.read(struct.calcsize(form)))[0])
    return following + 1 if following else end


def is_endless_jpeg(content: bytes) -> bool:
    """Whether a file begins as a JPEG, but has no marker of its end; zeros may follow one."""
    return content.startswith(_START_OF_IMAGE) and (
        _END_OF_IMAGE not in content.rstrip(b"\0")[-_TAIL:]
    )
