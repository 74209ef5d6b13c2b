"""Reading the pixels of a slide's tiles, neighbours together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from histoencoder_core.decoding.readers import ImageReading, SlideLostError
from histoencoder_core.errors import KINDS, SlideError
from histoencoder_core.slides import Slide, open_slide
from histoencoder_core.store.tables import Place

BLOCK_PX = 1536
"""Width and height of the regions in which a slide is read. Where tiles overlap by half, they are
read 1.8 times as fast as one by one; larger regions leave threads idle at a slide's end."""

SHARED = 0.8
"""Most pixels that a block may have, to those of its tiles. Where tiles hardly overlap, one by one
is as fast, and what lies between them is not decoded for nothing."""

IMAGES_A_BLOCK = 8

Tile = np.ndarray | SlideError
"""uint8 pixels of shape (height, width, 3), or why they can't be read."""


class TilePixels(Protocol):
    """An open source of tiles. Its `read` may be called from several threads."""

    @property
    def blocks(self) -> Sequence[Sequence[int]]:
        """All rows of the table of tiles, parted into those that are best read together."""

    def read(self, rows: Sequence[int]) -> list[Tile]:
        """Read tiles; one that can't be read does not stop the others."""


class SlideTiles:
    """Tiles that are read straight from a slide.

    Attributes:
        blocks: Rows by neighbourhood, from top to bottom and left to right.
    """

    def __init__(self, slide: Slide, places: Sequence[Place], levels: Sequence[int]) -> None:
        """Group tiles into blocks.

        Args:
            slide: The open slide.
            places: Each tile's place in level-0 pixels.
            levels: The level that each tile is read from.
        """
        self._slide, self._places, self._levels = slide, places, levels
        near: dict[tuple[int, ...], list[int]] = {}
        for row, (place, level) in enumerate(zip(places, levels, strict=True)):
            near.setdefault(_neighbourhood(slide, place, level, row), []).append(row)
        self.blocks = [block for key in sorted(near) for block in _dense(near[key], places)]

    def read(self, rows: Sequence[int]) -> list[Tile]:
        """Read tiles of one block: in one read, or one by one where that fails."""
        if len(rows) > 1:
            with contextlib.suppress(SlideError):
                return self._read_together(rows)
        return [self._read_alone(row) for row in rows]

    def _read_together(self, rows: Sequence[int]) -> list[Tile]:
        places = [self._places[row] for row in rows]
        left, top, right, bottom = _box(places)
        level = self._levels[rows[0]]
        pixels = self._slide.read((left, top, right - left, bottom - top), level=level)
        down_x, down_y = (round(down) for down in self._slide.downsamples[level])
        tiles: list[Tile] = []
        for x, y, w, h in places:
            i, j = (y - top) // down_y, (x - left) // down_x
            height, width = self._slide.size_at(level, (x, y, w, h))
            tiles.append(pixels[i : i + height, j : j + width])
        return tiles

    def _read_alone(self, row: int) -> Tile:
        place, level = self._places[row], self._levels[row]
        return _tile_or_why_not(lambda: self._slide.read(place, level=level))


class ImageTiles:
    """Tiles that are images of their own.

    Attributes:
        blocks: A few rows each, in order.
    """

    def __init__(self, images: ImageReading, paths: Sequence[Path]) -> None:
        self._images, self._paths = images, paths
        rows, size = range(len(paths)), IMAGES_A_BLOCK
        self.blocks = [rows[start : start + size] for start in range(0, len(rows), size)]

    def read(self, rows: Sequence[int]) -> list[Tile]:
        """Decode images."""
        return [self._read(self._paths[row]) for row in rows]

    def _read(self, path: Path) -> Tile:
        return _tile_or_why_not(lambda: self._images.read(path))


@contextlib.contextmanager
def open_slide_tiles(
    path: Path, places: Sequence[Place], levels: Sequence[int]
) -> Iterator[SlideTiles]:
    """Open a slide to read its tiles.

    Raises:
        SlideError: The slide can't be opened.
    """
    with open_slide(path) as slide:
        yield SlideTiles(slide, places, levels)


@contextlib.contextmanager
def open_image_tiles(paths: Sequence[Path]) -> Iterator[ImageTiles]:
    """Get ready to decode images."""
    with ImageReading() as images:
        yield ImageTiles(images, paths)


def _tile_or_why_not(read: Callable[[], np.ndarray]) -> Tile:
    """A tile may be missing for what the file is, not for what passes: that is tried again."""
    try:
        return read()
    except SlideLostError:
        raise
    except SlideError as error:
        if KINDS[error.kind].transient:
            raise
        return error


def _neighbourhood(slide: Slide, place: Place, level: int, row: int) -> tuple[int, ...]:
    """What tiles have in common that give the same pixels together as alone.

    Readers interpolate where a place falls between a level's pixels, so only tiles whose distances
    are whole pixels of the level may share a read.
    """
    x, y, w, h = place
    down_x, down_y = slide.downsamples[level]
    whole_x, whole_y = round(down_x), round(down_y)
    exact = (down_x, down_y) == (whole_x, whole_y) and w % whole_x == 0 and h % whole_y == 0
    if not exact or (level > 0 and not slide.exact_levels):
        return (level, y, x, row, 0, 0)
    side_x, side_y = BLOCK_PX * whole_x, BLOCK_PX * whole_y
    corner = (y // side_y * side_y, x // side_x * side_x)
    return (level, *corner, -1, y % whole_y, x % whole_x)


def _dense(rows: list[int], places: Sequence[Place]) -> list[list[int]]:
    """Part neighbours into those that overlap enough to be worth one read."""
    left, top, right, bottom = _box([places[row] for row in rows])
    width, height = right - left, bottom - top
    alone = sum(places[row][2] * places[row][3] for row in rows)
    if len(rows) == 1 or width * height <= SHARED * alone:
        return [rows]
    axis = 0 if width > height else 1
    middle = sorted(places[row][axis] for row in rows)[len(rows) // 2]
    first = [row for row in rows if places[row][axis] < middle]
    rest = [row for row in rows if places[row][axis] >= middle]
    if not first:
        return [[row] for row in rows]
    return [*_dense(first, places), *_dense(rest, places)]


def _box(places: Sequence[Place]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what encloses all places."""
    return (
        min(x for x, *_ in places),
        min(y for _, y, *_ in places),
        max(x + w for x, _, w, _ in places),
        max(y + h for _, y, _, h in places),
    )
