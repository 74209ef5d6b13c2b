"""Encoders: a registry of names, and one class that turns tiles into feature vectors."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models.xcit import Xcit
from torch.nn import functional as nn_functional

from histoencoder_core.errors import SettingsError, WeightsError
from histoencoder_core.features import weights
from histoencoder_core.features.pathmnist import build_densenet121, fetch_capricorn
from histoencoder_core.features.xcit import extract_features
from histoencoder_core.settings import EncoderSettings, PlatformSettings, fingerprint

ARCHITECTURES = {
    "prostate_small": "xcit_small_12_p16_224",
    "prostate_medium": "xcit_medium_24_p16_224",
}
"""HistoEncoder's models and their timm architectures."""

PATHMNIST = "pathmnist_densenet121"
UNTRAINED = "untrained:"
TIMM = "timm:"
HUB = "hf-hub:"

_Scale = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, in units of [0, 1]."""

_IMAGENET: _Scale = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_UNIT: _Scale = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Encoder:
    """An encoder, ready to run.

    Attributes:
        settings: What was asked for.
        module: The network in evaluation mode, on its device.
        device: Where it runs.
        input_size: Width and height in pixels of its input.
        mean: Subtracted from each channel, in units of [0, 1].
        std: What each channel is then divided by.
        weights_sha256: Hash of the weights, see `weights.state_dict_sha256`.
        length: Length of a feature vector.
        native_size: Input size that the encoder has if none is asked for.
    """

    settings: EncoderSettings
    module: torch.nn.Module
    device: torch.device
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights_sha256: str
    length: int
    native_size: int

    @property
    def untrained(self) -> bool:
        """Whether the weights are random."""
        return self.settings.name.startswith(UNTRAINED)

    @property
    def made_from(self) -> dict[str, Any]:
        """All that decides a tile's features besides its pixels, for a stamp."""
        return {
            "name": self.settings.name,
            "weights_sha256": self.weights_sha256,
            "num_blocks": self.settings.num_blocks,
            "avg_pool": self.settings.avg_pool,
            "input_size": self.input_size,
            "normalisation": {"mean": list(self.mean), "std": list(self.std)},
            "dtype": self.settings.dtype,
            **({"seed": self.settings.seed} if self.untrained else {}),
        }

    @property
    def space(self) -> str:
        """Fingerprint of the features' space; only within one can features be compared."""
        return fingerprint(self.made_from)

    @torch.inference_mode()
    def encode(self, tiles: Sequence[np.ndarray]) -> np.ndarray:
        """Encode a batch of tiles.

        Tiles are resized to the input size (bilinear, antialiased) and normalised on the device.

        Args:
            tiles: uint8 arrays of shape (height, width, 3), of any size.

        Returns:
            float32 array of shape (tiles, length).
        """
        batch = torch.cat([self._resize(group) for group in _same_shape(tiles)])
        mean = torch.tensor(self.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(1, 3, 1, 1)
        features = self._forward((batch / 255 - mean) / std)
        return features.float().cpu().numpy()

    def _resize(self, tiles: Sequence[np.ndarray]) -> torch.Tensor:
        stacked = torch.from_numpy(np.stack(tiles)).to(self.device)
        images = stacked.permute(0, 3, 1, 2).float()
        size = (self.input_size, self.input_size)
        if images.shape[-2:] == size:
            return images
        return nn_functional.interpolate(images, size, mode="bilinear", antialias=True)

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        if isinstance(self.module, Xcit):
            return extract_features(
                self.module,
                images,
                num_blocks=self.settings.num_blocks,
                avg_pool=self.settings.avg_pool,
            )
        features: torch.Tensor = self.module(images)
        return features


def encoder_names() -> dict[str, str]:
    """The encoders that can be named, with a line on each."""
    return {
        "prostate_small": "HistoEncoder XCiT-S12/16, 384 features, prostate tissue",
        "prostate_medium": "HistoEncoder XCiT-M24/16, 512 features, prostate tissue",
        PATHMNIST: "DenseNet121 of a PathMNIST classifier, 1,024 features; for the demo only",
        f"{TIMM}<name>": "any timm model with its published weights",
        f"{HUB}<org>/<name>": "any timm model on a hub, gated ones with your token (HF_TOKEN)",
        f"{UNTRAINED}<timm name>": "random weights, for tests; everything made from them says so",
    }


_loading = threading.Lock()


def load_encoder(
    settings: EncoderSettings,
    *,
    weights_folder: Path | None = None,
    weights_url: str | None = None,
    device: str = "auto",
) -> Encoder:
    """Build an encoder and load its weights, once per process.

    Args:
        settings: Which encoder.
        weights_folder: Folder of weights and download cache; the deployment's if not given.
        weights_url: Mirror tried before the published address.
        device: Torch device; ``auto`` takes a GPU if there is one.

    Returns:
        The encoder, the same object for the same arguments.

    Raises:
        SettingsError: There is no such encoder, or it can't do what is asked.
        WeightsError: The weights can't be had; the message says what to put where.
    """
    folder = weights_folder or PlatformSettings().weights_folder
    with _loading:
        return _load(settings, folder, weights_url, choose_device(device))


def create_prostate_encoder(name: str) -> torch.nn.Module:
    """Build a HistoEncoder model with its published weights, on the CPU.

    Args:
        name: ``prostate_small`` or ``prostate_medium``.

    Raises:
        WeightsError: The weights can't be had.
    """
    deployment = PlatformSettings()
    return _prostate(name, {}, deployment.weights_folder, deployment.weights_url)


def choose_device(device: str) -> str:
    """Resolve ``auto`` and check that the device is there.

    Raises:
        SettingsError: A GPU was asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"Device {device} was asked for, but PyTorch finds no GPU here.")
    return device


@functools.lru_cache(maxsize=2)
def _load(settings: EncoderSettings, folder: Path, weights_url: str | None, device: str) -> Encoder:
    name = settings.name
    sized: dict[str, Any] = {"img_size": settings.input_size} if settings.input_size else {}
    if name in ARCHITECTURES:
        module = _prostate(name, sized, folder, weights_url)
        size, (mean, std) = 224, _IMAGENET
    elif name == PATHMNIST:
        module = build_densenet121(fetch_capricorn(folder))
        size, (mean, std) = 224, _UNIT
    elif name.startswith(UNTRAINED):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            module = _create(name.removeprefix(UNTRAINED), sized)
        size, mean, std = _data_config(module)
    elif name.startswith((TIMM, HUB)):
        module = _pretrained(name, sized, folder)
        size, mean, std = _data_config(module)
    else:
        known = ", ".join(encoder_names())
        raise SettingsError(f"There is no encoder {name!r}. Choose from: {known}.")
    if not isinstance(module, Xcit) and (settings.num_blocks != 1 or settings.avg_pool):
        raise SettingsError(
            f"num_blocks and avg_pool choose among the outputs of XCiT models; {name} is none."
        )
    module = module.eval().requires_grad_(requires_grad=False)
    encoder = Encoder(
        settings=settings,
        module=module.to(device),
        device=torch.device(device),
        input_size=settings.input_size or size,
        mean=mean,
        std=std,
        weights_sha256=weights.state_dict_sha256(module),
        length=0,
        native_size=size,
    )
    return _with_length(encoder)


def _with_length(encoder: Encoder) -> Encoder:
    blank = np.full((encoder.input_size, encoder.input_size, 3), 255, np.uint8)
    try:
        shape = encoder.encode([blank]).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SettingsError(
            f"{encoder.settings.name} can't take tiles of {encoder.input_size} px: {error}"
        ) from error
    if len(shape) != 2:
        raise SettingsError(
            f"{encoder.settings.name} gives an array of shape {shape}, not one vector a tile."
        )
    return Encoder(**{**encoder.__dict__, "length": shape[1]})


def _prostate(
    name: str, sized: dict[str, Any], folder: Path, weights_url: str | None
) -> torch.nn.Module:
    path = weights.prostate_weights(name, folder=folder, mirror=weights_url)
    module = _create(ARCHITECTURES[name], sized)
    weights.load_into(module, path, ignore=("head.",))
    return module


def _pretrained(name: str, sized: dict[str, Any], folder: Path) -> torch.nn.Module:
    timm_name = name.removeprefix(TIMM)
    local = weights.local_weights(name, folder)
    if local is not None and name.startswith(TIMM):
        module = _create(timm_name, sized)
        weights.load_into(module, local, ignore=("head.", "fc.", "classifier."))
        return module
    try:
        return _create(timm_name, sized, pretrained=True)
    except SettingsError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        where = folder / f"{weights.file_stem(name)}.safetensors"
        remedy = (
            f"put the weights at {where}"
            if name.startswith(TIMM)
            else "fill the hub's cache on a machine with network access, copy it (HF_HOME) and set "
            "HF_HUB_OFFLINE=1"
        )
        raise WeightsError(
            f"The weights of {name} could not be had ({type(error).__name__}: {error}). With "
            f"network access they are fetched from the hub, gated ones with a token in HF_TOKEN; "
            f"without, {remedy}."
        ) from error


def _create(timm_name: str, sized: dict[str, Any], *, pretrained: bool = False) -> torch.nn.Module:
    if not timm_name.startswith(HUB) and not timm.is_model(timm_name):
        similar = ", ".join(timm.list_models(f"*{timm_name.split('_')[0]}*")[:5])
        raise SettingsError(
            f"timm has no model {timm_name!r}" + (f"; it has {similar}, …" if similar else ".")
        )
    try:
        return timm.create_model(timm_name, pretrained=pretrained, num_classes=0, **sized)
    except TypeError:
        if not sized:
            raise
        # Convolutional networks take any size and no such argument.
        return timm.create_model(timm_name, pretrained=pretrained, num_classes=0)


def _data_config(module: torch.nn.Module) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    config: dict[str, Any] = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
    return config["input_size"][-1], tuple(config["mean"]), tuple(config["std"])


def _same_shape(tiles: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
    """Split a batch into runs of one shape, which can be stacked."""
    groups: list[list[np.ndarray]] = []
    for tile in tiles:
        if groups and groups[-1][0].shape == tile.shape:
            groups[-1].append(tile)
        else:
            groups.append([tile])
    return list(groups)
