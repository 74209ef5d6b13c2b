"""Find the tiles nearest to one, over cohorts of generated features: a JSON object a line.

exact: `find_tile` and `similar_tiles`, every tile looked at; `search` is the part that reads them.
duckdb: the same search by DuckDB's array_cosine_distance over the same files, in turns with it.
index_make, index_add: making the index, and bringing it up to date after one new slide.
index: `find_tile` and `similar_tiles` through the index; `recall` is the share of the exact nearest
    tiles that it finds, over several queries.

Features lie in 64 groups that fill 32 dimensions of `length`, with a shift for each slide and noise
in all dimensions. Slides vary in what groups they hold.

Usage: python benchmarks/similar.py [--tiles 100000 1000000] [--length 384] [--slide-tiles 385]
    [--count 24] [--repeat 5] [--queries 50] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from about import about

from histoencoder_core.clusters import FeatureFile, feature_files
from histoencoder_core.similar import QueryTile, exact, find_tile, index, similar_tiles
from histoencoder_core.store import Stamp, Store
from histoencoder_core.store.tables import feature_list, key_table, tile_name

GROUPS, DIMENSIONS, SIDE, COLUMNS = 64, 32, 512, 20
ROUNDING = 1e-6


def write_slide(number: int, *, root: Path, tiles: int, length: int) -> None:
    """Write a slide's features as the stage before does."""
    shared = np.random.default_rng(0)
    groups = shared.normal(size=(GROUPS, length))
    basis = 0.15 * shared.normal(size=(DIMENSIONS, length))
    rng = np.random.default_rng([1, number])
    held = rng.choice(GROUPS, tiles, p=rng.dirichlet(np.full(GROUPS, 0.3)))
    features = groups[held] + 0.3 * rng.normal(size=length)
    features += rng.normal(size=(tiles, DIMENSIONS)) @ basis
    features += 0.1 * rng.normal(size=(tiles, length))
    places = [(SIDE * (i % COLUMNS), SIDE * (i // COLUMNS), SIDE, SIDE) for i in range(tiles)]
    table = key_table([tile_name(*place) for place in places], places)
    table = table.append_column("features", feature_list(features, "float32"))
    table = table.append_column("unreadable", pa.nulls(tiles, pa.string()))
    made_from = {"slide": number, "tiles": tiles, "encoder": {"name": "generated"}}
    stamp = Stamp.of("features", algorithm=0, made_from=made_from)
    with Store(root).slide(f"slide-{number:05d}").writing("features") as writer:
        writer.table(table, stamp.with_result(space=f"generated-{length}", encoder="generated"))


def by_duckdb(files: list[FeatureFile], query: QueryTile, count: int) -> list[tuple[Any, ...]]:
    """The nearest tiles, as SQL finds them."""
    vector = f"FLOAT[{query.file.length}]"
    with duckdb.connect() as connection:
        return connection.execute(
            f"""
            SELECT filename, tile,
                array_cosine_distance(features::{vector}, ?::{vector}) AS distance
            FROM read_parquet(?, filename = true)
            ORDER BY distance
            LIMIT {count}
            """,
            [query.direction.tolist(), [str(file.path) for file in files]],
        ).fetchall()


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def memory_mb() -> float:
    """The most memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def spread(values: list[float]) -> dict[str, float]:
    """What is told of repeated measurements."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4)}


def some_queries(store: Store, files: list[FeatureFile], count: int) -> list[QueryTile]:
    """Tiles of slides from all over the cohort."""
    rng = np.random.default_rng(2)
    return [
        find_tile(store, files[i].slide, (int(rng.integers(COLUMNS)) * SIDE, 0))
        for i in rng.integers(len(files), size=count)
    ]


def measure(store: Store, asked: argparse.Namespace, say: Callable[..., None]) -> None:
    """Measure one store."""
    files = feature_files(store)
    queries = some_queries(store, files, max(asked.repeat, asked.queries))
    before = memory_mb()
    find = partial(similar_tiles, store, count=asked.count)
    told: dict[str, list[float]] = {"exact": [], "search": [], "duckdb": []}
    peak = 0.0
    for query in queries[: asked.repeat]:
        told["exact"].append(seconds(partial(find, query, exact_tiles=10**12)))
        told["search"].append(
            seconds(partial(exact.search, files, query.direction[None], asked.count + 1))
        )
        # Once DuckDB has run, the process's peak may be DuckDB's.
        peak = peak or memory_mb()
        told["duckdb"].append(seconds(partial(by_duckdb, files, query, asked.count + 1)))
    say("exact", **spread(told["exact"]), peak_rss_mb=round(peak), rss_before_mb=round(before))
    say("search", **spread(told["search"]))
    say("duckdb", **spread(told["duckdb"]))

    made = seconds(partial(index.tile_index, store, files))
    [path] = (store.cohort / "index").glob("*.faiss")
    say("index_make", seconds=round(made, 2), size_mb=round(path.stat().st_size / 1e6))
    times, recall = [], []
    directions = np.stack([query.direction for query in queries])
    truth = exact.search(files, directions, asked.count + 1)
    for query, known in zip(queries, truth, strict=True):
        started = time.perf_counter()
        found = find(query, exact_tiles=0)
        times.append(time.perf_counter() - started)
        # The first is the query itself.
        farthest = known.distance[asked.count] + ROUNDING
        recall.append(float((found.column("distance").to_numpy() <= farthest).mean()))
    told_recall = {"mean": round(statistics.mean(recall), 4), "min": round(min(recall), 4)}
    say("index", **spread(times), recall=told_recall, queries=len(queries))
    write_slide(len(files), root=store.root, tiles=asked.slide_tiles, length=asked.length)
    added = seconds(partial(index.tile_index, store, feature_files(store)))
    say("index_add", seconds=round(added, 2))


def main() -> None:
    """Read the command line, measure each size, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--slide-tiles", type=int, default=385)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="Where features are generated.")
    asked = parser.parse_args()
    measured_on = about(duckdb="duckdb", faiss="faiss-cpu")
    for tiles in asked.tiles:
        slides = -(-tiles // asked.slide_tiles)
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            write = partial(
                write_slide, root=Path(folder), tiles=asked.slide_tiles, length=asked.length
            )
            # In processes of their own: what they take is not this one's memory.
            with multiprocessing.get_context("spawn").Pool() as pool:
                pool.map(write, range(slides))

            def say(
                name: str,
                *,
                tiles: int = slides * asked.slide_tiles,
                slides: int = slides,
                **told: Any,
            ) -> None:
                row = {"measure": name, "tiles": tiles, "slides": slides, "length": asked.length}
                print(json.dumps({**row, "count": asked.count, **told, **measured_on}), flush=True)

            measure(Store(folder), asked, say)


if __name__ == "__main__":
    main()
