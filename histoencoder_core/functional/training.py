"""Parts of an encoder to train, and how fast each learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from histoencoder_core.functional.models import check_encoder

if TYPE_CHECKING:
    import torch
    from timm.models.xcit import Xcit

_FIRST_LAYER = ("cls_token", "patch_embed", "pos_embed")


def freeze_encoder(
    encoder: Xcit,
    num_liquid: int = 0,
    *,
    freeze_cls_token: bool = True,
    freeze_patch_embed: bool = True,
    freeze_pos_embed: bool = True,
    freeze_layer_norm: bool = True,
    freeze_last_mlp_layer: bool = False,
) -> None:
    """Freeze an encoder's parameters but for its last blocks.

    Class-attention blocks count as blocks and are the last ones. The head always stays liquid
    (trainable). If all blocks are liquid, nothing is changed: neither are other parameters frozen,
    nor formerly frozen ones thawed.

    Args:
        encoder: The encoder, changed in place.
        num_liquid: Number of last blocks that stay liquid.
        freeze_cls_token: Whether to freeze the class token.
        freeze_patch_embed: Whether to freeze the patch embedding.
        freeze_pos_embed: Whether to freeze the positional encoding's projection.
        freeze_layer_norm: Whether to freeze the last norm.
        freeze_last_mlp_layer: Whether to freeze the MLP of the last class-attention block too, if
            that block is not liquid.

    Raises:
        TypeError: The encoder is not an XCiT.
        ValueError: `num_liquid` is negative.

    Sources:
        HistoEncoder 0.1.1 (Pohjonen, 2023).
    """
    encoder = check_encoder(encoder)
    if num_liquid < 0:
        raise ValueError(f"num_liquid must be 0 or more, not {num_liquid}.")
    num_blocks = len(encoder.blocks) + len(encoder.cls_attn_blocks)
    if num_liquid >= num_blocks:
        return
    frozen = {
        "cls_token": freeze_cls_token,
        "patch_embed": freeze_patch_embed,
        "pos_embed": freeze_pos_embed,
        "norm": freeze_layer_norm,
    }
    for name, parameter in encoder.named_parameters():
        block = _block_of(encoder, name)
        if block is None:
            part = name.partition(".")[0]
            parameter.requires_grad = not frozen.get(part, not part.startswith("head"))
        else:
            in_last_mlp = block == num_blocks - 1 and ".mlp." in name
            parameter.requires_grad = block >= num_blocks - num_liquid or (
                in_last_mlp and not freeze_last_mlp_layer
            )


def get_parameter_groups(
    encoder: Xcit,
    *,
    lr: float = 0.001,
    weight_decay: float = 0.05,
    lr_decay: float = 0.75,
    filter_1d: bool = True,
) -> list[dict[str, Any]]:
    """Sort an encoder's liquid parameters into groups for an optimizer.

    With L blocks (class-attention blocks included), the class token and both embeddings are layer
    0, the blocks layers 1 to L, and the last norm and the head layer L + 1. Layer i learns at the
    rate lr * lr_decay ** (L + 1 - i), as in the layer-wise decay of BEiT (Bao et al., 2021). With
    an `lr_decay` of 1 all are layer 0.

    Args:
        encoder: The encoder; frozen parameters are left out.
        lr: Learning rate of the last layer.
        weight_decay: Weight decay of parameters that have one.
        lr_decay: Factor on the learning rate from a layer to the one before it, in (0, 1].
        filter_1d: Whether one-dimensional parameters (biases, norms, scales) have no weight decay.
            The class token never has.

    Returns:
        One group each for the parameters with and without weight decay of each layer:
        ``name`` (``params_{layer}_decay`` or ``params_{layer}_no_decay``), ``lr``, ``lr_scale``,
        ``weight_decay`` and ``params``.

    Raises:
        TypeError: The encoder is not an XCiT.
        ValueError: `lr_decay` is not in (0, 1].

    Sources:
        HistoEncoder 0.1.1 (Pohjonen, 2023).
    """
    encoder = check_encoder(encoder)
    if not 0 < lr_decay <= 1:
        raise ValueError(f"lr_decay must be in (0, 1], not {lr_decay}.")
    last_layer = len(encoder.blocks) + len(encoder.cls_attn_blocks) + 1
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            continue
        # Not by the encoder's no_weight_decay(), whose patterns differ between versions of timm.
        decays = name != "cls_token" and not (filter_1d and parameter.ndim == 1)
        layer = 0 if lr_decay == 1 else _layer_of(encoder, name)
        lr_scale = lr_decay ** (last_layer - layer)
        group_name = f"params_{layer}_{'decay' if decays else 'no_decay'}"
        group = {
            "name": group_name,
            "lr": lr * lr_scale,
            "lr_scale": lr_scale,
            "weight_decay": weight_decay if decays else 0.0,
            "params": [],
        }
        groups.setdefault(group_name, group)["params"].append(parameter)
    return list(groups.values())


def update_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set an optimizer's learning rate, scaled by each group's ``lr_scale`` if it has one.

    Args:
        optimizer: The optimizer, changed in place.
        lr: Learning rate of a group without a scale.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def update_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Set an optimizer's weight decay, but for groups with ``no_decay`` in their name.

    Args:
        optimizer: The optimizer, changed in place.
        weight_decay: The weight decay.
    """
    for group in optimizer.param_groups:
        if "no_decay" not in group.get("name", ""):
            group["weight_decay"] = weight_decay


def _block_of(encoder: Xcit, name: str) -> int | None:
    """Number of the block that a parameter is in, class-attention blocks counted last."""
    part, _, rest = name.partition(".")
    if part not in ("blocks", "cls_attn_blocks"):
        return None
    return int(rest.partition(".")[0]) + (len(encoder.blocks) if part == "cls_attn_blocks" else 0)


def _layer_of(encoder: Xcit, name: str) -> int:
    block = _block_of(encoder, name)
    if block is not None:
        return block + 1
    if name.startswith(_FIRST_LAYER):
        return 0
    return len(encoder.blocks) + len(encoder.cls_attn_blocks) + 1
