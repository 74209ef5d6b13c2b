"""What is done to features before k-means sees them: nothing, unless it is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from histoencoder_core.errors import ClusterError

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]

_LEAST_VARIANCE = 1e-6
"""Share of the first component's variance below which a component is rounding."""


@dataclass(frozen=True)
class Whitening:
    """Features to principal components of variance 1, about their mean.

    Attributes:
        matrix: float32 array of shape (length, components).
        offset: float32 array of shape (components,), added after it.
        mean: float32 array of shape (length,), of the features.

    Source: Kessy, Lewin and Strimmer, "Optimal whitening and decorrelation" (2018): PCA whitening.
    """

    matrix: Floats
    offset: Floats
    mean: Floats


@dataclass(frozen=True)
class Transform:
    """From features to the space in which they are clustered.

    Attributes:
        normalise: Scale every vector to length 1; a vector of zeros stays as it is.
        whitening: What is done then, if anything.
    """

    normalise: bool = False
    whitening: Whitening | None = None

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Transform a float32 tensor of shape (tiles, length), on whatever device it is."""
        import torch  # takes seconds, and most who read a model transform nothing

        if self.normalise:
            lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows = rows / torch.where(lengths == 0, 1.0, lengths)
        if self.whitening is not None:
            offset, matrix = (
                torch.from_numpy(part).to(rows.device)
                for part in (self.whitening.offset, self.whitening.matrix)
            )
            rows = torch.addmm(offset, rows, matrix)
        return rows

    def move(self, points: Floats, other: Transform) -> Floats:
        """Bring points of this transform's space into that of another that normalises as this one.

        Components that this one's whitening dropped are taken to be those of the mean.
        """
        if self.whitening is not None:
            back = np.linalg.pinv(self.whitening.matrix.astype(np.float64))
            moved = points.astype(np.float64) @ back + self.whitening.mean
            points = moved.astype(np.float32)
        if other.whitening is not None:
            points = points @ other.whitening.matrix + other.whitening.offset
        return points


AS_THEY_ARE = Transform()
"""Features as they are."""


def fit_whitening(blocks: Iterable[Floats], components: int) -> Whitening:
    """Fit PCA whitening on a sample.

    Args:
        blocks: float32 arrays of shape (tiles, length).
        components: Principal components to keep.

    Raises:
        ClusterError: The features do not vary in so many directions.
    """
    count, total, products = 0, np.zeros(()), np.zeros(())
    for block in blocks:
        wide = block.astype(np.float64)
        count += len(wide)
        total = total + wide.sum(axis=0)
        products = products + wide.T @ wide
    mean = total / count
    values, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    values, vectors = values[::-1], vectors[:, ::-1]
    there = int((values > _LEAST_VARIANCE * max(values[0], 1e-30)).sum())
    if components > there:
        raise ClusterError(
            f"Features can't be whitened to {components} components: those of the {count} tiles "
            f"drawn vary in {there} directions only. Set whiten (--whiten) to {there} or less."
        )
    # An eigenvector's sign is nobody's choice: its largest part is made positive.
    kept = vectors[:, :components]
    kept = kept * np.sign(kept[np.abs(kept).argmax(axis=0), np.arange(components)])
    matrix = kept / np.sqrt(values[:components])
    parts = (matrix, -mean @ matrix, mean)
    return Whitening(*(part.astype(np.float32) for part in parts))
