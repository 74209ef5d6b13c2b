"""Nearest tiles by looking at every tile, and exact distances of some."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from histoencoder_core.clusters import FeatureFile
from histoencoder_core.store.tables import iter_features

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CHUNK = 1024
"""Tiles that a thread holds in memory."""


@dataclass(frozen=True)
class Neighbours:
    """Tiles near a query, nearest first.

    Attributes:
        distance: float32 cosine distances, from 0 for the same direction to 2 for the opposite.
        file: Which of the feature files each tile is in.
        row: The tile's row in that file.
    """

    distance: Floats
    file: Ints
    row: Ints

    def joined(self, other: Neighbours, count: int) -> Neighbours:
        """The nearest of both; of tiles that are equally far, these and then the others."""
        distance = np.concatenate([self.distance, other.distance])
        order = np.argsort(distance, kind="stable")[:count]
        files, rows = np.concatenate([self.file, other.file]), np.concatenate([self.row, other.row])
        return Neighbours(distance[order], files[order], rows[order])


NOBODY = Neighbours(np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64))


def unit(vector: Floats) -> Floats:
    """A vector scaled to length 1; NaN if it has no direction, as one of zeros."""
    with np.errstate(invalid="ignore"):
        return np.asarray(vector / np.linalg.norm(vector), np.float32)


def search(files: Sequence[FeatureFile], queries: Floats, count: int) -> list[Neighbours]:
    """Find the nearest tiles of several queries, exactly.

    All features stream by once, a part of a few slides in memory at a time. Reading bounds it, and
    so threads read ahead.

    Args:
        files: Features of one space.
        queries: float32 array of shape (queries, length), each of length 1.
        count: Tiles a query.

    Returns:
        For each query its nearest tiles, itself included if it is among them. Tiles without a
        direction are left out.
    """
    nearest = [NOBODY] * len(queries)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda i: _nearest(files[i], i, queries, count), range(len(files)))
        for of_file in found:
            nearest = [a.joined(b, count) for a, b in zip(nearest, of_file, strict=True)]
    return nearest


def _nearest(file: FeatureFile, number: int, queries: Floats, count: int) -> list[Neighbours]:
    """The nearest tiles of one file, by query."""
    nearest = [NOBODY] * len(queries)
    first = 0
    for chunk in iter_features(file.path, CHUNK):
        for i, distance in enumerate(_distances(chunk, queries)):
            rows = np.flatnonzero(np.isfinite(distance))
            if len(rows) > count:
                rows = rows[np.argpartition(distance[rows], count)[:count]]
                rows.sort()
            here = Neighbours(distance[rows], np.full(len(rows), number), rows + first)
            nearest[i] = nearest[i].joined(here, count)
        first += len(chunk)
    return nearest


def _distances(features: Floats, queries: Floats) -> Floats:
    """Cosine distances of shape (queries, tiles); NaN for tiles without a direction.

    Args:
        features: float32 array of shape (tiles, length).
        queries: float32 array of shape (queries, length), each of length 1.
    """
    lengths = np.sqrt(np.einsum("ij,ij->i", features, features))
    with np.errstate(invalid="ignore"):
        # Rounding would put a tile's twin a hair below zero.
        return np.asarray(np.maximum(1 - queries @ features.T / lengths, 0), np.float32)


def measured(
    files: Sequence[FeatureFile], candidates: tuple[Ints, Ints], query: Floats, count: int
) -> Neighbours:
    """The nearest of some tiles, by their exact distances.

    Args:
        files: Features of one space.
        candidates: Which file each tile is in, and its row there.
        query: float32 array of shape (length,), of length 1.
        count: Number of tiles.
    """
    numbers, rows = candidates

    def of_file(number: int) -> Neighbours:
        wanted = np.sort(rows[numbers == number])
        features = read_rows(files[number], wanted)
        return Neighbours(
            _distances(features, query[None])[0], np.full(len(wanted), number), wanted
        )

    nearest = NOBODY
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(of_file, np.unique(numbers).tolist()):
            nearest = nearest.joined(found, count)
    return nearest


def read_rows(file: FeatureFile, rows: Ints) -> Floats:
    """Read the features of some tiles.

    Args:
        file: The features.
        rows: The tiles' rows, in rising order.

    Returns:
        float32 array of shape (rows, length); NaN for a tile without features.
    """
    found, first = [np.empty((0, file.length), np.float32)], 0
    for chunk in iter_features(file.path, CHUNK):
        found.append(chunk[rows[(rows >= first) & (rows < first + len(chunk))] - first])
        first += len(chunk)
    return np.concatenate(found)
