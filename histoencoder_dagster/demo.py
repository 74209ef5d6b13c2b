"""The demo: a real slide and a synthetic cohort, through every asset, in one process.

Run it with ``make demo``; ``make ui`` then opens the platform on what it made. A second run finds
everything done.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from histoencoder_core.cli.tables import print_table
from histoencoder_core.clusters import current_model
from histoencoder_core.cohort import run_sql, slide_states
from histoencoder_core.demo import fetch_cmu_small_region, make_synthetic_cohort
from histoencoder_core.errors import HistoEncoderError
from histoencoder_core.settings import PlatformSettings
from histoencoder_core.store import Store, layout
from histoencoder_dagster.partitions import RANGE_END, RANGE_START, SLIDES
from histoencoder_dagster.resources import Platform
from histoencoder_dagster.sensors.batches import contiguous_batches

ENCODER = "pathmnist_densenet121"
SYNTHETIC_SLIDES = 6
SHOWN_K = 8

_INSTANCE_CONFIG = Path(__file__).parents[1] / "deploy" / "dagster.yaml"
_BEFORE_MODEL: tuple[layout.Stage, ...] = ("slides", "tiles", "features")
_AFTER_MODEL: tuple[layout.Stage, ...] = ("clusters", "labels")
_QUIET = {"loggers": {"console": {"config": {"log_level": "WARNING"}}}}


def main() -> int:
    """Make the demo, or open the UI on it."""
    parser = argparse.ArgumentParser(prog="histoencoder demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the demo lives")
    parser.add_argument("--ui", action="store_true", help="open the web UI on the demo's cohort")
    parser.add_argument("--port", type=int, default=3000, help="the web UI's port")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    _deploy(folder)
    if arguments.ui:
        dev = ["dagster", "dev", "-m", "histoencoder_dagster.definitions"]
        address = ["-h", "127.0.0.1", "-p", str(arguments.port)]
        print(f"Opening http://127.0.0.1:{arguments.port} … (stop it with Ctrl-C)", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", *dev, *address])  # noqa: S606
    started = time.perf_counter()
    try:
        _prepare(folder / "slides")
        ran = _materialise()
    except HistoEncoderError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    _report(folder, ran, time.perf_counter() - started)
    return 0


def _deploy(folder: Path) -> None:
    """Set the deployment's environment: the same for this process and for the UI."""
    home = folder / "dagster_home"
    home.mkdir(parents=True, exist_ok=True)
    if _INSTANCE_CONFIG.is_file() and not (home / "dagster.yaml").exists():
        shutil.copy(_INSTANCE_CONFIG, home)
    os.environ |= {
        "DAGSTER_HOME": str(home),
        "HISTOENCODER_SLIDES": str(folder / "slides"),
        "HISTOENCODER_STORE": str(folder / "store"),
        "HISTOENCODER_ENCODER__NAME": ENCODER,
        # A few hundred tiles are too few for the 128 clusters of a real cohort.
        "HISTOENCODER_CLUSTERS__N_CLUSTERS": "[8, 16, 24, 32]",
        "HISTOENCODER_ANNOTATE__N_CLUSTERS": "16",
        "HISTOENCODER_SETTLE_SECONDS": "5",
    }


def _prepare(slides: Path) -> None:
    fetch_cmu_small_region(slides)
    if len(list(slides.glob("synthetic-*.tiff"))) < SYNTHETIC_SLIDES:
        print(f"Drawing {SYNTHETIC_SLIDES} synthetic slides …", flush=True)
        make_synthetic_cohort(slides, slides=SYNTHETIC_SLIDES)


def _materialise() -> list[str]:
    """Run every stage on the slides that are due; tell which assets ran."""
    # The definitions read the environment, which is set by now.
    from histoencoder_dagster.definitions import defs

    platform = Platform(PlatformSettings())
    ran: list[str] = []
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions(SLIDES, list(platform.register_slides()))
        order = instance.get_dynamic_partitions(SLIDES)

        def run(selection: str | dg.AssetSelection, batch: Sequence[str] = ()) -> None:
            name = selection if isinstance(selection, str) else "report and checks"
            print(f"{name}{f': {len(batch)} slides' if batch else ''} …", flush=True)
            result = dg.materialize(
                [*(defs.assets or ()), *(defs.asset_checks or ())],  # type: ignore[list-item]
                selection=[selection] if isinstance(selection, str) else selection,
                instance=instance,
                resources={"platform": platform},
                tags={RANGE_START: batch[0], RANGE_END: batch[-1]} if batch else None,
                run_config=_QUIET,
                raise_on_error=False,
            )
            if not result.success:
                raise HistoEncoderError(f"{name} failed; see the messages above.")
            ran.append(name)

        def run_slides(stage: layout.Stage) -> None:
            due = _due(platform, stage)
            for batch in contiguous_batches(due, order, size=platform.settings.slides_per_run):
                run(stage, batch)

        for stage in _BEFORE_MODEL:
            run_slides(stage)
        if current_model(platform.store) is None:
            run("cluster_model")
        for stage in _AFTER_MODEL:
            run_slides(stage)
        if ran or not platform.store.catalog_path.exists():
            for asset in ("catalog", "cluster_statistics", "cluster_purity", "cluster_labels"):
                run(asset)
            run("annotation_accuracy")
            run_slides("annotations")
            run(dg.AssetSelection.groups("report") | dg.AssetSelection.all_asset_checks())
    return ran


def _due(platform: Platform, stage: layout.Stage) -> set[str]:
    settings, store = platform.settings, platform.store
    states = slide_states(
        store,
        tiling=settings.tiling,
        encoder=settings.encoder,
        model=current_model(store),
        annotations=settings.annotations_folder,
        labels=settings.labels,
        annotate=settings.annotate,
    )
    due = {"missing", "stale", "failed"}
    return {state.slide for state in states if state.stage == stage and state.state in due}


def _report(folder: Path, ran: list[str], seconds: float) -> None:
    store = Store(folder / "store")
    columns = "cluster, label, purity, labelled_tiles, tiles, slides"
    query = f"SELECT {columns} FROM cluster_purity WHERE k = {SHOWN_K} ORDER BY purity DESC"  # noqa: S608
    print(f"\nPurity of the {SHOWN_K} clusters in their most frequent label:\n")
    print_table(run_sql(store, query))
    shown = Path(os.path.relpath(folder))
    told = f"{len(ran)} steps ran" if ran else "everything was done already, nothing was recomputed"
    print(
        f"\nDone in {seconds:.0f} s: {told}. What to do next:\n"
        f"  make ui                                       see it in the browser\n"
        f"  histoencoder status -i {shown}/store             what is done, and what is not\n"
        f'  histoencoder sql -i {shown}/store "from slide_composition"   ask it anything\n'
        f"  histoencoder show cluster {SHOWN_K} 0 -i {shown}/store   a cluster's tiles\n"
        f"  {shown}/store/_cohort/report.html                the cohort in one page\n"
        f"  {shown}/store/CMU-1-Small-Region/annotations.geojson   for QuPath\n"
        "The synthetic slides are drawn, not scanned, and the encoder is a stand-in: the numbers\n"
        "show how the platform works, not what an encoder knows."
    )


if __name__ == "__main__":
    sys.exit(main())
