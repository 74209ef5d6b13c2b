"""Opening a slide, which a process of its own decodes."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np

from histoencoder_core.buckets import copied
from histoencoder_core.decoding.facts import Region
from histoencoder_core.decoding.readers import SlideReading
from histoencoder_core.errors import SlideError
from histoencoder_core.slides.find import parts_of

_LFS = b"version https://git-lfs"
_STRIP_ROWS = 1024


class Slide:
    """An open slide. Use it in a ``with`` block.

    Attributes:
        path: The slide's file.
        copy: The file that is read: the same, unless the slide lies in a bucket.
        width: Width in level-0 pixels.
        height: Height in level-0 pixels.
        downsamples: Downsample (x, y) of each level, finest first.
        mpp: Stated resolution (x, y) in µm/px at level 0, plausible or not; None if not stated.
        properties: Vendor, objective power and quickhash, where stated.
        backend: Name of the backend that reads it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.ExitStack() as held:
            self.copy = held.enter_context(copied(parts_of(path)))
            self._reading = SlideReading(self.copy)
            self._held = held.pop_all()
        facts = self._reading.facts
        self.height, self.width = facts.sizes[0]
        self.downsamples = [(x, y) for y, x in facts.downsamples]
        self.mpp = facts.mpp
        self.properties = facts.properties
        self.backend = facts.backend

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reading.close()
        self._held.close()

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each level in pixels, finest first."""
        return [(w, h) for h, w in self._reading.facts.sizes]

    @property
    def exact_levels(self) -> bool:
        """Whether a part of a region of a lower level has the pixels that it has alone."""
        return self._reading.facts.exact_levels

    def size_at(self, level: int, region: Region) -> tuple[int, int]:
        """(height, width) in pixels that `read` gives for a region.

        Args:
            level: Pyramid level.
            region: ``x, y, w, h`` in level-0 pixels.
        """
        return self._reading.facts.size_at(level, region)

    def read(self, region: Region, *, level: int = 0) -> np.ndarray:
        """Read a region.

        Args:
            region: ``x, y, w, h`` in level-0 pixels; what lies outside of the slide is white.
            level: Pyramid level to read from.

        Returns:
            uint8 array of shape (h, w, 3), divided by the level's downsample.

        Raises:
            SlideError: The region can't be decoded. Other regions may still be, unless it is a
                `SlideLostError`.
        """
        return self._reading.read(region, level)

    def overview(self, max_dimension: int) -> np.ndarray:
        """Read the whole slide, small.

        The finest level that fits is read. Where even the coarsest does not fit, it is read strip
        by strip and averaged down, so that memory stays bounded.

        Args:
            max_dimension: Largest width and height in pixels of the result.

        Returns:
            uint8 array of shape (height, width, 3).

        Raises:
            SlideError: It can't be decoded.
        """
        for level, size in enumerate(self.level_sizes):
            if max(size) <= max_dimension:
                return self.read((0, 0, self.width, self.height), level=level)
        level, (width, height) = len(self.level_sizes) - 1, self.level_sizes[-1]
        factor = math.ceil(max(width, height) / max_dimension)
        down_y = self.downsamples[level][1]
        rows = max(1, _STRIP_ROWS // factor) * factor
        strips = []
        for top in range(0, height, rows):
            h = min(rows, height - top)
            strip = self.read((0, round(top * down_y), self.width, round(h * down_y)), level=level)
            small = (max(1, width // factor), max(1, h // factor))
            strips.append(cv2.resize(strip, small, interpolation=cv2.INTER_AREA))
        return np.concatenate(strips)


def open_slide(path: Path) -> Slide:
    """Open a slide with the decoder that its suffix names, in a process of its own.

    Args:
        path: Whatever OpenSlide opens, a CZI, or a JPEG.

    Raises:
        SlideError: There is no such file, its format is not read here, it is cut short or damaged,
            or it crashes its decoder.
    """
    if not path.is_file():
        raise SlideError(
            f"{path}: is not there. Check that the folder of slides is mounted.", kind="missing"
        )
    if path.stat().st_size == 0:
        raise SlideError(f"{path}: is empty. Copy it again from the scanner.", kind="unreadable")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise SlideError(
                f"{path}: is a git-LFS pointer, not the slide itself. Fetch the slide with "
                "`git lfs pull`.",
                kind="unreadable",
            )
    return Slide(path)
