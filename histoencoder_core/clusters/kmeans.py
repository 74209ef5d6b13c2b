"""k-means on tiles in memory: where centroids start, and how they come to rest.

Sources: k-means++, Arthur and Vassilvitskii (2007), greedy as in scikit-learn; Lloyd (1982).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from threadpoolctl import threadpool_limits

from histoencoder_core.clusters.engine import Centroids, Engine, usable_cores
from histoencoder_core.errors import ClusterError

STARTS = 8
"""k-means++ starts tried for each K."""

START_TILES = 4096
"""Tiles that a start is drawn from and judged on, more for a large K."""

START_STEPS = 5
"""Steps of k-means that a start is judged after."""

SAME_TILE = 1e-9
"""Squared distance, as a share of the tiles' spread, below which two tiles differ by rounding."""

STEPS = 100
"""Most steps from the best start."""

Points = dict[int, torch.Tensor]
"""Centroids by K: float64 tensors of shape (K, length), on the CPU."""


@dataclass(frozen=True)
class Rest:
    """Where centroids came to rest.

    Attributes:
        points: The centroids.
        counts: By K, int64 tensor of shape (K,): tiles of each cluster.
        inertia: By K, the sum of squared distances before the last step.
    """

    points: Points
    counts: dict[int, torch.Tensor]
    inertia: dict[int, float]


def fit_in_memory(
    engine: Engine, tiles: torch.Tensor, ks: Sequence[int], *, seed: int, tolerance: float
) -> Rest:
    """Fit k-means for each K.

    Args:
        engine: What computes.
        tiles: float32 tensor of shape (tiles, length) on the engine's device, at least as many as
            the largest K.
        ks: Numbers of clusters.
        seed: Of the starts.
        tolerance: A K's centroids rest whose squared movement, as a mean over tiles, is no more.

    Raises:
        ClusterError: The features are too large to be squared.
    """
    size = min(len(tiles), max(START_TILES, 4 * max(ks)))
    drawn = np.random.default_rng(seed).choice(len(tiles), size, replace=False)
    subset = tiles[torch.from_numpy(drawn).to(tiles.device)]
    best: Points = {}
    least = dict.fromkeys(ks, float("inf"))
    for points in _starts(subset.cpu().numpy(), ks, seed=seed):
        rest = settle(engine, subset, points, steps=START_STEPS, tolerance=tolerance)
        for k in ks:
            if rest.inertia[k] < least[k]:
                best[k], least[k] = rest.points[k], rest.inertia[k]
    if len(best) < len(ks):
        raise ClusterError(
            f"The features reach {float(tiles.abs().max()):.3g}, which is too large to compute "
            "distances with. Extract the slides again, or look for what is wrong with the encoder."
        )
    return settle(engine, tiles, best, steps=STEPS, tolerance=tolerance)


def _starts(tiles: np.ndarray, ks: Sequence[int], *, seed: int) -> list[Points]:
    """Several k-means++ starts, which are tried in turn.

    One start alone often puts two centroids into one clear cluster, which no step ever mends.
    """

    def draw(k: int, number: int) -> torch.Tensor:
        # scikit-learn's own seeds are of 32 bits.
        drawn = int(np.random.default_rng([seed, k, number]).integers(2**31))
        return torch.from_numpy(kmeans_plusplus(tiles, k, random_state=drawn)[0]).double()

    # A start must not depend on how many threads added up its numbers, so each has one.
    with threadpool_limits(1), ThreadPoolExecutor(usable_cores()) as pool:
        drawn = {k: pool.map(draw, [k] * STARTS, range(STARTS)) for k in sorted(ks, reverse=True)}
        found = {k: list(points) for k, points in drawn.items()}
    return [{k: found[k][number] for k in ks} for number in range(STARTS)]


def settle(
    engine: Engine, tiles: torch.Tensor, start: Points, *, steps: int, tolerance: float
) -> Rest:
    """Move centroids to the means of their tiles, over and over, until they rest.

    Args:
        engine: What computes.
        tiles: float32 tensor of shape (tiles, length) on the engine's device.
        start: The centroids.
        steps: Most steps.
        tolerance: A K's centroids rest whose squared movement, as a mean over tiles, is no more.
    """
    rest = Rest(dict(start), {}, {})
    moving = list(start)
    for _ in range(steps):
        centroids = Centroids({k: rest.points[k] for k in moving}, engine.device)
        sums = engine.sums(tiles, centroids)
        for k in list(moving):
            counts = sums.counts[k]
            step = sums.moves[k] / counts.clamp(min=1)[:, None]
            rest.points[k] = rest.points[k] + step
            rest.counts[k], rest.inertia[k] = counts, sums.inertia[k]
            filled = refill(engine, tiles, rest.points, counts, k)
            moved = float(step.square().sum(dim=1) @ counts.double()) / len(tiles)
            if moved <= tolerance and not filled:
                moving.remove(k)
        if not moving:
            break
    return rest


def refill(
    engine: Engine, tiles: torch.Tensor, points: Points, counts: torch.Tensor, k: int
) -> bool:
    """Move each centroid without tiles onto the tile that is farthest from all centroids.

    Args:
        engine: What computes.
        tiles: float32 tensor of shape (tiles, length) on the engine's device.
        points: The centroids; those of one K are changed.
        counts: int64 tensor of shape (K,): tiles of each cluster.
        k: The number of clusters.

    Returns:
        Whether one was moved. It is not where there are fewer different tiles than clusters.
    """
    moved = False
    # Transformed in parts of other sizes, equal tiles differ in their last digits.
    least = SAME_TILE * float(tiles.var(dim=0, correction=0).sum())
    for cluster in torch.nonzero(counts == 0).flatten().tolist():
        found = engine.find(tiles, Centroids({k: points[k]}, engine.device))
        farthest = int(found.squared[k].argmax())
        if not float(found.squared[k][farthest]) > least:
            break
        points[k] = points[k].clone()
        points[k][cluster] = tiles[farthest].double().cpu()
        moved = True
    return moved
