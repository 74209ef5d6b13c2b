"""What identifies a slide's content, whatever its name.

A slide is first identified by a sample of its bytes, since reading an archive over the network
takes days. A sample can miss what changes later, so from the moment that a file's size or
modification time has changed, it is identified by all of its bytes; so is one of which another
file, that is there too, has the same sample.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from histoencoder_core.slides.find import OF_MANY_FILES, parts_of, suffix_of

WHOLE_BYTES = 16 * 2**20
"""Files up to this size are hashed whole."""

_BLOCK = 64 * 2**10
_BLOCKS = 256


@dataclass(frozen=True)
class Content:
    """A slide's content.

    Attributes:
        sample: See `content_fingerprint`.
        whole: Hash of all bytes; None where they were never read.
        fingerprint: What stands for the content in all that is made from it.
    """

    sample: str
    whole: str | None
    fingerprint: str

    @classmethod
    def of(cls, path: Path, *, quickhash: str | None, before: Content | None = None) -> Content:
        """Identify a file's content.

        Args:
            path: The slide's main file.
            quickhash: OpenSlide's ``quickhash-1``, if there is one.
            before: The content that this file had before its size or time changed; None for a file
                that is seen for the first time.
        """
        sample = content_fingerprint(path, quickhash=quickhash)
        if all(part.stat().st_size <= WHOLE_BYTES for part in parts_of(path)):
            return cls(sample, sample, sample)
        if before is None:
            return cls(sample, None, sample)
        whole = whole_hash(path)
        same = (before.sample, before.whole) == (sample, whole)
        return cls(sample, whole, before.fingerprint if same else whole)

    def is_that_of(self, path: Path, sampled: Content) -> bool:
        """Whether another file, of which a sample was taken, has this content.

        Args:
            path: The other file.
            sampled: What is known of its content.
        """
        if sampled.sample != self.sample:
            return False
        return self.whole is None or self.whole == (sampled.whole or whole_hash(path))


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
        for block in _all_blocks(part) if size <= WHOLE_BYTES else _sampled_blocks(part, size):
            digest.update(block)
    return digest.hexdigest()


def whole_hash(path: Path) -> str:
    """Hash all bytes of a slide.

    Args:
        path: The slide's main file; the other files of its format are hashed with it.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(b"whole")
    for part in parts_of(path):
        name = "" if part == path else part.name
        digest.update(f"\n{name}:{part.stat().st_size}\n".encode())
        for block in _all_blocks(part):
            digest.update(block)
    return digest.hexdigest()


def signature(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds of all of a slide's files.

    Cheap; a slide whose signature stood still has not changed.

    Raises:
        FileNotFoundError: A file was taken away.
    """
    if suffix_of(path) not in OF_MANY_FILES:
        stat = os.stat(path)  # noqa: PTH116 - asked for every slide of an archive in each tick
        return stat.st_size, stat.st_mtime_ns
    stats = [part.stat() for part in parts_of(path)]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def _all_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(2**20):
            yield block


def _sampled_blocks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for i in range(_BLOCKS):
            file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            yield file.read(_BLOCK)
