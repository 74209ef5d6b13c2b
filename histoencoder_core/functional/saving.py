"""Features of a loader's images in parquet files."""

from __future__ import annotations

import os
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tqdm
from torch import Tensor

from histoencoder_core.functional.extraction import FeatureBatch, yield_features
from histoencoder_core.store.files import flush, remove, temporary_name
from histoencoder_core.store.tables import place_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from timm.models.xcit import Xcit
    from torch.utils.data import DataLoader

ROW_GROUP_ROWS = 16384
"""Rows that are held in memory until they are written."""


def save_features(
    encoder: Xcit,
    output_dir: str | os.PathLike[str],
    loader: DataLoader[Any],
    *,
    num_blocks: int = 1,
    avg_pool: bool = False,
    legacy: bool = False,
    max_samples: int | None = None,
    overwrite: bool = False,
    verbose: bool = False,
    **tqdm_kwargs: Any,
) -> None:
    """Extract features from a loader's images and write them to parquet files.

    A file has the columns ``feat1…featN`` and, if the batches tell where the images come from,
    before them ``path`` (string, absolute), ``x``, ``y``, ``w`` and ``h`` (int64, level-0 pixels).
    The second element of a batch tells: paths give all five columns, with the place read from names
    like ``x0_y512_w256_h256.jpeg``; whole numbers of shape (B, 4), or four of shape (B,), give the
    place alone. All else in a batch is left out.

    Full files are called ``features_1.parquet``, ``features_2.parquet``, …, and so is the
    rest; if there is no full file, the only one is ``features.parquet``. Files appear under these
    names, and former ones go, once all are complete. No other file is touched.

    Unlike 0.1.1, what a batch holds is told by the types of its elements rather than by the
    dataset's class, a name that tells no place gives nulls rather than the smallest integer, no
    file has more than `max_samples` rows, and a failed run leaves former features as they were.

    Args:
        encoder: The encoder.
        output_dir: Folder of the files; made if need be.
        loader: A loader of images, alone or as the first element of a list or tuple.
        num_blocks: See `extract_features`.
        avg_pool: See `extract_features`.
        legacy: See `extract_features`.
        max_samples: Largest number of rows of a file; one file for all if not given.
        overwrite: Whether to replace the folder's ``features*.parquet``.
        verbose: Whether to show a progress bar.
        **tqdm_kwargs: Passed to `tqdm.tqdm`.

    Raises:
        FileExistsError: The folder holds features and `overwrite` is False.
        TypeError: The encoder is not an XCiT, or a batch has no images.
        ValueError: The loader does not batch, the encoder does not have so many blocks,
            `max_samples` is less than 1, or batches differ in what they hold.

    Sources:
        HistoEncoder 0.1.1 (Pohjonen, 2023).
    """
    folder = Path(output_dir)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be 1 or more, not {max_samples}.")
    if _feature_files(folder) and not overwrite:
        raise FileExistsError(f"{folder} holds features; remove them or set overwrite=True.")
    batches = yield_features(
        encoder, loader, num_blocks=num_blocks, avg_pool=avg_pool, legacy=legacy
    )
    progress = {"disable": not verbose, "total": _length(loader), **tqdm_kwargs}
    with _replacing_features(folder, max_samples) as files, closing(batches):
        for batch in tqdm.tqdm(batches, **progress):
            files.add(_to_table(batch))


class _Files:
    """Feature files that are being written under temporary names.

    Attributes:
        full: Files with as many rows as a file may have.
        rest: The file being written, if any.
    """

    def __init__(self, folder: Path, max_samples: int | None) -> None:
        self.full: list[Path] = []
        self.rest: Path | None = None
        self._folder = folder
        self._max_samples = max_samples
        self._rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._buffer: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Add rows, starting new files as former ones get full."""
        while table.num_rows:
            room = table.num_rows if self._max_samples is None else self._max_samples - self._rows
            self._append(table.slice(0, room))
            table = table.slice(room)
            if self._rows == self._max_samples and self.rest is not None:
                self.close()
                self.full.append(self.rest)
                self.rest = None

    def close(self) -> None:
        """Complete the file being written."""
        if self._writer is not None:
            self._flush_rows(self._writer)
            self._writer.close()
        self._writer, self._rows = None, 0

    def discard(self) -> None:
        """Remove what was written."""
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            for path in (*self.full, self.rest):
                if path is not None:
                    remove(path)

    def _append(self, table: pa.Table) -> None:
        if self._writer is None:
            self.rest = temporary_name(self._folder / "features.parquet")
            # Hardly any two features are equal, so that dictionaries would only take time.
            self._writer = pq.ParquetWriter(
                self.rest, table.schema, compression="zstd", use_dictionary=False
            )
        if table.schema != self._writer.schema:
            raise ValueError(
                "The loader's batches differ in what they hold: first columns "
                f"{self._writer.schema.names}, then {table.schema.names}."
            )
        self._buffer.append(table)
        self._rows += table.num_rows
        if sum(part.num_rows for part in self._buffer) >= ROW_GROUP_ROWS:
            self._flush_rows(self._writer)

    def _flush_rows(self, writer: pq.ParquetWriter) -> None:
        if self._buffer:
            writer.write_table(pa.concat_tables(self._buffer).combine_chunks())
        self._buffer = []


@contextmanager
def _replacing_features(folder: Path, max_samples: int | None) -> Iterator[_Files]:
    folder.mkdir(parents=True, exist_ok=True)
    files = _Files(folder, max_samples)
    try:
        yield files
        files.close()
        _put_in_place(files, folder)
    except BaseException:
        files.discard()
        raise


def _put_in_place(files: _Files, folder: Path) -> None:
    stale = set(_feature_files(folder))
    parts = [*files.full, *([] if files.rest is None else [files.rest])]
    for number, part in enumerate(parts, start=1):
        flush(part)
        target = folder / (f"features_{number}.parquet" if files.full else "features.parquet")
        part.replace(target)
        stale.discard(target)
    for path in stale:
        path.unlink()
    flush(folder)


def _feature_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("features*.parquet") if path.is_file()]


def _length(loader: DataLoader[Any]) -> int | None:
    try:
        return len(loader)
    except (AttributeError, TypeError):  # the loader of a stream has no length
        return None


def _to_table(batch: FeatureBatch) -> pa.Table:
    features, *extras = (batch,) if isinstance(batch, Tensor) else batch
    columns = _origin_columns(extras[0], len(features)) if extras else {}
    # NumPy has no such type.
    matrix = (features.float() if features.dtype == torch.bfloat16 else features).numpy()
    for number, values in enumerate(np.ascontiguousarray(matrix.T), start=1):
        columns[f"feat{number}"] = pa.array(values)
    return pa.table(columns)


def _origin_columns(extra: Any, rows: int) -> dict[str, pa.Array]:
    if isinstance(extra, list | tuple) and len(extra) == rows and _are_paths(extra):
        places = [place_of(Path(path).stem) for path in extra]
        columns = {"path": pa.array([str(Path(path).resolve()) for path in extra], pa.string())}
        for i, name in enumerate("xywh"):
            numbers = [None if place is None else place[i] for place in places]
            columns[name] = pa.array(numbers, pa.int64())
        return columns
    coordinates = _to_coordinates(extra)
    if coordinates is not None and coordinates.shape == (rows, 4):
        return {name: pa.array(coordinates[:, i], pa.int64()) for i, name in enumerate("xywh")}
    return {}


def _are_paths(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str | os.PathLike) for value in values)


def _to_coordinates(extra: Any) -> np.ndarray | None:
    """Whole numbers as an array; torch collates a tuple of numbers into a list of tensors."""
    if isinstance(extra, list | tuple) and all(isinstance(value, Tensor) for value in extra):
        if len({value.shape for value in extra}) != 1:
            return None
        extra = torch.stack(tuple(extra), dim=-1)
    if isinstance(extra, Tensor) and not extra.is_floating_point():
        extra = extra.cpu().numpy()
    if isinstance(extra, np.ndarray) and extra.dtype.kind in "iu":
        return extra.astype(np.int64)
    return None
