"""Fitting k-means over the cohort, a part of one slide in memory at a time."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from sklearn.cluster import MiniBatchKMeans, kmeans_plusplus
from sklearn.metrics import pairwise_distances_argmin_min

from histoencoder_core.clusters.inputs import FeatureFile
from histoencoder_core.clusters.model import (
    VERSION_LENGTH,
    ClusterModel,
    load_model,
    model_versions,
    save_model,
)
from histoencoder_core.errors import ClusterError
from histoencoder_core.settings import ClusterSettings
from histoencoder_core.store import Stamp, Store
from histoencoder_core.store.tables import iter_features

log = logging.getLogger(__name__)

ALGORITHM = 1

STARTS = 8
"""k-means++ starts tried for each K."""

START_TILES = 8192
"""Tiles of the sample that a k-means++ start is drawn from, more for a large K."""

Floats = npt.NDArray[np.float32]


def model_stamp(inputs: list[FeatureFile], settings: ClusterSettings) -> Stamp:
    """The stamp of a model fitted on these features."""
    return Stamp.of(
        "cluster_model",
        algorithm=ALGORITHM,
        made_from={
            "space": inputs[0].space,
            "settings": settings.model_dump(mode="json", exclude_defaults=True),
            "features": {file.slide: file.fingerprint for file in inputs},
        },
        untrained=any(file.untrained for file in inputs),
    ).with_result(encoder=inputs[0].encoder)


def ensure_model(
    store: Store, inputs: list[FeatureFile], settings: ClusterSettings
) -> tuple[ClusterModel, bool]:
    """Make the model of these features and settings the current one, fitting it if it is new.

    Args:
        store: The store, which keeps every version that was ever fitted.
        inputs: The features, all in one space.
        settings: How to cluster.

    Returns:
        The model, and whether it was fitted now.

    Raises:
        ClusterError: There are fewer tiles than the smallest K.
    """
    version = model_stamp(inputs, settings).fingerprint[:VERSION_LENGTH]
    known = version in model_versions(store)
    model = load_model(store, version) if known else fit_clusters(inputs, settings)
    save_model(store, model)
    return model, not known


def fit_clusters(inputs: list[FeatureFile], settings: ClusterSettings) -> ClusterModel:
    """Fit a k-means model for each K.

    The centroids start from k-means++ on a sample drawn evenly over slides, then all tiles stream
    by in mini-batches, pass after pass, until the centroids rest. The same features and settings
    give the same model, in whatever order the slides are listed.

    Args:
        inputs: The features, all in one space.
        settings: How to cluster.

    Returns:
        The model, not yet saved. A K with fewer tiles than clusters is left out with a warning.

    Raises:
        ClusterError: There are fewer tiles than the smallest K.
    """
    started = time.perf_counter()
    inputs = sorted(inputs, key=lambda file: file.slide)
    counts = [sum(map(len, _readable(file))) for file in inputs]
    tiles = sum(counts)
    ks = [k for k in settings.n_clusters if k <= tiles]
    if not ks:
        raise ClusterError(
            f"{tiles} tiles can't be put into {settings.n_clusters[0]} clusters; ask for fewer "
            "clusters, or wait for more slides."
        )
    for k in settings.n_clusters[len(ks) :]:
        log.warning("left out K = %d: there are only %d tiles", k, tiles)
    sample = _sample(inputs, counts, settings, at_least=max(ks))
    spread = float(sample.var(axis=0, dtype=np.float64).sum()) or 1.0
    models = {k: _k_means(_start(sample, k, settings)) for k in ks}
    del sample
    passes = 0
    for number in range(settings.max_passes):
        before = {k: model.cluster_centers_.copy() for k, model in models.items()} if number else {}
        for batch in _batches(inputs, settings, number, at_least=max(ks)):
            for model in models.values():
                model.partial_fit(batch)
        passes += 1
        if before and all(
            _shift(before[k], models[k].cluster_centers_) < settings.tolerance * spread for k in ks
        ):
            break
    centroids = {k: models[k].cluster_centers_.astype(np.float32) for k in ks}
    stamp = model_stamp(inputs, settings).with_result(
        slides=len(inputs),
        tiles=tiles,
        n_clusters=ks,
        passes=passes,
        seconds=round(time.perf_counter() - started, 3),
    )
    return ClusterModel(stamp, centroids, _inertia(inputs, centroids, tiles))


def _readable(file: FeatureFile) -> Iterator[Floats]:
    """A slide's features without unreadable tiles, chunk by chunk."""
    for chunk in iter_features(file.path):
        yield chunk[np.isfinite(chunk).all(axis=1)]


def _sample(
    inputs: list[FeatureFile], counts: list[int], settings: ClusterSettings, *, at_least: int
) -> Floats:
    """Draw the same number of tiles from each slide, or all it has.

    What small slides lack is drawn from the larger ones. There are never fewer tiles than
    `at_least` while the cohort has them: k-means++ needs one for each centroid.
    """
    share = _share(counts, max(settings.sample_size, at_least))
    drawn = []
    for file, count in zip(inputs, counts, strict=True):
        # A slide's draw must not depend on which other slides there are.
        name = int.from_bytes(hashlib.sha256(file.slide.encode()).digest())
        rng = np.random.default_rng([settings.seed, name])
        chosen = np.sort(rng.choice(count, min(count, share), replace=False))
        first = 0
        for rows in _readable(file):
            here = chosen[(chosen >= first) & (chosen < first + len(rows))]
            drawn.append(rows[here - first])
            first += len(rows)
    return np.concatenate(drawn)


def _share(counts: list[int], wanted: int) -> int:
    """The least number of tiles a slide that gives as many as wanted, or all there are.

    Example:
        >>> _share([2, 100, 100], wanted=12), _share([2, 100, 100], wanted=1000)
        (5, 100)
    """
    for place, count in enumerate(sorted(counts)):
        share = -(-wanted // (len(counts) - place))
        if count >= share:
            return share
        wanted -= count
    return max(counts)


def _start(sample: Floats, k: int, settings: ClusterSettings) -> Floats:
    """The best of several k-means++ starts, each after one step over the whole sample.

    One start alone often puts two centroids into one clear cluster, which no pass ever mends.
    """
    rng = np.random.default_rng([settings.seed, k])
    size = min(len(sample), max(START_TILES, 4 * k))
    best, least = sample, np.inf
    for seed in rng.integers(2**31, size=STARTS).tolist():
        drawn = sample[rng.choice(len(sample), size, replace=False)]
        centres, _ = kmeans_plusplus(drawn, k, random_state=seed)
        centres = _k_means(centres).partial_fit(sample).cluster_centers_
        distance = _squared_distances(sample, centres)
        if distance < least:
            best, least = centres, distance
    return best


def _k_means(centres: Floats) -> MiniBatchKMeans:
    """Mini-batch k-means from these centroids, in which nothing is left to chance."""
    return MiniBatchKMeans(
        n_clusters=len(centres),
        init=centres,
        n_init=1,
        # Centroids of rare tissue would be moved to random tiles, over and over.
        reassignment_ratio=0,
        compute_labels=False,
    )


def _batches(
    inputs: list[FeatureFile], settings: ClusterSettings, number: int, *, at_least: int
) -> Iterator[Floats]:
    """All tiles in mini-batches, slides and tiles within them in an order set by seed and pass."""
    rng = np.random.default_rng([settings.seed, number])
    size = max(settings.batch_size, at_least)
    waiting: list[Floats] = []
    for i in rng.permutation(len(inputs)):
        for chunk in _readable(inputs[i]):
            waiting.append(rng.permutation(chunk))
            if sum(map(len, waiting)) >= 2 * size:
                joined = np.concatenate(waiting)
                # scikit-learn takes no batch smaller than K, so the last one is never left alone.
                *ready, rest = np.split(joined, range(size, len(joined) - size + 1, size))
                yield from ready
                waiting = [rest]
    yield np.concatenate(waiting)


def _shift(before: Floats, after: Floats) -> float:
    """Mean squared movement of the centroids."""
    return float(((before - after) ** 2).sum(axis=1).mean())


def _inertia(
    inputs: list[FeatureFile], centroids: dict[int, Floats], tiles: int
) -> dict[int, float]:
    total = dict.fromkeys(centroids, 0.0)
    for file in inputs:
        for chunk in _readable(file):
            for k, centres in centroids.items():
                total[k] += _squared_distances(chunk, centres)
    return {k: value / tiles for k, value in total.items()}


def _squared_distances(rows: Floats, centres: Floats) -> float:
    """Sum of the squared distances of tiles to their nearest centroids."""
    if len(rows) == 0:
        return 0.0
    _, distance = pairwise_distances_argmin_min(rows, centres)
    return float((distance.astype(np.float64) ** 2).sum())
