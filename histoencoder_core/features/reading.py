"""Reading tiles ahead of the encoder, from one slide on to the next."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import TypeVar

from histoencoder_core.tiles.pixels import Tile, TilePixels

T = TypeVar("T")

MAX_READERS = 32
WAITING_A_READER = 4
"""Blocks in work or waiting: enough that none rests while the first of them takes long."""

_STOP_SECONDS = 0.1


def choose_readers(readers: int | None = None) -> int:
    """Number of threads that read tiles: one a CPU core that this process may use."""
    if readers is not None:
        return readers
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_READERS, available or 1)


def read_blocks(
    pixels: TilePixels, readers: int, rows: Sequence[int] | None = None
) -> Generator[tuple[Sequence[int], list[Tile]]]:
    """Read tiles with several threads, a few blocks ahead.

    Args:
        pixels: The open source.
        readers: Number of threads.
        rows: Only these rows; all if not given.

    Yields:
        The rows of a block with their tiles. The order is that of the blocks, however many threads
        read.
    """
    blocks = pixels.blocks
    if rows is not None:
        wanted = set(rows)
        blocks = [kept for block in blocks if (kept := [row for row in block if row in wanted])]
    pool = ThreadPoolExecutor(readers, thread_name_prefix="read")
    try:
        waiting: deque[tuple[Sequence[int], Future[list[Tile]]]] = deque()
        for block in blocks:
            waiting.append((block, pool.submit(pixels.read, block)))
            if len(waiting) >= WAITING_A_READER * readers:
                ready, tiles = waiting.popleft()
                yield ready, tiles.result()
        for ready, tiles in waiting:
            yield ready, tiles.result()
    finally:
        # The source may be closed next, so no thread may still be reading.
        pool.shutdown(wait=True, cancel_futures=True)


def in_batches(
    blocks: Iterator[tuple[Sequence[int], list[Tile]]], size: int
) -> Iterator[tuple[list[int], list[Tile]]]:
    """Part a stream of blocks into batches.

    Args:
        blocks: As from `read_blocks`.
        size: Tiles a batch; the last may have fewer.

    Yields:
        Rows with their tiles.
    """
    rows: list[int] = []
    tiles: list[Tile] = []
    for more_rows, more_tiles in blocks:
        rows.extend(more_rows)
        tiles.extend(more_tiles)
        start = 0
        for start in range(size, len(rows) + 1, size):
            yield rows[start - size : start], tiles[start - size : start]
        del rows[:start], tiles[:start]
    if rows:
        yield rows, tiles


@contextmanager
def ahead(items: Generator[T], depth: int) -> Iterator[Iterator[T]]:
    """Run a generator in a thread of its own, some items ahead.

    Args:
        items: The generator; it is closed at the end, in its thread.
        depth: Items that may wait.

    Yields:
        Its items. What it raises is raised here.
    """
    waiting: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[T] | BaseException | None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                waiting.put(item, timeout=_STOP_SECONDS)
                return

    def fill() -> None:
        try:
            with closing(items):
                for item in items:
                    put((item,))
                    if stop.is_set():
                        return
        except BaseException as error:  # noqa: BLE001 - raised where the items are used
            put(error)
        else:
            put(None)

    def drain() -> Iterator[T]:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    del item  # it would hold, by its traceback, itself and all that it came from
            yield item[0]

    thread = threading.Thread(target=fill, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield drain()
    finally:
        stop.set()
        thread.join()
