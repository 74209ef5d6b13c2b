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
import datetime as dt
import json
import os
import platform
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

from histoencoder_core import __version__
from histoencoder_core.features.reading import choose_readers, read_blocks
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import Register, describe_slide
from histoencoder_core.slides.find import find_pattern
from histoencoder_core.slides.sheet import SheetRow
from histoencoder_core.store import Store
from histoencoder_core.tiles import cut_tiles, pixels, tile_source

BLOCKS = (1024, pixels.BLOCK_PX, 2048)
Place = tuple[int, int, int, int]


def plain(slide: Path, places: Sequence[Place], readers: int, *, cache: int | None = None) -> None:
    """Read with one handle for all threads."""
    with openslide.OpenSlide(slide) as handle, ThreadPoolExecutor(readers) as pool:
        if cache is not None:
            handle.set_cache(openslide.OpenSlideCache(cache))
        for _ in pool.map(lambda place: _read(handle, place), places):
            pass


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


def places_of(slide: Path, width: int, overlap: float) -> list[Place]:
    """Where the slide's tiles are."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        [(slide_id, found)] = Register(store).assign(find_pattern(str(slide))).items()
        describe_slide(store.slide(slide_id), found, SheetRow())
        cut_tiles(store.slide(slide_id), TilingSettings.histoprep(width=width, overlap=overlap))
        source = tile_source(store, slide_id)
        assert source is not None
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
    places = places_of(slide, asked.width, asked.overlap)
    ways: dict[str, Callable[[], None]] = {
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
    about = {
        "slide": slide.name,
        "tiles": len(places),
        "width": asked.width,
        "overlap": asked.overlap,
        "readers": readers,
        "repeat": asked.repeat,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "python": platform.python_version(),
        "openslide": openslide.__library_version__,
        "ours": __version__,
    }
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates["plain"], strict=True)]
        row = {"way": name, "tiles_per_second": round(statistics.median(found), 1)}
        print(json.dumps({**row, "ratio": round(statistics.median(ratios), 3), **about}))


if __name__ == "__main__":
    main()
