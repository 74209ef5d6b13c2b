"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoding import small_encoder
from making import tissue_pixels
from test_cluster_models import mixture
from test_clusters import write_features

from histoencoder_core.clusters import feature_files
from histoencoder_core.clusters.fit import fit_clusters
from histoencoder_core.features import Runner
from histoencoder_core.settings import ClusterSettings
from histoencoder_core.store import Store

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


@pytest.mark.parametrize("transform", [{}, {"normalise": True, "whiten": 8}])
def test_cluster_models_are_nearly_those_of_a_cpu(
    tmp_path: Path, transform: dict[str, Any]
) -> None:
    store = Store(tmp_path)
    for i in range(4):
        write_features(store, f"slide-{i}", mixture(3000, seed=i))
    settings = ClusterSettings(n_clusters=(8, 32), batch_size=1000, **transform)
    inputs = feature_files(store)
    on_gpu, again = (fit_clusters(inputs, settings, device="cuda") for _ in range(2))
    on_cpu = fit_clusters(inputs, settings)
    assert on_gpu.version == on_cpu.version
    for k in (8, 32):
        assert np.array_equal(on_gpu.centroids[k], again.centroids[k])
        assert np.array_equal(on_gpu.distances[k], again.distances[k])
        assert on_gpu.inertia[k] == again.inertia[k]
        # A tile between two centroids may go to the other one, and others follow.
        assert on_gpu.inertia[k] == pytest.approx(on_cpu.inertia[k], rel=1e-2)
