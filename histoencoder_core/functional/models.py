"""The published encoders by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from timm.models.xcit import Xcit

from histoencoder_core.features.encoders import ARCHITECTURES, create_prostate_encoder

if TYPE_CHECKING:
    import torch


def create_encoder(model_name: str) -> Xcit:
    """Create an encoder with its published weights.

    Args:
        model_name: One of `list_encoders`, in any case.

    Returns:
        The encoder on the CPU and without a head. It takes images of shape (B, 3, H, W) and gives
        features of shape (B, 384) for ``prostate_small`` and (B, 512) for ``prostate_medium``.

    Raises:
        ValueError: There is no encoder of that name.
        WeightsError: The encoder's weights can't be had or don't fit.
    """
    name = model_name.lower()
    if name not in ARCHITECTURES:
        raise ValueError(f"There is no encoder {model_name!r}; choose from {list_encoders()}.")
    return check_encoder(create_prostate_encoder(name))


def list_encoders() -> list[str]:
    """Names that `create_encoder` takes.

    Example:
        >>> list_encoders()
        ['prostate_small', 'prostate_medium']
    """
    return list(ARCHITECTURES)


def check_encoder(encoder: torch.nn.Module) -> Xcit:
    """Make sure that a model is timm's XCiT.

    Raises:
        TypeError: It is another model.
    """
    if not isinstance(encoder, Xcit):
        raise TypeError(f"Expected the encoder to be timm's Xcit, not {type(encoder).__name__}.")
    return encoder
