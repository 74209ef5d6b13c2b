"""Decoders of slides: OpenSlide, CZI and plain JPEG, told apart by a file's suffix.

Regions are asked for in level-0 pixels, sizes are (height, width), transparency is laid on white,
and whatever lies outside the slide is white. HistoPrep 2.0.5's own readers differ: they drop the
alpha channel, mix up width and height when they divide by anisotropic downsamples, clip a region of
a lower level against level-0 dimensions, do not pad CZI regions, and let Pillow sniff formats.

Any call here may crash or hang on a damaged file, so only reader processes import this module.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import openslide
from aicspylibczi import CziFile

from histoencoder_core.decoding.facts import Region, SlideFacts
from histoencoder_core.decoding.images import on_white, pad_white, read_image
from histoencoder_core.decoding.truncation import TIFF_SUFFIXES, missing_bytes
from histoencoder_core.errors import SlideError

_KEPT_PROPERTIES = {
    "openslide.vendor": "vendor",
    "openslide.objective-power": "objective_power",
    "openslide.quickhash-1": "quickhash",
}
"""All that is ever taken from a slide's own properties: the rest may name a person."""


class Decoder(Protocol):
    """An open slide. Its `read` may be called from several threads."""

    facts: SlideFacts

    def read(self, region: Region, level: int) -> np.ndarray:
        """Read a level-0 region at a level: uint8 (height, width, 3)."""

    def close(self) -> None:
        """Release the file. No thread may still be reading."""


def open_decoder(path: Path) -> Decoder:
    """Open a slide with the decoder that its suffix names.

    Args:
        path: Whatever OpenSlide opens, a CZI, or a JPEG.

    Raises:
        SlideError: Its format is not read here, or it is cut short.
        Exception: Whatever a library raises for a file that is damaged.
    """
    suffix = path.suffix.lower()
    if suffix in {".jpg", ".jpeg"}:
        return JpegDecoder(path)
    if suffix == ".czi":
        return CziDecoder(path)
    if suffix in TIFF_SUFFIXES and (missing := missing_bytes(path)):
        raise SlideError(
            f"{path}: is cut short, or its directory is damaged: that points {missing:,} bytes "
            "beyond its end. Copy it again from the scanner.",
            kind="truncated",
        )
    try:
        return OpenSlideDecoder(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(
            f"{path}: OpenSlide does not recognise it as a slide ({error}). The file is damaged, "
            "or of an unsupported format: copy it again, or export it as a tiled TIFF.",
            kind="unsupported",
        ) from error


class OpenSlideDecoder:
    """Whatever OpenSlide opens."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(path)
        self._scales = self._slide.level_downsamples
        sizes = tuple((h, w) for w, h in self._slide.level_dimensions)
        if not sizes:
            raise openslide.OpenSlideError("the slide has no image")
        stated = self._slide.properties
        self.facts = SlideFacts(
            backend="OPENSLIDE",
            sizes=sizes,
            mpp=_stated_mpp(stated),
            properties={
                name: stated[key] for key, name in _KEPT_PROPERTIES.items() if key in stated
            },
            exact_levels=True,
        )

    def read(self, region: Region, level: int) -> np.ndarray:
        """See `Decoder`."""
        height, width = self.facts.size_at(level, region)
        # OpenSlide divides x and y alike, by the mean of both downsamples.
        scale, (down_h, down_w) = self._scales[level], self.facts.downsamples[level]
        corner = (round(region[0] * scale / down_w), round(region[1] * scale / down_h))
        # OpenSlide itself gives transparent pixels outside of the slide.
        asked = (corner, level, (width, height))
        try:
            image = self._slide.read_region(*asked)
        except openslide.OpenSlideError:
            # After one failed read a handle refuses everything, so the fault may be another
            # thread's: try again alone. Closing the handle under those still reading would crash.
            self._slide = openslide.OpenSlide(self._path)
            with openslide.OpenSlide(self._path) as alone:
                image = alone.read_region(*asked)
        return on_white(np.asarray(image))

    def close(self) -> None:
        """See `Decoder`."""
        self._slide.close()


def _stated_mpp(stated: Mapping[str, str]) -> tuple[float, float] | None:
    try:
        return float(stated["openslide.mpp-x"]), float(stated["openslide.mpp-y"])
    except (KeyError, ValueError):
        return None


def _halving(height: int, width: int, *, smallest: int) -> tuple[tuple[int, int], ...]:
    """Sizes of levels for a file without a pyramid: each halves the one before."""
    count = 1 + max(0, int(math.log2(max(1, max(height, width) / smallest))))
    return tuple((max(1, round(height / 2**i)), max(1, round(width / 2**i))) for i in range(count))


class JpegDecoder:
    """A plain JPEG, decoded whole; lower levels are area averages."""

    _SMALLEST = 512

    def __init__(self, path: Path) -> None:
        pixels = read_image(path)
        self.facts = SlideFacts(
            backend="PILLOW",
            sizes=_halving(pixels.shape[0], pixels.shape[1], smallest=self._SMALLEST),
            mpp=None,  # a JPEG's dots per inch are those of a printer
            properties={},
            exact_levels=False,
        )
        self._levels = {0: pixels}

    def read(self, region: Region, level: int) -> np.ndarray:
        """See `Decoder`."""
        if level not in self._levels:
            height, width = self.facts.sizes[level]
            self._levels[level] = cv2.resize(
                self._levels[0], (width, height), interpolation=cv2.INTER_AREA
            )
        down_h, down_w = self.facts.downsamples[level]
        x, y = round(region[0] / down_w), round(region[1] / down_h)
        height, width = self.facts.size_at(level, region)
        inside = self._levels[level][max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)]
        return pad_white(inside, (height, width), at=(max(0, -y), max(0, -x)))

    def close(self) -> None:
        """See `Decoder`."""
        self._levels.clear()


class CziDecoder:
    """Zeiss CZI mosaics in colour."""

    _SMALLEST = 1024

    def __init__(self, path: Path) -> None:
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
        self.facts = SlideFacts(
            backend="CZI",
            sizes=_halving(box.h, box.w, smallest=self._SMALLEST),
            mpp=self._stated_mpp(),
            properties={"vendor": "zeiss"},  # nothing else of its metadata is kept
            exact_levels=False,
        )

    def _stated_mpp(self) -> tuple[float, float] | None:
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

    def read(self, region: Region, level: int) -> np.ndarray:
        """See `Decoder`."""
        x, y, w, h = region
        (height, width), size_at = self.facts.sizes[0], self.facts.size_at
        out_h, out_w = size_at(level, region)
        left, top = max(0, x), max(0, y)
        right, bottom = min(width, x + w), min(height, y + h)
        scale = 1 / 2**level
        if (right - left) * scale < 1 or (bottom - top) * scale < 1:
            return np.full((out_h, out_w, 3), 255, np.uint8)  # libCZI crashes on an empty region
        inner = (left, top, right - left, bottom - top)
        pixels = self._czi.read_mosaic(
            region=(self._origin[0] + left, self._origin[1] + top, *inner[2:]),
            scale_factor=scale,
            C=0,
            background_color=(1.0, 1.0, 1.0),
        )
        rgb = cv2.cvtColor(np.squeeze(pixels).reshape(*pixels.shape[-3:]), cv2.COLOR_BGR2RGB)
        inner_h, inner_w = size_at(level, inner)
        inner_h, inner_w = min(inner_h, out_h), min(inner_w, out_w)
        if rgb.shape[:2] != (inner_h, inner_w):  # libCZI rounds sizes its own way
            rgb = cv2.resize(rgb, (inner_w, inner_h), interpolation=cv2.INTER_AREA)
        at = (
            min(round((top - y) * scale), out_h - inner_h),
            min(round((left - x) * scale), out_w - inner_w),
        )
        return pad_white(rgb, (out_h, out_w), at=at)

    def close(self) -> None:
        """See `Decoder`. The library closes the file with its object."""
        del self._czi
