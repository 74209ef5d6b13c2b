"""Bringing tiles into the form an encoder takes: resized and normalised, on its device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

NORMALISING_TILES = 1000


@dataclass(frozen=True)
class Normalisation:
    """What is done to pixel values: ``(x / 255 - mean) / std`` for each channel.

    Attributes:
        mean: Of each channel, in units of [0, 1].
        std: Of each channel, in units of [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


def normalised(
    tiles: Sequence[np.ndarray], *, size: int, normalisation: Normalisation, device: torch.device
) -> torch.Tensor:
    """Resize and normalise tiles on a device.

    They travel as uint8. Resizing is bilinear and antialiased and gives whole grey values, as
    Pillow's does, which HistoEncoder 0.1.1 resized with.

    Args:
        tiles: uint8 arrays of shape (height, width, 3), of any sizes.
        size: Width and height in pixels of the result.
        normalisation: What is done to pixel values.
        device: Where it is done, and where the result is.

    Returns:
        float32 tensor of shape (tiles, 3, size, size).
    """
    scale = torch.tensor([255 * value for value in normalisation.std], device=device)
    offset = torch.tensor(
        [m / s for m, s in zip(normalisation.mean, normalisation.std, strict=True)], device=device
    )

    def finished(stacked: np.ndarray) -> torch.Tensor:
        return _resized(stacked, size, device) / scale.view(3, 1, 1) - offset.view(3, 1, 1)

    groups = _by_shape(tiles)
    if len(groups) == 1:
        return finished(groups[0][1])
    batch = torch.empty(len(tiles), 3, size, size, device=device)
    for places, stacked in groups:
        batch[places] = finished(stacked)
    return batch


def estimate_normalisation(tiles: Iterable[np.ndarray]) -> Normalisation:
    """Estimate a slide's normalisation as HistoEncoder 0.1.1 did, through HistoPrep 2.

    Args:
        tiles: uint8 arrays of shape (height, width, 3).

    Returns:
        The means, over tiles, of each tile's mean and standard deviation; 1 for a deviation of 0.

    Raises:
        ValueError: There are no tiles.
    """
    moments = [(tile.mean(axis=(0, 1)) / 255, tile.std(axis=(0, 1)) / 255) for tile in tiles]
    if not moments:
        raise ValueError("There are no tiles to estimate a normalisation from.")
    means, stds = np.mean(moments, axis=0)
    stds[stds == 0] = 1  # tiles of one colour would be divided by zero
    return Normalisation(tuple(means.tolist()), tuple(stds.tolist()))


def _by_shape(tiles: Sequence[np.ndarray]) -> list[tuple[list[int], np.ndarray]]:
    """Tiles of one shape stacked, with their places in the batch."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, tile in enumerate(tiles):
        places.setdefault(tile.shape, []).append(place)
    return [(found, np.stack([tiles[place] for place in found])) for found in places.values()]


def _resized(stacked: np.ndarray, size: int, device: torch.device) -> torch.Tensor:
    """Whole grey values of shape (tiles, 3, size, size), from uint8 (tiles, height, width, 3)."""
    pixels = torch.from_numpy(stacked)
    if device.type == "cuda":
        # Only from pinned memory does a copy overlap with what the device computes.
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    pixels = pixels.permute(0, 3, 1, 2)
    if pixels.shape[-2:] == (size, size):
        return pixels
    if device.type == "cpu":
        return functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return resized_in_float(pixels, size)


def resized_in_float(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Resize as a GPU does, for which PyTorch has no resizing of uint8.

    Args:
        pixels: uint8 of shape (tiles, 3, height, width).
        size: Width and height in pixels of the result.

    Returns:
        float32 of shape (tiles, 3, size, size) with whole grey values.
    """
    exact = functional.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True)
    return exact.round().clamp(0, 255)
