"""Laying a grid of tiles over a slide, at the resolution asked for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

from histoencoder_core.errors import SlideError
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import Description
from histoencoder_core.slides.describe import NO_MPP

TOLERANCE = 0.01
"""Relative error accepted in a tile's field of view and in its resolution."""


@dataclass(frozen=True)
class Grid:
    """The shape of every tile of a slide.

    Attributes:
        width: Tile width in level-0 pixels.
        height: Tile height in level-0 pixels.
        step_x: Distance of neighbours in level-0 pixels.
        step_y: The same, vertically.
        level: Pyramid level that is read.
        image_size: (width, height) in pixels of a tile's image.
        mpp: Achieved resolution (x, y) of the image in µm/px; None if the slide's is not known.
    """

    width: int
    height: int
    step_x: int
    step_y: int
    level: int
    image_size: tuple[int, int]
    mpp: tuple[float, float] | None


def plan_grid(slide: Description, settings: TilingSettings) -> Grid:
    """Work out what a request means on a slide.

    Args:
        slide: The slide.
        settings: The request, physical or HistoPrep's.

    Returns:
        The shape of every tile.

    Raises:
        SlideError: The slide's resolution is not known or coarser than the request, the request
            can't be met within 1 % of its field of view, or the slide has no such level.
    """
    if settings.width is not None:
        return _histoprep_grid(slide, settings, settings.width)
    mpp = _known_mpp(slide)
    for value in mpp:
        if settings.mpp < value * (1 - TOLERANCE) and not settings.allow_upsampling:
            raise SlideError(
                f"{slide.path}: {settings.mpp:g} µm/px was asked for, but the slide has only "
                f"{value:g} µm/px. Ask for mpp = {value:.4g} or coarser, or allow upsampling.",
                kind="too-fine",
            )
    field = settings.mpp * settings.tile_px
    width, height = (max(1, round(field / value)) for value in mpp)
    for pixels, value in ((width, mpp[0]), (height, mpp[1])):
        if abs(pixels * value / field - 1) > TOLERANCE:
            raise SlideError(
                f"{slide.path}: a tile of {field:g} µm is {pixels} whole pixels of {value:g} µm, "
                "more than 1 % off. Ask for larger tiles.",
                kind="too-small",
            )
    return Grid(
        width=width,
        height=height,
        step_x=_step(width, settings.overlap),
        step_y=_step(height, settings.overlap),
        level=_level_for(slide, settings.mpp / max(mpp)),
        image_size=(settings.tile_px, settings.tile_px),
        mpp=(width * mpp[0] / settings.tile_px, height * mpp[1] / settings.tile_px),
    )


def lay_grid(
    slide: Description,
    grid: Grid,
    mask: np.ndarray,
    *,
    max_background: float,
    in_bounds: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Place tiles and keep those with enough tissue.

    Tiles start at the slide's top left corner and may reach beyond its right and lower border, as
    with HistoPrep's command line; what lies outside counts as background.

    Args:
        slide: The slide.
        grid: The shape of its tiles.
        mask: uint8 array of shape (height, width) over the whole slide, 1 for tissue.
        max_background: Largest share of background in a kept tile.
        in_bounds: Leave out tiles that reach beyond the slide's border.

    Returns:
        An int32 array of shape (tiles, 4), ``x, y, w, h`` in level-0 pixels, row by row, and a
        float32 array of shape (tiles,), the share of background.
    """
    xs, ys = range(0, slide.width, grid.step_x), range(0, slide.height, grid.step_y)
    places = np.array(
        [(x, y, grid.width, grid.height) for y, x in itertools.product(ys, xs)], np.int64
    ).reshape(-1, 4)
    background = background_share(places, mask, (slide.width, slide.height))
    kept = background <= max_background
    if in_bounds:
        kept &= (places[:, :2] + places[:, 2:] <= [slide.width, slide.height]).all(axis=1)
    return places[kept].astype(np.int32), background[kept].astype(np.float32)


def background_share(places: np.ndarray, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The share of background in each tile.

    Args:
        places: Integer array of shape (tiles, 4), ``x, y, w, h`` in level-0 pixels.
        mask: uint8 array of shape (height, width), 1 for tissue.
        size: (width, height) of the slide in level-0 pixels.

    Returns:
        float64 array of shape (tiles,).
    """
    rows, columns = mask.shape
    down = np.array([size[0] / columns, size[1] / rows])
    start = np.rint(places[:, :2] / down).astype(int)
    extent = np.maximum(1, np.rint(places[:, 2:] / down).astype(int))
    left, top = np.clip(start, 0, [columns, rows]).T
    right, bottom = np.clip(start + extent, 0, [columns, rows]).T
    total = cv2.integral(mask)
    tissue = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    area = extent.prod(axis=1)
    share: np.ndarray = (area - tissue) / area
    return share


def _histoprep_grid(slide: Description, settings: TilingSettings, width: int) -> Grid:
    height = settings.height or width
    count = len(slide.levels)
    level = settings.level or 0
    if not -count <= level < count:
        raise SlideError(
            f"{slide.path}: has no level {level}; it has {count}, 0 being the finest.",
            kind="unsupported",
        )
    level %= count
    down_x = slide.width / slide.levels[level]["width"]
    down_y = slide.height / slide.levels[level]["height"]
    known = slide.mpp_x is not None and slide.mpp_y is not None
    return Grid(
        width=width,
        height=height,
        step_x=_step(width, settings.overlap),
        step_y=_step(height, settings.overlap),
        level=level,
        image_size=(max(1, round(width / down_x)), max(1, round(height / down_y))),
        mpp=(slide.mpp_x * down_x, slide.mpp_y * down_y) if known else None,  # type: ignore[operator]
    )


def _known_mpp(slide: Description) -> tuple[float, float]:
    if slide.mpp_x is None or slide.mpp_y is None:
        stated = slide.mpp_problem or NO_MPP
        raise SlideError(
            f"{slide.path}: its resolution is not known ({stated}). Add a row to slides.csv "
            f"(columns slide, mpp): {slide.slide},<µm/px>. Or ask for tiles in pixels with width.",
            kind="no-mpp" if stated == NO_MPP else "implausible-mpp",
        )
    return slide.mpp_x, slide.mpp_y


def _level_for(slide: Description, downsample: float) -> int:
    """The coarsest level that is still as fine as asked, so that pixels are only averaged."""
    fine_enough = [
        i
        for i, level in enumerate(slide.levels)
        if level["downsample"] <= downsample * (1 + TOLERANCE)
    ]
    return max(fine_enough, default=0)


def _step(size: int, overlap: float) -> int:
    return max(1, size - round(size * overlap))
