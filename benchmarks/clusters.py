"""Measure the fit of a cluster model on generated features: a JSON object a line, one a program.

ours: `fit_clusters` on the feature files of a store.
scikit-learn: `MiniBatchKMeans` for each K with all features in memory, as HistoEncoder clusters;
    they are read from the same files into one array, without a copy. `load_seconds` are part of its
    `seconds`.

`seconds` are those of a process from its start to its end, `peak_rss_mb` the most memory it held.
`ratio` is the peer's time to ours, of each repeat. `inertia` is the mean squared distance of a tile
to its nearest centroid, by K, computed from both programs' centroids by the same code in float64;
`inertia_ratio` is ours to the peer's of the same repeat, by K, largest of the repeats. What is
compared takes turns, each repeat anew.

The features are a mixture of more patterns than there are clusters, of unequal weight, in groups;
slides differ in size, in which patterns they have and by an offset of their own. They are written
as the features stage writes them.

Usage: python benchmarks/clusters.py [--slides N] [--tiles N] [--length N] [--only ours] …
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from about import about, usable_cores

# What takes time or memory to import is imported where it is used: this file is also the start of
# the processes that are measured.
if TYPE_CHECKING:
    import numpy as np

SEED = 0
PATTERNS, GROUPS = 400, 24
PROGRAMS = ("ours", "scikit-learn")


# --- Features


def slide_sizes(slides: int, tiles: int) -> list[int]:
    """Tiles of each slide, unequal, `tiles` altogether and at least one each."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    weights = rng.lognormal(0, 0.7, slides)
    sizes: list[int] = (1 + rng.multinomial(tiles - slides, weights / weights.sum())).tolist()
    return sizes


def write_slides(store: Path, length: int, numbered: Sequence[tuple[int, int]]) -> None:
    """Write the features of slides, given with their numbers of tiles."""
    import numpy as np

    from histoencoder_core.store import Stamp, Store
    from histoencoder_core.store.tables import feature_list, key_table, tile_name

    rng = np.random.default_rng([SEED, 1])
    # Encoders' features vary much in few directions and little in many.
    scale = (np.arange(length) / 16 + 1) ** -0.5
    groups = rng.normal(0, 1.0, (GROUPS, length))[rng.integers(GROUPS, size=PATTERNS)]
    patterns = ((groups + rng.normal(0, 0.7, (PATTERNS, length))) * scale).astype(np.float32)
    weights = (np.arange(PATTERNS) + 3.0) ** -0.8
    for number, tiles in numbered:
        rng = np.random.default_rng([SEED, 2, number])
        shares = rng.dirichlet(40 * weights / weights.sum())
        drawn = rng.choice(PATTERNS, tiles, p=shares)
        features = patterns[drawn]
        features += rng.normal(0, 0.3, length).astype(np.float32) * scale.astype(np.float32)
        noise = rng.standard_normal((tiles, length), np.float32)
        features += 0.8 * noise * scale.astype(np.float32)
        places = [(512 * (i % 100), 512 * (i // 100), 512, 512) for i in range(tiles)]
        table = key_table([tile_name(*place) for place in places], places)
        table = table.append_column("features", feature_list(features, "float32"))
        stamp = Stamp.of(
            "features", algorithm=1, made_from={"tiles": str(number), "encoder": {"name": "made"}}
        ).with_result(space="made", encoder="made", tiles=tiles)
        with Store(store).slide(f"slide-{number:06d}").writing("features") as writer:
            writer.table(table, stamp)


def write_store(store: Path, *, slides: int, tiles: int, length: int) -> None:
    """Write a store of generated features."""
    numbered = list(enumerate(slide_sizes(slides, tiles)))
    parts = [numbered[first : first + 100] for first in range(0, slides, 100)]
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        for _ in pool.map(partial(write_slides, store, length), parts):
            pass


# --- What is done in processes of their own


def fit_ours(store: Path, ks: tuple[int, ...], memory_gb: float, centroids: Path) -> dict[str, Any]:
    """Fit our model."""
    import numpy as np

    from histoencoder_core.clusters import feature_files
    from histoencoder_core.clusters.fit import fit_clusters
    from histoencoder_core.settings import ClusterSettings
    from histoencoder_core.store import Store

    settings = ClusterSettings(n_clusters=ks, seed=SEED)
    model = fit_clusters(feature_files(Store(store)), settings, memory_gb=memory_gb)
    np.savez(centroids, **{str(k): found for k, found in model.centroids.items()})
    told = {str(k): round(value, 5) for k, value in model.inertia.items()}
    return {"passes": model.stamp.result["passes"], "told_inertia": told}


def fit_peer(store: Path, ks: tuple[int, ...], centroids: Path) -> dict[str, Any]:
    """Fit scikit-learn's models."""
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans

    started = time.perf_counter()
    features = None
    for first, rows, total in chunks(store):
        if features is None:
            features = np.empty((total, rows.shape[1]), np.float32)
        features[first : first + len(rows)] = rows
    load_seconds = time.perf_counter() - started
    found = {}
    for k in ks:
        model = MiniBatchKMeans(n_clusters=k, random_state=SEED)
        model.fit_predict(features)
        found[str(k)] = model.cluster_centers_
    np.savez(centroids, **found)
    return {"load_seconds": round(load_seconds, 1)}


def chunks(store: Path) -> Iterator[tuple[int, np.ndarray, int]]:
    """All features, with the number of tiles before them and altogether."""
    from histoencoder_core.clusters import feature_files
    from histoencoder_core.store import Store
    from histoencoder_core.store.tables import iter_features

    inputs = feature_files(Store(store))
    total, first = sum(file.tiles for file in inputs), 0
    for file in inputs:
        for rows in iter_features(file.path):
            yield first, rows, total
            first += len(rows)


def mean_inertia(store: Path, centroids: Sequence[Path]) -> list[dict[str, float]]:
    """The mean squared distance to the nearest centroid, by K, of several programs' centroids."""
    import numpy as np

    loaded = [dict(np.load(path)) for path in centroids]
    totals = [dict.fromkeys(found, 0.0) for found in loaded]
    tiles = 0
    for _, rows, tiles in chunks(store):  # noqa: B007 - the last one is used
        wide = rows.astype(np.float64)
        squares = (wide**2).sum(axis=1)
        for found, total in zip(loaded, totals, strict=True):
            for k, points in found.items():
                centres = points.astype(np.float64)
                products = (centres**2).sum(axis=1) - 2 * wide @ centres.T
                total[k] += float((products.min(axis=1) + squares).sum())
    return [{k: value / tiles for k, value in total.items()} for total in totals]


# --- Measuring


def run(*arguments: str) -> dict[str, Any]:
    """Run this script for one part in a process of its own, and time it."""
    started = time.perf_counter()
    command = [sys.executable, __file__, *arguments]
    # Threads that wait busily for each other take many times as long where others use the machine.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout), "seconds": time.perf_counter() - started}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of what was measured."""
    rounded = [float(f"{value:.4g}") for value in values]
    return {
        "median": float(f"{statistics.median(rounded):.4g}"),
        "min": min(rounded),
        "max": max(rounded),
        "values": rounded,
    }


def measure(store: Path, asked: argparse.Namespace, work: Path) -> None:
    """Print what each program took and gave."""
    programs = [asked.only] if asked.only else list(PROGRAMS)
    load_at_start = os.getloadavg()[0]
    done: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    for repeat in range(asked.repeat):
        for program in programs if repeat % 2 == 0 else reversed(programs):
            centroids = work / f"{program}-{repeat}.npz"
            options = ["--fit", program, "--folder", str(store), "--centroids", str(centroids)]
            options += ["--memory", str(asked.memory), "--n-clusters", *map(str, asked.n_clusters)]
            done[program].append(run(*options))
    for repeat in range(asked.repeat):
        paths = [str(work / f"{program}-{repeat}.npz") for program in programs]
        found = run("--inertia", *paths, "--folder", str(store))["inertia"]
        for program, inertia in zip(programs, found, strict=True):
            done[program][repeat]["inertia"] = inertia
    facts = about(scikit_learn="scikit-learn")
    facts["machine"]["load_at_start"] = round(load_at_start, 2)
    for program, measures in done.items():
        line: dict[str, Any] = {
            "program": program,
            "seconds": spread([m["seconds"] for m in measures]),
            "peak_rss_mb": spread([m["peak_rss_mb"] for m in measures]),
            "inertia": {
                k: float(f"{statistics.median(m['inertia'][k] for m in measures):.6g}")
                for k in map(str, asked.n_clusters)
            },
        }
        if program == "ours":
            line |= {"memory_gb": asked.memory, "passes": measures[0]["passes"]}
            line["told_inertia"] = measures[0]["told_inertia"]
        else:
            line["load_seconds"] = spread([m["load_seconds"] for m in measures])
        if program == "ours" and len(programs) > 1:
            pairs = list(zip(measures, done["scikit-learn"], strict=True))
            line["ratio"] = spread([peer["seconds"] / ours["seconds"] for ours, peer in pairs])
            line["inertia_ratio"] = {
                k: round(max(ours["inertia"][k] / peer["inertia"][k] for ours, peer in pairs), 5)
                for k in map(str, asked.n_clusters)
            }
        line |= {name: getattr(asked, name) for name in ("slides", "tiles", "length", "repeat")}
        print(json.dumps({**line, **facts}), flush=True)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--tiles", type=int, default=3_800_000)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--n-clusters", type=int, nargs="+", default=[8, 16, 24, 32, 64, 128])
    parser.add_argument("--memory", type=float, default=2.0, help="GB that our fit may take")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=PROGRAMS)
    parser.add_argument("--folder", type=Path, help="keep the features here, or use those here")
    parser.add_argument("--fit", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--inertia", type=Path, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--centroids", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.fit or asked.inertia:
        print(json.dumps(_part(asked)))
        return
    with tempfile.TemporaryDirectory(prefix="histoencoder-clusters-") as work:
        store = asked.folder or Path(work) / "store"
        if not store.exists():
            try:
                write_store(store, slides=asked.slides, tiles=asked.tiles, length=asked.length)
            except BaseException:
                shutil.rmtree(store, ignore_errors=True)
                raise
        measure(store, asked, Path(work))


def _part(asked: argparse.Namespace) -> dict[str, Any]:
    if asked.inertia:
        return {"inertia": mean_inertia(asked.folder, asked.inertia)}
    ks = tuple(asked.n_clusters)
    if asked.fit == "ours":
        told = fit_ours(asked.folder, ks, asked.memory, asked.centroids)
    else:
        told = fit_peer(asked.folder, ks, asked.centroids)
    # On Linux in KiB.
    return {**told, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}


if __name__ == "__main__":
    main()
