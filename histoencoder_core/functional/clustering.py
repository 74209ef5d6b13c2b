"""Clusters of features in memory."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from sklearn.cluster import MiniBatchKMeans

from histoencoder_core.store.tables import cluster_column

if TYPE_CHECKING:
    from collections.abc import Iterable


class ArrowStream(Protocol):
    """A table that can be read as Arrow batches: of pyarrow, duckdb, polars and others."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


class ArrowArray(Protocol):
    """A single Arrow batch."""

    def __arrow_c_array__(
        self, requested_schema: object | None = None
    ) -> tuple[object, object]: ...


Features: TypeAlias = ArrowStream | ArrowArray | np.ndarray | torch.Tensor
"""What `cluster_features` takes."""


def cluster_features(
    features: Features,
    n_clusters: int | Iterable[int] = (4, 8, 16, 32, 64),
    *,
    random_state: int | np.random.RandomState | None = 0,
    **kwargs: Any,
) -> pa.Table:
    """Cluster features by k-means, once for each number of clusters.

    Unlike 0.1.1, equal features get equal clusters from call to call, a number of clusters that
    is too large does not stop the larger or smaller ones after it, and a row without features
    (null, as for a tile that could not be read) has no cluster rather than being an error.

    Args:
        features: An array or tensor of shape (N, D), or a table of N rows. In a table all columns
            whose names begin with ``feat`` count, in their order: numbers, as in HistoEncoder's
            ``feat1…featN``, or fixed-size lists of numbers, as in the store's ``features``.
        n_clusters: A number of clusters, or several.
        random_state: Seed of k-means; None for another result each time.
        **kwargs: Passed to `sklearn.cluster.MiniBatchKMeans`.

    Returns:
        A table of N rows with one column ``n_clusters=K`` (int32, 0 to K - 1) for each K. A K that
        is not less than the number of rows with features is left out with a warning.

    Raises:
        TypeError: `features` is of another kind, or a column holds something else than numbers.
        ValueError: `features` does not have two dimensions, has no columns of features or holds
            NaN.

    Sources:
        HistoEncoder 0.1.1 (Pohjonen, 2023); mini-batch k-means (Sculley, 2010).

    Example:
        >>> clusters = cluster_features(np.array([[0.0], [0.1], [9.0]]), n_clusters=2)
        >>> first, second, third = clusters["n_clusters=2"].to_pylist()
        >>> first == second, second == third
        (True, False)
    """
    matrix, present = _to_matrix(features)
    if matrix.ndim != 2:
        raise ValueError(f"Expected features of shape (N, D), not {matrix.shape}.")
    columns = {}
    for k in [n_clusters] if isinstance(n_clusters, int | np.integer) else n_clusters:
        if k >= len(matrix):
            message = f"Left out {k} clusters: there are only {len(matrix)} rows with features."
            warnings.warn(message, stacklevel=2)
            continue
        model = MiniBatchKMeans(n_clusters=k, random_state=random_state, **kwargs)
        columns[cluster_column(k)] = _spread(model.fit_predict(matrix), present)
    return pa.table(columns)


def _to_matrix(features: Features) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows with features, of shape (M, D), and which they are of all N, if not all."""
    if isinstance(features, np.ndarray):
        return features, None
    if isinstance(features, torch.Tensor):
        tensor = features.detach().cpu()
        # NumPy has no such type.
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), None
    if not hasattr(features, "__arrow_c_stream__") and not hasattr(features, "__arrow_c_array__"):
        kind = type(features).__name__
        raise TypeError(f"Expected features to be an Arrow table, array or tensor, not {kind}.")
    table = pa.table(features)
    table = table.select([i for i, n in enumerate(table.column_names) if n.startswith("feat")])
    if table.num_columns == 0:
        raise ValueError("Found no column of features: their names begin with 'feat'.")
    present = np.logical_and.reduce([column.is_valid().to_numpy() for column in table.columns])
    if present.all():
        return _stack(table), None
    return _stack(table.filter(pa.array(present))), present


def _stack(table: pa.Table) -> np.ndarray:
    parts = [_numbers(name, table.column(i)) for i, name in enumerate(table.column_names)]
    return np.concatenate(parts, axis=1)


def _numbers(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column of N numbers or lists of D numbers as an array of shape (N, 1) or (N, D)."""
    width, kind = 1, column.type
    if pa.types.is_fixed_size_list(kind):
        width, kind = kind.list_size, kind.value_type
        column = pa.chunked_array([chunk.flatten() for chunk in column.chunks], kind)
    if not pa.types.is_floating(kind) and not pa.types.is_integer(kind):
        raise TypeError(f"Expected column {name!r} to hold numbers, not {kind}.")
    numbers: np.ndarray = column.to_numpy()
    return numbers.reshape(-1, width)


def _spread(labels: np.ndarray, present: np.ndarray | None) -> pa.Array:
    if present is None:
        return pa.array(labels, pa.int32())
    spread = np.zeros(len(present), np.int32)
    spread[present] = labels
    return pa.array(spread, mask=~present)
