"""Reading the features of many slides: a sample of them, or all of them in batches."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from histoencoder_core.clusters.inputs import FeatureFile
from histoencoder_core.store.tables import iter_features

Floats = npt.NDArray[np.float32]

MAX_READERS = 8
_AHEAD = 4
"""Slides a reader that are read or wait, if there is room: small ones come in quick succession."""
_CHUNK_BYTES = 8 * 2**20
_CHUNKS = 3
"""Chunks of a slide in memory: one that is being read, and two that wait."""
_STOP_SECONDS = 0.1


@dataclass(frozen=True)
class Reader:
    """How features are read; decides no result.

    Attributes:
        threads: Threads that read.
        slides: Slides that are read, or have been read and wait, at a time.
        rows: Tiles of one slide that are read at a time.
    """

    threads: int
    slides: int
    rows: int

    @classmethod
    def within(cls, room: float, *, length: int, cores: int) -> Reader:
        """Choose how to read.

        Args:
            room: Bytes that features may take that were read and wait.
            length: Length of a feature vector.
            cores: CPU cores.
        """
        threads = min(MAX_READERS, cores)
        slides = min(_AHEAD * threads, int(room // slide_bytes(length)))
        return cls(max(1, min(threads, slides)), max(1, slides), _rows(length))


def slide_bytes(length: int) -> int:
    """Most memory that a slide which is being read takes, in bytes."""
    return _CHUNKS * _rows(length) * 4 * length


def _rows(length: int) -> int:
    return max(1, _CHUNK_BYTES // (4 * length))


def read_slides(
    inputs: Sequence[FeatureFile], how: Reader
) -> Generator[tuple[FeatureFile, Iterator[Floats]]]:
    """Read slides in the order given, several at a time.

    Args:
        inputs: The slides.
        how: How many at a time.

    Yields:
        A slide with its features: float32 arrays of shape (tiles, length) with NaN where a tile
        could not be read. What reading raises is raised there.
    """
    stop = threading.Event()
    waiting: deque[tuple[FeatureFile, _Chunks]] = deque()
    with ThreadPoolExecutor(how.threads, thread_name_prefix="features") as pool:
        try:
            for file in inputs:
                chunks = _Chunks(file, how.rows, stop)
                pool.submit(chunks.fill)
                waiting.append((file, chunks))
                if len(waiting) >= how.slides:
                    first, ready = waiting.popleft()
                    yield first, ready.drain()
            while waiting:
                first, ready = waiting.popleft()
                yield first, ready.drain()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Chunks:
    """A slide's features, read by one thread and used by another."""

    def __init__(self, file: FeatureFile, rows: int, stop: threading.Event) -> None:
        self._file, self._rows, self._stop = file, rows, stop
        self._waiting: queue.Queue[Floats | BaseException | None] = queue.Queue(_CHUNKS - 1)

    def fill(self) -> None:
        try:
            for chunk in iter_features(self._file.path, self._rows):
                if not self._put(chunk):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - raised where the features are used
            self._put(error)

    def drain(self) -> Iterator[Floats]:
        while (chunk := self._waiting.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk

    def _put(self, item: Floats | BaseException | None) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._waiting.put(item, timeout=_STOP_SECONDS)
                return True
        return False


def readable(chunk: Floats) -> Floats:
    """The tiles that could be read."""
    known = np.isfinite(chunk)
    return chunk if known.all() else chunk[known.all(axis=1)]


def draw_sample(
    inputs: Sequence[FeatureFile], how: Reader, *, seed: int, size: int
) -> tuple[Floats, int]:
    """Draw the same number of tiles from each slide, or all it has.

    What small slides lack is drawn from the larger ones. A slide's draw does not depend on which
    other slides there are, but for its size.

    Args:
        inputs: The slides.
        how: How to read.
        seed: Of the draw.
        size: Tiles to draw; a few more are drawn where slides do not divide it.

    Returns:
        float32 array of shape (tiles, length), by slide, and the number of readable tiles that
        there are on all slides.
    """
    counts = [file.tiles for file in inputs]
    while True:
        share = share_of(counts, size)
        most = sum(min(count, share) for count in counts)
        sample, drawn = np.empty((most, inputs[0].length), np.float32), 0
        for number, (file, chunks) in enumerate(read_slides(inputs, how)):
            rows, counts[number] = _draw(file, chunks, seed=seed, share=share)
            sample[drawn : drawn + len(rows)] = rows
            drawn += len(rows)
        # Tiles that could not be read leave their share to others, who may then give more.
        if share_of(counts, size) <= share:
            return sample[:drawn], sum(counts)


def _draw(
    file: FeatureFile, chunks: Iterator[Floats], *, seed: int, share: int
) -> tuple[Floats, int]:
    """The first readable tiles of a slide in an order of its own, and how many are readable."""
    name = int.from_bytes(hashlib.sha256(file.slide.encode()).digest())
    order = np.random.default_rng([seed, name]).permutation(file.tiles)
    kept, places = np.empty((0, file.length), np.float32), np.empty(0, order.dtype)
    first = count = 0
    for chunk in chunks:
        here = np.isfinite(chunk).all(axis=1)
        count += int(here.sum())
        its = order[first : first + len(chunk)][here]
        first += len(chunk)
        joined = np.concatenate([places, its])
        last = np.partition(joined, share - 1)[share - 1] if len(joined) > share else file.tiles
        kept = np.concatenate([kept[places <= last], chunk[here][its <= last]])
        places = joined[joined <= last]
    return kept, count


def share_of(counts: Sequence[int], wanted: int) -> int:
    """The least number of tiles a slide that gives as many as wanted, or all there are.

    Example:
        >>> share_of([2, 100, 100], wanted=12), share_of([2, 100, 100], wanted=1000)
        (5, 100)
    """
    for place, count in enumerate(sorted(counts)):
        share = -(-wanted // (len(counts) - place))
        if count >= share:
            return share
        wanted -= count
    return max(counts)


def batches(
    inputs: Sequence[FeatureFile],
    how: Reader,
    *,
    size: int,
    buffer: Floats,
    rng: np.random.Generator | None = None,
) -> Iterator[Floats]:
    """All readable tiles in batches.

    Args:
        inputs: The slides.
        how: How to read.
        size: Tiles a batch. No batch is smaller, and the last may have almost as many more.
        buffer: float32 array of shape (tiles, length) that tiles wait in; at least two batches.
        rng: What shuffles the slides, and the tiles that wait. If not given, tiles come in the
            order of the slides.

    Yields:
        float32 arrays of shape (tiles, length), to be used before the next is asked for.
    """
    order = range(len(inputs)) if rng is None else rng.permutation(len(inputs)).tolist()
    taken = np.empty((2 * size, buffer.shape[1]), np.float32)
    waiting = 0
    for _, chunks in read_slides([inputs[i] for i in order], how):
        for chunk in map(readable, chunks):
            done = 0
            while done < len(chunk):
                room = min(len(chunk) - done, len(buffer) - waiting)
                buffer[waiting : waiting + room] = chunk[done : done + room]
                done, waiting = done + room, waiting + room
                if waiting == len(buffer):
                    # Some wait for more, so that the last batch is never too small.
                    places = _order(waiting, rng)
                    yield from _parts(buffer, places[size:], size, taken)
                    buffer[:size] = buffer[places[:size]]
                    waiting = size
    if waiting:
        yield from _parts(buffer, _order(waiting, rng), size, taken)


def _order(count: int, rng: np.random.Generator | None) -> npt.NDArray[np.int64]:
    return np.arange(count) if rng is None else rng.permutation(count)


def _parts(
    buffer: Floats, places: npt.NDArray[np.int64], size: int, taken: Floats
) -> Iterator[Floats]:
    """Rows of a buffer in batches, of which the last is larger, each in the same memory."""
    for part in np.split(places, range(size, len(places) - size + 1, size)):
        # Fresh memory for each batch would take longer than the rest of the reading.
        yield np.take(buffer, part, axis=0, out=taken[: len(part)], mode="clip")
