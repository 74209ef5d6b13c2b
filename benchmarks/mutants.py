"""Bring damaged slides through describing, cutting and encoding: a JSON object a line.

One line for each mutant, then a summary: outcomes by kind of failure; `changed`, mutants that were
done although their tiles have other pixels than the original's, which no reader can know;
`accepted`, outputs that hold what the reader reported an error for (must be 0); `crashes` and
`hangs` of the program itself (must be 0); peak memory of the program and of its reader processes.

A mutant is told by file, seed and number, and made again from these (`mutation.py`). The program
runs in a process of its own, so that its crash would be counted, not suffered.

Usage: python benchmarks/mutants.py SLIDES [--mutants 1000] [--seed 0] [--only 17,33]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from about import about
from mutation import mutant

HANG_SECONDS = 240
"""No mutant takes so long, even if each of its stages meets the reader's time limit."""

ENVIRONMENT = {
    "HISTOENCODER_READER_SECONDS": "20",
    "HISTOENCODER_READER_MEMORY_GB": "2",
    "OMP_NUM_THREADS": "1",
}
MPP = 0.5
"""What every slide is taken for, in µm/px: many of them state none, or an absurd one."""

SUFFIXES = {".svs", ".ndpi", ".tiff", ".jpeg"}


def slides_in(folder: Path) -> list[Path]:
    """The originals, in a fixed order."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def run_worker(slides: Sequence[Path], numbers: Sequence[int], seed: int) -> None:
    """Process mutants, and print a line for each before and after it is processed."""
    # Here, as the process that only watches needs none of the seconds that these imports take.
    from histoencoder_core.features import Runner, load_encoder
    from histoencoder_core.settings import EncoderSettings

    encoder = load_encoder(EncoderSettings(name="untrained:test_resnet", input_size=32))
    runner = Runner(encoder, device="cpu", backend="eager")
    readers = {0}
    threading.Thread(target=watch_readers, args=(readers,), daemon=True).start()
    for number in numbers:
        original = slides[number // 4 % len(slides)]
        content, told = mutant(original.name, original.read_bytes(), seed=seed, number=number)
        described = {"number": number, "file": original.name, "damage": told}
        print(json.dumps(described), flush=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"mutant-{number}{original.suffix}")
            path.write_bytes(content)
            found = process(path, original, runner)
        seconds = round(time.perf_counter() - started, 2)
        print(json.dumps({**described, **found, "seconds": seconds}), flush=True)
    program = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"peak_rss_mb": {"program": program, "reader": max(readers)}}), flush=True)


def watch_readers(peaks: set[int]) -> None:
    """Note the peak memory in MB of this program's child processes, again and again.

    What the operating system tells of ended children counts their time as copies of this program.
    """
    while True:
        for children in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended
                for child in children.read_text().split():
                    status = Path("/proc", child, "status").read_text()
                    if "histoencoder_core.decoding" in Path("/proc", child, "cmdline").read_text():
                        lines = (line.split() for line in status.splitlines())
                        peaks.update(int(line[1]) // 1024 for line in lines if line[0] == "VmHWM:")
        time.sleep(0.05)


def process(path: Path, original: Path, runner: Any) -> dict[str, Any]:
    """Bring one slide through the stages, and compare what came out with the original."""
    from histoencoder_core.errors import kind_of
    from histoencoder_core.features import extract_slides
    from histoencoder_core.slides import Register, describe_slide
    from histoencoder_core.slides.find import find_pattern
    from histoencoder_core.slides.sheet import SheetRow
    from histoencoder_core.store import Store
    from histoencoder_core.tiles import cut_tiles

    store = Store(path.parent / "store")
    stage, record = "register", None
    try:
        [(slide_id, found)] = Register(store).assign(find_pattern(str(path))).items()
        folder = store.slide(slide_id)
        stage, record = "slides", folder.record("slides")
        describe_slide(folder, found, SheetRow(mpp=MPP))
        stage, record = "tiles", folder.record("tiles")
        cut_tiles(folder, tiling_of(original))
        stage, record = "features", folder.record("features")
        with extract_slides(store, [slide_id], runner, readers=2) as features:
            stamp = features[slide_id].result()
    except Exception as error:  # noqa: BLE001 - what kind it is, is the result
        left = record is not None and record.exists()
        return {"outcome": kind_of(error), "stage": stage, "accepted": int(left), "why": str(error)}
    return {
        "outcome": "done",
        "tiles": stamp.result["tiles"],
        "unreadable": stamp.result.get("unreadable", 0),
        **compare(path, original, folder),
    }


def compare(path: Path, original: Path, folder: Any) -> dict[str, int]:
    """Read each tile alone, from the mutant and from the original.

    Returns:
        ``accepted``: tiles with features that can't be read; ``changed``: tiles with features whose
        pixels are not the original's, and tiles that only one of the two has.
    """
    from histoencoder_core.errors import SlideError
    from histoencoder_core.slides import open_slide
    from histoencoder_core.store.tables import read_table

    features = read_table(folder.record("features"), ["unreadable"]).to_pydict()["unreadable"]
    expected, tiles = tiles_of(original), rows_of(folder)
    accepted, changed = 0, len(expected ^ set(tiles))
    with open_slide(path) as damaged, open_slide(original) as sound:
        for (*place, level), reason in zip(tiles, features, strict=True):
            if reason is not None:
                continue
            try:
                pixels = damaged.read(tuple(place), level=level)
            except SlideError:
                accepted += 1
                continue
            if (*place, level) in expected:
                changed += not np.array_equal(pixels, sound.read(tuple(place), level=level))
    return {"accepted": accepted, "changed": changed}


def tiling_of(original: Path) -> Any:
    """How a slide and its mutants are cut."""
    from histoencoder_core.settings import TilingSettings

    dark = original.suffix == ".ndpi"
    asked = {"tile_px": 256, "mpp": 2 * MPP, "max_dimension": 2048}
    return TilingSettings(**asked, background="dark" if dark else "bright")


def rows_of(folder: Any) -> list[tuple[int, ...]]:
    """Place and level of each tile, in the table's order."""
    from histoencoder_core.store.tables import read_table

    table = read_table(folder.record("tiles"), ["x", "y", "w", "h", "level"])
    columns = (table.column(name).to_pylist() for name in table.column_names)
    return list(zip(*columns, strict=True))


@functools.cache
def tiles_of(original: Path) -> set[tuple[int, ...]]:
    """Place and level of the tiles of a slide that is not damaged."""
    from histoencoder_core.slides import describe_slide
    from histoencoder_core.slides.find import find_pattern
    from histoencoder_core.slides.sheet import SheetRow
    from histoencoder_core.store import Store
    from histoencoder_core.tiles import cut_tiles

    with tempfile.TemporaryDirectory() as store:
        folder = Store(Path(store)).slide("original")
        describe_slide(folder, find_pattern(str(original))[0], SheetRow(mpp=MPP))
        cut_tiles(folder, tiling_of(original))
        return set(rows_of(folder))


def watch(command: Sequence[str], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Run workers until all mutants are done, and give what they tell of each.

    A worker that dies, or says nothing for too long, costs the mutant that it was at.
    """
    remaining = list(numbers)
    while remaining:
        listed = ",".join(map(str, remaining))
        worker = subprocess.Popen(
            [*command, "--only", listed, "--worker"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reading = threading.Thread(target=_read_lines, args=(worker, lines), daemon=True)
        reading.start()
        begun: dict[str, Any] = {"number": remaining[0]}
        fault = None
        while (line := _next_line(lines)) is not None:
            told = json.loads(line) if line else {}
            if not told:
                fault = "hang"
                break
            if "outcome" in told or "peak_rss_mb" in told:
                if "number" in told:
                    remaining.remove(told["number"])
                yield told
            else:
                begun = told
        worker.kill()
        code = worker.wait()
        if fault is None and code != 0:
            fault = "crash"
        if fault is not None:
            remaining.remove(begun["number"])
            yield {**begun, "outcome": f"program: {fault}", "code": code}


def _read_lines(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    worker.wait()
    lines.put(None)


def _next_line(lines: queue.Queue[str | None]) -> str | None:
    with contextlib.suppress(queue.Empty):
        return lines.get(timeout=HANG_SECONDS)
    return ""


def main() -> None:
    """Read the command line, run all mutants, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slides", type=Path)
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="Numbers of mutants, with commas between")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    numbers = [*map(int, asked.only.split(","))] if asked.only else [*range(asked.mutants)]
    if asked.worker:
        run_worker(slides_in(asked.slides), numbers, asked.seed)
        return
    started = time.perf_counter()
    command = [sys.executable, __file__, str(asked.slides), "--seed", str(asked.seed)]
    found, peaks = [], []
    for told in watch(command, numbers):
        print(json.dumps(told), flush=True)
        if "peak_rss_mb" in told:
            peaks.append(told["peak_rss_mb"])
        else:
            found.append(told)
    summary = {
        "mutants": len(found),
        "seed": asked.seed,
        "outcomes": dict(Counter(it["outcome"] for it in found).most_common()),
        "changed": sum(bool(it.get("changed")) for it in found),
        "accepted": sum(it.get("accepted", 0) for it in found),
        "crashes": sum(it["outcome"] == "program: crash" for it in found),
        "hangs": sum(it["outcome"] == "program: hang" for it in found),
        "peak_rss_mb": {k: max(peak[k] for peak in peaks) for k in peaks[0]} if peaks else None,
        "slowest_seconds": max(it.get("seconds", 0) for it in found),
        "seconds": round(time.perf_counter() - started),
    }
    packages = {"openslide": "openslide-bin", "pillow": "pillow", "tifffile": "tifffile"}
    print(json.dumps({**summary, **about(**packages)}))


if __name__ == "__main__":
    main()
