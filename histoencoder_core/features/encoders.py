"""Encoders: what their names stand for, with which weights and normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models.xcit import Xcit

from histoencoder_core.errors import SettingsError, WeightsError, without_credentials
from histoencoder_core.features import hub, weights
from histoencoder_core.features.pathmnist import build_densenet121, fetch_capricorn
from histoencoder_core.features.xcit import check_num_blocks, extract_features
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.settings import EncoderSettings, PlatformSettings, Precision

ARCHITECTURES = {
    "prostate_small": "xcit_small_12_p16_224",
    "prostate_medium": "xcit_medium_24_p16_224",
}
"""HistoEncoder's models and their timm architectures."""

PATHMNIST = "pathmnist_densenet121"
UNTRAINED = "untrained:"
TIMM = "timm:"
HUB = hub.PREFIX

NAMED = {*ARCHITECTURES, PATHMNIST}
"""Encoders whose one set of weights is known."""

_Scale = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, in units of [0, 1]."""

_IMAGENET: _Scale = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_UNIT: _Scale = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

_MISFITS = (RuntimeError, TypeError, KeyError, AttributeError, AssertionError)
"""What timm and PyTorch raise when weights, arguments and network do not go together."""


@dataclass(frozen=True)
class Encoder:
    """An encoder: what turns a tile into a feature vector. A `Runner` decides how it is run.

    Attributes:
        settings: What was asked for.
        module: Maps normalised float32 images (batch, 3, input_size, input_size) to features
            (batch, length); in evaluation mode.
        input_size: Width and height in pixels of its input.
        mean: Subtracted from each channel, in units of [0, 1].
        std: What each channel is then divided by.
        weights_sha256: Hash of the weights, see `weights.state_dict_sha256`.
        length: Length of a feature vector.
        native_size: Input size that the encoder has if none is asked for.
    """

    settings: EncoderSettings
    module: torch.nn.Module
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
    def gpu_precision(self) -> Precision:
        """The precision that ``auto`` takes on a GPU.

        float16 rounds eight times finer than bfloat16 but overflows at 65,504, so it is taken for
        encoders whose activations are known to stay below.
        """
        return "float16" if self.settings.name in NAMED else "bfloat16"

    def made_from(self, precision: Precision) -> dict[str, Any]:
        """All that decides a tile's features besides its pixels, for a stamp.

        Args:
            precision: Of the arithmetic.
        """
        by_slide = self.settings.normalise == "slide"
        recipe = hub.known(self.settings.name).recipe
        return {
            "name": self.settings.name,
            "weights_sha256": self.weights_sha256,
            "num_blocks": self.settings.num_blocks,
            "avg_pool": self.settings.avg_pool,
            "input_size": self.input_size,
            "normalisation": "slide" if by_slide else {"mean": [*self.mean], "std": [*self.std]},
            "precision": precision,
            "dtype": self.settings.dtype,
            **({"recipe": recipe} if recipe else {}),
            **({"seed": self.settings.seed} if self.untrained or by_slide else {}),
        }

    def space(self, precision: Precision) -> str:
        """Fingerprint of the features' space; only within one can features be compared."""
        return fingerprint(self.made_from(precision))


class _XcitFeatures(torch.nn.Module):
    """An XCiT whose output is the features that were asked for."""

    def __init__(self, xcit: Xcit, settings: EncoderSettings) -> None:
        super().__init__()
        self.xcit = xcit
        self._num_blocks, self._avg_pool = settings.num_blocks, settings.avg_pool

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return extract_features(
            self.xcit, images, num_blocks=self._num_blocks, avg_pool=self._avg_pool
        )


def encoder_names() -> dict[str, str]:
    """The encoders that can be named, with a line on each."""
    return {
        "prostate_small": "HistoEncoder XCiT-S12/16, 384 features, prostate tissue",
        "prostate_medium": "HistoEncoder XCiT-M24/16, 512 features, prostate tissue",
        PATHMNIST: "DenseNet121 of a PathMNIST classifier, 1,024 features; for the demo only",
        f"{TIMM}<name>": "a timm model that gives a vector an image, with its published weights",
        f"{HUB}<org>/<name>": "a timm model on a hub, gated ones with your token (HF_TOKEN); see "
        "docs/encoders.md for what is known to work",
        f"{UNTRAINED}<timm name>": "random weights, for tests; everything made from them says so",
    }


def load_encoder(
    settings: EncoderSettings,
    *,
    weights_folder: Path | None = None,
    weights_url: str | None = None,
    weights_sha256: str | None = None,
) -> Encoder:
    """Build an encoder and load its weights.

    Args:
        settings: Which encoder.
        weights_folder: Folder of weights and download cache; the deployment's if not given.
        weights_url: Mirror tried before the published address.
        weights_sha256: SHA-256 of the file of weights, if another one is to be refused.

    Returns:
        The encoder, on the CPU.

    Raises:
        SettingsError: There is no such encoder, or it can't do what is asked.
        WeightsError: The weights can't be had; the message says what to put where.
    """
    folder = weights_folder or PlatformSettings().weights_folder
    name = settings.name
    if name.startswith((TIMM, UNTRAINED)):
        _check_timm_name(name.partition(":")[2])
    known = hub.known(name)
    size_asked = settings.input_size or known.input_size
    sized: dict[str, Any] = {"img_size": size_asked} if size_asked else {}
    if name in ARCHITECTURES:
        path = weights.prostate_weights(
            name, folder=folder, mirror=weights_url, expected_sha256=weights_sha256
        )
        module = _prostate(name, sized, path)
        size, (mean, std) = 224, _IMAGENET
    elif name == PATHMNIST:
        module = build_densenet121(fetch_capricorn(folder))
        size, (mean, std) = 224, _UNIT
    elif name.startswith(UNTRAINED):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            module = _create(name.removeprefix(UNTRAINED), sized)
        size, mean, std = _data_config(module)
    elif name.startswith(TIMM) and (local := weights.local_weights(name, folder)) is not None:
        weights.check_sha256(local, weights_sha256)
        module = _from_file(name.removeprefix(TIMM), sized, local)
        size, mean, std = _data_config(module)
    elif name.startswith((TIMM, HUB)):
        if weights_sha256 is not None:
            raise SettingsError(
                f"{name} comes from the hub, whose files HISTOENCODER_WEIGHTS_SHA256 does not "
                "check. Pin its revision (name@commit), or put a file into the folder of weights."
            )
        module = _from_hub(name, {**known.keywords, **sized}, folder)
        size, mean, std = _data_config(module)
        size, (mean, std) = known.input_size or size, known.normalisation or (mean, std)
    else:
        names = ", ".join(encoder_names())
        hint = f" Write {HUB}, not hf_hub:." if name.startswith("hf_hub:") else ""
        raise SettingsError(f"There is no encoder {name!r}.{hint} Choose from: {names}.")
    loaded_sha256 = weights.state_dict_sha256(module)
    if isinstance(module, Xcit):
        try:
            check_num_blocks(module, settings.num_blocks)
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from error
        module = _XcitFeatures(module, settings)
    elif settings.num_blocks != 1 or settings.avg_pool:
        raise SettingsError(
            f"num_blocks and avg_pool choose among the outputs of XCiT models; {name} is none."
        )
    if known.pooling == "class_and_patches":
        module = hub.ClassAndPatches(module)  # type: ignore[arg-type]
    module = module.eval().requires_grad_(requires_grad=False)
    input_size = settings.input_size or size
    return Encoder(
        settings=settings,
        module=module,
        input_size=input_size,
        mean=mean,
        std=std,
        weights_sha256=loaded_sha256,
        length=_length(module, input_size, name),
        native_size=size,
    )


def create_prostate_encoder(name: str) -> torch.nn.Module:
    """Build a HistoEncoder model with its published weights, on the CPU.

    Args:
        name: ``prostate_small`` or ``prostate_medium``.

    Raises:
        WeightsError: The weights can't be had.
    """
    deployment = PlatformSettings()
    path = weights.prostate_weights(
        name,
        folder=deployment.weights_folder,
        mirror=deployment.weights_mirror,
        expected_sha256=deployment.weights_sha256,
    )
    return _prostate(name, {}, path)


def _length(module: torch.nn.Module, input_size: int, name: str) -> int:
    try:
        with torch.inference_mode():
            shape = module(torch.zeros(1, 3, input_size, input_size)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SettingsError(f"{name} can't take tiles of {input_size} px: {error}") from error
    if len(shape) != 2:
        raise SettingsError(f"{name} gives an array of shape {tuple(shape)}, not a vector a tile.")
    return int(shape[1])


def _prostate(name: str, sized: dict[str, Any], path: Path) -> torch.nn.Module:
    module = _create(ARCHITECTURES[name], sized)
    weights.load_into(module, path, ignore=("head.",))
    return module


def _check_timm_name(timm_name: str) -> None:
    if not timm.is_model(timm_name):
        similar = ", ".join(timm.list_models(f"*{timm_name.split('_')[0]}*")[:5])
        raise SettingsError(
            f"timm has no model {timm_name!r}" + (f"; it has {similar}, …" if similar else ".")
        )


def _from_file(timm_name: str, sized: dict[str, Any], path: Path) -> torch.nn.Module:
    module = _create(timm_name, sized)
    try:
        _load(module, path)
    except WeightsError as error:
        if not sized:
            raise
        if not (hasattr(module, "set_input_size") and hasattr(module, "pos_embed")):
            raise WeightsError(
                f"{error} If the file is of another input size than {sized['img_size']} px: this "
                "network's weights can't be resized; leave the input size out."
            ) from error
    else:
        return module
    # Position embeddings of the native size, which timm interpolates.
    module = _create(timm_name, {})
    _load(module, path)
    module.set_input_size(img_size=(sized["img_size"],) * 2)  # type: ignore[operator]
    return module


def _load(module: torch.nn.Module, path: Path) -> None:
    config: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]
    named = config.get("classifier") or ()
    classifiers = (named,) if isinstance(named, str) else named
    ignore = {f"{name.partition('.')[0]}." for name in (*classifiers, "head", "fc", "classifier")}
    weights.load_into(module, path, ignore=tuple(ignore))


def _from_hub(name: str, arguments: dict[str, Any], folder: Path) -> torch.nn.Module:
    try:
        return _create(name.removeprefix(TIMM), arguments, pretrained=True)
    except SettingsError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        told = without_credentials(f"{type(error).__name__}: {error}")
        problem = " ".join(told.split())[:600]
        if isinstance(error, _MISFITS) and "No pretrained weights" not in problem:
            raise WeightsError(
                f"The weights of {name} do not fit the network of its configuration ({problem}). "
                "Models may need more than their configuration says; docs/encoders.md lists those "
                "whose needs are known here."
            ) from error
        where = folder / f"{weights.file_stem(name)}.safetensors"
        remedy = (
            f"put the weights at {where}"
            if name.startswith(TIMM)
            else "fill the hub's cache on a machine with network access, copy it (HF_HOME) and set "
            "HF_HUB_OFFLINE=1"
        )
        raise WeightsError(
            f"The weights of {name} could not be had ({problem}). With network access they are "
            f"fetched from the hub, gated ones with a token in HF_TOKEN; without, {remedy}."
        ) from error


def _create(
    timm_name: str, arguments: dict[str, Any], *, pretrained: bool = False
) -> torch.nn.Module:
    try:
        return timm.create_model(timm_name, pretrained=pretrained, num_classes=0, **arguments)
    except AssertionError as error:
        if "img_size" not in arguments:
            raise
        raise SettingsError(
            f"{timm_name} can't take tiles of {arguments['img_size']} px: {error}"
        ) from error
    except TypeError:
        if "img_size" not in arguments:
            raise
        # Convolutional networks take any size and no such argument.
        others = {name: value for name, value in arguments.items() if name != "img_size"}
        return timm.create_model(timm_name, pretrained=pretrained, num_classes=0, **others)


def _data_config(module: torch.nn.Module) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    config: dict[str, Any] = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
    return config["input_size"][-1], tuple(config["mean"]), tuple(config["std"])
