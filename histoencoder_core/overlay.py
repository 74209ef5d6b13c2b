"""Colours laid over a slide's thumbnail, tile by tile."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from histoencoder_core.decoding.images import read_image
from histoencoder_core.slides import read_description
from histoencoder_core.slides.describe import THUMBNAIL_DIMENSION
from histoencoder_core.store import SlideFolder, layout

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]


class _Placed(NamedTuple):
    """A tile's place in level-0 pixels, and its colour."""

    x: int
    y: int
    w: int
    h: int
    colour: Colour


def draw_tiles(
    folder: SlideFolder,
    keys: pa.Table,
    colours: Sequence[Colour | None],
    *,
    legend: Mapping[str, Colour] | None = None,
    untrained: bool = False,
) -> Pixels | None:
    """Lay the colours of tiles over the slide's thumbnail.

    Args:
        folder: The slide's folder.
        keys: Table of ``tile, x, y, w, h``.
        colours: RGB of each tile; None leaves it bare.
        legend: What the colours mean, told in a strip below the slide.
        untrained: Write into the picture that random weights are behind it.

    Returns:
        uint8 array of shape (height, width, 3); None if no tile has both a place and a colour.
    """
    columns = [keys.column(name).to_pylist() for name in "xywh"]
    placed = [
        _Placed(x, y, w, h, colour)
        for x, y, w, h, colour in zip(*columns, colours, strict=True)
        if None not in (x, y, w, h, colour)
    ]
    if not placed:
        return None
    canvas, scale = _canvas(folder, placed)
    overlay = canvas.copy()
    step_x = _step([tile.x for tile in placed], default=placed[0].w)
    step_y = _step([tile.y for tile in placed], default=placed[0].h)
    for x, y, w, h, colour in placed:
        # Neighbours overlap: each colours only the part that lies nearest to its centre.
        centre_x, centre_y = x + w / 2, y + h / 2
        half_w, half_h = min(step_x, w) / 2, min(step_y, h) / 2
        left, top = round((centre_x - half_w) * scale), round((centre_y - half_h) * scale)
        right, bottom = round((centre_x + half_w) * scale), round((centre_y + half_h) * scale)
        # OpenCV colours the last corner too, which is the next tile's first.
        last = (max(left, right - 1), max(top, bottom - 1))
        cv2.rectangle(overlay, (left, top), last, colour, -1)
    picture = np.asarray(cv2.addWeighted(canvas, 0.5, overlay, 0.5, 0), np.uint8)
    if untrained:
        size = max(0.6, picture.shape[1] / 900)
        at = (10, round(30 * size))
        cv2.putText(
            picture, "UNTRAINED ENCODER", at, cv2.FONT_HERSHEY_SIMPLEX, size, (200, 0, 0), 2
        )
    return _above_legend(picture, legend) if legend else picture


def _canvas(folder: SlideFolder, placed: list[_Placed]) -> tuple[Pixels, float]:
    """The slide's thumbnail, or white where there is none, and its pixels a level-0 pixel."""
    slide = read_description(folder)
    if slide is not None:
        thumbnail = read_image(folder.file(layout.THUMBNAIL)).copy()
        return thumbnail, thumbnail.shape[1] / slide.width
    width = max(tile.x + tile.w for tile in placed)
    height = max(tile.y + tile.h for tile in placed)
    scale = min(1.0, THUMBNAIL_DIMENSION / max(width, height))
    shape = (max(1, round(height * scale)), max(1, round(width * scale)), 3)
    return np.full(shape, 255, np.uint8), scale


def _step(places: list[int], *, default: int) -> int:
    """The grid's step along an axis: the smallest distance of two tiles."""
    return min((b - a for a, b in itertools.pairwise(sorted(set(places)))), default=default)


def _above_legend(picture: Pixels, legend: Mapping[str, Colour]) -> Pixels:
    """The picture with a strip below that names the colours, in as many lines as it takes."""
    import matplotlib as mpl  # takes a while, and few pictures have a legend

    size = max(11, picture.shape[1] // 64)
    # OpenCV writes ASCII only, and Pillow brings no font of its own that can be scaled.
    font = ImageFont.truetype(str(Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
    line, gap = 2 * size, size // 2
    places, x, y = [], gap, gap
    for name in legend:
        width = 2 * size + round(font.getlength(name)) + 2 * gap
        if x > gap and x + width > picture.shape[1]:
            x, y = gap, y + line
        places.append((x, y))
        x += width
    strip = Image.new("RGB", (picture.shape[1], y + line), (255, 255, 255))
    draw = ImageDraw.Draw(strip)
    for (x, y), (name, colour) in zip(places, legend.items(), strict=True):
        draw.rectangle((x, y, x + size, y + size), fill=colour)
        draw.text((x + size + gap, y + size / 2), name, fill=(0, 0, 0), font=font, anchor="lm")
    return np.concatenate([picture, np.asarray(strip)])
