"""Encoding the tiles of slides: ``features.parquet``.

Tiles flow through three threads: one reads them (with helpers) and brings them to the encoder's
device, across the borders of slides; one encodes; one checks and writes. What waits between them is
bounded, so memory stays flat and the slowest of them, which should be the encoder, sets the pace.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
from filelock import Timeout

from histoencoder_core.errors import HistoEncoderError, SlideError
from histoencoder_core.features.encoders import Encoder
from histoencoder_core.features.images import (
    NORMALISING_TILES,
    Normalisation,
    estimate_normalisation,
)
from histoencoder_core.features.reading import ahead, choose_readers, in_batches, read_blocks
from histoencoder_core.features.runner import Batch, Prepared, Runner
from histoencoder_core.settings import Precision
from histoencoder_core.store import SlideFolder, Stamp, Store, layout
from histoencoder_core.store.tables import feature_list, read_table, widen
from histoencoder_core.tiles import TileSource, tile_source
from histoencoder_core.tiles.pixels import TilePixels

log = logging.getLogger(__name__)

ALGORITHM = layout.FEATURES_ALGORITHM

MAX_UNREADABLE = 0.01
"""Largest share of tiles that may be unreadable before the slide fails."""

Progress = Callable[[int], None]

_BATCHES_AHEAD = 4
_SLIDES_TO_WRITE = 8


def features_stamp(upstream: str, encoder: Encoder, precision: Precision) -> Stamp:
    """The stamp that features of these tiles carry if this encoder makes them.

    Args:
        upstream: Fingerprint of the tiles.
        encoder: The encoder.
        precision: Of its arithmetic.
    """
    return Stamp.of(
        "features",
        algorithm=ALGORITHM,
        made_from={"tiles": upstream, "encoder": encoder.made_from(precision)},
        untrained=encoder.untrained,
    ).with_result(
        space=encoder.space(precision),
        encoder=encoder.settings.name,
        native_size=encoder.native_size,
    )


@contextmanager
def extract_slides(
    store: Store,
    slide_ids: Sequence[str],
    runner: Runner,
    *,
    readers: int | None = None,
    wide: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Iterator[Mapping[str, Future[Stamp]]]:
    """Encode the tiles of slides, unless that is done already.

    While one slide is encoded, the next is read and the last one written. When a GPU runs out of
    memory, the slide is done again from its start with batches of half the size, because a feature
    may depend in its last digits on the batch size, which is recorded.

    Args:
        store: The store.
        slide_ids: The slides, in the order in which they are done.
        runner: The encoder, ready to run.
        readers: Threads that read tiles; one a CPU core if not given.
        wide: Write HistoEncoder's columns ``feat1…featN`` instead of one list column.
        overwrite: Do it again even where it is done.
        progress: Called from another thread with the number of tiles done since the last call.

    Yields:
        For each slide the future stamp of ``features.parquet``. It raises `SlideError` if the
        slide, or more than 1 % of its tiles, can't be read; `HistoEncoderError` if a feature is
        not finite, naming the tile; `StoreError` if another program's files stand in the way.
        Leaving the block waits for all slides; leaving it by an error gives up those not done.
    """
    work = _Extraction(
        store=store,
        runner=runner,
        readers=choose_readers(readers),
        wide=wide,
        overwrite=overwrite,
        progress=progress or (lambda _: None),
        futures={slide_id: Future() for slide_id in slide_ids},
    )
    thread = threading.Thread(target=work.run, name="encode")
    thread.start()
    try:
        yield work.futures
    except BaseException:
        work.stopped.set()
        raise
    finally:
        thread.join()


@dataclass
class _Slide:
    """A slide on its way.

    Attributes:
        folder: Its folder in the store.
        hold: Its lock, held from before its tiles are looked at until all is in place.
        stamp: The stamp of its features, once its tiles are known.
        source: Its tiles, if they are known.
        normalisation: Estimated from the slide, where that was asked for.
        reasons: Why a tile can't be read, by row.
        batches: Rows with the features that they get.
        started: When its first batch was run.
        made_with: How it was encoded: the batch size may shrink for the next slide.
        found: The stamp of features that were there already.
        error: Why it failed.
    """

    folder: SlideFolder
    hold: ExitStack = field(default_factory=ExitStack)
    stamp: Stamp | None = None
    source: TileSource | None = None
    normalisation: Normalisation | None = None
    reasons: dict[int, str] = field(default_factory=dict)
    batches: list[tuple[list[int], Batch]] = field(default_factory=list)
    started: float = 0.0
    made_with: dict[str, Any] = field(default_factory=dict)
    found: Stamp | None = None
    error: Exception | None = None


_Step = tuple[_Slide, tuple[list[int], Prepared] | None]
"""A batch of a slide; None after its last."""


@dataclass
class _Extraction:
    """The three threads' common state; `run` is the encoding one."""

    store: Store
    runner: Runner
    readers: int
    wide: bool
    overwrite: bool
    progress: Progress
    futures: dict[str, Future[Stamp]]
    stopped: threading.Event = field(default_factory=threading.Event)
    read: dict[str, _Slide] = field(default_factory=dict)
    """Slides that are locked, and not yet handed to the writing thread, which unlocks them."""

    def run(self) -> None:
        """Do all slides. Nothing is raised: every future gets its result or its error."""
        remaining = deque(self.futures)
        failure: BaseException = CancelledError()
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
                while remaining and not self.stopped.is_set():
                    try:
                        sufficed = self._encode(remaining, writer)
                    finally:
                        self._unlock()
                    if not sufficed:
                        self._retry_smaller(remaining, writer)
        except BaseException as error:  # noqa: BLE001 - raised where the results are used
            failure = error
        for slide_id in remaining:
            self.futures[slide_id].set_exception(failure)

    def _encode(self, remaining: deque[str], writer: ThreadPoolExecutor) -> bool:
        """Run batches as they come; a slide leaves `remaining` when it goes to the writer.

        Returns:
            Whether the GPU's memory sufficed. If not, the first of `remaining` is to be done again,
            after this returned: only then is the memory free that the error's traceback holds.
        """
        free = threading.BoundedSemaphore(_SLIDES_TO_WRITE)
        told = 0
        over = threading.Event()
        with (
            ahead(self._read([*remaining], over), _BATCHES_AHEAD) as steps,
            ExitStack() as at_end,
        ):
            at_end.callback(over.set)  # else the reading thread might wait for a lock for ever
            try:
                for slide, step in steps:
                    if self.stopped.is_set():
                        break
                    if step is not None:
                        self._run_batch(slide, *step)
                        told += len(step[0])
                        continue
                    if slide.batches:
                        slide.made_with = self.runner.description
                    free.acquire()
                    self.read.pop(slide.folder.slide_id, None)
                    written = writer.submit(self._finish, slide)
                    written.add_done_callback(lambda _: free.release())
                    remaining.popleft()
                    told = 0
            except torch.OutOfMemoryError:
                self.progress(-told)  # the slide is done again
                return False
        return True

    def _run_batch(self, slide: _Slide, rows: list[int], prepared: Prepared) -> None:
        self.runner.warm_up()
        slide.started = slide.started or time.perf_counter()
        slide.batches.append((rows, self.runner.run(prepared)))
        self.progress(len(rows))

    def _retry_smaller(self, remaining: deque[str], writer: ThreadPoolExecutor) -> None:
        try:
            self.runner.halve()
        except HistoEncoderError as error:
            slide = _Slide(self.store.slide(remaining[0]), error=error)
            slide.hold.enter_context(slide.folder.locked())
            writer.submit(self._finish, slide)
            remaining.popleft()

    def _unlock(self) -> None:
        for slide in self.read.values():
            slide.hold.close()
        self.read.clear()

    # --- the reading thread

    def _read(self, slide_ids: Sequence[str], over: threading.Event) -> Generator[_Step]:
        def given_up() -> bool:
            return over.is_set() or self.stopped.is_set()

        for slide_id in slide_ids:
            slide = _Slide(self.store.slide(slide_id))
            try:
                # Two processes may each hold slides while they wait here for one of the other's.
                # Neither blocks the other: what a process holds has been read, so its other threads
                # complete and unlock it without this one.
                slide.hold.enter_context(slide.folder.locked(given_up=given_up))
                self.read[slide_id] = slide
                yield from self._read_slide(slide)
            except torch.OutOfMemoryError:
                raise
            except Timeout:
                return
            except Exception as error:  # noqa: BLE001 - the other slides go on
                slide.error = error
            yield slide, None

    def _read_slide(self, slide: _Slide) -> Generator[_Step]:
        source = slide.source = _tiles_of(self.store, slide.folder)
        upstream = source.upstream()
        encoder, execution = self.runner.encoder, self.runner.execution
        slide.stamp = features_stamp(upstream, encoder, execution.precision)
        slide.found = None if self.overwrite else _found(slide.folder, upstream, self.runner)
        if slide.found is not None:
            return
        slide.folder.refuse_foreign("features")  # before the work, not after
        count = source.keys.num_rows
        if count == 0:
            return
        # The blocks are closed first: a slide must not be closed while threads read it.
        with source.open() as pixels, closing(read_blocks(pixels, self.readers)) as blocks:
            if encoder.settings.normalise == "slide":
                slide.normalisation = self._estimate(pixels, count)
            blank = np.full((encoder.input_size, encoder.input_size, 3), 255, np.uint8)
            for rows, tiles in in_batches(blocks, execution.batch_size):
                images = []
                for row, tile in zip(rows, tiles, strict=True):
                    if isinstance(tile, SlideError):
                        slide.reasons[row] = str(tile)
                        # A blank in its place, so that the others keep theirs in the batch.
                        images.append(blank)
                    else:
                        images.append(tile)
                # A slide that fails is only read to its end to count what can't be read.
                if len(slide.reasons) <= MAX_UNREADABLE * count:
                    yield slide, (rows, self.runner.prepare(images, slide.normalisation))

    def _estimate(self, pixels: TilePixels, count: int) -> Normalisation:
        rng = np.random.default_rng(self.runner.encoder.settings.seed)
        drawn = rng.choice(count, min(count, NORMALISING_TILES), replace=False).tolist()
        with closing(read_blocks(pixels, self.readers, drawn)) as blocks:
            tiles = (tile for _, found in blocks for tile in found)
            try:
                return estimate_normalisation(t for t in tiles if not isinstance(t, SlideError))
            except ValueError as error:
                raise SlideError(
                    f"None of {len(drawn)} tiles that were tried can be read.",
                    kind="unreadable-tiles",
                ) from error

    # --- the writing thread

    def _finish(self, slide: _Slide) -> None:
        future = self.futures[slide.folder.slide_id]
        with slide.hold:
            try:
                stamp = self._found_or_written(slide)
            except Exception as error:  # noqa: BLE001 - raised where the result is used
                try:
                    # Without tiles, features are not due.
                    if not (isinstance(error, SlideError) and error.kind == "no-tiles"):
                        inputs = slide.stamp.fingerprint if slide.stamp else None
                        slide.folder.record_failure("features", error, inputs=inputs)
                finally:
                    if not isinstance(error, HistoEncoderError):
                        log.exception("the features of %s failed", slide.folder.slide_id)
                    # By their tracebacks, failures would keep what their slides held in memory.
                    slide.batches.clear()
                    future.set_exception(_without_tracebacks(error))
            else:
                future.set_result(stamp)

    def _found_or_written(self, slide: _Slide) -> Stamp:
        if slide.error is not None:
            raise slide.error
        if slide.found is not None:
            slide.folder.clear_failure("features")
            return _rewritten_wide(slide.folder, slide.found) if self.wide else slide.found
        assert slide.source is not None
        assert slide.stamp is not None
        encoder, keys = self.runner.encoder, slide.source.keys
        features = _collected(slide, keys, encoder)
        seconds = slide.batches[-1][1].done_at - slide.started if slide.batches else 0.0
        stamp = slide.stamp.with_result(
            tiles=len(features),
            unreadable=len(slide.reasons),
            length=encoder.length,
            seconds=round(seconds, 3),
            tiles_per_second=round(len(features) / seconds, 2) if seconds else 0.0,
            readers=self.readers,
            **slide.made_with,
        )
        if slide.normalisation is not None:
            stamp = stamp.with_result(normalisation=asdict(slide.normalisation))
        table = _table(keys, features, slide.reasons)
        with slide.folder.writing("features") as writer:
            writer.table(widen(table) if self.wide else table, stamp)
        return stamp.just_made()


def _without_tracebacks(error: Exception) -> Exception:
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def _tiles_of(store: Store, folder: SlideFolder) -> TileSource:
    source = tile_source(store, folder.slide_id)
    if source is None:
        raise SlideError(
            f"{folder.path}: has no tiles; run `histoencoder tile` or the asset 'tiles'.",
            kind="no-tiles",
        )
    return source


def _found(folder: SlideFolder, upstream: str, runner: Runner) -> Stamp | None:
    """Features that were made before; where any precision will do, in whichever."""
    precisions: tuple[Precision, ...] = (runner.execution.precision,)
    if runner.encoder.settings.precision == "auto":
        precisions += get_args(Precision)
    prints = [features_stamp(upstream, runner.encoder, p).fingerprint for p in precisions]
    current = folder.stamp("features")
    if current is not None and current.fingerprint in prints:
        return current
    return folder.stamp("features") if any(folder.fetch("features", p) for p in prints) else None


def _rewritten_wide(folder: SlideFolder, stamp: Stamp) -> Stamp:
    """Give features that are there HistoEncoder's form; nothing is encoded again."""
    table = read_table(folder.record("features"))
    if "features" not in table.column_names:
        return stamp
    with folder.writing("features") as writer:
        writer.table(widen(table), stamp)
    return stamp.just_made()


def _collected(slide: _Slide, keys: pa.Table, encoder: Encoder) -> np.ndarray:
    """Features (tiles, length) in the stored type; zeros where a tile can't be read."""
    count = keys.num_rows
    if len(slide.reasons) > MAX_UNREADABLE * count:
        first = slide.reasons[min(slide.reasons)]
        raise SlideError(
            f"{len(slide.reasons)} of {count} tiles can't be read, more than "
            f"{MAX_UNREADABLE:.0%}; the first: {first}",
            kind="unreadable-tiles",
        )
    features = np.empty((count, encoder.length), encoder.settings.dtype)
    with np.errstate(over="ignore"):  # too large for float16 is told below
        for rows, batch in slide.batches:
            features[rows] = batch.features()
    features[list(slide.reasons)] = 0  # of what stood in their place
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        name = keys.column("tile")[int(np.argmax(bad))].as_py()
        raise HistoEncoderError(
            f"The encoder gave a feature that is not finite, first for the tile {name}. Nothing "
            "was written. Check the weights, and try float32."
        )
    return features


def _table(keys: pa.Table, features: np.ndarray, reasons: Mapping[int, str]) -> pa.Table:
    column = feature_list(features, features.dtype.name)
    told = [reasons.get(row) for row in range(len(features))]
    if reasons:
        missing = pa.array([reason is not None for reason in told])
        column = pa.FixedSizeListArray.from_arrays(column.values, features.shape[1], mask=missing)
    table = keys.append_column("features", column)
    return table.append_column("unreadable", pa.array(told, pa.string()))
