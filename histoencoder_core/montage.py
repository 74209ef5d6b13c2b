"""Pictures of many tiles."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from histoencoder_core.slides import read_description
from histoencoder_core.store import Store
from histoencoder_core.tiles import tile_source

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

GAP = 4
"""Pixels between two tiles, and around all."""

STRIP = 16
"""Height in pixels of a line of text."""

FRAME = 3
"""Width in pixels of a frame, which covers a tile's border."""

TEXT_SIZE = 11

_SAME_FIELD = 0.02
"""Largest difference, relative, between the fields of view that share a scale bar."""

_INK, _MISSING, _CROSS = 40, 205, 150
"""Grey values."""


@dataclass
class _Shown:
    """What is known of the tiles so far, by their number in the montage."""

    pixels: dict[int, Pixels] = field(default_factory=dict)
    micrometres: dict[int, float] = field(default_factory=dict)


def montage(
    store: Store,
    tiles: Sequence[tuple[str, str] | None],
    *,
    columns: int = 8,
    side: int = 112,
    captions: Sequence[str] | None = None,
    frames: Sequence[Colour | None] | None = None,
) -> Pixels:
    """Lay tiles side by side, row by row, in the order given.

    Each slide is opened once, several at a time. A tile that can't be read is a grey box with a
    cross, and why is logged. Where all tiles show the same field of view of known size, a scale bar
    stands below them.

    Args:
        store: The store.
        tiles: Ids of slides and names of tiles; None leaves a place empty.
        columns: Places a row; a last row that is not full ends in white.
        side: Width and height of a place in pixels. Tiles are averaged down to it, and keep their
            proportions.
        captions: A line of text under each tile.
        frames: RGB colours to frame tiles with; None for no frame.

    Returns:
        uint8 array of shape (height, width, 3).
    """
    cell = side + GAP + (STRIP if captions is not None else 0)
    rows = max(1, math.ceil(len(tiles) / columns))
    canvas = np.full((rows * cell + GAP, columns * (side + GAP) + GAP, 3), 255, np.uint8)
    shown = _read(store, tiles, side)
    corners = [
        (GAP + i % columns * (side + GAP), GAP + i // columns * cell) for i in range(len(tiles))
    ]
    for i, (left, top) in enumerate(corners):
        if tiles[i] is None:
            continue
        box = canvas[top : top + side, left : left + side]
        pixels = shown.pixels.get(i)
        if pixels is None:
            pixels = _crossed(side)
        height, width = pixels.shape[:2]
        y, x = (side - height) // 2, (side - width) // 2
        box[y : y + height, x : x + width] = pixels
        if frames is not None and (colour := frames[i]) is not None:
            inner = box[FRAME:-FRAME, FRAME:-FRAME].copy()
            box[:] = colour
            box[FRAME:-FRAME, FRAME:-FRAME] = inner
    if captions is not None:
        below = [(left, top + side) for left, top in corners]
        texts = ["" if tiles[i] is None else text for i, text in enumerate(captions)]
        canvas = _written(canvas, below, texts, side)
    bar = _scale_bar(list(shown.micrometres.values()), side, width=canvas.shape[1])
    return canvas if bar is None else np.concatenate([canvas, bar])


def _read(store: Store, tiles: Sequence[tuple[str, str] | None], side: int) -> _Shown:
    wanted: dict[str, dict[int, str]] = {}
    for i, tile in enumerate(tiles):
        if tile is not None:
            wanted.setdefault(tile[0], {})[i] = tile[1]
    shown = _Shown()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(
            lambda slide: _read_slide(store, slide, wanted[slide], side, shown), wanted
        ):
            pass
    return shown


def _read_slide(
    store: Store, slide_id: str, wanted: dict[int, str], side: int, shown: _Shown
) -> None:
    """Read tiles of one slide; whatever can't be read is left out."""
    problem: object = None
    try:
        source = tile_source(store, slide_id)
        if source is None:
            log.warning("%s: has no tiles, so none of them can be shown", slide_id)
            return
        rows = {name: row for row, name in enumerate(source.keys.column("tile").to_pylist())}
        description = read_description(store.slide(slide_id))
        mpp = description.mpp_x if description is not None else None
        widths = source.keys.column("w")
        with source.open() as pixels:
            for i, name in wanted.items():
                if name not in rows:
                    problem = f"there is no tile {name}"
                    continue
                [tile] = pixels.read([rows[name]])
                if not isinstance(tile, np.ndarray):
                    problem = tile
                    continue
                shown.pixels[i] = _fitted(tile, side)
                width = widths[rows[name]].as_py()
                if mpp is not None and width is not None:
                    longer = max(1.0, tile.shape[0] / tile.shape[1])
                    shown.micrometres[i] = width * mpp * longer
    except Exception as error:  # noqa: BLE001 - a picture of the others is better than none
        problem = error
    if problem is not None:
        missing = sum(i not in shown.pixels for i in wanted)
        log.warning("%s: %d of its tiles can't be shown: %s", slide_id, missing, problem)


def _fitted(tile: Pixels, side: int) -> Pixels:
    """A tile in a box, with its proportions kept."""
    scale = side / max(tile.shape[:2])
    height, width = (max(1, round(n * scale)) for n in tile.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(tile, (width, height), interpolation=how), np.uint8)


def _crossed(side: int) -> Pixels:
    box = np.full((side, side, 3), _MISSING, np.uint8)
    for start, end in (((0, 0), (side, side)), ((0, side), (side, 0))):
        cv2.line(box, start, end, (_CROSS,) * 3, 2, cv2.LINE_AA)
    return box


def _written(
    canvas: Pixels, corners: Sequence[tuple[int, int]], texts: Sequence[str], width: int
) -> Pixels:
    """The canvas with a line of text at each corner, cut where it would reach its neighbour."""
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    for (left, top), text in zip(corners, texts, strict=True):
        shortened = text
        while shortened and _font().getlength(shortened) > width:
            shortened = f"{shortened.rstrip('…')[:-1]}…" if len(shortened) > 1 else ""
        draw.text((left, top + 1), shortened, fill=(_INK,) * 3, font=_font())
    return np.asarray(image)


def _scale_bar(fields: list[float], side: int, *, width: int) -> Pixels | None:
    """A strip with a bar of a round length; None if the tiles are not all of one known size.

    Args:
        fields: Widths of the tiles' longer sides in µm.
        side: The same in pixels.
        width: Of the strip in pixels.
    """
    if not fields or max(fields) > (1 + _SAME_FIELD) * min(fields):
        return None
    longest = fields[0] / 2
    power = 10.0 ** math.floor(math.log10(longest))
    length = max(n * power for n in (1, 2, 5) if n * power <= longest)
    strip = np.full((STRIP + GAP, width, 3), 255, np.uint8)
    end = GAP + round(length / fields[0] * side)
    strip[STRIP // 2 - 1 : STRIP // 2 + 2, GAP:end] = _INK
    return _written(strip, [(end + GAP, 0)], [f"{length:g} µm"], width - end)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    # Pillow's own font knows no letters beyond Latin 1; Matplotlib brings one that does.
    path = Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), TEXT_SIZE)
