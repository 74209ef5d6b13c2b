"""Measure the platform at a number of slides: a JSON object a line, one a measure.

A store with all stages of all slides done is written (see `cohort_store`), and a Dagster instance
that has them all on record (see `cohort_home`), on SQLite or PostgreSQL. Measured are one tick of
each sensor and automation sensor, with nothing new and with 25 new slides; a refresh of the
catalog, with nothing new, 1 and 25 new slides; ``histoencoder status`` and ``sql``; the checks; and
the daemon and the web server on it all: memory, ticks, and what the web UI asks for.

``wall`` and ``cpu`` are seconds; of ticks, the daemon's own record is told too. Pictures in the
event log are made tiny, as they would fill the disk.

Usage: python benchmarks/scale.py [--slides N …] [--storage sqlite postgres] [--folder FOLDER] …
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from about import about
from cohort_store import TILE_PX, TILING, Cohort, add_slide, register, slide_name, write_cohort
from homes import dagster_home
from servers import served

from histoencoder_core.settings import PlatformSettings

Line = dict[str, Any]

PICTURE_PX = 16
NEW = 25
PARTS = ("catalog", "commands", "checks", "ticks", "servers")


def written(folder: Path, slides: int, tiles: int) -> Cohort:
    """The store of a cohort, with its table of slides; one that is there is taken."""
    cohort = Cohort(folder / f"{slides}", slides, tiles, (2, 3))
    if not (cohort.folder / "slides" / "slides.csv").exists():
        write_cohort(cohort)
        write_sheet(cohort)
    register(cohort, slides)
    return cohort


def write_sheet(cohort: Cohort) -> None:
    """The ``slides.csv`` that the slides were described with, and of those to come."""
    with (cohort.folder / "slides" / "slides.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["slide", "patient", "site", "scanner"])
        for number in range(cohort.slides + 10 * NEW):
            facts = f"patient-{number // 2}", f"site-{number % 7}", f"scanner-{number % 3}"
            rows.writerow([slide_name(number), *facts])


def settings_of(cohort: Cohort) -> PlatformSettings:
    """The deployment's settings."""
    return PlatformSettings(
        slides=(cohort.folder / "slides",),
        store=cohort.folder / "store",
        annotations=cohort.annotations,
        device="cpu",
        settle_seconds=0,
        tiling=TILING,
    )


def environment_of(cohort: Cohort, *, annotated: bool) -> dict[str, str]:
    """The same as environment variables.

    Args:
        cohort: The cohort.
        annotated: Whether its annotations are looked for.
    """
    return {
        "HISTOENCODER_SLIDES": str(cohort.folder / "slides"),
        "HISTOENCODER_STORE": str(cohort.folder / "store"),
        "HISTOENCODER_ANNOTATIONS": str(cohort.annotations if annotated else cohort.folder / "no"),
        "HISTOENCODER_DEVICE": "cpu",
        "HISTOENCODER_TILING__TILE_PX": str(TILE_PX),
        "HISTOENCODER_TILING__OVERLAP": "0",
    }


@contextlib.contextmanager
def home_of(cohort: Cohort, storage: str) -> Iterator[dict[str, str]]:
    """A Dagster instance that has all slides on record; one that is there is taken.

    Yields:
        Its environment variables, which this process then has, too.
    """
    home = cohort.folder / storage
    fresh = not home.exists()
    with dagster_home(home, storage) as environment:
        if fresh:
            alone(partial(_fill, cohort.slides))
        yield environment


def _fill(slides: int) -> None:
    import dagster as dg
    from cohort_home import fill

    with dg.DagsterInstance.get() as instance:
        fill(instance, slides, picture_px=PICTURE_PX)


def _ticks(cohort: Cohort) -> list[Line]:
    import dagster as dg
    from ticks import ticks

    new = [slide_name(cohort.slides + number) for number in range(NEW)]
    with dg.DagsterInstance.get() as instance:
        return list(ticks(instance, settings_of(cohort), new))


def _refreshes(cohort: Cohort) -> list[Line]:
    from histoencoder_core.cohort import build_catalog

    def refresh() -> None:
        build_catalog(cohort.store, tiling=TILING, annotations=cohort.annotations)

    lines = [timed("catalog, from scratch or what changed since", refresh)]
    lines.append(timed("catalog, nothing new", refresh))
    following = cohort.slides
    for new in (1, NEW):
        for number in range(following, following + new):
            add_slide(cohort, number)
        following += new
        lines.append(timed(f"catalog, {new} new", refresh))
    for number in range(cohort.slides, following):
        shutil.rmtree(cohort.store.slide(slide_name(number)).path)
        (cohort.folder / "slides" / f"{slide_name(number)}.tiff").unlink()
        (cohort.annotations / f"{slide_name(number)}.geojson").unlink()
    register(cohort, cohort.slides)
    refresh()
    return lines


def _checks(cohort: Cohort) -> list[Line]:
    from histoencoder_dagster.checks import ALL_CHECKS
    from histoencoder_dagster.resources import Platform

    platform = Platform(settings_of(cohort))
    return [
        timed(
            f"check {check.check_keys.__iter__().__next__().name}, {when}", partial(check, platform)
        )
        for check in ALL_CHECKS
        for when in ("first", "nothing new")
    ]


def _commands(cohort: Cohort) -> Iterator[Line]:
    """The command line's wall time, its start included."""
    environment = {**os.environ, **environment_of(cohort, annotated=True)}
    commands = {
        "status": ["status"],
        "sql": ["sql", "SELECT stage, state, count(*) FROM completeness GROUP BY ALL"],
    }
    for name, command in commands.items():
        for when in ("first", "again"):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", "from histoencoder_core.cli import main; main()", *command],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:] + done.stdout[-2000:])
            wall = round(time.perf_counter() - started, 3)
            yield {"measure": f"histoencoder {name}, {when}", "unit": "s", "wall": wall}


def timed(name: str, work: Callable[[], Any]) -> Line:
    """Do something, and tell how long it took."""
    started = time.perf_counter(), time.process_time()
    work()
    return {
        "measure": name,
        "unit": "s",
        "wall": round(time.perf_counter() - started[0], 3),
        "cpu": round(time.process_time() - started[1], 3),
    }


def alone(work: Callable[[], Any]) -> Any:
    """Do something in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work).result()


def measure(
    cohort: Cohort, only: list[str], storages: list[str], *, seconds: float
) -> Iterator[Line]:
    """Measure one cohort, and on each storage what depends on it."""
    if "catalog" in only:
        yield from alone(partial(_refreshes, cohort))
    if "commands" in only:
        yield from _commands(cohort)
    if "checks" in only:
        yield from alone(partial(_checks, cohort))
    for storage in storages if {"ticks", "servers"} & set(only) else ():
        with home_of(cohort, storage) as environment:
            lines = alone(partial(_ticks, cohort)) if "ticks" in only else []
            yield from ({**line, "storage": storage} for line in lines)
            if "servers" not in only:
                continue
            # Without annotations: the first tick would ask for the labels of all slides.
            environment |= environment_of(cohort, annotated=False)
            served_lines = served(
                environment, asset="tiles", slide=slide_name(7), seconds=seconds, repeats=5
            )
            yield from ({**line, "storage": storage} for line in served_lines)


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--tiles", type=int, default=6, help="of a slide, on average")
    parser.add_argument(
        "--storage", nargs="+", choices=["sqlite", "postgres"], default=["sqlite", "postgres"]
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=180, help="that the daemon ticks")
    parser.add_argument("--folder", type=Path, help="where all is written, and kept")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        for slides in arguments.slides:
            cohort = written(folder, slides, arguments.tiles)
            same = {"slides": slides, "tiles": arguments.tiles, **about(dagster="dagster")}
            for line in measure(
                cohort, arguments.only, arguments.storage, seconds=arguments.seconds
            ):
                print(json.dumps({**line, **same}), flush=True)


if __name__ == "__main__":
    main()
