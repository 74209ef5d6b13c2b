"""Backends for HistoPrep's `SlideReader` that read what HistoPrep's own read wrongly.

HistoPrep 2.0.5 drops the alpha channel instead of laying it on white, mixes up width and height
when it divides by anisotropic downsamples, clips a region of a lower level against level-0
dimensions, does not pad CZI regions, and lets Pillow sniff formats. These backends keep its
interface: regions are asked for in level-0 pixels, sizes are (height, width), and whatever lies
outside the slide is white.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from abc import abstractmethod
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
from aicspylibczi import CziFile
from histoprep._backend import SlideReaderBackend

from histoencoder_core.errors import SlideError
from histoencoder_core.slides.images import on_white, read_image

Region = tuple[int, int, int, int]

_KEPT_PROPERTIES = {
    "openslide.vendor": "vendor",
    "openslide.objective-power": "objective_power",
    "openslide.quickhash-1": "quickhash",
}
"""All that is ever taken from a slide's own properties: the rest may name a person."""


class Backend(SlideReaderBackend):  # type: ignore[misc]  # HistoPrep has no types
    """What this project asks of a backend beyond HistoPrep's interface."""

    BACKEND_NAME: str
    EXACT_LEVELS = False
    """Whether lower levels are read from the file, not scaled for each region."""

    @property
    @abstractmethod
    def mpp(self) -> tuple[float, float] | None:
        """Stated resolution (x, y) in µm/px at level 0, plausible or not."""

    @property
    def kept_properties(self) -> dict[str, str]:
        """The vendor properties on the allow-list."""
        return {}

    def level_region(self, xywh: Region, level: int) -> tuple[int, int]:
        """Size (height, width) in pixels that a level-0 region has at a level."""
        down_h, down_w = self.level_downsamples[level]
        return max(1, round(xywh[3] / down_h)), max(1, round(xywh[2] / down_w))

    def read_level(self, level: int) -> np.ndarray:
        """Read a whole level: uint8 (height, width, 3)."""
        height, width = self.dimensions
        return np.asarray(self.read_region((0, 0, width, height), level))

    def close(self) -> None:
        """Release the file."""


class OpenSlideBackend(Backend):
    """Whatever OpenSlide opens."""

    BACKEND_NAME = "OPENSLIDE"
    EXACT_LEVELS = True

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._slide = openslide.OpenSlide(str(path))
        self._sizes = self._slide.level_dimensions
        self._scales = self._slide.level_downsamples
        if not self._sizes:
            raise openslide.OpenSlideError("the slide has no image")

    @property
    def reader(self) -> Any:
        """The `openslide.OpenSlide` object."""
        return self._slide

    @property
    def mpp(self) -> tuple[float, float] | None:
        """Stated resolution (x, y) in µm/px at level 0."""
        try:
            stated = self._slide.properties
            return float(stated["openslide.mpp-x"]), float(stated["openslide.mpp-y"])
        except (KeyError, ValueError):
            return None

    @property
    def kept_properties(self) -> dict[str, str]:
        """The vendor properties on the allow-list."""
        stated = self._slide.properties
        return {name: stated[key] for key, name in _KEPT_PROPERTIES.items() if key in stated}

    @property
    def data_bounds(self) -> Region:
        """The region with image data, ``x, y, w, h`` in level-0 pixels."""
        height, width = self.dimensions
        stated = self._slide.properties
        try:
            x, y = int(stated["openslide.bounds-x"]), int(stated["openslide.bounds-y"])
            w, h = int(stated["openslide.bounds-width"]), int(stated["openslide.bounds-height"])
        except (KeyError, ValueError):
            return (0, 0, width, height)
        return (x, y, w, h)

    @property
    def dimensions(self) -> tuple[int, int]:
        """(height, width) at level 0."""
        return self.level_dimensions[0]

    @property
    def level_count(self) -> int:
        """Number of levels."""
        return len(self._sizes)

    @property
    def level_dimensions(self) -> dict[int, tuple[int, int]]:
        """(height, width) of each level."""
        return {i: (h, w) for i, (w, h) in enumerate(self._sizes)}

    @property
    def level_downsamples(self) -> dict[int, tuple[float, float]]:
        """Downsample of (height, width) of each level."""
        height, width = self.dimensions
        return {i: (height / h, width / w) for i, (h, w) in self.level_dimensions.items()}

    def read_region(self, xywh: Region, level: int = 0) -> np.ndarray:
        """Read a level-0 region at a level: uint8 (height, width, 3)."""
        height, width = self.level_region(xywh, level)
        # OpenSlide divides x and y alike, by the mean of both downsamples.
        scale, (down_h, down_w) = self._scales[level], self.level_downsamples[level]
        corner = (round(xywh[0] * scale / down_w), round(xywh[1] * scale / down_h))
        # OpenSlide itself gives transparent pixels outside of the slide.
        asked = (corner, level, (width, height))
        try:
            image = self._slide.read_region(*asked)
        except openslide.OpenSlideError:
            # After one failed read a handle refuses everything, so the fault may be another
            # thread's: try again alone. Closing the handle under those still reading would crash.
            self._slide = openslide.OpenSlide(self.path)
            with openslide.OpenSlide(self.path) as alone:
                image = alone.read_region(*asked)
        return on_white(np.asarray(image))

    def close(self) -> None:
        """Release the file."""
        self._slide.close()


class _VirtualPyramid(Backend):
    """A backend whose file has no pyramid of its own: levels halve the one before."""

    MIN_LEVEL_DIMENSION: int

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._size = (0, 0)

    @property
    def data_bounds(self) -> Region:
        """The whole slide, ``x, y, w, h`` in level-0 pixels."""
        return (0, 0, self._size[1], self._size[0])

    @property
    def dimensions(self) -> tuple[int, int]:
        """(height, width) at level 0."""
        return self._size

    @property
    def level_count(self) -> int:
        """Number of levels."""
        longest = max(self._size)
        return 1 + max(0, int(math.log2(max(1, longest / self.MIN_LEVEL_DIMENSION))))

    @property
    def level_dimensions(self) -> dict[int, tuple[int, int]]:
        """(height, width) of each level."""
        height, width = self._size
        return {
            i: (max(1, round(height / 2**i)), max(1, round(width / 2**i)))
            for i in range(self.level_count)
        }

    @property
    def level_downsamples(self) -> dict[int, tuple[float, float]]:
        """Downsample of (height, width) of each level."""
        height, width = self._size
        return {i: (height / h, width / w) for i, (h, w) in self.level_dimensions.items()}


class JpegBackend(_VirtualPyramid):
    """A plain JPEG, decoded whole; lower levels are area averages."""

    BACKEND_NAME = "PILLOW"
    MIN_LEVEL_DIMENSION = 512

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        pixels = read_image(Path(path))
        self._size = (pixels.shape[0], pixels.shape[1])
        self._levels = {0: pixels}

    @property
    def reader(self) -> np.ndarray:
        """The decoded image."""
        return self._levels[0]

    @property
    def mpp(self) -> None:
        """None: a JPEG's dots per inch are those of a printer."""
        return

    def read_region(self, xywh: Region, level: int = 0) -> np.ndarray:
        """Read a level-0 region at a level: uint8 (height, width, 3)."""
        if level not in self._levels:
            height, width = self.level_dimensions[level]
            self._levels[level] = cv2.resize(
                self._levels[0], (width, height), interpolation=cv2.INTER_AREA
            )
        down_h, down_w = self.level_downsamples[level]
        x, y = round(xywh[0] / down_w), round(xywh[1] / down_h)
        height, width = self.level_region(xywh, level)
        inside = self._levels[level][max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)]
        return pad_white(inside, (height, width), at=(max(0, -y), max(0, -x)))


class CziBackend(_VirtualPyramid):
    """Zeiss CZI mosaics in colour."""

    BACKEND_NAME = "CZI"
    MIN_LEVEL_DIMENSION = 1024

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._czi = CziFile(str(path))
        if self._czi.pixel_type != "bgr24":
            raise SlideError(
                f"{path}: a CZI of type {self._czi.pixel_type}, not of 8-bit colour pixels; only "
                "brightfield CZI files are read. Export it as a TIFF.",
                kind="unsupported",
            )
        box = (
            self._czi.get_mosaic_bounding_box()
            if self._czi.is_mosaic()
            else self._czi.get_tile_bounding_box(C=0)
        )
        self._origin = (box.x, box.y)
        self._size = (box.h, box.w)

    @property
    def reader(self) -> Any:
        """The `aicspylibczi.CziFile` object."""
        return self._czi

    @property
    def mpp(self) -> tuple[float, float] | None:
        """Stated resolution (x, y) in µm/px at level 0."""
        meta = self._czi.meta
        if isinstance(meta, str):
            meta = ET.fromstring(meta)  # noqa: S314 - the CZI library parses the same text
        found = []
        for axis in "XY":
            value = meta.findtext(f".//Scaling/Items/Distance[@Id='{axis}']/Value")
            if not value:
                return None
            found.append(float(value) * 1e6)
        return found[0], found[1]

    @property
    def kept_properties(self) -> dict[str, str]:
        """The vendor; nothing else of a CZI's metadata is kept."""
        return {"vendor": "zeiss"}

    def read_region(self, xywh: Region, level: int = 0) -> np.ndarray:
        """Read a level-0 region at a level: uint8 (height, width, 3)."""
        x, y, w, h = xywh
        out_h, out_w = self.level_region(xywh, level)
        left, top = max(0, x), max(0, y)
        right, bottom = min(self._size[1], x + w), min(self._size[0], y + h)
        scale = 1 / 2**level
        if (right - left) * scale < 1 or (bottom - top) * scale < 1:
            return np.full((out_h, out_w, 3), 255, np.uint8)  # libCZI crashes on an empty region
        region = (self._origin[0] + left, self._origin[1] + top, right - left, bottom - top)
        pixels = self._czi.read_mosaic(
            region=region, scale_factor=scale, C=0, background_color=(1.0, 1.0, 1.0)
        )
        rgb = cv2.cvtColor(np.squeeze(pixels).reshape(*pixels.shape[-3:]), cv2.COLOR_BGR2RGB)
        inner_h, inner_w = self.level_region((left, top, right - left, bottom - top), level)
        inner_h, inner_w = min(inner_h, out_h), min(inner_w, out_w)
        if rgb.shape[:2] != (inner_h, inner_w):  # libCZI rounds sizes its own way
            rgb = cv2.resize(rgb, (inner_w, inner_h), interpolation=cv2.INTER_AREA)
        at = (
            min(round((top - y) * scale), out_h - inner_h),
            min(round((left - x) * scale), out_w - inner_w),
        )
        return pad_white(rgb, (out_h, out_w), at=at)


def pad_white(
    pixels: np.ndarray, size: tuple[int, int], *, at: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Lay pixels onto a white canvas.

    Args:
        pixels: uint8 array of shape (h, w, 3), no larger than the canvas.
        size: (height, width) of the canvas.
        at: (row, column) of the pixels' top-left corner.

    Returns:
        uint8 array of shape (height, width, 3).
    """
    if pixels.shape[:2] == size:
        return np.ascontiguousarray(pixels)
    canvas = np.full((*size, 3), 255, np.uint8)
    canvas[at[0] : at[0] + pixels.shape[0], at[1] : at[1] + pixels.shape[1]] = pixels
    return canvas
