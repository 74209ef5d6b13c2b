"""Quality metrics of tiles, HistoPrep's own set."""

from __future__ import annotations

from collections.abc import Iterable

import histoprep.functional as histoprep
import numpy as np
import pyarrow as pa

CHANNELS = ("gray", "red", "green", "blue", "hue", "saturation", "brightness")
METRICS = (
    "black_pixels",
    "white_pixels",
    "laplacian_std",
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
        (sharpness), means and standard deviations of the grey, RGB and HSV channels.
    """
    # HistoPrep 2.0.5's quantiles fail on NumPy 2.
    found = histoprep.get_image_metrics(pixels, mask, quantiles=())
    return {name: float(found[name]) for name in METRICS}


def metrics_table(rows: Iterable[dict[str, float]]) -> pa.Table:
    """Collect metrics of tiles into float32 columns."""
    listed = list(rows)
    columns = {name: np.array([row[name] for row in listed], np.float32) for name in METRICS}
    return pa.table(columns)
