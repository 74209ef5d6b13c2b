"""Measure what Dagster adds to a slide: a JSON object a line, one a measure.

Tiny slides, in which every stage takes next to no time, are put through the stages twice: by the
core alone, in one process, and by the platform as it is deployed, from the daemon's start until the
last slide has its clusters. What the second takes longer, divided by slides and stages, is the
overhead. What a run of the platform consists of is told from Dagster's own records.

Usage: python benchmarks/overhead.py [--slides 1000] [--per-run 25 …] [--storage sqlite postgres]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
from about import about
from cohort_home import tiny_settings, tiny_slide
from homes import dagster_home
from scale import alone
from servers import code_server, running

from histoencoder_core.clusters import assign_slide, current_model, feature_files, save_model
from histoencoder_core.clusters.fit import fit_clusters
from histoencoder_core.features import Runner, extract_slides, load_encoder
from histoencoder_core.settings import PlatformSettings
from histoencoder_core.slides import Register, Sheet, find_slides, receive_slide
from histoencoder_core.store import Store
from histoencoder_core.tiles import cut_tiles

Line = dict[str, Any]

STAGES = ("slides", "tiles", "features", "clusters")
PATIENCE = 3600.0


def core_alone(settings: PlatformSettings) -> dict[str, float]:
    """Put all slides through the stages of the core: the seconds that each stage took."""
    store, took, [folder] = Store(settings.store), dict[str, float](), settings.slides
    assert isinstance(folder, Path)
    runner = Runner(load_encoder(settings.encoder), device="cpu", backend="eager")
    found = Register(store).assign(find_slides(folder))
    with timed(took, "slides"):
        for slide_id, slide in found.items():
            receive_slide(store, slide_id, slide, Sheet())
    with timed(took, "tiles"):
        for slide_id in found:
            cut_tiles(store.slide(slide_id), settings.tiling)
    with timed(took, "features"), extract_slides(store, list(found), runner) as features:
        for slide_id in found:
            features[slide_id].result()
    first = list(found)[: settings.first_fit_slides]
    save_model(store, fit_clusters(feature_files(store, slides=first), settings.clusters))
    model = current_model(store)
    assert model is not None
    with timed(took, "clusters"):
        for slide_id in found:
            assign_slide(store.slide(slide_id), model)
    return took


@contextlib.contextmanager
def timed(took: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block takes."""
    started = time.perf_counter()
    yield
    took[name] = time.perf_counter() - started


def platform(environment: Mapping[str, str], slides: int) -> float:
    """Run the daemon until all slides are done: the seconds from its start."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        _, location = stack.enter_context(code_server(environment))
        daemon = [sys.executable, "-m", "dagster._daemon", "run", *location]
        stack.enter_context(running(daemon, environment))
        instance = stack.enter_context(dg.DagsterInstance.get())
        while len(instance.get_materialized_partitions(dg.AssetKey(STAGES[-1]))) < slides:
            if time.monotonic() - started > PATIENCE:
                raise TimeoutError(f"not done; see the log in {environment['DAGSTER_HOME']}")
            time.sleep(1)
    return time.monotonic() - started


def of_runs() -> Iterator[Line]:
    """What each job's runs consisted of, as Dagster recorded it: medians in seconds.

    ``start`` is from the launch of a run's process to its first step, ``end`` from its last.
    """
    with dg.DagsterInstance.get() as instance:
        parts: dict[str, dict[str, list[float]]] = {}
        for record in instance.get_run_records():
            run = record.dagster_run
            steps = instance.get_run_step_stats(run.run_id)
            whole = [step for step in steps if step.start_time and step.end_time]
            if not (record.end_time and whole):
                continue
            first = min(step.start_time or 0 for step in whole)
            last = max(step.end_time or 0 for step in whole)
            took = {
                "start": first - launch_time(instance, run.run_id),
                **{it.step_key: (it.end_time or 0) - (it.start_time or 0) for it in whole},
                "end": record.end_time - last,
            }
            for name, seconds in took.items():
                parts.setdefault(run.job_name, {}).setdefault(name, []).append(seconds)
    for job, by_part in parts.items():
        medians = {name: round(statistics.median(took), 2) for name, took in by_part.items()}
        yield {"measure": f"a run of {job}", "unit": "s", "runs": len(by_part["start"]), **medians}


def launch_time(instance: dg.DagsterInstance, run_id: str) -> float:
    """When a run's process was started."""
    [event] = instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.PIPELINE_STARTING, limit=1
    ).records
    return float(event.event_log_entry.timestamp)


def environment_of(settings: PlatformSettings, *, per_run: int) -> dict[str, str]:
    """The deployment as environment variables."""
    told = {
        "SLIDES": str(settings.slides[0]),
        "STORE": str(settings.store),
        "DEVICE": "cpu",
        "BACKEND": "eager",
        "READERS": "1",
        "SETTLE_SECONDS": "0",
        "SLIDES_PER_RUN": str(per_run),
        "TILING": settings.tiling.model_dump_json(include={"tile_px", "overlap"}),
        "ENCODER": settings.encoder.model_dump_json(include={"name", "input_size"}),
        "CLUSTERS": settings.clusters.model_dump_json(include={"n_clusters"}),
    }
    return {f"HISTOENCODER_{name}": value for name, value in told.items()}


def measure(folder: Path, slides: int, per_run: list[int], storages: list[str]) -> Iterator[Line]:
    """Measure both ways, and tell what lies between."""
    base = tiny_settings(folder)
    [scans] = base.slides
    assert isinstance(scans, Path)
    scans.mkdir(parents=True)
    for number in range(slides):
        tiny_slide(scans / f"slide-{number:05d}.tiff", seed=number)
    core = alone(partial(core_alone, base.model_copy(update={"store": folder / "core"})))
    for stage, seconds in core.items():
        yield {"measure": f"core alone, {stage}", "unit": "s a slide", "wall": seconds / slides}
    for storage in storages:
        for size in per_run:
            place = folder / f"{storage}-{size}"
            place.mkdir()
            settings = base.model_copy(update={"store": place / "store"})
            with dagster_home(place / "home", storage) as environment:
                with dg.DagsterInstance.get():
                    pass  # so that no two processes make its tables at once
                wall = platform(environment | environment_of(settings, per_run=size), slides)
                same = {"storage": storage, "per_run": size}
                yield {
                    "measure": "platform, from the daemon's start to the last slide's clusters",
                    "unit": "s",
                    "wall": round(wall, 1),
                    **same,
                }
                beyond = (wall - sum(core.values())) / slides / len(STAGES)
                yield {
                    "measure": "overhead",
                    "unit": "s a slide and stage",
                    "wall": round(beyond, 4),
                    **same,
                }
                yield from ({**line, **same} for line in of_runs())


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=1_000)
    parser.add_argument("--per-run", type=int, nargs="+", default=[25])
    parser.add_argument(
        "--storage", nargs="+", choices=["sqlite", "postgres"], default=["sqlite", "postgres"]
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    with tempfile.TemporaryDirectory() as folder:
        for line in measure(Path(folder), arguments.slides, arguments.per_run, arguments.storage):
            told = {**line, "slides": arguments.slides, **about(dagster="dagster")}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
