"""What identifies a slide's content, whatever its name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from histoencoder_core.slides.find import parts_of

WHOLE_BYTES = 16 * 2**20
"""Files up to this size are hashed whole."""

_BLOCK = 64 * 2**10
_BLOCKS = 256


def content_fingerprint(path: Path, *, quickhash: str | None = None) -> str:
    """Hash a slide's content: sizes, OpenSlide's quickhash, and blocks spread over its files.

    OpenSlide's quickhash alone misses changes in the pixel data, and reading a whole archive over
    the network is too slow, so a large file is sampled evenly, its first and last block included.

    Args:
        path: The slide's main file; the other files of its format are hashed with it.
        quickhash: OpenSlide's ``quickhash-1``, if there is one.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(f"quickhash:{quickhash or ''}".encode())
    for part in parts_of(path):
        size = part.stat().st_size
        # The main file's name may change, those of its parts are content.
        name = "" if part == path else part.name
        digest.update(f"\n{name}:{size}\n".encode())
        with part.open("rb") as file:
            if size <= WHOLE_BYTES:
                while block := file.read(2**20):
                    digest.update(block)
                continue
            for i in range(_BLOCKS):
                file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def signature(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds of all of a slide's files.

    Cheap; a slide whose signature stood still has not changed.
    """
    stats = [part.stat() for part in parts_of(path)]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
