"""Measure the catalog on a large cohort: a JSON object a line, one a measure.

build: the catalog written from scratch.
refresh: one new slide taken in, another each time.
nothing_new: a refresh that finds no change.
statistics: bootstraps and permutations, computed from the catalog.
The others are queries, each with the opening of the catalog.

All but `nothing_new` are measured in processes of their own; `peak_rss_mb` is theirs, libraries
included. The store is written first, as the stages write it (see `cohort_store`), and read from the
disk's cache.

Usage: python benchmarks/catalog.py [--slides N] [--tiles N] [--folder FOLDER] …
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from about import about
from cohort_store import TILING, Cohort, add_slide, write_cohort

from histoencoder_core.cohort import build_catalog, ensure_statistics, run_sql

Line = dict[str, Any]

Result = TypeVar("Result")

Run = tuple[float, float]
"""Seconds, and the most memory in MB that the process held until then."""


def queries(k: int) -> dict[str, str]:
    """The queries that are measured, by name."""
    return {
        f"cluster_purity({k})": f"FROM cluster_purity({k})",
        f"purity_curve({k})": f"FROM purity_curve({k})",
        f"coverage_at({k}, 0.9)": f"FROM coverage_at({k}, 0.9)",
        f"coverage_null({k}, 0.9)": f"FROM coverage_null({k}, 0.9)",
        f"cluster_spread({k})": f"FROM cluster_spread({k})",
        f"agreement({k})": f"FROM agreement({k})",
        f"slide_composition_k{k}": f"FROM slide_composition_k{k}",
        "tiles of a cluster": f"SELECT slide, tile FROM clusters WHERE k = {k} AND cluster = 3",
    }


def build(cohort: Cohort) -> None:
    """Write the catalog from scratch."""
    cohort.store.catalog_path.unlink(missing_ok=True)
    refresh(cohort)


def refresh(cohort: Cohort) -> None:
    """Bring the catalog up to date."""
    build_catalog(cohort.store, tiling=TILING, annotations=cohort.annotations)


def compute_statistics(cohort: Cohort) -> None:
    """Compute what the catalog takes in."""
    ensure_statistics(cohort.store)


def ask(cohort: Cohort, query: str) -> None:
    """Ask the catalog."""
    run_sql(cohort.store, query)


def timed(work: Callable[[], None]) -> Run:
    """Do something."""
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refreshes(cohort: Cohort, times: int) -> list[Run]:
    """Refresh after each new slide."""
    runs = []
    for number in range(times):
        add_slide(cohort, cohort.slides + number)
        runs.append(timed(partial(refresh, cohort)))
    return runs


def answers(cohort: Cohort, times: int) -> list[list[Run]]:
    """Ask each query so many times."""
    asked = queries(max(cohort.n_clusters)).values()
    return [[timed(partial(ask, cohort, query)) for _ in range(times)] for query in asked]


def alone(work: Callable[[], Result]) -> Result:
    """Do something in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work).result()


def measured(name: str, runs: list[Run], **more: Any) -> Line:
    """One line of output."""
    seconds = [round(run[0], 4) for run in runs]
    return {
        "measure": name,
        "unit": "s",
        "median": round(statistics.median(seconds), 4),
        "min": min(seconds),
        "max": max(seconds),
        "values": seconds,
        "peak_rss_mb": round(max(run[1] for run in runs)),
        **more,
    }


def measure(cohort: Cohort, *, builds: int, repeats: int) -> Iterator[Line]:
    """Measure everything, the slowest first."""
    yield measured("build", [alone(partial(timed, partial(build, cohort))) for _ in range(builds)])
    runs = []
    for _ in range(builds):
        for table in cohort.store.statistics.glob("*"):
            table.unlink()
        runs.append(alone(partial(timed, partial(compute_statistics, cohort))))
    yield measured("statistics", runs)
    first, *runs = alone(partial(refreshes, cohort, repeats + 1))
    # The first also takes in the statistics, or puts them out of use.
    yield measured("refresh", runs, first=round(first[0], 4))
    yield measured("nothing_new", [timed(partial(refresh, cohort)) for _ in range(repeats)])
    compute_statistics(cohort)
    refresh(cohort)
    size = cohort.store.catalog_path.stat().st_size
    yield {"measure": "size", "unit": "MB", "median": round(size / 1e6, 1)}
    found = alone(partial(answers, cohort, repeats))
    for name, runs in zip(queries(max(cohort.n_clusters)), found, strict=True):
        yield measured(name, runs)


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--tiles", type=int, default=380, help="of a slide, on average")
    parser.add_argument(
        "--n-clusters", type=int, nargs="+", default=[8, 16, 24, 32, 64, 128], metavar="K"
    )
    parser.add_argument("--builds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the cohort is written, and kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        cohort = Cohort(folder, arguments.slides, arguments.tiles, tuple(arguments.n_clusters))
        tiles = write_cohort(cohort)
        same = {
            "settings": {
                "slides": cohort.slides,
                "tiles": tiles,
                "n_clusters": arguments.n_clusters,
                "repeats": arguments.repeats,
            },
            **about(duckdb="duckdb", pyarrow="pyarrow"),
        }
        for line in measure(cohort, builds=arguments.builds, repeats=arguments.repeats):
            print(json.dumps({**line, **same}), flush=True)


if __name__ == "__main__":
    main()
