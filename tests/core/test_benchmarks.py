from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import tissue_pixels, write_tiff

from histoencoder_core.slides import open_slide

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SETTINGS = {
    "encoder", "device", "backend", "precision", "batch_size", "readers", "tile_px", "overlap"
}  # fmt: skip


def load_benchmark(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def region(tmp_path: Path) -> Path:
    return write_tiff(tmp_path / "region.tiff", tissue_pixels(600, 400))


def run(script: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def read_whole(path: Path) -> np.ndarray:
    with open_slide(path) as slide:
        return slide.read((0, 0, slide.width, slide.height))


# --- slide.py


def test_slide_is_a_pyramid_of_known_resolution(region: Path, tmp_path: Path) -> None:
    script = load_benchmark("slide")
    script.make_slide(region, tmp_path / "made.tiff", columns=4, rows=2)
    with open_slide(tmp_path / "made.tiff") as slide:
        assert slide.level_sizes == [(2400, 800), (1200, 400)]
        assert slide.mpp == pytest.approx((script.MPP, script.MPP))


def test_cells_are_flipped_copies_or_glass(region: Path, tmp_path: Path) -> None:
    script = load_benchmark("slide")
    for name in ("made.tiff", "again.tiff"):
        script.make_slide(region, tmp_path / name, columns=4, rows=2)
    pixels = read_whole(tmp_path / "made.tiff")
    np.testing.assert_array_equal(pixels, read_whole(tmp_path / "again.tiff"))
    copied = read_whole(region).astype(int)
    flips = [copied[::y, ::x] for y in (1, -1) for x in (1, -1)]
    blank = 0
    for top in range(0, 800, 400):
        for left in range(0, 2400, 600):
            cell = pixels[top : top + 400, left : left + 600].astype(int)
            if np.abs(cell - script.GLASS).mean() < 1:
                blank += 1
            else:
                assert min(np.abs(cell - flip).mean() for flip in flips) < 4
    assert blank == round(script.BLANK_SHARE * 8)


# --- extraction.py


def assert_spread(figures: dict[str, Any]) -> None:
    assert len(figures["values"]) == 1
    assert 0 < figures["min"] <= figures["median"] <= figures["max"]


@pytest.mark.slow
def test_extraction_prints_its_measures(region: Path, tmp_path: Path) -> None:
    done = run(
        "extraction.py",
        *("--region", str(region), "--columns", "2", "--rows", "2"),
        *("--encoder", "untrained:test_resnet", "--device", "cpu", "--backend", "eager"),
        *("--batch-size", "4", "--readers", "2", "--width", "100", "--overlap", "0.25"),
        *("--max-tiles", "10", "--copies", "2", "--repeat", "1"),
        TMPDIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    lines = {line["measure"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert lines.keys() == {
        "read_only", "read_plain", "encoder_only", "end_to_end", "start_up", "peak_rss_mb"
    }  # fmt: skip
    for line in lines.values():
        assert_spread(line)
        assert line["unit"]
        assert line["repeats"] == 1
        assert line["settings"].keys() >= SETTINGS
        assert line["machine"].keys() == {"cpu", "cores", "gpu", "load_at_start"}
        assert line["versions"].keys() == {"python", "torch", "openvino", "ours"}
        assert line["date"]
    assert_spread(lines["read_only"]["ratio"])
    assert_spread(lines["end_to_end"]["share"])
    assert [lines[name]["tiles"] for name in ("read_only", "read_plain", "end_to_end")] == [
        10, 10, 20
    ]  # fmt: skip
    chosen = lines["end_to_end"]["settings"]
    assert (chosen["backend"], chosen["batch_size"], chosen["tile_px"]) == ("eager", 4, 100)
    # The slide is kept for the next time, what was measured with it is not.
    assert len([*tmp_path.glob("histoencoder-benchmark/*.tiff")]) == 1
    assert not [*tmp_path.rglob("*.parquet")]


def test_peer_has_no_other_encoders(region: Path) -> None:
    done = run(
        "extraction.py",
        *("--slide", str(region), "--encoder", "untrained:test_resnet"),
        *("--peer", sys.executable),
    )
    assert done.returncode == 2
    assert "prostate_small" in done.stderr


# --- path.py, reading.py, backends.py


def lines_of(*command: str) -> list[dict[str, Any]]:
    """What a script printed, each line with what it was measured on."""
    done = run(*command, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        assert line["machine"].keys() == {"cpu", "cores"}
        assert line["versions"].keys() >= {"python", "torch", "openvino", "ours"}
        assert line["date"]
    return lines


def test_path_prints_its_stages(tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "slide.tiff", tissue_pixels(2400, 2400))
    lines = lines_of("path.py", str(slide), "--encoder", "untrained:test_resnet", "--repeat", "1")
    assert [line["stage"] for line in lines] == [
        "slides", "tiles", "features", "cluster_model", "clusters", "catalog", "tiles_per_second"
    ]  # fmt: skip
    for line in lines:
        assert line.keys() == {
            *("stage", "median", "min", "slide", "encoder", "peak_rss_mb"),
            *("machine", "versions", "date"),
        }
        assert 0 < line["min"] <= line["median"]


def test_reading_prints_its_ways(region: Path) -> None:
    options = ("--width", "64", "--readers", "2", "--repeat", "1")
    lines = lines_of("reading.py", str(region), *options)
    assert [line["way"] for line in lines] == [
        "plain", "plain, a handle a thread", "plain, cache of 256 MB", "alone",
        "blocks of 1024 px", "blocks of 1536 px", "blocks of 2048 px",
    ]  # fmt: skip
    for line in lines:
        assert line.keys() == {
            *("way", "tiles_per_second", "ratio", "slide", "tiles", "width", "overlap", "readers"),
            *("repeat", "openslide", "machine", "versions", "date"),
        }
        assert line["tiles"] > 0
        assert line["tiles_per_second"] > 0


@pytest.mark.slow
def test_backends_prints_what_was_asked_for() -> None:
    options = ("--encoder", "untrained:test_resnet", "--repeat", "1", "--seconds", "0.1")
    [line] = lines_of("backends.py", *options, "--only", "eager")
    assert line.keys() == {
        *("backend", "start_up_seconds", "images_per_second", "difference", "batch_difference"),
        *("encoder", "batch", "repeat", "instructions", "machine", "versions", "date"),
    }
    assert line["backend"] == "eager"
    assert line["difference"] < 1e-4
    assert line["batch_difference"] < 1e-4


# --- similar.py


@pytest.mark.slow
def test_similar_prints_its_measures(tmp_path: Path) -> None:
    options = ("--tiles", "2000", "--length", "32", "--repeat", "1", "--queries", "3")
    lines = lines_of("similar.py", *options, "--folder", str(tmp_path))
    assert [line["measure"] for line in lines] == [
        "exact", "search", "duckdb", "index_make", "index", "index_add"
    ]  # fmt: skip
    for line in lines:
        assert (line["tiles"], line["slides"], line["length"]) == (2310, 6, 32)
        assert line.get("median", line.get("seconds")) > 0
    assert lines[4]["recall"]["mean"] > 0.9
    assert not [*tmp_path.iterdir()]


# --- scale.py


@pytest.mark.slow
def test_scale_measures_slides_of_which_nothing_is_owed(tmp_path: Path) -> None:
    options = ("--slides", "50", "--storage", "sqlite", "--only", "catalog", "ticks")
    lines = lines_of("scale.py", *options, "--folder", str(tmp_path))
    told = {line["measure"]: line for line in lines}
    for name in ("catalog, nothing new", "catalog, 25 new"):
        assert told[name]["cpu"] > 0
    # What was written is taken for done, and 25 slides that come are one batch.
    for sensor in ("new_slides", "next_stages", "cohort_follows_slides"):
        assert told[f"tick of {sensor}, nothing new"]["requests"] == 0
    assert told["tick of new_slides, 25 settled"]["requests"] == 1
    assert told["tick of next_stages, 25 described"]["requests"] == 1
    assert told["tick of cohort_follows_slides, 25 described"]["requests"] == 1
