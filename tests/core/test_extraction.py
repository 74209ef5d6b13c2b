"""Extraction: the same features whatever happens on the way, and a bad slide fails alone."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoding import (
    FakePixels,
    Means,
    colour_pixels,
    colour_tile,
    colours_of,
    simple_encoder,
    small_encoder,
)
from histoprep.functional import get_mean_and_std_from_images
from making import contents, damage_tiles, described, gradient_pixels, write_tiff
from PIL import Image

from histoencoder_core.clusters.inputs import made_by
from histoencoder_core.errors import HistoEncoderError, SettingsError, SlideError, StoreError
from histoencoder_core.features import Encoder, Runner, backends, extract_slides, extraction
from histoencoder_core.features import runner as runner_module
from histoencoder_core.features.execution import Execution
from histoencoder_core.features.reading import WAITING_A_READER, in_batches
from histoencoder_core.settings import EncoderSettings, TilingSettings
from histoencoder_core.slides import open_slide
from histoencoder_core.store import SlideFolder, Stamp, Store
from histoencoder_core.store.tables import read_features
from histoencoder_core.tiles import cut_tiles, tile_source
from histoencoder_core.tiles.pixels import SlideTiles, Tile

pytestmark = pytest.mark.usefixtures("one_thread")

PATIENCE = 30.0
"""Seconds after which a test that waits for another thread has failed."""

Compute = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    names = ("encode", "write", "read")
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith(names)]
    assert left == []


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let slides have the tiles of these sources."""

    def put(**sources: FakePixels) -> None:
        monkeypatch.setattr(extraction, "tile_source", lambda _, name: sources[name].source())

    return put


def extract(store: Store, *slide_ids: str, runner: Runner | None = None, **how: Any):
    """Extract slides; give each one's stamp or error."""
    with extract_slides(store, slide_ids, runner or eager(), **how) as futures:
        assert list(futures) == list(slide_ids)
    assert all(future.done() for future in futures.values())
    return {s: future.exception() or future.result() for s, future in futures.items()}


def table_of(store: Store, slide_id: str = "a") -> pa.Table:
    return pq.read_table(store.slide(slide_id).record("features"))


def features_of(store: Store, slide_id: str = "a") -> np.ndarray:
    return read_features(store.slide(slide_id).record("features"))[1]


def eager(encoder: Encoder | None = None, *, batch_size: int = 8) -> Runner:
    return Runner(encoder or simple_encoder(), device="cpu", backend="eager", batch_size=batch_size)


def slide_pixels(seed: int = 0) -> np.ndarray:
    """768 × 640 px of which no two parts are alike."""
    noise = np.random.default_rng(seed).integers(-30, 31, (640, 768, 3))
    return (gradient_pixels(768, 640) + noise).clip(0, 255).astype(np.uint8)


def slide_of_tiles(
    store: Store, folder: Path, slide_id: str = "a", *, overlap: float = 0.0
) -> SlideFolder:
    """A real slide with 120 tiles of 64 px in rows of 12."""
    path = write_tiff(folder / f"{slide_id}.tiff", slide_pixels(), tile=64)
    slide = described(store, path)
    settings = TilingSettings(
        mpp=0.5, tile_px=64, overlap=overlap, threshold=255, max_background=1.0
    )
    assert cut_tiles(slide, settings).result["tiles"] == (120 if overlap == 0 else 480)
    return slide


# --- Parity and determinism


def test_features_do_not_depend_on_the_readers_nor_on_the_order_of_reads(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide_of_tiles(store, tmp_path, overlap=0.5)
    runner = Runner(small_encoder(), device="cpu")
    monkeypatch.setattr("histoencoder_core.tiles.pixels.BLOCK_PX", 128)
    read = SlideTiles.read
    sleeps = random.Random(0)

    def unsteady(tiles: SlideTiles, rows: Sequence[int]) -> list[Tile]:
        time.sleep(sleeps.uniform(0, 0.02))
        return read(tiles, rows)

    tables = []
    for readers in (1, 2, 7, 7):
        extract(store, "a", runner=runner, readers=readers, overwrite=True)
        tables.append(table_of(store))
        monkeypatch.setattr(SlideTiles, "read", unsteady)
    assert all(table.equals(tables[0]) for table in tables)
    features = features_of(store)
    assert len({feature.tobytes() for feature in features}) == len(features) == 480


@pytest.mark.slow
def test_features_are_the_same_in_another_process(store: Store, tmp_path: Path) -> None:
    """The other process has one core, so that it uses fewer threads."""
    slide_of_tiles(store, tmp_path)
    extract(store, "a", runner=Runner(small_encoder(), device="cpu"))
    mine = table_of(store)
    script = (
        "import os, sys\n"
        "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {0})\n"
        "from histoencoder_core.cli import main\n"
        "sys.argv = ['histoencoder', *sys.argv[1:]]\n"
        "main()\n"
    )
    asked = ["--overwrite", "--use-cpu", "-m", "untrained:test_resnet", "-s", "32"]
    command = [sys.executable, "-c", script, "extract", *asked, "-i", str(store.root)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HISTOENCODER_")}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=120)
    assert table_of(store).equals(mine)
    assert pq.read_metadata(store.slide("a").record("features")).num_rows == 120


def test_features_of_a_real_slide_are_those_of_its_tiles_one_by_one(
    store: Store, data: Path
) -> None:
    """Read, resized, normalised and encoded by nothing of the feature stage."""
    path = data / "slides" / "CMU-1-Small-Region.svs"
    folder = described(store, path)
    cut_tiles(folder, TilingSettings(mpp=0.499, tile_px=256))
    encoder = small_encoder(input_size=64)
    extract(store, folder.slide_id, runner=Runner(encoder, device="cpu", batch_size=16))
    keys, features = read_features(folder.record("features"))
    places = list(zip(*(keys.column(name).to_pylist() for name in "xywh"), strict=True))
    mean, std = np.array(encoder.mean), np.array(encoder.std)
    images = []
    with open_slide(path) as slide:
        for place in places:
            tile = Image.fromarray(slide.read(place)).resize((64, 64), Image.Resampling.BILINEAR)
            images.append(((np.asarray(tile) / 255 - mean) / std).transpose(2, 0, 1))
    with torch.inference_mode():
        wanted = encoder.module(torch.from_numpy(np.stack(images).astype(np.float32))).numpy()
    assert len(features) > 100
    # Pillow rounds a few pixels of a thousand another way.
    assert np.abs(features - wanted).max() < 1e-3 * np.abs(wanted).max()
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(wanted, axis=1)
    assert ((features * wanted).sum(axis=1) / lengths).min() > 0.99999


def test_every_feature_is_in_its_tiles_row(store: Store, offer: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    for batch_size in (1, 7, 8, 400):
        order = rng.permutation(300)
        blocks = np.split(order, np.sort(rng.choice(299, 40, replace=False)) + 1)
        offer(a=colour_pixels(300, blocks=[block.tolist() for block in blocks]))
        counted: list[int] = []
        runner = eager(batch_size=batch_size)
        extract(store, "a", runner=runner, overwrite=True, progress=counted.append)
        assert colours_of(features_of(store)) == [(row % 256, row // 256, 0) for row in range(300)]
        assert sum(counted) == 300


def test_batches_are_full_but_the_last() -> None:
    rows = list(range(23))
    for sizes in ([23], [1] * 23, [5, 1, 9, 8], [4, 4, 4, 4, 7]):
        bounds = np.cumsum([0, *sizes])
        blocks = [rows[a:b] for a, b in itertools.pairwise(bounds)]
        tiles = ([colour_tile(row) for row in block] for block in blocks)
        batches = list(in_batches(zip(blocks, tiles, strict=True), 4))
        assert [found for found, _ in batches] == [rows[i : i + 4] for i in range(0, 23, 4)]
        assert all(t[0, 0, 0] == r for b in batches for r, t in zip(*b, strict=True))


def test_what_is_done_is_not_done_again(store: Store, offer: Callable[..., None]) -> None:
    pixels = colour_pixels(20)
    offer(a=pixels)
    first = extract(store, "a")["a"]
    assert first.made_now
    assert (first.result["tiles"], first.result["unreadable"]) == (20, 0)
    before = contents(store.root)
    pixels.opened.clear()
    again = extract(store, "a")["a"]
    assert (again.made_now, again.fingerprint) == (False, first.fingerprint)
    assert not pixels.opened.is_set()
    assert contents(store.root) == before
    wide = extract(store, "a", wide=True)["a"]
    assert wide.made_now
    assert not pixels.opened.is_set()
    assert table_of(store).column_names[-3:] == ["feat1", "feat2", "feat3"]
    assert extract(store, "a", overwrite=True)["a"].made_now
    assert pixels.opened.is_set()
    offer(a=colour_pixels(21))
    assert extract(store, "a")["a"].fingerprint != first.fingerprint


def test_a_slide_without_tiles_has_no_features(store: Store, offer: Callable[..., None]) -> None:
    offer(a=colour_pixels(0), b=colour_pixels(3))
    done = extract(store, "a", "b")
    assert [done[s].result["tiles"] for s in "ab"] == [0, 3]
    assert features_of(store).shape == (0, 3)


def test_another_programs_features_are_left_alone(store: Store, offer: Callable[..., None]) -> None:
    offer(a=colour_pixels(3), b=colour_pixels(3))
    record = store.slide("a").record("features")
    record.parent.mkdir(parents=True)
    pq.write_table(pa.table({"feat1": [1.0]}), record)
    before = record.read_bytes()
    done = extract(store, "a", "b")
    assert isinstance(done["a"], StoreError)
    assert "was not written by this program" in str(done["a"])
    assert record.read_bytes() == before
    assert done["b"].result["tiles"] == 3


# --- Tiles that can't be read


@pytest.mark.parametrize("batch_size", [8, 50])
def test_a_damaged_tile_spoils_no_other(store: Store, tmp_path: Path, batch_size: int) -> None:
    slide_of_tiles(store, tmp_path, "whole")
    slide_of_tiles(store, tmp_path, "torn")
    damage_tiles(tmp_path / "torn.tiff", [17])
    runner = Runner(small_encoder(), device="cpu", batch_size=batch_size)
    done = extract(store, "whole", "torn", runner=runner, readers=3)
    assert (done["torn"].result["tiles"], done["torn"].result["unreadable"]) == (120, 1)
    whole, torn = table_of(store, "whole"), table_of(store, "torn")
    assert [
        i for i, valid in enumerate(torn.column("features").is_valid()) if not valid.as_py()
    ] == [17]
    reasons = torn.column("unreadable").to_pylist()
    assert [i for i, reason in enumerate(reasons) if reason is not None] == [17]
    assert "torn.tiff: region (320, 64, 64, 64) can't be read" in reasons[17]
    for row in set(range(120)) - {17}:
        assert torn.column("features")[row] == whole.column("features")[row], row
    assert whole.column("unreadable").null_count == 120
    assert whole.column("features").null_count == 0
    assert store.slide("torn").failures() == {}


def test_too_many_damaged_tiles_fail_the_slide(store: Store, tmp_path: Path) -> None:
    slide_of_tiles(store, tmp_path)
    runner = Runner(small_encoder(), device="cpu")
    extract(store, "a", runner=runner)
    before = contents(store.slide("a").path)
    damage_tiles(tmp_path / "a.tiff", [40, 111])
    error = extract(store, "a", runner=runner, overwrite=True)["a"]
    assert isinstance(error, SlideError)
    assert "2 of 120 tiles can't be read, more than 1%; the first: " in str(error)
    assert "region (256, 192, 64, 64)" in str(error)
    failure = store.slide("a").failures()["features"]
    assert failure["kind"] == error.kind == "unreadable-tiles"
    assert failure["reason"] == str(error)
    store.slide("a").clear_failure("features")
    assert contents(store.slide("a").path) == before


def test_exactly_one_percent_may_be_unreadable(store: Store, offer: Callable[..., None]) -> None:
    broken = SlideError("torn", kind="unreadable")
    for count, fails in ((100, False), (99, True)):
        tiles: list[Tile] = [colour_tile(row) for row in range(count)]
        tiles[3] = broken
        offer(a=FakePixels(tiles))
        assert isinstance(extract(store, "a")["a"], SlideError) is fails


def test_an_unreadable_tile_is_not_blamed_for_what_stands_in_its_place(
    store: Store, offer: Callable[..., None]
) -> None:
    tiles: list[Tile] = [colour_tile(row) for row in range(200)]
    tiles[9] = SlideError("torn", kind="unreadable")
    offer(a=FakePixels(tiles))

    class NoWhite(Means):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            means = super().forward(images)
            return torch.where(means.amin(1, keepdim=True) > 0.99, torch.nan, means)

    assert extract(store, "a", runner=eager(simple_encoder(NoWhite())))["a"].result["tiles"] == 200


# --- Features that are not finite


class Overflowing(Means):
    """Gives too large a feature for the tiles of one slide number."""

    def __init__(self, slide: int, value: float) -> None:
        super().__init__()
        self.slide, self.value = slide, value

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = super().forward(images)
        chosen = torch.round(means[:, 2:] * 255) == self.slide
        return torch.where(chosen, self.value, means)


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), "float32"), (float("-inf"), "float32"), (1e5, "float16")]
)
def test_a_feature_that_is_not_finite_names_the_first_tile_of_the_table(
    store: Store, offer: Callable[..., None], value: float, dtype: str
) -> None:
    encoder = simple_encoder(Overflowing(77, value), dtype=dtype)
    good = [colour_tile(row) for row in range(40)]
    bad = [colour_tile(row, slide=77 if row in (11, 30) else 0) for row in range(40)]
    blocks = [range(20, 40), range(20)]  # the later rows are read first
    offer(a=FakePixels(good, blocks=blocks), b=colour_pixels(4))
    assert extract(store, "a", runner=eager(encoder))["a"].made_now
    assert (
        table_of(store).schema.field("features").type.value_type
        == {
            "float32": pa.float32(),
            "float16": pa.float16(),
        }[dtype]
    )
    before = contents(store.root)
    offer(a=FakePixels(bad, blocks=blocks), b=colour_pixels(4))
    done = extract(store, "a", "b", runner=eager(encoder))
    assert isinstance(done["a"], HistoEncoderError)
    assert "not finite, first for the tile x176_y0_w16_h16. Nothing was written" in str(done["a"])
    assert done["b"].made_now
    shutil.rmtree(store.slide("b").path)
    assert store.slide("a").failures()["features"]["kind"] == "encoder"
    store.slide("a").clear_failure("features")
    assert contents(store.root) == before


def test_large_features_are_stored_as_float32(store: Store, offer: Callable[..., None]) -> None:
    offer(a=colour_pixels(4, slide=77))
    extract(store, "a", runner=eager(simple_encoder(Overflowing(77, 1e5))))
    assert (features_of(store) == 1e5).all()


# --- A slide that fails


def test_a_slide_that_fails_in_the_middle_fails_alone(
    store: Store, offer: Callable[..., None]
) -> None:
    gone = SlideError("b.svs: is not there", kind="missing")
    offer(
        a=colour_pixels(20, slide=1),
        b=colour_pixels(20, fails_to_open=gone),
        c=colour_pixels(20, before=lambda rows: 1 / (rows[0] - 10)),  # a bug, at the third block
        d=colour_pixels(20, slide=4),
    )
    done = extract(store, "a", "b", "c", "d")
    assert done["b"] is gone
    assert isinstance(done["c"], ZeroDivisionError)
    for slide_id, number in (("a", 1), ("d", 4)):
        assert colours_of(features_of(store, slide_id)) == [(row, 0, number) for row in range(20)]
        assert store.slide(slide_id).failures() == {}
    failed = {s: store.slide(s).failures()["features"] for s in "bc"}
    assert (failed["b"]["kind"], failed["b"]["reason"]) == ("missing", "b.svs: is not there")
    assert failed["c"]["reason"].startswith("ZeroDivisionError: ")
    assert failed["b"]["inputs"] is not None
    offer(**{s: colour_pixels(20) for s in "abcd"})
    assert all(isinstance(stamp, Stamp) for stamp in extract(store, "b", "c").values())
    assert store.slide("b").failures() == store.slide("c").failures() == {}


def test_a_slide_that_has_no_tiles_says_what_to_run(store: Store, tmp_path: Path) -> None:
    slide_of_tiles(store, tmp_path)
    done = extract(store, "ghost", "a", runner=Runner(small_encoder(), device="cpu"))
    assert isinstance(done["ghost"], SlideError)
    assert done["ghost"].kind == "no-tiles"
    assert "has no tiles; run `histoencoder tile`" in str(done["ghost"])
    assert done["a"].result["tiles"] == 120


def test_an_encoder_that_can_not_run_fails_every_slide_with_the_reason(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(a=colour_pixels(20), b=colour_pixels(20), c=colour_pixels(20))
    extract(store, "b")

    def build(*_: object) -> Compute:
        raise SettingsError("no such arithmetic")

    monkeypatch.setattr(backends, "build", build)
    done = extract(store, "a", "b", "c")
    assert "no such arithmetic" in str(done["a"])
    assert "no such arithmetic" in str(done["c"])
    assert contents(store.slide("a").path) == contents(store.slide("c").path) == {}


def test_no_future_is_left_open_when_a_failure_can_not_be_recorded(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = SlideError("gone", kind="missing")
    offer(a=colour_pixels(3, fails_to_open=gone), b=colour_pixels(3))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SlideFolder, "record_failure", full)
    done = extract(store, "a", "b")
    assert done["a"] is gone
    assert done["b"].made_now
    # So it is where the encoding thread, not the writing one, finds that a slide has failed.
    out_of_memory(monkeypatch, lambda images: not is_of(images, 1, 0))
    offer(a=colour_pixels(3, slide=1), b=colour_pixels(4))
    done = extract(store, "a", "b", runner=eager(batch_size=1))
    assert "memory" in str(done["a"])
    assert done["b"].made_now


# --- A GPU's memory that does not suffice


def out_of_memory(
    monkeypatch: pytest.MonkeyPatch, suffices: Callable[[torch.Tensor], bool]
) -> None:
    """Let a batch be encoded only where the memory suffices for it."""
    build = backends.build

    def built(module: torch.nn.Module, how: Execution, size: int) -> Compute:
        compute = build(module, how, size)

        def limited(images: torch.Tensor) -> torch.Tensor:
            if not suffices(images):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return compute(images)

        return limited

    monkeypatch.setattr(backends, "build", built)


def is_of(images: torch.Tensor, slide: int, row: int) -> bool:
    """Whether a tile is among the images of a batch."""
    wanted = torch.tensor([row, 0, slide]) / 255
    return bool(torch.isclose(images[:, :, 0, 0], wanted, atol=1e-4).all(dim=1).any())


class Sized(Means):
    """Features that depend in their last digits on the batch size."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + 1e-6 * len(images)


def test_a_slide_that_runs_out_of_memory_is_done_again_whole_with_smaller_batches(
    store: Store,
    tmp_path: Path,
    offer: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = simple_encoder(Sized())
    offer(**{s: colour_pixels(45, slide=i) for i, s in enumerate("abc")})
    wanted, other = {}, Store(tmp_path / "other")
    for batch_size in (8, 4):
        runner = eager(encoder, batch_size=batch_size)
        extract(other, *"abc", runner=runner, overwrite=True)
        wanted[batch_size] = {s: features_of(other, s) for s in "abc"}
    assert not np.array_equal(wanted[8]["b"], wanted[4]["b"])
    # In the middle of the second slide, so that some of it is encoded already.
    out_of_memory(monkeypatch, lambda images: len(images) <= 4 or not is_of(images, 1, 20))
    counted: list[int] = []
    runner = eager(encoder)
    with caplog.at_level(logging.WARNING):
        done = extract(store, *"abc", runner=runner, progress=counted.append)
    assert [done[s].result["batch_size"] for s in "abc"] == [8, 4, 4]
    assert runner.execution.batch_size == 4
    for slide_id, batch_size in (("a", 8), ("b", 4), ("c", 4)):
        assert np.array_equal(features_of(store, slide_id), wanted[batch_size][slide_id])
    assert "out of memory; batches of 4 from now on" in caplog.text
    assert sum(counted) == 3 * 45


def test_the_batch_size_on_record_is_that_of_the_slide(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slide may still wait to be written when the next one runs out of memory."""
    smaller = threading.Event()
    halve, collected = Runner.halve, extraction._collected

    def halved(runner: Runner) -> None:
        halve(runner)
        smaller.set()

    def late(slide: Any, *rest: Any) -> np.ndarray:
        assert smaller.wait(PATIENCE)
        return collected(slide, *rest)

    monkeypatch.setattr(Runner, "halve", halved)
    monkeypatch.setattr(extraction, "_collected", late)
    out_of_memory(monkeypatch, lambda images: len(images) <= 4 or not is_of(images, 1, 0))
    offer(a=colour_pixels(20), b=colour_pixels(20, slide=1))
    done = extract(store, "a", "b")
    assert [done[s].result["batch_size"] for s in "ab"] == [8, 4]


def test_memory_may_also_run_out_where_tiles_are_brought_to_the_device(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the next slide may be read already while one is still encoded."""
    normalised = runner_module.normalised

    def limited(tiles: Sequence[np.ndarray], **how: Any) -> torch.Tensor:
        if len(tiles) > 2 and any((tile[0, 0] == (7, 0, 1)).all() for tile in tiles):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return normalised(tiles, **how)

    monkeypatch.setattr(runner_module, "normalised", limited)
    offer(**{s: colour_pixels(21, slide=i) for i, s in enumerate("abc")})
    done = extract(store, *"abc")
    assert [done[s].result["batch_size"] for s in "abc"] == [8, 2, 2]
    for number, slide_id in enumerate("abc"):
        assert colours_of(features_of(store, slide_id)) == [(r, 0, number) for r in range(21)]


def test_a_slide_of_which_not_even_one_tile_fits_fails_alone(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory(monkeypatch, lambda images: not is_of(images, 1, 5))
    offer(**{s: colour_pixels(20, slide=i) for i, s in enumerate("abcd")})
    done = extract(store, *"abcd")
    assert [done[s].result["batch_size"] for s in "acd"] == [8, 1, 1]
    for number, slide_id in ((0, "a"), (2, "c"), (3, "d")):
        assert colours_of(features_of(store, slide_id)) == [(r, 0, number) for r in range(20)]
    assert isinstance(done["b"], HistoEncoderError)
    assert "too little memory for one tile of untrained:means" in str(done["b"])
    assert "too little memory" in store.slide("b").failures()["features"]["reason"]


# --- Threads


def test_the_next_slide_is_read_while_one_is_encoded(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {s: colour_pixels(20, slide=i) for i, s in enumerate("ab")}
    offer(**sources)
    in_time = []

    def waits(images: torch.Tensor) -> bool:
        if is_of(images, 0, 19):
            in_time.append(sources["b"].opened.wait(PATIENCE))
        return True

    out_of_memory(monkeypatch, waits)
    extract(store, "a", "b")
    assert in_time == [True]


def test_a_slide_is_encoded_while_one_is_written(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(**{s: colour_pixels(20, slide=i) for i, s in enumerate("ab")})
    encoding, in_time = threading.Event(), []
    collected = extraction._collected

    def late(slide: Any, *rest: Any) -> np.ndarray:
        if slide.folder.slide_id == "a":
            in_time.append(encoding.wait(PATIENCE))
        return collected(slide, *rest)

    def told(images: torch.Tensor) -> bool:
        if is_of(images, 1, 0):
            encoding.set()
        return True

    monkeypatch.setattr(extraction, "_collected", late)
    out_of_memory(monkeypatch, told)
    extract(store, "a", "b")
    assert in_time == [True]


def settled(number: Callable[[], int]) -> int:
    """A number once it has not changed for half a second."""
    last, since = number(), time.monotonic()
    while time.monotonic() - since < 0.5:
        time.sleep(0.02)
        if number() != last:
            last, since = number(), time.monotonic()
    return last


def test_no_more_is_read_ahead_than_the_encoder_soon_needs(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {s: colour_pixels(1000) for s in ("a", "b", "c")}
    offer(**sources)
    go_on = threading.Event()
    out_of_memory(monkeypatch, lambda images: len(images) != 8 or go_on.wait(PATIENCE))
    runner, readers, block = eager(), 3, 5
    with extract_slides(store, [*sources], runner, readers=readers) as futures:
        ahead = settled(lambda: sum(pixels.reads for pixels in sources.values()))
        go_on.set()
    waiting = WAITING_A_READER * readers
    # Encoded, in the queue, about to be put there, and blocks that are read or not yet parted.
    assert ahead <= 8 * (1 + extraction._BATCHES_AHEAD + 1) + block * (waiting + 1) + 8
    assert [futures[s].result().result["tiles"] for s in sources] == [1000] * 3


def test_a_failed_slide_leaves_nothing_in_memory(store: Store, offer: Callable[..., None]) -> None:
    broken = colour_pixels(40)
    broken.tiles[33] = SlideError("torn", kind="unreadable")
    offer(a=broken)
    with extract_slides(store, ["a"], eager()) as futures:
        error = futures["a"].exception()
    assert isinstance(error, SlideError)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is extraction._Slide]


def test_other_programs_features_are_refused_before_the_work(
    store: Store, offer: Callable[..., None]
) -> None:
    source = colour_pixels(40)
    offer(a=source)
    path = store.slide("a").record("features")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"mine": [1]}), path)
    with extract_slides(store, ["a"], eager()) as futures:
        assert isinstance(futures["a"].exception(), StoreError)
    assert source.reads == 0


def test_no_more_slides_wait_to_be_written_than_may(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"s{number}" for number in range(8)]
    sources = {name: colour_pixels(40) for name in names}
    offer(**sources)
    monkeypatch.setattr(extraction, "_SLIDES_TO_WRITE", 2)
    go_on, collected = threading.Event(), extraction._collected

    def late(*arguments: Any) -> np.ndarray:
        assert go_on.wait(PATIENCE)
        return collected(*arguments)

    monkeypatch.setattr(extraction, "_collected", late)
    counted: list[int] = []
    with extract_slides(store, names, eager(), progress=counted.append) as futures:
        encoded = settled(lambda: sum(counted))
        go_on.set()
    assert encoded <= 3 * 40
    assert sum(counted) == 8 * 40
    assert all(future.result().made_now for future in futures.values())


@pytest.mark.parametrize("error", [RuntimeError("given up"), KeyboardInterrupt()])
def test_leaving_by_an_error_gives_up_what_is_not_done(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    sources = {f"s{number}": colour_pixels(4000, slide=number) for number in range(3)}
    sources["s1"] = colour_pixels(4000, slide=1, before=lambda _: time.sleep(0.001))
    sources["s0"] = colour_pixels(40)
    offer(**sources)
    extract(store, "s2")
    before = store.slide("s2").record("features").read_bytes()
    batches: Counter[bool] = Counter()
    left = threading.Event()

    def slow(images: torch.Tensor) -> bool:
        batches[left.is_set()] += 1
        return True

    out_of_memory(monkeypatch, slow)

    def leave() -> None:
        with extract_slides(store, [*sources], eager(), overwrite=True) as found:
            futures.update(found)
            found["s0"].result()
            left.set()
            raise error

    futures: dict[str, Future[Stamp]] = {}
    with pytest.raises(type(error)):
        leave()
    assert batches[True] < 100  # of 500 a slide
    assert futures["s0"].result().made_now
    for name in ("s1", "s2"):
        assert futures[name].done()
        with pytest.raises(CancelledError):
            futures[name].result()
    assert not contents(store.slide("s1").path)
    assert store.slide("s2").record("features").read_bytes() == before
    assert not [path for path in store.root.rglob("*") if path.name.endswith(".tmp")]


def test_a_source_is_closed_only_when_nobody_reads_from_it(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slide that is closed under a thread that reads it takes the process with it."""
    normalised = runner_module.normalised

    def limited(tiles: Sequence[np.ndarray], **how: Any) -> torch.Tensor:
        if len(tiles) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return normalised(tiles, **how)

    def slowly(rows: Sequence[int]) -> None:
        time.sleep(0.001 * (1 + rows[0] % 7) * (rows[0] > 10))

    # Memory runs out in the midst of reading.
    pixels = colour_pixels(200, before=slowly)
    offer(a=pixels)
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "normalised", limited)
        extract(store, "a", readers=6)
    assert not pixels.closed_too_early
    # The caller gives up in the midst of reading.
    pixels = colour_pixels(200, before=slowly)
    offer(a=pixels)
    started = threading.Event()
    out_of_memory(monkeypatch, lambda images: started.set() or True)

    def leave() -> None:
        with extract_slides(store, ["a"], eager(), readers=6, overwrite=True):
            assert started.wait(PATIENCE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert not pixels.closed_too_early


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_slides(store: Store, tmp_path: Path) -> None:
    """The tiles of these slides take 280 MB, what an encoder is given of them twice that."""
    folder = slide_of_tiles(store, tmp_path)
    names = [f"s{number}" for number in range(200)]
    for name in names:
        shutil.copytree(folder.path, store.slide(name).path)

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    runner = Runner(small_encoder(input_size=64), device="cpu")
    with extract_slides(store, names, runner) as futures:
        assert futures[names[19]].result().made_now
        before = resident()
        assert futures[names[-1]].result().made_now
        after = resident()
    assert after - before < 100


# --- Normalised by the slide


def tiles_in_memory(store: Store, slide_id: str) -> list[np.ndarray]:
    source = tile_source(store, slide_id)
    assert source is not None
    with source.open() as pixels:
        return [tile for row in range(source.keys.num_rows) for tile in pixels.read([row])]


def test_a_slides_own_normalisation_is_that_of_0_1_1(store: Store, tmp_path: Path) -> None:
    slide_of_tiles(store, tmp_path)
    encoder = small_encoder(input_size=64, normalise="slide")
    stamp = extract(store, "a", runner=Runner(encoder, device="cpu"))["a"]
    tiles = tiles_in_memory(store, "a")
    mean, std = get_mean_and_std_from_images(tiles)
    estimated = stamp.result["normalisation"]
    np.testing.assert_allclose(estimated["mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(estimated["std"], std, rtol=1e-9)
    images = np.stack([((tile / 255 - mean) / std).transpose(2, 0, 1) for tile in tiles])
    with torch.inference_mode():
        wanted = encoder.module(torch.from_numpy(images.astype(np.float32))).numpy()
    difference = np.abs(features_of(store) - wanted).max()
    assert difference < 1e-5 * np.abs(wanted).max()


def test_the_tiles_that_normalise_a_slide_are_drawn_by_its_seed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide_of_tiles(store, tmp_path)
    monkeypatch.setattr(extraction, "NORMALISING_TILES", 20)
    found = []
    for seed, readers in ((0, 1), (0, 5), (1, 1)):
        runner = Runner(small_encoder(normalise="slide", seed=seed), device="cpu")
        stamp = extract(store, "a", runner=runner, readers=readers, overwrite=True)["a"]
        assert stamp.made_from["encoder"]["seed"] == seed
        found.append(json.dumps(stamp.result["normalisation"]))
    assert found[0] == found[1] != found[2]
    mean, _ = get_mean_and_std_from_images(tiles_in_memory(store, "a"))
    assert np.abs(np.array(json.loads(found[0])["mean"]) - mean).max() > 1e-3  # not of all


def test_features_normalised_by_the_slide_are_of_another_space(
    store: Store, offer: Callable[..., None]
) -> None:
    offer(a=colour_pixels(20, slide=30))
    own, slides = simple_encoder(), simple_encoder(normalise="slide")
    other_seed = simple_encoder(normalise="slide", seed=1)
    stamps = [extract(store, "a", runner=eager(encoder))["a"] for encoder in (own, slides)]
    assert [stamp.made_now for stamp in stamps] == [True, True]
    assert stamps[1].made_from["encoder"]["normalisation"] == "slide"
    assert stamps[0].result["space"] != stamps[1].result["space"]
    assert "normalisation" not in stamps[0].result
    for stamp, mine in ((stamps[0], own), (stamps[1], slides)):
        for encoder in (own, slides, other_seed):
            assert made_by(stamp, encoder.settings) is (encoder is mine)


def test_the_seed_bears_only_on_what_is_drawn(store: Store, offer: Callable[..., None]) -> None:
    offer(a=colour_pixels(20))
    encoder = simple_encoder()
    named = {"name": "timm:means", "input_size": 16}
    for normalise, bears in (("encoder", False), ("slide", True)):
        asked = [EncoderSettings(**named, normalise=normalise, seed=seed) for seed in (0, 1)]
        trained = [Encoder(**{**vars(encoder), "settings": one}) for one in asked]  # type: ignore[arg-type]
        stamp = extract(store, "a", runner=eager(trained[0]))["a"]
        assert made_by(stamp, asked[0])
        assert made_by(stamp, asked[1]) is not bears
        assert extract(store, "a", runner=eager(trained[1]))["a"].made_now is bears


# --- Precision


def test_features_of_any_precision_will_do_unless_one_is_asked_for(
    store: Store, offer: Callable[..., None]
) -> None:
    pixels = colour_pixels(20)
    offer(a=pixels)

    def again(precision: str) -> Stamp:
        pixels.opened.clear()
        encoder = simple_encoder(precision=precision)
        stamp = extract(store, "a", runner=eager(encoder))["a"]
        assert stamp.made_now is pixels.opened.is_set()
        assert made_by(stamp, encoder.settings)
        return stamp

    rounded = again("bfloat16")
    assert rounded.made_now
    assert rounded.made_from["encoder"]["precision"] == "bfloat16"
    found = again("auto")
    assert (found.made_now, found.fingerprint) == (False, rounded.fingerprint)
    exact = again("float32")
    assert exact.made_now
    assert exact.fingerprint != rounded.fingerprint
    assert exact.result["space"] != rounded.result["space"]
    assert not made_by(rounded, simple_encoder(precision="float32").settings)
    assert again("auto").fingerprint == exact.fingerprint
    back = again("bfloat16")  # was kept
    assert (back.made_now, back.fingerprint) == (False, rounded.fingerprint)
    assert again("auto").fingerprint == rounded.fingerprint


def test_what_a_feature_was_made_with_is_on_record(
    store: Store, offer: Callable[..., None]
) -> None:
    offer(a=colour_pixels(20))
    runner = Runner(simple_encoder(), device="cpu", batch_size=4)
    result = extract(store, "a", runner=runner, readers=3)["a"].result
    stored = store.slide("a").stamp("features")
    assert stored is not None
    assert stored.result == result
    told = {name: result[name] for name in ("device", "backend", "precision", "batch_size")}
    assert told == {
        "device": "cpu",
        "backend": "openvino",
        "precision": "float32",
        "batch_size": 4,
    }
    assert result["readers"] == 3
    assert result["length"] == 3
    assert result["processor"]
    assert result["torch"] == torch.__version__
    assert result["start_up_seconds"] > 0
    # None of that decides what the features are, but for the precision.
    plain = extract(store, "a", runner=eager(), overwrite=True)["a"]
    assert plain.fingerprint == stored.fingerprint
