"""Damaging slide files, each in a way that its number alone decides."""

from __future__ import annotations

import io
import zlib

import numpy as np
import tifffile

ABSURD = (0, 1, 2, 255, 65_535, 65_537, 2**31 - 1, 2**31, 2**32 - 1)
"""Values that a tag may get; each is cut to the tag's own size."""

_JPEG_HEADER = 640


def mutant(name: str, content: bytes, *, seed: int, number: int) -> tuple[bytes, str]:
    """Make one of a file's mutants.

    Args:
        name: The file's name.
        content: The file.
        seed: Of all mutants.
        number: Which mutant; it decides the way of damage in turn, and all that is drawn.

    Returns:
        The damaged file, and what was done to it.
    """
    rng = np.random.default_rng([seed, number, zlib.crc32(name.encode())])
    ways = (_flip_bits, _truncate, _swap_blocks, _write_absurd_values)
    damaged = bytearray(content)
    told = ways[number % len(ways)](damaged, rng)
    return bytes(damaged), told


def _flip_bits(content: bytearray, rng: np.random.Generator) -> str:
    count = int(rng.choice((1, 1, 2, 8, 64)))
    for bit in rng.integers(0, 8 * len(content), count):
        content[bit // 8] ^= 1 << (bit % 8)
    return f"{count} bits flipped"


def _truncate(content: bytearray, rng: np.random.Generator) -> str:
    length = int(rng.integers(1, len(content)))
    del content[length:]
    return f"cut at {length} bytes"


def _swap_blocks(content: bytearray, rng: np.random.Generator) -> str:
    size = int(min(rng.choice((64, 512, 4096, 65_536)), len(content) // 4))
    first, second = (int(at) for at in rng.integers(0, len(content) - size, 2))
    one, other = content[first : first + size], content[second : second + size]
    content[first : first + size], content[second : second + size] = other, one
    return f"{size} bytes at {first} and {second} swapped"


def _write_absurd_values(content: bytearray, rng: np.random.Generator) -> str:
    told = []
    places = _fields(bytes(content))
    for _ in range(int(rng.choice((1, 1, 1, 3)))):
        name, at, size, order = places[rng.integers(len(places))]
        value = int(rng.choice(ABSURD)) % 256**size
        content[at : at + size] = value.to_bytes(size, order)
        told.append(f"{name} = {value}")
    return ", ".join(told)


def _fields(content: bytes) -> list[tuple[str, int, int, str]]:
    """Name, offset, size and byte order of what a file's header says in numbers."""
    if content.startswith(b"\xff\xd8"):
        return [(f"byte {at}", at, 1, "big") for at in range(2, _JPEG_HEADER)]
    fields = []
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        order = "little" if file.byteorder == "<" else "big"
        wide = 8 if file.is_bigtiff else 4
        for number, page in enumerate(file.pages):
            for tag in page.tags:
                what = f"page {number} {tag.name}"
                fields.append((f"{what} type", tag.offset + 2, 2, order))
                fields.append((f"{what} count", tag.offset + 4, wide, order))
                size = min(tag.valuebytecount, wide) if tag.valuebytecount > 0 else wide
                fields.append((what, tag.offset + 4 + wide, size, order))
    return fields
