"""Compare ways to read a slide's tiles: a JSON object a line, one a way.

plain: one OpenSlide handle in a pool of threads, a read for each tile.
plain, a handle a thread: the same, with handles of their own.
plain, cache of 256 MB: the same as plain, with eight times OpenSlide's cache.
alone: this project's reader, a read for each tile.
blocks of N px: this project's reader, neighbours in one read; N is `pixels.BLOCK_PX` by default.

All read the same tiles, in turns. `ratio` is to plain, the median over repeats.

Usage: python benchmarks/reading.py SLIDE [--width 512] [--overlap 0.5] [--readers 2] [--repeat 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import openslide
from about import about
from cutting import cut_slide

from histoencoder_core.features.reading import choose_readers, read_blocks
from histoencoder_core.settings import TilingSettings
from histoencoder_core.store import Store
from histoencoder_core.tiles import TileSource, pixels, tile_source

BLOCKS = (1024, pixels.BLOCK_PX, 2048)
Place = tuple[int, int, int, int]


def plain(slide: Path, places: Sequence[Place], readers: int, *, cache: int | None = None) -> int:
    """Read with one handle for all threads, and give the number of tiles."""
    with openslide.OpenSlide(slide) as handle, ThreadPoolExecutor(readers) as pool:
        if cache is not None:
            handle.set_cache(openslide.OpenSlideCache(cache))
        return sum(1 for _ in pool.map(lambda place: _read(handle, place), places))


def handle_a_thread(slide: Path, places: Sequence[Place], readers: int) -> None:
    """Read with a handle for each thread."""
    own = threading.local()

    def read(place: Place) -> np.ndarray:
        if not hasattr(own, "handle"):
            own.handle = openslide.OpenSlide(slide)
        return _read(own.handle, place)

    with ThreadPoolExecutor(readers) as pool:
        for _ in pool.map(read, places):
            pass


def _read(handle: openslide.OpenSlide, place: Place) -> np.ndarray:
    return np.asarray(handle.read_region(place[:2], 0, place[2:]).convert("RGB"))


def ours(slide: Path, places: Sequence[Place], readers: int, *, block: int | None) -> None:
    """Read with this project's reader, alone or in blocks."""
    before = pixels.BLOCK_PX
    pixels.BLOCK_PX = block or 1
    try:
        with (
            pixels.open_slide_tiles(slide, places, [0] * len(places)) as source,
            closing(read_blocks(source, readers)) as blocks,
        ):
            for _ in blocks:
                pass
    finally:
        pixels.BLOCK_PX = before


def places_of(source: TileSource) -> list[Place]:
    """Where tiles are, in level-0 pixels."""
    return list(zip(*(source.keys.column(name).to_pylist() for name in "xywh"), strict=True))


def main() -> None:
    """Read the command line, measure in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--readers", type=int)
    parser.add_argument("--repeat", type=int, default=5)
    asked = parser.parse_args()
    slide, readers = asked.slide, choose_readers(asked.readers)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        settings = TilingSettings.histoprep(width=asked.width, overlap=asked.overlap)
        source = tile_source(store, cut_slide(slide, store, settings).slide_id)
        assert source is not None
        places = places_of(source)
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(slide, places, readers),
        "plain, a handle a thread": lambda: handle_a_thread(slide, places, readers),
        "plain, cache of 256 MB": lambda: plain(slide, places, readers, cache=256 << 20),
        "alone": lambda: ours(slide, places, readers, block=None),
    }
    for size in BLOCKS:
        ways[f"blocks of {size} px"] = lambda size=size: ours(slide, places, readers, block=size)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.repeat):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            rates[name].append(len(places) / (time.perf_counter() - started))
    described = {
        "slide": slide.name,
        "tiles": len(places),
        "width": asked.width,
        "overlap": asked.overlap,
        "readers": readers,
        "repeat": asked.repeat,
        "openslide": openslide.__library_version__,
        **about(),
    }
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates["plain"], strict=True)]
        row = {"way": name, "tiles_per_second": round(statistics.median(found), 1)}
        print(json.dumps({**row, "ratio": round(statistics.median(ratios), 3), **described}))


if __name__ == "__main__":
    main()
