"""Features of images from a loader."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from histoencoder_core.features.xcit import check_num_blocks, extract_features
from histoencoder_core.functional.models import check_encoder

if TYPE_CHECKING:
    from timm.models.xcit import Xcit

Batch: TypeAlias = Tensor | Sequence[Any]
"""What a loader yields: images, or a list or tuple that begins with images."""

FeatureBatch: TypeAlias = Tensor | tuple[Any, ...]
"""A `Batch` with features in place of the images."""


def yield_features(
    encoder: Xcit,
    loader: Iterable[Batch],
    *,
    num_blocks: int = 1,
    avg_pool: bool = False,
    legacy: bool = False,
) -> Generator[FeatureBatch, None, None]:
    """Replace the images in a loader's batches by their features.

    The encoder is in evaluation mode from the first batch to the last, and no gradients are kept.

    Unlike 0.1.1, every module of the encoder gets its former mode back also if the consumer stops
    early or an error is raised, images are moved to the encoder's own device, and arguments are
    checked at the call.

    Args:
        encoder: The encoder.
        loader: A `torch.utils.data.DataLoader`, or any iterable of batches: images of shape
            (B, 3, H, W), alone or as the first element of a list or tuple.
        num_blocks: See `extract_features`.
        avg_pool: See `extract_features`.
        legacy: See `extract_features`.

    Returns:
        A generator of the loader's batches with features of shape (B, D), on the CPU, in place of
        the images: tensors where the loader gives tensors, else tuples.

    Raises:
        TypeError: The encoder is not an XCiT, or a batch has no images.
        ValueError: The loader does not batch, or the encoder does not have so many blocks.
    """
    encoder = check_encoder(encoder)
    check_num_blocks(encoder, num_blocks)
    # A loader that was given a batch sampler has no batch size of its own.
    if getattr(loader, "batch_size", 1) is None and getattr(loader, "batch_sampler", None) is None:
        raise ValueError("The loader yields single samples: its batch_size must not be None.")
    options = {"num_blocks": num_blocks, "avg_pool": avg_pool, "legacy": legacy}
    return _generate(encoder, loader, options)


def _generate(
    encoder: Xcit, loader: Iterable[Batch], options: dict[str, Any]
) -> Generator[FeatureBatch, None, None]:
    device = next(encoder.parameters()).device
    with _evaluating(encoder):
        for batch in loader:
            images, *extras = _unpack(batch)
            # Not around the yield: the consumer's own code may need gradients.
            with torch.no_grad():
                features = extract_features(encoder, images.to(device), **options).cpu()
            yield features if isinstance(batch, Tensor) else (features, *extras)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # Not by train(), which would also switch modules that were in evaluation mode before.
        for module in training:
            module.training = True


def _unpack(batch: Batch) -> Sequence[Any]:
    if isinstance(batch, Tensor):
        return (batch,)
    if not isinstance(batch, list | tuple):
        raise TypeError(f"Expected a batch to be a tensor, list or tuple, not {type(batch)}.")
    if not batch or not isinstance(batch[0], Tensor):
        raise TypeError("Expected the first element of a batch to be a tensor of images.")
    return batch
