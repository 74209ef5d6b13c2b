"""Quality of tiles: HistoPrep's own metrics, blur, and the shares of ink and of nothing."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import pyarrow as pa

from histoencoder_core.tiles.grid import background_share
from histoencoder_core.tiles.tissue import Tissue

CHANNELS = ("gray", "red", "green", "blue", "hue", "saturation", "brightness")
METRICS = (
    "black_pixels",
    "white_pixels",
    "laplacian_std",
    "blur",
    *(f"{channel}_{moment}" for moment in ("mean", "std") for channel in CHANNELS),
)
"""Columns of ``metadata.parquet``: shares in [0, 1], and grey values in [0, 255]."""


def tile_metrics(pixels: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Measure a tile's pixels.

    Args:
        pixels: uint8 array of shape (height, width, 3).
        mask: uint8 array of shape (height, width), 1 for tissue.

    Returns:
        The `METRICS`: shares of black and white pixels, the standard deviation of the Laplacian
        (sharpness), blur, means and standard deviations of the grey, RGB and HSV channels.
    """
    from histoencoder_core.tiles.histoprep_functions import (
        get_image_metrics,
    )  # takes seconds to import

    # HistoPrep 2.0.5's quantiles fail on NumPy 2.
    found = get_image_metrics(pixels, mask, quantiles=())
    found["blur"] = blur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))
    return {name: float(found[name]) for name in METRICS}


def blur(grey: np.ndarray) -> float:
    """How blurred an image is, by Crete et al. (2007, doi 10.1117/12.702790).

    The image is blurred once more, over nine pixels. What is sharp loses most of the differences
    of neighbouring pixels, what was blurred before keeps them. Unlike the Laplacian's deviation,
    this hardly depends on how much there is to see; where there is nothing, noise counts as sharp.

    Args:
        grey: uint8 array of shape (height, width).

    Returns:
        The share of differences that is kept, along rows or columns, whichever keeps more: 0 for
        the sharpest, near 1 for the most blurred. NaN where no pixel differs from its neighbour.
    """
    kept = []
    for axis, extent in ((0, (1, 9)), (1, (9, 1))):
        before = np.abs(np.diff(grey.astype(np.float32), axis=axis))
        after = np.abs(np.diff(cv2.blur(grey.astype(np.float32), extent), axis=axis))
        total = float(before.sum(dtype=np.float64))
        if total > 0:
            kept.append(float(np.minimum(before, after).sum(dtype=np.float64)) / total)
    return max(kept, default=float("nan"))


def ink_and_blank(
    places: np.ndarray, tissue: Tissue, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """How much of each tile is ink, and how much is neither ink nor tissue.

    Args:
        places: Integer array of shape (tiles, 4), ``x, y, w, h`` in level-0 pixels.
        tissue: Where tissue and ink are.
        size: (width, height) of the slide in level-0 pixels.

    Returns:
        The columns ``ink`` and ``blank``, float32 arrays of shape (tiles,) in [0, 1]. What lies
        outside of the slide is blank. Where no ink was looked for, ``ink`` is NaN.
    """
    taken, ink = tissue.mask, np.full(len(places), np.nan)
    if tissue.ink is not None:
        taken = taken | tissue.ink.mask
        ink = 1 - background_share(places, tissue.ink.mask, size)
    blank = background_share(places, taken, size)
    return {"ink": ink.astype(np.float32), "blank": blank.astype(np.float32)}


def metrics_table(rows: Iterable[dict[str, float]]) -> pa.Table:
    """Collect metrics of tiles into float32 columns; what can't be measured is null."""
    listed = list(rows)
    columns = {name: np.array([row[name] for row in listed], np.float32) for name in METRICS}
    return pa.table({name: pa.array(told, from_pandas=True) for name, told in columns.items()})
