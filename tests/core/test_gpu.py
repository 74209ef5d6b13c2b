"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from encoding import small_encoder
from making import tissue_pixels

from histoencoder_core.features import Runner

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.slow,
]

XCIT = "xcit_nano_12_p16_224"


@pytest.fixture(scope="module")
def tiles() -> list[np.ndarray]:
    pixels = tissue_pixels(1024, 1024)
    return [pixels[y : y + 96, x : x + 96] for y in range(0, 900, 96) for x in range(0, 900, 96)]


def features(tiles: list[np.ndarray], device: str, **how: Any) -> np.ndarray:
    precision = how.pop("precision", "float32")
    encoder = small_encoder(XCIT, input_size=64, precision=precision)
    return Runner(encoder, device=device, **how).encode(tiles)


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_features_are_nearly_those_of_a_cpu(tiles: list[np.ndarray], backend: str) -> None:
    # Resizing may differ by a grey value here and there.
    assert relative(features(tiles, "cuda", backend=backend), features(tiles, "cpu")) < 1e-2


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_features_are_the_same_every_time(
    tiles: list[np.ndarray], backend: str, precision: str
) -> None:
    how = {"backend": backend, "precision": precision, "batch_size": 16}
    assert np.array_equal(features(tiles, "cuda", **how), features(tiles, "cuda", **how))


def test_features_hardly_depend_on_the_batch(tiles: list[np.ndarray]) -> None:
    wanted = features(tiles, "cuda", batch_size=16)
    for size in (1, 7, 64):
        assert relative(features(tiles, "cuda", batch_size=size), wanted) < 1e-5


@pytest.mark.parametrize(("precision", "bound"), [("float16", 2e-2), ("bfloat16", 1e-1)])
def test_lower_precision_stays_near(tiles: list[np.ndarray], precision: str, bound: float) -> None:
    assert relative(features(tiles, "cuda", precision=precision), features(tiles, "cuda")) < bound
