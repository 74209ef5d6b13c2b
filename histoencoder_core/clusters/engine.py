"""The arithmetic of k-means, for several K at once, on a CPU or a GPU.

On a CPU, blocks of a fixed size are shared among threads, each of which computes alone, and what
they find is added up in the blocks' order. So results do not depend, to the last bit, on how many
threads there are. On a GPU only operations are used that give the same result every time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from histoencoder_core.clusters.transform import AS_THEY_ARE, Transform

T = TypeVar("T")

CPU_BLOCK, GPU_BLOCK = 512, 65536
"""Tiles that are compared with all centroids at a time."""

_NEAR = 1e-2
"""Squared distances below this share of a tile's squared length are computed anew: subtracting two
almost equal numbers would leave few digits of them."""

_memory = threading.local()


@dataclass(frozen=True)
class Found:
    """Where tiles lie.

    Attributes:
        clusters: By K, int64 tensor of shape (tiles,): the nearest centroid.
        squared: By K, float32 tensor of shape (tiles,): the squared distance to it.
    """

    clusters: dict[int, torch.Tensor]
    squared: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Sums:
    """What a step of k-means needs to know of tiles, by K and on the CPU.

    Attributes:
        counts: int64 tensors of shape (K,): tiles of each cluster.
        moves: float64 tensors of shape (K, length): sum of the tiles' differences to the centroid.
        inertia: Sums of squared distances.
    """

    counts: dict[int, torch.Tensor]
    moves: dict[int, torch.Tensor]
    inertia: dict[int, float]


class Centroids:
    """Centroids of several K, in one matrix.

    Attributes:
        points: By K, float64 tensor of shape (K, length).
    """

    def __init__(self, points: Mapping[int, torch.Tensor], device: torch.device) -> None:
        self.points = dict(points)
        stacked = torch.cat(list(self.points.values()))
        # Far from the origin, differences would drown in the rounding of large numbers.
        self.origin = stacked.mean(dim=0).float()
        moved = (stacked - self.origin).float()
        self._rows = moved.to(device)
        self._columns = moved.T.contiguous().to(device)
        self._squares = moved.square().sum(dim=1).to(device)
        self._on_device = self.origin.to(device)
        edges = np.cumsum([0, *map(len, self.points.values())]).tolist()
        self.slices = dict(zip(self.points, itertools.pairwise(edges), strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def centred(self, rows: torch.Tensor) -> torch.Tensor:
        """Tiles relative to the origin that these centroids are compared at.

        On a CPU they are in memory that the thread's next call writes to: fresh memory takes longer
        than the subtraction.
        """
        if rows.is_cuda:
            return rows - self._on_device
        out = getattr(_memory, "rows", None)
        if out is None or out.shape[1] != rows.shape[1] or len(out) < len(rows):
            out = _memory.rows = torch.empty_like(rows)
        return torch.sub(rows, self._on_device, out=out[: len(rows)])

    def find(self, centred: torch.Tensor) -> Found:
        """The nearest centroids of tiles that are relative to the origin."""
        norms = centred.square().sum(dim=1)
        products = torch.addmm(self._squares, centred, self._columns, alpha=-2)
        clusters, squared = {}, {}
        for k, (first, end) in self.slices.items():
            least, nearest = products[:, first:end].min(dim=1)
            distance = (least + norms).clamp_(min=0)
            near = torch.nonzero(distance < _NEAR * norms).flatten()
            if len(near):
                gap = centred[near] - self._rows[first + nearest[near]]
                distance[near] = gap.square().sum(dim=1)
            clusters[k], squared[k] = nearest, distance
        return Found(clusters, squared)

    def sums(self, centred: torch.Tensor, found: Found) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts, int64 of shape (centroids,), and sums, float32 of shape (centroids, length)."""
        places = torch.stack([found.clusters[k] + first for k, (first, _) in self.slices.items()])
        counts = torch.bincount(places.flatten(), minlength=len(self))
        add_up = by_matrix if centred.is_cuda else by_index
        return counts.cpu(), add_up(centred, places, len(self)).cpu()


def by_index(rows: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
    """Add rows up where they belong; on a GPU the order, and so the result, would vary.

    Args:
        rows: float32 tensor of shape (tiles, length).
        places: int64 tensor of shape (times, tiles): where each row is added, once for each K.
        size: Number of sums.
    """
    total = torch.zeros(size, rows.shape[1], device=rows.device)
    for of_k in places:
        total.index_add_(0, of_k, rows)
    return total


def by_matrix(rows: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
    """The same by a product of matrices: slower on a CPU, and the same every time on a GPU."""
    members = torch.zeros(len(rows), size, device=rows.device)
    members.scatter_(1, places.T, 1.0)
    return members.T @ rows


class Engine:
    """Threads of a CPU, or a GPU.

    Attributes:
        device: Where the arithmetic is done.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="clusters")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _each_block(self, rows: torch.Tensor, work: Callable[[torch.Tensor], T]) -> Iterator[T]:
        """Do some work on blocks of tiles; gives what it gave, in the blocks' order."""
        size = CPU_BLOCK if self.device.type == "cpu" else GPU_BLOCK
        waiting: deque[Future[T]] = deque()
        for first in range(0, max(1, len(rows)), size):
            waiting.append(self._pool.submit(work, rows[first : first + size].to(self.device)))
            if len(waiting) > 2 * self._threads:  # results may be large
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def find(
        self, rows: torch.Tensor, centroids: Centroids, transform: Transform = AS_THEY_ARE
    ) -> Found:
        """The nearest centroids of tiles.

        Args:
            rows: float32 tensor of shape (tiles, length).
            centroids: Of each K.
            transform: What is done to tiles first.

        Returns:
            On the CPU.
        """

        def work(block: torch.Tensor) -> Found:
            found = centroids.find(centroids.centred(transform.apply(block)))
            return Found(
                {k: v.cpu() for k, v in found.clusters.items()},
                {k: v.cpu() for k, v in found.squared.items()},
            )

        parts = list(self._each_block(rows, work))
        return Found(
            {k: torch.cat([part.clusters[k] for part in parts]) for k in centroids.points},
            {k: torch.cat([part.squared[k] for part in parts]) for k in centroids.points},
        )

    def sums(
        self, rows: torch.Tensor, centroids: Centroids, transform: Transform = AS_THEY_ARE
    ) -> Sums:
        """What a step of k-means needs to know of tiles.

        Args:
            rows: float32 tensor of shape (tiles, length).
            centroids: Of each K.
            transform: What is done to tiles first.
        """

        def work(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
            centred = centroids.centred(transform.apply(block))
            found = centroids.find(centred)
            # To float64 on the way: blocks are small, the sum of all is not.
            inertia = [float(found.squared[k].double().sum()) for k in centroids.points]
            return *centroids.sums(centred, found), inertia

        counts = torch.zeros(len(centroids), dtype=torch.int64)
        total = torch.zeros(len(centroids), len(centroids.origin), dtype=torch.float64)
        inertia = np.zeros(len(centroids.points))
        for of_block, sums, squared in self._each_block(rows, work):
            counts += of_block
            total += sums
            inertia += squared
        of_k: Sums = Sums({}, {}, dict(zip(centroids.points, inertia.tolist(), strict=True)))
        for k, (first, end) in centroids.slices.items():
            of_k.counts[k] = counts[first:end]
            centres = centroids.points[k] - centroids.origin
            of_k.moves[k] = total[first:end] - counts[first:end, None] * centres
        return of_k


@contextlib.contextmanager
def computing(device: str = "cpu") -> Iterator[Engine]:
    """Make ready to compute; PyTorch's own threads and TF32 are off meanwhile.

    Args:
        device: ``cpu``, ``cuda`` for any free GPU, ``cuda:N`` for one of them, or ``auto`` for a
            GPU where there is one. A GPU is leased.

    Raises:
        SettingsError: There is no such GPU.
    """
    chosen = _chosen(device)
    threads = usable_cores() if chosen.type == "cpu" else 1
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    engine = Engine(chosen, threads)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield engine
    finally:
        engine.close()
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chosen(device: str) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    # Encoders come with them, which takes seconds.
    from histoencoder_core.features.execution import on_gpu
    from histoencoder_core.features.lease import lease_gpu

    on_gpu(device)
    _, _, number = device.partition(":")
    return torch.device("cuda", lease_gpu([int(number)] if number else None))
