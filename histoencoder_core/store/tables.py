"""Schemas of the store's tables, and readers that take HistoEncoder's and HistoPrep's forms too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from histoencoder_core.errors import StoreError

TILE_FIELDS = [
    pa.field("tile", pa.string()),
    *(pa.field(name, pa.int32()) for name in ("x", "y", "w", "h")),
]
"""The columns every table of tiles begins with: the key, and the place in level-0 pixels."""

ROW_GROUP = 16384
"""Rows that are written, and read, at a time."""

KEY_COLUMNS = [field.name for field in TILE_FIELDS]

Place = tuple[int, int, int, int]
"""``x, y, w, h`` in level-0 pixels."""

_TILE_NAME = re.compile(r"x(\d+)_y(\d+)_w(\d+)_h(\d+)")
_WIDE = re.compile(r"feat(\d+)")
_N_CLUSTERS = re.compile(r"n_clusters=(\d+)")


def tile_name(x: int, y: int, w: int, h: int) -> str:
    """HistoPrep's name of a tile: its place in level-0 pixels.

    Example:
        >>> tile_name(0, 512, 224, 224)
        'x0_y512_w224_h224'
    """
    return f"x{x}_y{y}_w{w}_h{h}"


def place_of(name: str) -> Place | None:
    """The place that a tile's name tells, or None.

    Example:
        >>> place_of("x0_y512_w224_h224"), place_of("10A0_CRC")
        ((0, 512, 224, 224), None)
    """
    match = _TILE_NAME.fullmatch(name)
    if match is None:
        return None
    x, y, w, h = map(int, match.groups())
    return x, y, w, h


def key_table(names: Sequence[str], places: Sequence[Place | None]) -> pa.Table:
    """Build the columns ``tile, x, y, w, h``; a tile without a place has nulls."""
    columns = [pa.array(names, pa.string())]
    columns += [
        pa.array([None if place is None else place[i] for place in places], pa.int32())
        for i in range(4)
    ]
    return pa.table(columns, schema=pa.schema(TILE_FIELDS))


def feature_list(features: np.ndarray, dtype: str) -> pa.FixedSizeListArray:
    """Turn a matrix (tiles, length) into a column of fixed-size lists.

    Args:
        features: Array of shape (tiles, length), any float type.
        dtype: ``float32`` or ``float16``.
    """
    flat = np.ascontiguousarray(features, dtype=dtype).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), features.shape[1])


def widen(table: pa.Table) -> pa.Table:
    """Turn a ``features`` column into HistoEncoder's wide ``feat1…featN`` columns."""
    matrix = _matrix(table.column("features"))
    names = [f"feat{i + 1}" for i in range(matrix.shape[1])]
    wide = pa.table([pa.array(column) for column in matrix.T], names=names)
    for field, column in zip(wide.schema, wide.columns, strict=True):
        table = table.append_column(field, column)
    return table.drop_columns(["features"])


def feature_length(path: Path) -> int:
    """Length of the features in a file, without reading them.

    Raises:
        StoreError: The file holds no features.
    """
    schema = _schema(path)
    if "features" in schema.names:
        kind = schema.field("features").type
        if pa.types.is_fixed_size_list(kind):
            return int(kind.list_size)
    wide = _wide_columns(schema)
    if wide:
        return len(wide)
    raise StoreError(
        f"{path}: holds no features: expected a fixed-size list column 'features' or columns "
        "'feat1', 'feat2', …. Remove the file and run `histoencoder extract` again."
    )


def row_count(path: Path) -> int:
    """Number of rows of a parquet file, from its footer."""
    return int(pq.read_metadata(path).num_rows)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file.

    Raises:
        StoreError: It is damaged; the message says which.
    """
    try:
        with pq.ParquetFile(path) as file:  # half the time of `pq.read_table` for a slide's tiles
            return file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path}: can't be read as parquet ({error}).") from error


def read_keys(path: Path) -> pa.Table:
    """Read ``tile, x, y, w, h`` of any table of tiles, ours, HistoPrep's or HistoEncoder's."""
    schema = _schema(path)
    wanted = [*KEY_COLUMNS, "path"]
    return normalise_keys(read_table(path, [n for n in schema.names if n in wanted]), path)


def normalise_keys(table: pa.Table, path: Path) -> pa.Table:
    """Bring a foreign table's keys into the form ``tile, x, y, w, h``.

    The name comes from the column ``tile``, else from the last part of ``path`` (which may point
    to another machine), else from the place.
    """
    rows = table.num_rows
    if "tile" in table.column_names:
        names = table.column("tile").to_pylist()
    elif "path" in table.column_names:
        # A Windows path's parser takes both kinds of slashes.
        names = [PureWindowsPath(text).stem for text in table.column("path").to_pylist()]
    else:
        names = []
    if set("xywh") <= set(table.column_names):
        numbers = [_integers(table.column(name)) for name in "xywh"]
        places = [_complete(place) for place in zip(*numbers, strict=True)]
    else:
        places = [None] * rows
    if not names:
        known = [place for place in places if place is not None]
        if len(known) < rows:
            raise StoreError(f"{path}: has neither 'path' nor complete 'x, y, w, h' columns.")
        names = [tile_name(*place) for place in known]
    places = [place or place_of(name) for name, place in zip(names, places, strict=True)]
    if len(set(names)) != rows:
        raise StoreError(f"{path}: two rows have the same tile name; names must be unique.")
    return key_table(names, places)


def read_features(path: Path) -> tuple[pa.Table, np.ndarray]:
    """Read features in either form.

    Args:
        path: A ``features.parquet``, ours or HistoEncoder's wide one.

    Returns:
        The keys ``tile, x, y, w, h`` and a float32 array of shape (tiles, length); a row without
        features is all NaN.

    Raises:
        StoreError: The file is damaged or holds no features.
    """
    length = feature_length(path)
    chunks = list(iter_features(path))
    matrix = np.concatenate(chunks) if chunks else np.empty((0, length), np.float32)
    return read_keys(path), matrix


def iter_features(path: Path, batch_rows: int = ROW_GROUP) -> Iterator[np.ndarray]:
    """Read features batch by batch.

    Args:
        path: A ``features.parquet``, ours or HistoEncoder's wide one.
        batch_rows: Largest number of rows of a batch.

    Yields:
        float32 arrays of shape (rows, length).

    Raises:
        StoreError: The file is damaged or holds no features.
    """
    wide = _wide_columns(_schema(path))
    feature_length(path)
    # Without these, Arrow holds all row groups' bytes in memory.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        for batch in file.iter_batches(batch_rows, columns=wide or ["features"]):
            if wide:
                columns = [batch.column(name).to_numpy(zero_copy_only=False) for name in wide]
                yield np.stack(columns, axis=1).astype(np.float32, copy=False)
            else:
                yield _matrix(batch.column("features"))


def cluster_columns(schema: pa.Schema) -> dict[int, str]:
    """The columns of cluster numbers in a ``clusters.parquet``, by K."""
    found = {name: _N_CLUSTERS.fullmatch(name) for name in schema.names}
    return {int(match[1]): name for name, match in found.items() if match}


def cluster_column(k: int) -> str:
    """HistoEncoder's name of the column for K clusters."""
    return f"n_clusters={k}"


def distance_column(k: int) -> str:
    """Our name of the column of distances to the centroids of K clusters."""
    return f"distance={k}"


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path}: can't be read as parquet ({error}).") from error


def _wide_columns(schema: pa.Schema) -> list[str]:
    numbered = [(int(match[1]), name) for name in schema.names if (match := _WIDE.fullmatch(name))]
    return [name for _, name in sorted(numbered)]


def _matrix(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    length = column.type.list_size
    flat = pc.list_flatten(column.drop_null())
    present: np.ndarray = flat.to_numpy(zero_copy_only=False).reshape(-1, length)
    if column.null_count == 0:
        return present.astype(np.float32, copy=False)
    matrix = np.full((len(column), length), np.nan, np.float32)
    matrix[column.is_valid().to_numpy(zero_copy_only=False)] = present
    return matrix


def _complete(place: tuple[int | None, ...]) -> Place | None:
    """A place of four numbers; None if one is missing."""
    x, y, w, h = place
    if x is None or y is None or w is None or h is None:
        return None
    return x, y, w, h


def _integers(column: pa.ChunkedArray) -> list[int | None]:
    # HistoEncoder 0.1.1 cast NaN to the smallest integer where a name told no place.
    return [None if v is None or v != v or v < 0 else int(v) for v in column.to_pylist()]
