"""Numbers of agreement from tables of counts.

A table counts tiles by their label (rows) and by what they are called (columns, in the same order,
and a last one for those that are not called anything).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
"""Draws of the bootstrap."""

LEVEL = 0.95
"""Share of the draws that an interval holds."""

Ints = npt.NDArray[np.int64]


def overall(table: Ints) -> dict[str, Any]:
    """Tiles, coverage (the share that is called something) and accuracy (the share of those right).

    Example:
        >>> overall(np.array([[3, 1, 0], [0, 2, 4]]))
        {'tiles': 10, 'accuracy': 0.8333333333333334, 'coverage': 0.6}
    """
    right, called, tiles = _counts(table)
    return {"tiles": tiles, "accuracy": ratio(right, called), "coverage": ratio(called, tiles)}


def of_class(table: Ints, i: int) -> dict[str, Any]:
    """Tiles, precision, recall and F1 of one label; a tile not called anything is missed."""
    right, tiles, called = (int(n) for n in (table[i, i], table[i].sum(), table[:, i].sum()))
    return {
        "tiles": tiles,
        "precision": ratio(right, called),
        "recall": ratio(right, tiles),
        "f1": ratio(2 * right, tiles + called),
    }


def intervals(tables: list[Ints], *, seed: int) -> dict[str, list[float] | None]:
    """Intervals of accuracy and coverage over groups that are independent of each other.

    Groups are drawn with replacement (cluster bootstrap; Field and Welsh, "Bootstrapping clustered
    data", 2007), as tiles of one patient or slide are alike.

    Args:
        tables: One a group.
        seed: Of the draws.

    Returns:
        Ends of the intervals; None for fewer than two groups.
    """
    if len(tables) < 2:
        return {"accuracy": None, "coverage": None}
    counts = np.array([_counts(table) for table in tables])
    rng = np.random.default_rng(seed)
    drawn = [counts[rng.integers(len(counts), size=len(counts))].sum(axis=0)
             for _ in range(RESAMPLES)]  # fmt: skip
    right, called, tiles = np.array(drawn).T
    return {
        "accuracy": _ends(right[called > 0] / called[called > 0]),
        "coverage": _ends(called / tiles),
    }


def ratio(part: int, whole: int) -> float | None:
    """A share; None of nothing."""
    return part / whole if whole else None


def _counts(table: Ints) -> tuple[int, int, int]:
    """Tiles that are called right, that are called something, and all."""
    return int(np.trace(table)), int(table[:, :-1].sum()), int(table.sum())


def _ends(values: npt.NDArray[np.float64]) -> list[float] | None:
    if len(values) == 0:
        return None
    ends: list[float] = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return ends
