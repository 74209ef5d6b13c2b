"""Tile encoders on the hub that need more than their configuration says.

Their authors load them with arguments that the configuration does not hold, join tokens themselves,
or normalise otherwise. What stands here was read in their model cards and code; docs/encoders.md
names the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

PREFIX = "hf-hub:"

_LAYERS = {"SwiGLUPacked": SwiGLUPacked, "SiLU": torch.nn.SiLU}
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class HubModel:
    """What a model needs beyond its configuration.

    Attributes:
        arguments: Of `timm.create_model`; layers by their names.
        pooling: How the network's tokens become one vector, see `ClassAndPatches`; None if the
            network gives a vector itself.
        normalisation: Mean and standard deviation of each channel, instead of the configuration's.
        input_size: Width and height in pixels, instead of the configuration's.
    """

    arguments: Mapping[str, float | str] = field(default_factory=dict)
    pooling: Literal["class_and_patches"] | None = None
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    input_size: int | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments as timm takes them."""
        return {
            name: _LAYERS[value] if isinstance(value, str) else value
            for name, value in self.arguments.items()
        }

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides the features, for a stamp; normalisation and input size stand there anyway.

        Example:
            >>> HubModel({"num_heads": 12}, pooling="class_and_patches").recipe
            {'arguments': {'num_heads': 12}, 'pooling': 'class_and_patches'}
        """
        return {
            **({"arguments": dict(self.arguments)} if self.arguments else {}),
            **({"pooling": self.pooling} if self.pooling else {}),
        }


class ClassAndPatches(torch.nn.Module):
    """A vision transformer whose output is its class token, then the mean of its patch tokens.

    Register tokens are left out.
    """

    def __init__(self, transformer: VisionTransformer) -> None:
        super().__init__()
        self.transformer = transformer
        self._num_prefix = int(transformer.num_prefix_tokens)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (batch, 2 × channels)."""
        tokens = self.transformer.forward_features(images)
        return torch.cat([tokens[:, 0], tokens[:, self._num_prefix :].mean(dim=1)], dim=-1)


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
_TOKENS = HubModel(_SWIGLU, pooling="class_and_patches")
_LAYER_SCALE = {"init_values": 1e-5}
_IMAGENET_LAYER_SCALE = HubModel(_LAYER_SCALE, normalisation=_IMAGENET)
_KAIKO = HubModel(normalisation=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), input_size=224)
_LUNIT = HubModel(
    normalisation=((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
)

KNOWN: Mapping[str, HubModel] = MappingProxyType(
    {
        "MahmoodLab/UNI": HubModel(_LAYER_SCALE),
        "MahmoodLab/UNI2-h": HubModel(
            {
                **_LAYER_SCALE,
                **_SWIGLU,
                "patch_size": 14,
                "depth": 24,
                "num_heads": 24,
                "embed_dim": 1536,
                "mlp_ratio": 2.66667 * 2,
                "no_embed_class": True,
                "reg_tokens": 8,
            },
            input_size=224,
        ),
        "paige-ai/Virchow": _TOKENS,
        "paige-ai/Virchow2": _TOKENS,
        "bioptimus/H0-mini": _TOKENS,
        "Wangyh/mSTAR": _IMAGENET_LAYER_SCALE,
        "xtxx/Digepath": _IMAGENET_LAYER_SCALE,
        "1aurent/vit_small_patch16_224.transpath_mocov3": HubModel(
            {"num_heads": 12}, normalisation=_IMAGENET
        ),
        "1aurent/vit_small_patch16_224.lunit_dino": _LUNIT,
        "1aurent/vit_small_patch8_224.lunit_dino": _LUNIT,
        **{
            f"1aurent/{network}.kaiko_ai_towards_large_pathology_fms": _KAIKO
            for network in (
                "vit_small_patch16_224",
                "vit_small_patch8_224",
                "vit_base_patch16_224",
                "vit_base_patch8_224",
                "vit_large_patch14_reg4_224",
                "vit_large_patch14_reg4_dinov2",  # its former name, which the hub still knows
            )
        },
    }
)
"""What is known, by the repository's name."""


def known(name: str) -> HubModel:
    """What is known of an encoder's needs; nothing, for most.

    Args:
        name: The encoder's; the hub does not tell upper from lower case, and a revision may follow.

    Example:
        >>> known("hf-hub:MahmoodLab/uni@main").arguments
        {'init_values': 1e-05}
    """
    if not name.startswith(PREFIX):
        return HubModel()
    repository = name.removeprefix(PREFIX).partition("@")[0].casefold()
    found = (model for known_name, model in KNOWN.items() if known_name.casefold() == repository)
    return next(found, HubModel())
