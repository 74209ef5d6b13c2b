"""Quantiles of any number of distances in a fixed amount of memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_DROPPED_BITS = 12
"""Of a float32's 23 that tell its fraction: 11 remain, so that a bin is at most 0.05 % wide."""


class Distances:
    """A histogram of distances whose bins are as narrow, relative to the distance, everywhere.

    The bins are the leading bits of a float32, whose order as whole numbers is that of the numbers
    they stand for. Quantiles are within 0.05 % of the exact ones; the least and the largest
    distance are exact.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(2 ** (31 - _DROPPED_BITS), np.int64)
        self._least, self._most = np.float32(np.inf), np.float32(0)

    def add(self, distances: Floats) -> None:
        """Count distances, none of which is negative."""
        if len(distances) == 0:
            return
        bits = np.ascontiguousarray(distances, np.float32).view(np.int32) >> _DROPPED_BITS
        np.add.at(self._counts, bits, 1)
        self._least = min(self._least, distances.min())
        self._most = max(self._most, distances.max())

    def percentiles(self) -> Floats:
        """The quantiles at 0, 1, …, 100 %: float32 array of shape (101,); NaN without distances."""
        total = int(self._counts.sum())
        if total == 0:
            return np.full(101, np.nan, np.float32)
        up_to = np.cumsum(self._counts)
        # As in NumPy, the distances stand at the shares 0, 1 / (total - 1), …, 1.
        ranks = np.linspace(0, total - 1, 101)
        bins = np.searchsorted(up_to, ranks, side="right")
        low, high = (_edge(bins + step) for step in (0, 1))
        within = (ranks - (up_to[bins] - self._counts[bins]) + 0.5) / self._counts[bins]
        found: Floats = (low + (high - low) * np.minimum(within, 1)).astype(np.float32)
        found = np.clip(found, self._least, self._most)
        found[0], found[-1] = self._least, self._most
        return found


def _edge(bins: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The least distance in a bin."""
    return (bins.astype(np.int32) << _DROPPED_BITS).view(np.float32).astype(np.float64)
