"""Fitting k-means over the cohort in a fixed amount of memory.

One reading of all slides draws a sample, on which the centroids of each K start and come to rest.
Then all tiles stream by in mini-batches, for all K at once, pass after pass, until the centroids
rest there too. A last reading measures what they give.

Source: mini-batch k-means, Sculley, "Web-scale k-means clustering" (2010).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from histoencoder_core.clusters import kmeans
from histoencoder_core.clusters.engine import Centroids, Engine, computing, usable_cores
from histoencoder_core.clusters.inputs import FeatureFile
from histoencoder_core.clusters.kmeans import Points
from histoencoder_core.clusters.match import numbered_after
from histoencoder_core.clusters.model import (
    ClusterModel,
    current_model,
    find_version,
    load_model,
    make_current,
    model_stamp,
    save_model,
)
from histoencoder_core.clusters.quantiles import Distances
from histoencoder_core.clusters.reading import (
    Floats,
    Reader,
    batches,
    draw_sample,
    share_of,
    slide_bytes,
)
from histoencoder_core.clusters.transform import AS_THEY_ARE, Transform, fit_whitening
from histoencoder_core.errors import ClusterError
from histoencoder_core.settings import ClusterSettings
from histoencoder_core.store import Store, files

log = logging.getLogger(__name__)

SAMPLE_TOLERANCE = 0.01
"""On the sample centroids must rest so much more strictly: its steps are cheap."""

SHUFFLE_BYTES = 64e6
"""Features that wait to be shuffled together."""

RESERVED_BYTES = 1.0e9
"""What the interpreter, the libraries and all that is small take."""

READ_BYTES = 256e6
"""Most that features take that were read ahead: more would not be faster."""

_PART = 4096
"""Tiles of the sample that are whitened, or looked at to do so, at a time."""


def ensure_model(
    store: Store,
    inputs: list[FeatureFile],
    settings: ClusterSettings,
    *,
    memory_gb: float = 2.0,
    device: str = "cpu",
) -> tuple[ClusterModel, bool]:
    """Make the model of these features and settings the current one, fitting it if it is new.

    A new model's clusters are numbered after those of the model that is current until then.

    Args:
        store: The store, which keeps every version that was ever fitted.
        inputs: The features, all in one space.
        settings: How to cluster.
        memory_gb: See `fit_clusters`.
        device: See `fit_clusters`.

    Returns:
        The model, and whether it was fitted now.

    Raises:
        ClusterError: See `fit_clusters`.
        SettingsError: There is no such device.
    """
    # Of two fits at once, the second finds the first one's model, or is numbered after it.
    with files.locked_to_write(store.cluster_models):
        version = find_version(store, model_stamp(inputs, settings))
        if version is not None:
            model = load_model(store, version)
            make_current(store, version)
        else:
            model = fit_clusters(inputs, settings, memory_gb=memory_gb, device=device)
            try:
                previous = current_model(store)
            except ClusterError as error:
                log.warning("clusters are not numbered after the current model's: %s", error)
                previous = None
            if previous is not None:
                model = numbered_after(model, previous)
            save_model(store, model)
    return model, version is None


def fit_clusters(
    inputs: list[FeatureFile],
    settings: ClusterSettings,
    *,
    memory_gb: float = 2.0,
    device: str = "cpu",
) -> ClusterModel:
    """Fit a k-means model for each K.

    The same features and settings give the same model, in whatever order the slides are listed and
    however much memory and how many CPU cores there are. On a GPU last digits may differ.

    Args:
        inputs: The features, all in one space.
        settings: How to cluster.
        memory_gb: Resident memory in GB (10⁹ bytes) that this process may take; its libraries take
            one of them.
        device: ``cpu``, ``cuda`` for any free GPU, ``cuda:N`` for one of them, or ``auto`` for a
            GPU where there is one.

    Returns:
        The model, not yet saved. Clusters are numbered by size, the largest first. A K with fewer
        tiles than clusters is left out with a warning.

    Raises:
        ClusterError: There are fewer tiles than the smallest K, they do not vary enough to be
            whitened as asked, or the memory does not suffice.
        SettingsError: There is no such device.
    """
    started = time.perf_counter()
    inputs = sorted(inputs, key=lambda file: file.slide)
    plan = _Plan.within(memory_gb, inputs, settings)
    sample, tiles = draw_sample(inputs, plan.reader, seed=settings.seed, size=plan.sample)
    ks = [k for k in settings.n_clusters if k <= tiles]
    if not ks:
        raise ClusterError(
            f"{tiles} tiles can't be put into {settings.n_clusters[0]} clusters; ask for fewer "
            "clusters, or wait for more slides."
        )
    for k in settings.n_clusters[len(ks) :]:
        log.warning("left out K = %d: there are only %d tiles", k, tiles)
    with computing(device) as engine:
        work = _Fit(engine, inputs, settings, plan, sample)
        del sample
        work.start(ks)
        passes = work.run()
        measures = work.measure()
    stamp = model_stamp(inputs, settings).with_result(
        slides=len(inputs),
        tiles=tiles,
        n_clusters=ks,
        passes=passes,
        device=str(engine.device),
        seconds=round(time.perf_counter() - started, 3),
    )
    # A stable sort: clusters of one size keep their order.
    orders = {k: torch.argsort(measures.counts[k], descending=True, stable=True) for k in ks}
    return ClusterModel(
        stamp,
        centroids={k: work.points[k][orders[k]].float().numpy() for k in ks},
        inertia={k: measures.inertia[k] / tiles for k in ks},
        distances={k: measures.distances[k].percentiles() for k in ks},
        transform=work.transform,
    )


@dataclass(frozen=True)
class _Plan:
    """How much is held at a time.

    Attributes:
        sample: Tiles of the sample.
        batch: Tiles of a mini-batch.
        buffer: Tiles that wait to be shuffled together.
        reader: How features are read, the only part that follows from the memory there is.
    """

    sample: int
    batch: int
    buffer: int
    reader: Reader

    @classmethod
    def within(
        cls, memory_gb: float, inputs: Sequence[FeatureFile], settings: ClusterSettings
    ) -> _Plan:
        """Plan what to hold.

        Raises:
            ClusterError: What decides the result does not fit.
        """
        length, tiles = inputs[0].length, sum(file.tiles for file in inputs)
        largest = max(settings.n_clusters)
        # k-means++ needs a tile for each centroid.
        sample = max(settings.sample_size, largest)
        batch = max(settings.batch_size, largest)
        buffer = batch * max(2, int(SHUFFLE_BYTES // (4 * length * batch)))
        drawn = min(tiles, sample + len(inputs))
        # While one slide is drawn, its own part is held twice more.
        share = share_of([file.tiles for file in inputs], sample)
        needed = RESERVED_BYTES + slide_bytes(length)
        needed += 4 * length * (drawn + max(2 * share, buffer + 2 * batch))
        if settings.normalise or settings.whiten is not None:
            needed += 4 * drawn * (settings.whiten or length)
        if settings.whiten is not None:
            needed += 5 * 8 * length**2  # covariance and eigenvectors
        room = 1e9 * memory_gb - needed
        if room < 0:
            raise ClusterError(
                f"Clustering features of length {length} takes {needed / 1e9:.1f} GB of memory, of "
                f"which {4e-9 * length * drawn:.1f} GB are for a sample of {drawn} tiles, but only "
                f"{memory_gb:g} GB may be used. Allow more (--memory, "
                "HISTOENCODER_CLUSTER_MEMORY_GB), or draw a smaller sample "
                "(HISTOENCODER_CLUSTERS__SAMPLE_SIZE)."
            )
        room = min(READ_BYTES, room + slide_bytes(length))
        return cls(sample, batch, buffer, Reader.within(room, length=length, cores=usable_cores()))


@dataclass(frozen=True)
class _Measures:
    """What centroids give over all tiles, by K: sizes, sums of squared distances, distances."""

    counts: dict[int, torch.Tensor]
    inertia: dict[int, float]
    distances: dict[int, Distances]


class _Fit:
    """The centroids on their way.

    Attributes:
        transform: What is done to features first.
        points: The centroids.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: Sequence[FeatureFile],
        settings: ClusterSettings,
        plan: _Plan,
        sample: Floats,
    ) -> None:
        self._engine, self._inputs, self._settings, self._plan = engine, inputs, settings, plan
        self.transform = _transform(sample, settings)
        self._sample = _transformed(sample, self.transform).to(engine.device)
        self._spread = float(self._sample.var(dim=0, correction=0).sum()) or 1.0
        self._buffer: Floats | None = None
        self.points: Points = {}
        self._weights: dict[int, torch.Tensor] = {}

    def start(self, ks: Sequence[int]) -> None:
        """Bring the centroids to rest on the sample."""
        settings = self._settings
        rest = kmeans.fit_in_memory(
            self._engine,
            self._sample,
            ks,
            seed=settings.seed,
            tolerance=SAMPLE_TOLERANCE * settings.tolerance * self._spread,
        )
        self.points, self._weights = rest.points, rest.counts

    def run(self) -> int:
        """Pass over all tiles until the centroids rest; gives the number of passes."""
        moving = list(self.points)
        for number in range(self._settings.max_passes):
            least = self._settings.tolerance * self._spread
            moved = self._pass(number, moving)
            moving = [k for k in moving if moved[k] >= least]
            if not moving:
                break
        return number + 1

    def _pass(self, number: int, ks: Sequence[int]) -> dict[int, float]:
        """Pass over all tiles once.

        Args:
            number: Of the pass; the order of the tiles follows from it.
            ks: The K whose centroids are moved.

        Returns:
            By K, the mean over all tiles of the squared movement of their centroid.
        """
        before = dict(self.points)
        # Tiles of earlier passes are forgotten, as other centroids took them. The sample's weight
        # stays, so that the first batches do not throw away where the pass starts.
        counts = {k: torch.zeros(k, dtype=torch.float64) for k in ks}
        for batch in self._batches(np.random.default_rng([self._settings.seed, number])):
            centroids = Centroids({k: self.points[k] for k in ks}, self._engine.device)
            sums = self._engine.sums(batch, centroids, self.transform)
            for k in ks:
                counts[k] += sums.counts[k]
                weights = (counts[k] + self._weights[k]).clamp(min=1)
                self.points[k] = self.points[k] + sums.moves[k] / weights[:, None]
        moves = {k: (self.points[k] - before[k]).square().sum(dim=1) for k in ks}
        return {k: float(moves[k] @ counts[k] / counts[k].sum()) for k in ks}

    def measure(self) -> _Measures:
        """See what the centroids give, once no cluster is empty that could be filled."""
        before = None
        while True:
            measures = self._measure()
            empty = sum(int((counts == 0).sum()) for counts in measures.counts.values())
            if before is not None and empty >= before:
                return measures
            before = empty
            filled = [
                kmeans.refill(self._engine, self._sample, self.points, measures.counts[k], k)
                for k in self.points
            ]
            if not any(filled):
                return measures

    def _measure(self) -> _Measures:
        centroids = Centroids(self.points, self._engine.device)
        counts = {k: torch.zeros(k, dtype=torch.int64) for k in self.points}
        inertia = dict.fromkeys(self.points, 0.0)
        distances = {k: Distances() for k in self.points}
        for batch in self._batches():
            found = self._engine.find(batch, centroids, self.transform)
            for k, squared in found.squared.items():
                counts[k] += torch.bincount(found.clusters[k], minlength=k)
                inertia[k] += float(squared.double().sum())
                distances[k].add(squared.sqrt().numpy())
        return _Measures(counts, inertia, distances)

    def _batches(self, rng: np.random.Generator | None = None) -> Iterator[torch.Tensor]:
        plan = self._plan
        if self._buffer is None:
            self._buffer = np.empty((plan.buffer, self._inputs[0].length), np.float32)
        return map(
            torch.from_numpy,
            batches(self._inputs, plan.reader, size=plan.batch, buffer=self._buffer, rng=rng),
        )


def _transform(sample: Floats, settings: ClusterSettings) -> Transform:
    scaled = Transform(settings.normalise)
    if settings.whiten is None:
        return scaled
    rows = (scaled.apply(part).numpy() for part in _parts(sample))
    return Transform(settings.normalise, fit_whitening(rows, settings.whiten))


def _transformed(sample: Floats, transform: Transform) -> torch.Tensor:
    if transform == AS_THEY_ARE:
        return torch.from_numpy(sample)
    width = sample.shape[1] if transform.whitening is None else transform.whitening.matrix.shape[1]
    moved = torch.empty((len(sample), width))
    first = 0
    for part in _parts(sample):
        moved[first : first + len(part)] = transform.apply(part)
        first += len(part)
    return moved


def _parts(sample: Floats) -> Iterator[torch.Tensor]:
    rows = torch.from_numpy(sample)
    return (rows[first : first + _PART] for first in range(0, len(rows), _PART))
