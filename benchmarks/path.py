"""Time the whole path on one slide: a JSON object a line, one a stage.

Usage: python benchmarks/path.py SLIDE [--encoder NAME] [--repeat N]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

from about import about

from histoencoder_core.clusters import assign_slide, feature_files, save_model
from histoencoder_core.clusters.fit import fit_clusters
from histoencoder_core.cohort import build_catalog
from histoencoder_core.features import Runner, extract_slides, load_encoder
from histoencoder_core.settings import ClusterSettings, EncoderSettings, TilingSettings
from histoencoder_core.slides import Register, describe_slide
from histoencoder_core.slides.find import find_pattern
from histoencoder_core.slides.sheet import SheetRow
from histoencoder_core.store import Store
from histoencoder_core.tiles import cut_tiles, tile_source


def run_once(slide: str, encoder_name: str) -> dict[str, float]:
    """Seconds of each stage, in an empty store."""
    seconds: dict[str, float] = {}
    runner = Runner(load_encoder(EncoderSettings(name=encoder_name)))
    runner.warm_up()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        [(slide_id, found)] = Register(store).assign(find_pattern(slide)).items()
        place = store.slide(slide_id)

        def timed(stage: str, work):
            started = time.perf_counter()
            result = work()
            seconds[stage] = time.perf_counter() - started
            return result

        timed("slides", lambda: describe_slide(place, found, SheetRow()))
        timed("tiles", lambda: cut_tiles(place, TilingSettings()))
        source = tile_source(store, slide_id)
        assert source is not None

        def extract() -> None:
            with extract_slides(store, [slide_id], runner) as features:
                features[slide_id].result()

        timed("features", extract)
        model = timed(
            "cluster_model", lambda: fit_clusters(feature_files(store), ClusterSettings())
        )
        save_model(store, model)
        timed("clusters", lambda: assign_slide(place, model))
        timed("catalog", lambda: build_catalog(store))
        seconds["tiles_per_second"] = source.keys.num_rows / seconds["features"]
    return seconds


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slide")
    parser.add_argument("--encoder", default="untrained:xcit_small_12_p16_224")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    runs = [run_once(arguments.slide, arguments.encoder) for _ in range(arguments.repeat)]
    described = {
        "slide": Path(arguments.slide).name,
        "encoder": arguments.encoder,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **about(),
    }
    for stage in runs[0]:
        values = sorted(run[stage] for run in runs)
        row = {"stage": stage, "median": statistics.median(values), "min": values[0], **described}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
