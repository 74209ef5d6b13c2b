"""Measure feature extraction on one slide and one encoder: a JSON object a line, one a measure.

start_up: seconds from the start of a process to an encoder that is ready.
read_only: tiles/s of reading; `ratio` is to read_plain of the same repeat.
read_plain: tiles/s of one OpenSlide handle in a plain pool of as many threads, the same tiles.
encoder_only: tiles/s of encoding tiles that are in memory, resizing included.
end_to_end: tiles/s from the slide to ``features.parquet`` once all is warm; `share` is that of the
    lower of read_only and encoder_only of the same repeat.
peak_rss_mb: the most memory that a process held which started, read, encoded and wrote.
slide_to_features: with --peer. Seconds from the slide to ``features.parquet`` on the command line,
    start-up of all programs included, and the same by HistoPrep and HistoEncoder 0.1.1; `ratio` is
    theirs to ours, of each repeat. Each program runs as it does by default.

What is compared takes turns, each repeat anew, so that a machine that slows down slows both. The
rates are measured in one process, all else in processes of its own. The weights of HistoEncoder's
models are drawn from a seed, the same on both sides: they do not bear on the time. Tiles are asked
for in HistoPrep's way, with its command line's defaults of overlap and background.

Usage: python benchmarks/extraction.py [--slide SLIDE] [--encoder NAME] [--peer PYTHON] …
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from about import about

# What takes time or memory to import is imported where it is used: this file is also the start of
# the processes that are measured.
if TYPE_CHECKING:
    from histoencoder_core.features import Runner
    from histoencoder_core.tiles import TileSource

HERE = Path(__file__).parent
PUBLISHED = ("prostate_small", "prostate_medium")
SEED = 0
TILES_IN_MEMORY = 512

PREFIX = "HISTOENCODER_"
OURS = (sys.executable, "-c", "from histoencoder_core.cli import main; main()")


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process and give its result."""
    # A forked process would inherit what is imported here already.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


# --- What is done in processes of their own


def make_benchmark_slide(region: Path, output: Path, columns: int, rows: int) -> None:
    """Write the slide of `slide.py`."""
    from slide import make_slide

    output.parent.mkdir(parents=True, exist_ok=True)
    make_slide(region, output, columns=columns, rows=rows)


def write_weights(name: str, folder: Path) -> None:
    """Write seeded weights where those of one of HistoEncoder's models are looked for."""
    import timm
    import torch

    from histoencoder_core.features.encoders import ARCHITECTURES

    torch.manual_seed(SEED)
    module = timm.create_model(ARCHITECTURES[name], num_classes=0)
    torch.save(module.state_dict(), folder / f"{name}.pth")


def cut(asked: argparse.Namespace, root: Path) -> list[str]:
    """Cut the slide into tiles and give the ids of its copies."""
    import pyarrow.parquet as pq
    from cutting import cut_slide

    from histoencoder_core.settings import TilingSettings
    from histoencoder_core.store import Store

    store = Store(root)
    settings = TilingSettings.histoprep(
        width=asked.width, overlap=asked.overlap, max_background=asked.max_background
    )
    folder = cut_slide(asked.slide, store, settings)
    slide_id = folder.slide_id
    if asked.max_tiles is not None:
        table = pq.read_table(folder.record("tiles"))
        pq.write_table(table.slice(0, asked.max_tiles), folder.record("tiles"))
    ids = [slide_id, *(f"{slide_id}-{number}" for number in range(2, asked.copies + 1))]
    for copy in ids[1:]:
        shutil.copytree(folder.path, store.slide(copy).path)
    return ids


def measure_rates(asked: argparse.Namespace, root: Path, ids: Sequence[str]) -> dict[str, Any]:
    """Tiles/s of reading, encoding, and both."""
    from reading import places_of, plain

    from histoencoder_core.features.reading import choose_readers
    from histoencoder_core.store import Store
    from histoencoder_core.tiles import tile_source

    source = tile_source(Store(root), ids[0])
    assert source is not None
    if source.keys.num_rows == 0:
        raise SystemExit(f"{asked.slide}: has no tiles of this size that hold enough tissue.")
    runner = ready_runner(asked)
    readers = choose_readers(asked.readers)
    places = places_of(source)
    in_memory = some_tiles(source, readers, runner.execution.batch_size)
    works = {
        "read_only": lambda: read_all(source, readers),
        "read_plain": lambda: plain(asked.slide, places, readers),
        "encoder_only": lambda: sum(len(runner.encode(in_memory)) for _ in range(asked.copies)),
        "end_to_end": lambda: extract_all(asked, root, ids, runner),
    }
    works["end_to_end"]()  # files are cached and the encoder warm from here on
    rates: dict[str, list[float]] = {name: [] for name in works}
    tiles: dict[str, int] = {}
    for _ in range(asked.repeat):
        for name, work in works.items():
            started = time.perf_counter()
            tiles[name] = work()
            rates[name].append(tiles[name] / (time.perf_counter() - started))
    return {"rates": rates, "tiles": tiles, **described(asked, runner, readers)}


def measure_fresh(
    asked: argparse.Namespace, root: Path, ids: Sequence[str]
) -> tuple[float, float, int]:
    """When the encoder was ready, the most memory held in MB, and the number of tiles."""
    runner = ready_runner(asked)
    ready = time.monotonic()
    tiles = extract_all(asked, root, ids, runner)
    return ready, peak_rss_mb(), tiles


def ready_runner(asked: argparse.Namespace) -> Runner:
    """The encoder, ready to run."""
    from histoencoder_core.features import Runner, load_encoder
    from histoencoder_core.settings import EncoderSettings

    encoder = load_encoder(
        EncoderSettings(name=asked.encoder, precision=asked.precision),
        weights_folder=asked.weights,
    )
    runner = Runner(
        encoder, device=asked.device, backend=asked.backend, batch_size=asked.batch_size
    )
    runner.warm_up()
    return runner


def some_tiles(source: TileSource, readers: int, batch_size: int) -> list[Any]:
    """Tiles to hold in memory, full batches if there are enough for one."""
    from histoencoder_core.features.reading import read_blocks

    tiles: list[Any] = []
    with source.open() as pixels, contextlib.closing(read_blocks(pixels, readers)) as blocks:
        for _, found in blocks:
            tiles.extend(found)
            if len(tiles) >= max(TILES_IN_MEMORY, batch_size):
                break
    return tiles[: len(tiles) // batch_size * batch_size or None]


def read_all(source: TileSource, readers: int) -> int:
    """Read all tiles as extraction does."""
    from histoencoder_core.errors import SlideError
    from histoencoder_core.features.reading import read_blocks

    count = 0
    with source.open() as pixels:
        for _, tiles in read_blocks(pixels, readers):
            for tile in tiles:
                if isinstance(tile, SlideError):
                    raise tile
            count += len(tiles)
    return count


def extract_all(asked: argparse.Namespace, root: Path, ids: Sequence[str], runner: Runner) -> int:
    """Extract the features of the slide and its copies."""
    from histoencoder_core.features import extract_slides
    from histoencoder_core.store import Store

    with extract_slides(Store(root), ids, runner, readers=asked.readers, overwrite=True) as futures:
        return sum(future.result().result["tiles"] for future in futures.values())


def described(asked: argparse.Namespace, runner: Runner, readers: int) -> dict[str, Any]:
    """What was chosen, and on what it runs."""
    import torch

    chosen = runner.execution
    on_gpu = chosen.device.startswith("cuda")
    common = about()
    common["machine"]["gpu"] = torch.cuda.get_device_name(chosen.device) if on_gpu else None
    return {
        "settings": {
            "encoder": asked.encoder,
            "device": chosen.device,
            "backend": chosen.backend,
            "precision": chosen.precision,
            "batch_size": chosen.batch_size,
            "readers": readers,
            "slide": asked.slide.name,
            "tile_px": asked.width,
            "input_px": runner.encoder.input_size,
            "overlap": asked.overlap,
            "max_background": asked.max_background,
        },
        **common,
    }


def peak_rss_mb() -> float:
    """The most resident memory that this process ever held."""
    # `getrusage` would count what the process that started this one held then.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


# --- From the slide to features on the command line


def ours(asked: argparse.Namespace, output: Path) -> dict[str, float]:
    """Seconds of our two commands."""
    chosen = {
        "WEIGHTS": asked.weights,
        "DEVICE": asked.device,
        "BACKEND": asked.backend,
        "BATCH_SIZE": asked.batch_size,
        "READERS": asked.readers,
        "ENCODER__PRECISION": asked.precision,
    }
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(PREFIX)},
        **{f"{PREFIX}{name}": str(value) for name, value in chosen.items() if value},
    }
    return {
        "tile": seconds([*OURS, "tile", *tile_options(asked, output)], environment),
        "extract": seconds([*OURS, "extract", *extract_options(asked, output)], environment),
    }


def peers(asked: argparse.Namespace, output: Path) -> dict[str, float]:
    """Seconds of HistoPrep and of HistoEncoder's ``extract``."""
    weights = str(asked.weights / f"{asked.encoder}.pth")
    extract = ["extract", weights, *extract_options(asked, output)]
    if asked.device == "cpu":
        extract.append("--use-cpu")
    return {
        "tile": seconds([*peer(asked), "tile", *tile_options(asked, output)], peer_environment()),
        "extract": seconds([*peer(asked), *extract], peer_environment()),
    }


def peer(asked: argparse.Namespace) -> list[str]:
    """How the peer's commands begin."""
    return [asked.peer, str(HERE / "peer.py")]


def peer_environment() -> dict[str, str]:
    """Variables without those that would have the peer import our packages."""
    ours_alone = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in ours_alone}


def tile_options(asked: argparse.Namespace, output: Path) -> list[str]:
    """Options of ``histoencoder tile`` and of HistoPrep."""
    options = {
        "--input": asked.slide,
        "--output": output,
        "--width": asked.width,
        "--overlap": asked.overlap,
        "--max-background": asked.max_background,
    }
    return [str(part) for option in options.items() for part in option]


def extract_options(asked: argparse.Namespace, output: Path) -> list[str]:
    """Options of both programs' ``extract``."""
    return ["--input_dir", str(output), "--model-name", asked.encoder]


def seconds(command: Sequence[str], environment: dict[str, str]) -> float:
    """How long a command takes.

    Raises:
        SystemExit: It failed.
    """
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return elapsed


def encoded_places(output: Path) -> list[tuple[int, int]]:
    """Upper left corners of all tiles in a ``features.parquet``, sorted."""
    import pyarrow.parquet as pq

    [path] = output.glob("*/features.parquet")
    table = pq.read_table(path, columns=["x", "y"])
    return sorted(zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True))


def compare(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both programs in turn, from the slide to features."""
    versions = subprocess.run(
        [*peer(asked), "about"],
        env=peer_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    sides = {"ours": ours, "peer": peers}
    steps: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    places: dict[str, list[tuple[int, int]]] = {}
    same_tiles = True
    for repeat, (side, run) in itertools.product(range(asked.repeat), sides.items()):
        output = work / f"{side}-{repeat}"
        steps[side].append(run(asked, output))
        places[side] = encoded_places(output)
        same_tiles &= places[side] == places["ours"]
        shutil.rmtree(output)
    if not same_tiles:
        print(
            f"WARNING: the programs encoded different tiles: {len(places['ours'])} by ours, "
            f"{len(places['peer'])} by the peer. Their seconds can't be compared.",
            file=sys.stderr,
        )
    totals = {side: [sum(step.values()) for step in found] for side, found in steps.items()}
    pairs = zip(totals["peer"], totals["ours"], strict=True)
    figures = {
        side: {
            **spread(total),
            "tiles": len(places[side]),
            "tiles_per_second": spread([len(places[side]) / value for value in total]),
            "steps": {
                name: spread([step[name] for step in steps[side]]) for name in ("tile", "extract")
            },
        }
        for side, total in totals.items()
    }
    return {
        **figures["ours"],
        "peer": {**figures["peer"], "versions": json.loads(versions.stdout)},
        "ratio": spread([theirs / ours for theirs, ours in pairs]),
        "same_tiles": same_tiles,
    }


# --- Reporting


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all values, in the order in which they were measured."""
    summary = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    rounded = {name: significant(value) for name, value in summary.items()}
    return {**rounded, "values": [significant(value) for value in values]}


def significant(value: float) -> float:
    """A figure with four digits."""
    return float(f"{value:.4g}")


def main() -> None:
    """Read the command line, measure, and print."""
    load = os.getloadavg()[0]  # tells of others who use the machine
    asked = parse()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        asked.weights = None
        if asked.encoder in PUBLISHED:
            asked.weights = work / "weights"
            asked.weights.mkdir()
            alone(write_weights, asked.encoder, asked.weights)
        root = work / "store"
        ids = alone(cut, asked, root)
        found = alone(measure_rates, asked, root, ids)
        rates, tiles = found.pop("rates"), found.pop("tiles")
        found["machine"]["load_at_start"] = significant(load)

        def emit(measure: str, unit: str, **figures: Any) -> None:
            line = {"measure": measure, "unit": unit, **figures, "repeats": asked.repeat, **found}
            print(json.dumps(line), flush=True)

        more: dict[str, dict[str, Any]] = {name: {"tiles": tiles[name]} for name in rates}
        more["read_only"]["ratio"] = spread(
            [a / b for a, b in zip(rates["read_only"], rates["read_plain"], strict=True)]
        )
        limits = map(min, rates["read_only"], rates["encoder_only"])
        more["end_to_end"]["share"] = spread(
            [a / b for a, b in zip(rates["end_to_end"], limits, strict=True)]
        )
        more["encoder_only"]["note"] = "tiles of tile_px in memory: resizing is included"
        for name, values in rates.items():
            emit(name, "tiles/s", **spread(values), **more[name])

        starts, peaks = [], []
        for _ in range(asked.repeat):
            started = time.monotonic()
            ready, peak, count = alone(measure_fresh, asked, root, ids)
            starts.append(ready - started)
            peaks.append(peak)
        emit("start_up", "s", **spread(starts))
        emit("peak_rss_mb", "MB", **spread(peaks), tiles=count)
        if asked.peer:
            emit("slide_to_features", "s", **compare(asked, work))


def parse() -> argparse.Namespace:
    """Read the command line; the slide is made if there is none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = os.environ.get("HISTOENCODER_TEST_DATA")
    region = Path(data) / "slides" / "CMU-1-Small-Region.svs" if data else None
    parser.add_argument("--slide", type=Path, help="default: made by slide.py, and kept")
    parser.add_argument("--region", type=Path, default=region, help="what slide.py copies")
    parser.add_argument("--columns", type=int, default=10, help="of slide.py's slide")
    parser.add_argument("--rows", type=int, default=8, help="of slide.py's slide")
    parser.add_argument("--encoder", default="prostate_small")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--backend", default="auto", choices=["auto", "eager", "compile", "openvino"]
    )
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "float32", "float16", "bfloat16"]
    )
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--readers", type=int)
    parser.add_argument("--width", type=int, default=512, help="of a tile, in level-0 pixels")
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--max-background", type=float, default=0.75)
    parser.add_argument(
        "--max-tiles", type=int, help="tiles that are used, but for slide_to_features"
    )
    parser.add_argument(
        "--copies",
        type=int,
        default=1,
        help="of the slide to extract in a row, but for slide_to_features: a GPU needs more tiles "
        "than one slide of this size has to reach its pace",
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer", help="Python of an environment with histoencoder==0.1.1")
    asked = parser.parse_args()
    if asked.peer and asked.encoder not in PUBLISHED:
        parser.error(f"HistoEncoder 0.1.1 has no encoders but {' and '.join(PUBLISHED)}.")
    if asked.slide is None:
        if asked.region is None:
            parser.error("Give --slide, --region, or the environment's HISTOENCODER_TEST_DATA.")
        asked.slide = benchmark_slide(asked.region, asked.columns, asked.rows)
    asked.slide = asked.slide.resolve()
    return asked


def benchmark_slide(region: Path, columns: int, rows: int) -> Path:
    """The slide of `slide.py`, made if it was not made before."""
    digest = hashlib.sha256((HERE / "slide.py").read_bytes() + region.read_bytes())
    name = f"benchmark-{columns}x{rows}-{digest.hexdigest()[:8]}.tiff"
    path = Path(tempfile.gettempdir()) / "histoencoder-benchmark" / name
    if not path.exists():
        alone(make_benchmark_slide, region, path, columns, rows)
    return path


if __name__ == "__main__":
    main()
