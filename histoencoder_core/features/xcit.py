"""The outputs of an XCiT that become features."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from timm.models.xcit import Xcit


def extract_features(
    encoder: Xcit,
    images: Tensor,
    *,
    num_blocks: int = 1,
    avg_pool: bool = False,
    legacy: bool = False,
) -> Tensor:
    """Extract features from a batch of images.

    An XCiT of C channels ends in (usually two) class-attention blocks, whose class token stands
    for the whole image. The class tokens of the last `num_blocks` blocks, normalised by the
    encoder's last norm, are joined from the earlier to the later block.

    Unlike 0.1.1, which takes the first patch's token (the image's top left corner) from a block
    before the class-attention blocks, such a block is represented by the mean over its patch
    tokens. `legacy` brings the corner back. For `num_blocks` up to the number of class-attention
    blocks it makes no difference.

    Args:
        encoder: The encoder, in evaluation mode unless it is being trained.
        images: Normalised images, float of shape (B, 3, H, W), on the encoder's device.
        num_blocks: Number of last blocks in the features.
        avg_pool: Whether to append the mean over the last block's patch tokens.
        legacy: Whether to repeat 0.1.1's choice of tokens.

    Returns:
        Features of shape (B, C * (num_blocks + avg_pool)) and the encoder's float type.

    Raises:
        TypeError: `images` is not a tensor of floats.
        ValueError: `images` does not have four dimensions, or the encoder does not have so many
            blocks.

    Sources:
        HistoEncoder 0.1.1 (Pohjonen, 2023); XCiT (El-Nouby et al., 2021), section 3.4 for class
        attention.
    """
    _check_images(images)
    check_num_blocks(encoder, num_blocks)
    outputs = [encoder.norm(tokens) for tokens in _last_outputs(encoder, images, num_blocks)]
    num_plain = 0 if legacy else max(0, num_blocks - len(encoder.cls_attn_blocks))
    parts = [tokens.mean(dim=1) for tokens in outputs[:num_plain]]
    parts += [tokens[:, 0] for tokens in outputs[num_plain:]]
    if avg_pool:
        parts.append(outputs[-1][:, 1:].mean(dim=1))
    return torch.cat(parts, dim=-1)


def check_num_blocks(encoder: Xcit, num_blocks: int) -> None:
    """Make sure that an encoder has so many blocks.

    Raises:
        ValueError: It has fewer, or none were asked for.
    """
    total = len(encoder.blocks) + len(encoder.cls_attn_blocks)
    if not 1 <= num_blocks <= total:
        raise ValueError(f"num_blocks must be from 1 to the encoder's {total}, not {num_blocks}.")


def _last_outputs(encoder: Xcit, images: Tensor, num_blocks: int) -> deque[Tensor]:
    """Tokens of shape (B, N, C) after each of the last blocks; class tokens come first."""
    outputs: deque[Tensor] = deque(maxlen=num_blocks)
    tokens, (height, width) = encoder.patch_embed(images)
    if encoder.pos_embed is not None:
        position = encoder.pos_embed(len(images), height, width)
        tokens = tokens + position.flatten(start_dim=2).transpose(1, 2)
    tokens = encoder.pos_drop(tokens)
    for block in encoder.blocks:
        tokens = block(tokens, height, width)
        outputs.append(tokens)
    tokens = torch.cat([encoder.cls_token.expand(len(images), -1, -1), tokens], dim=1)
    for block in encoder.cls_attn_blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    return outputs


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images)
        raise TypeError(f"Expected the images to be a tensor of floats, not {kind}.")
    if images.ndim != 4:
        raise ValueError(f"Expected images of shape (B, 3, H, W), not {tuple(images.shape)}.")
