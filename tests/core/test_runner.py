"""Running an encoder: what is chosen, and that it changes no feature."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoding import Means, colour_tile, colours_of, simple_encoder, small_encoder
from histoprep.functional import get_mean_and_std_from_images
from PIL import Image

from histoencoder_core.errors import HistoEncoderError, SettingsError
from histoencoder_core.features import Encoder, Runner, backends
from histoencoder_core.features import runner as runner_module
from histoencoder_core.features.execution import Execution, choose_execution
from histoencoder_core.features.images import (
    Normalisation,
    estimate_normalisation,
    normalised,
    resized_in_float,
)
from histoencoder_core.settings import EncoderSettings
from histoencoder_core.slides import open_slide

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
AS_IT_IS = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
XCIT = "xcit_nano_12_p16_224"


@pytest.fixture(scope="module")
def tissue(data: Path) -> np.ndarray:
    """A part of a real slide that is all tissue."""
    with open_slide(data / "slides" / "CMU-1-Small-Region.svs") as slide:
        return slide.read((0, 500, 2200, 2200))


def cut(pixels: np.ndarray, height: int, width: int, count: int) -> list[np.ndarray]:
    """Tiles anywhere in an image."""
    rng = np.random.default_rng(0)
    limits = (pixels.shape[0] - height, pixels.shape[1] - width)
    corners = rng.integers(0, limits, (count, 2)).tolist()
    return [pixels[y : y + height, x : x + width] for y, x in corners]


@pytest.fixture(scope="module")
def tiles(tissue: np.ndarray) -> list[np.ndarray]:
    """24 tiles of two sizes."""
    return cut(tissue, 64, 64, 16) + cut(tissue, 90, 70, 8)


def relative(features: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest feature."""
    return float(np.abs(features - wanted).max() / np.abs(wanted).max())


def plain_features(encoder: Encoder, tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Features by PyTorch as it is, one tile at a time."""
    own = Normalisation(encoder.mean, encoder.std)
    with torch.inference_mode():
        return np.concatenate(
            [
                encoder.module(
                    normalised([tile], size=encoder.input_size, normalisation=own, device=CPU)
                ).numpy()
                for tile in tiles
            ]
        )


# --- Images


def grey_values(tiles: Sequence[np.ndarray], size: int) -> np.ndarray:
    images = normalised(tiles, size=size, normalisation=AS_IT_IS, device=CPU)
    grey = images.numpy().transpose(0, 2, 3, 1) * 255
    np.testing.assert_allclose(grey, np.rint(grey), atol=1e-4)
    return np.rint(grey).astype(int)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(512, 512, 224), (512, 512, 32), (1024, 1024, 256), (513, 300, 224), (33, 35, 32)],
)
def test_tiles_are_resized_as_pillow_does(
    tissue: np.ndarray, height: int, width: int, size: int
) -> None:
    parts = cut(tissue, height, width, 6)
    pillow = [Image.fromarray(p).resize((size, size), Image.Resampling.BILINEAR) for p in parts]
    difference = np.abs(grey_values(parts, size) - np.stack([np.asarray(p, int) for p in pillow]))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_a_small_tile_is_enlarged_as_pillow_does(tissue: np.ndarray) -> None:
    parts = cut(tissue, 64, 64, 20)
    pillow = [Image.fromarray(p).resize((224, 224), Image.Resampling.BILINEAR) for p in parts]
    difference = np.abs(grey_values(parts, 224) - np.stack([np.asarray(p, int) for p in pillow]))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-3
    assert (difference > 0).mean() < 0.05


def test_tiles_are_resized_alike_where_only_floats_are(tissue: np.ndarray) -> None:
    parts = cut(tissue, 512, 512, 6)
    stacked = torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)
    floats = resized_in_float(stacked, 224).numpy().transpose(0, 2, 3, 1)
    difference = np.abs(grey_values(parts, 224) - floats)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.1


def test_a_tile_of_the_encoders_size_is_left_as_it_is(tissue: np.ndarray) -> None:
    parts = cut(tissue, 224, 224, 3)
    assert np.array_equal(grey_values(parts, 224), np.stack(parts))


def test_a_tile_is_resized_alike_alone_and_among_others(tissue: np.ndarray) -> None:
    parts = [t for h, w in ((60, 60), (90, 70), (60, 60)) for t in cut(tissue, h, w, 3)]
    together = grey_values(parts, 32)
    for part, image in zip(parts, together, strict=True):
        assert np.array_equal(grey_values([np.ascontiguousarray(part)], 32)[0], image)


def test_images_are_normalised_by_channel() -> None:
    tile = np.full((8, 8, 3), (0, 51, 255), np.uint8)
    how = Normalisation((0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    images = normalised([tile], size=8, normalisation=how, device=CPU)
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images[0, :, 4, 4], [-0.2, 0.0, 5.6], atol=1e-6)


def test_normalisation_is_estimated_as_0_1_1_did(tissue: np.ndarray) -> None:
    parts = cut(tissue, 64, 64, 20) + cut(tissue, 90, 70, 5)
    mean, std = get_mean_and_std_from_images(parts)
    estimated = estimate_normalisation(parts)
    np.testing.assert_allclose(estimated.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(estimated.std, std, rtol=1e-9)


def test_tiles_of_one_colour_are_not_divided_by_zero() -> None:
    parts = [np.full((8, 8, 3), grey, np.uint8) for grey in (51, 153)]
    estimated = estimate_normalisation(parts)
    assert estimated.mean == pytest.approx((0.4, 0.4, 0.4))
    assert estimated.std == (1.0, 1.0, 1.0)


# --- Parity: the same features whatever runs the encoder


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("test_resnet", "openvino"),
        ("test_resnet", "eager"),
        pytest.param("test_resnet", "compile", marks=pytest.mark.slow),
        (XCIT, "openvino"),
        (XCIT, "eager"),
    ],
)
def test_features_are_those_of_plain_pytorch(
    tiles: list[np.ndarray], name: str, backend: Any
) -> None:
    encoder = small_encoder(name)
    features = Runner(encoder, device="cpu", backend=backend).encode(tiles)
    assert features.dtype == np.float32
    assert relative(features, plain_features(encoder, tiles)) < 1e-5
    assert len({feature.tobytes() for feature in features}) == len(tiles)


@pytest.mark.parametrize("name", ["test_resnet", XCIT])
def test_openvinos_features_depend_neither_on_the_batch_nor_on_the_place_in_it(
    tiles: list[np.ndarray], name: str
) -> None:
    encoder = small_encoder(name)
    order = np.random.default_rng(0).permutation(len(tiles))
    wanted = Runner(encoder, device="cpu", backend="openvino", batch_size=1).encode(tiles)
    for batch_size in (3, 8, 16):
        runner = Runner(encoder, device="cpu", backend="openvino", batch_size=batch_size)
        assert np.array_equal(runner.encode(tiles), wanted)
        assert np.array_equal(runner.encode([tiles[i] for i in order]), wanted[order])
        assert np.array_equal(runner.encode(tiles[:1]), wanted[:1])  # the rest is filled up


@pytest.mark.parametrize("name", ["test_resnet", XCIT])
def test_plain_pytorchs_features_hardly_depend_on_the_batch(
    tiles: list[np.ndarray], name: str
) -> None:
    encoder = small_encoder(name)
    wanted = plain_features(encoder, tiles)
    for batch_size in (1, 3, 8, 16):
        runner = Runner(encoder, device="cpu", backend="eager", batch_size=batch_size)
        assert relative(runner.encode(tiles), wanted) < 1e-5
        assert np.array_equal(runner.encode(tiles), runner.encode(tiles))


def test_no_tiles_give_no_features() -> None:
    runner = Runner(simple_encoder(), device="cpu", backend="eager")
    assert runner.encode([]).shape == (0, 3)


def test_features_keep_to_their_tiles_while_more_are_computed() -> None:
    """A backend that writes to the same memory each time must be copied from."""
    runner = Runner(simple_encoder(), device="cpu", backend="openvino", batch_size=4)
    rows = list(range(30))
    features = runner.encode([colour_tile(row) for row in rows])
    assert colours_of(features) == [(row, 0, 0) for row in rows]


def test_an_encoder_goes_on_with_smaller_batches(tiles: list[np.ndarray]) -> None:
    runner = Runner(small_encoder(), device="cpu", backend="openvino", batch_size=5)
    wanted = runner.encode(tiles)
    for batch_size in (2, 1):
        runner.halve()
        assert runner.description["batch_size"] == batch_size
        assert np.array_equal(runner.encode(tiles), wanted)


# --- A backend that can't be trusted


def spoiled(
    monkeypatch: pytest.MonkeyPatch, backend: str, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Let a backend do something to the features."""
    build = backends.build

    def built(module: torch.nn.Module, how: Execution, size: int) -> backends.Compute:
        compute = build(module, how, size)
        return (lambda images: spoil(compute(images))) if how.backend == backend else compute

    monkeypatch.setattr(backends, "build", built)


class Branching(torch.nn.Module):
    """What a trace of it on zeros does not tell."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean(dim=(2, 3))
        return -means if images.abs().sum() > 0 else means


class Unknown(torch.nn.Module):
    """An operation that OpenVINO has no translation for."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(images).mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("module", "told"),
    [(Branching(), "differs from PyTorch by 2 of the largest"), (Unknown(), "can't run untrained")],
    ids=["differs", "raises"],
)
def test_pytorch_runs_what_openvino_can_not(
    caplog: pytest.LogCaptureFixture, module: torch.nn.Module, told: str
) -> None:
    encoder = simple_encoder(module)
    rows = [colour_tile(row) for row in range(1, 12)]
    runner = Runner(encoder, device="cpu", batch_size=4)
    assert runner.execution.backend == "openvino"
    with caplog.at_level(logging.WARNING):
        features = runner.encode(rows)
    assert np.array_equal(features, Runner(encoder, device="cpu", backend="eager").encode(rows))
    assert runner.description["backend"] == "eager"
    assert told in caplog.text
    asked = Runner(encoder, device="cpu", backend="openvino")
    with pytest.raises(SettingsError, match=told):
        asked.encode(rows)
    with pytest.raises(SettingsError, match=told):  # and not only the first time
        asked.encode(rows)


def test_a_small_difference_is_told_from_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for factor, kept in ((1 + 1e-5, True), (1 + 1e-3, False), (float("nan"), False)):
        with monkeypatch.context() as patch:
            spoiled(patch, "openvino", lambda features, by=factor: features * by)
            runner = Runner(simple_encoder(), device="cpu")
            runner.warm_up()
            assert (runner.execution.backend == "openvino") is kept


def test_float32_is_never_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Watched(Means):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_float32_matmul_precision())
            return super().forward(images)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        Runner(simple_encoder(Watched()), device="cpu", backend="eager").warm_up()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


@pytest.mark.parametrize(
    "told", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", "wrapped"]
)
def test_too_little_memory_is_no_reason_to_fall_back(
    monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    def fails(*_: Any) -> Any:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except torch.OutOfMemoryError as error:
            if told == "wrapped":
                raise RuntimeError("backend compiler failed") from error
        raise RuntimeError(told)

    build = backends.build
    monkeypatch.setattr(
        backends, "build", lambda m, how, s: (build if how.batch_size == 2 else fails)(m, how, s)
    )
    runner = Runner(simple_encoder(), device="cpu", backend="auto")
    with pytest.raises(torch.OutOfMemoryError):
        runner.warm_up()
    assert runner.execution.backend == "openvino"


def test_a_network_of_no_use_is_not_blamed_on_the_backend() -> None:
    class Lost(Means):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * float("nan")

    with pytest.raises(HistoEncoderError, match=r"not finite.*weights"):
        Runner(simple_encoder(Lost()), device="cpu").warm_up()


# --- What is chosen


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Two GPUs, of which the second is free; what was leased."""
    leased: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)

    def lease(indices: Sequence[int] | None = None) -> int:
        leased.append(indices)
        return indices[0] if indices else 1

    monkeypatch.setattr(runner_module, "lease_gpu", lease)
    return leased


def named(name: str, **settings: Any) -> Encoder:
    """An encoder of which only the settings are needed."""
    encoder = simple_encoder()
    return Encoder(
        **{**vars(encoder), "settings": EncoderSettings(name=name, **settings)}  # type: ignore[arg-type]
    )


def chosen(encoder: Encoder, **asked: Any) -> tuple[Any, ...]:
    how = choose_execution(encoder, **asked)
    return how.device, how.backend, how.precision, how.batch_size


def test_what_is_chosen_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("prostate_small", "timm:resnet18"):
        assert chosen(named(name)) == ("cpu", "openvino", "float32", 8)
    assert chosen(named("timm:resnet18"), backend="eager", batch_size=3)[1::2] == ("eager", 3)
    half = named("prostate_small", precision="bfloat16")
    assert chosen(half)[:3] == ("cpu", "openvino", "bfloat16")
    with pytest.raises(SettingsError, match=r"float16 arithmetic needs a GPU.*--float16"):
        choose_execution(named("prostate_small", precision="float16"))
    for device in ("cuda", "cuda:0"):
        with pytest.raises(SettingsError, match=f"{device} was asked for, but PyTorch finds no"):
            choose_execution(named("prostate_small"), device=device)


def test_what_is_chosen_on_a_gpu(gpus: list[Any]) -> None:
    assert chosen(named("prostate_small")) == ("cuda", "compile", "float16", 256)
    # float16 overflows: only encoders that are known not to are trusted with it.
    assert chosen(named("hf-hub:bioptimus/H-optimus-0"))[2] == "bfloat16"
    exact = named("prostate_small", precision="float32")
    assert chosen(exact, device="cuda", backend="eager")[1:3] == ("eager", "float32")
    assert chosen(exact, device="cuda:1")[0] == "cuda:1"
    assert chosen(exact, device="cpu")[:2] == ("cpu", "openvino")
    with pytest.raises(SettingsError, match="There is no cuda:2: PyTorch finds 2"):
        choose_execution(exact, device="cuda:2")
    assert gpus == []


def test_a_gpu_is_leased_when_work_begins(gpus: list[Any]) -> None:
    runner = Runner(named("prostate_small"))
    assert gpus == []
    assert str(runner.device) == runner.execution.device == "cuda:1"
    assert str(Runner(named("prostate_small"), device="cuda:0").device) == "cuda:0"
    assert gpus == [None, [0]]


def test_a_gpu_without_bfloat16_computes_in_float32(
    gpus: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert chosen(named("hf-hub:bioptimus/H-optimus-0"))[2] == "float32"
    assert chosen(named("prostate_small"))[2] == "float16"


def test_openvino_is_refused_on_a_gpu(gpus: list[Any]) -> None:
    with pytest.raises(SettingsError, match="openvino is for CPUs"):
        choose_execution(named("prostate_small"), backend="openvino")
    assert chosen(named("prostate_small"), device="cpu", backend="openvino")[1] == "openvino"


@pytest.mark.parametrize("backend", ["openvino", "eager"])
def test_bfloat16_on_a_cpu(tiles: list[np.ndarray], backend: Any) -> None:
    exact = Runner(small_encoder(), device="cpu", backend="eager").encode(tiles)
    runner = Runner(small_encoder(precision="bfloat16"), device="cpu", backend=backend)
    try:
        rounded = runner.encode(tiles)
    except SettingsError as error:
        assert "no bfloat16 arithmetic; choose float32" in str(error)  # noqa: PT017
        return
    lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1)
    assert ((exact * rounded).sum(axis=1) / lengths).min() > 0.999
    assert not np.array_equal(exact, rounded)


def test_a_cpu_without_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    def capabilities(*_: object) -> list[str]:
        return ["FP32", "INT8"]

    monkeypatch.setattr(openvino.Core, "get_property", capabilities)
    runner = Runner(simple_encoder(precision="bfloat16"), device="cpu")
    with pytest.raises(SettingsError, match="no bfloat16 arithmetic; choose float32"):
        runner.warm_up()


def test_the_precision_is_part_of_what_features_are_made_from() -> None:
    encoder = simple_encoder()
    spaces = {encoder.space(p) for p in ("float32", "float16", "bfloat16")}
    assert len(spaces) == 3
    # What was chosen counts, not how.
    assert simple_encoder(precision="float32").space("float32") == encoder.space("float32")


# --- Privacy


@pytest.mark.slow
def test_nobody_is_told_of_the_run(tmp_path: Path) -> None:
    """OpenVINO's Python package reports to its makers when it is imported, from a process apart."""
    (tmp_path / "home").mkdir()
    script = f"""
import socket
from pathlib import Path

def tell(*arguments, **_):
    with Path({str(tmp_path / "asked")!r}).open("a") as file:
        print(*arguments, file=file)
    raise OSError("there is no network")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = tell
from histoencoder_core.features import Runner, load_encoder
from histoencoder_core.settings import EncoderSettings
runner = Runner(
    load_encoder(EncoderSettings(name="untrained:test_resnet", input_size=32)),
    device="cpu", backend="openvino",
)
runner.warm_up()
"""
    environment = {**os.environ, "HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
    assert not (tmp_path / "asked").exists(), (tmp_path / "asked").read_text()
    assert not (tmp_path / "home" / "intel").exists(), "an id to be recognised by"
