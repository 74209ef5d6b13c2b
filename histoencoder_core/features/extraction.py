"""Encoding all tiles of a slide: ``features.parquet``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from histoencoder_core.errors import HistoEncoderError, SlideError
from histoencoder_core.features.encoders import Encoder
from histoencoder_core.store import SlideFolder, Stamp, layout
from histoencoder_core.store.tables import feature_list, read_table, widen
from histoencoder_core.tiles import TileSource
from histoencoder_core.tiles.source import ReadTile

ALGORITHM = layout.FEATURES_ALGORITHM

MAX_UNREADABLE = 0.01
"""Largest share of tiles that may be unreadable before the slide fails."""

Progress = Callable[[int], None]


def features_stamp(upstream: str, encoder: Encoder) -> Stamp:
    """The stamp that features of these tiles carry if this encoder makes them.

    Args:
        upstream: Fingerprint of the tiles.
        encoder: The encoder.
    """
    return Stamp.of(
        "features",
        algorithm=ALGORITHM,
        made_from={"tiles": upstream, "encoder": encoder.made_from},
        untrained=encoder.untrained,
    ).with_result(
        space=encoder.space, encoder=encoder.settings.name, native_size=encoder.native_size
    )


def extract_slide(
    folder: SlideFolder,
    source: TileSource,
    encoder: Encoder,
    *,
    batch_size: int = 16,
    num_workers: int = 2,
    wide: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Stamp:
    """Encode a slide's tiles, unless that is done already.

    Args:
        folder: The slide's folder in the store.
        source: Its tiles.
        encoder: The encoder.
        batch_size: Tiles a forward pass.
        num_workers: Threads that read tiles while the encoder works.
        wide: Write HistoEncoder's columns ``feat1…featN`` instead of one list column.
        overwrite: Do it again even where it is done.
        progress: Called with the number of tiles done since the last call.

    Returns:
        The stamp of ``features.parquet``.

    Raises:
        SlideError: The slide, or more than 1 % of its tiles, can't be read.
        HistoEncoderError: A feature is not finite; the message names the tile.
        StoreError: Another program's files stand in the way.
    """
    stamp = features_stamp(source.upstream(), encoder)
    if not overwrite and folder.fetch("features", stamp.fingerprint):
        folder.clear_failure("features")
        done = folder.stamp("features") or stamp
        return _rewritten_wide(folder, done) if wide else done
    try:
        started = time.perf_counter()
        features, reasons = _encode_all(source, encoder, batch_size, num_workers, progress)
        seconds = time.perf_counter() - started
        stamp = stamp.with_result(
            tiles=len(features),
            unreadable=sum(reason is not None for reason in reasons),
            length=encoder.length,
            seconds=round(seconds, 3),
            tiles_per_second=round(len(features) / seconds, 2) if len(features) else 0.0,
            device=str(encoder.device),
            batch_size=batch_size,
        )
        table = _table(source.keys, features, reasons, encoder.settings.dtype)
        with folder.writing("features") as writer:
            writer.table(widen(table) if wide else table, stamp)
    except Exception as error:
        folder.record_failure("features", error, inputs=stamp.fingerprint)
        raise
    return stamp.just_made()


def _rewritten_wide(folder: SlideFolder, stamp: Stamp) -> Stamp:
    """Give features that are there HistoEncoder's form; nothing is encoded again."""
    table = read_table(folder.record("features"))
    if "features" not in table.column_names:
        return stamp
    with folder.writing("features") as writer:
        writer.table(widen(table), stamp)
    return stamp.just_made()


def _encode_all(
    source: TileSource,
    encoder: Encoder,
    batch_size: int,
    num_workers: int,
    progress: Progress | None,
) -> tuple[np.ndarray, list[str | None]]:
    """Features (tiles, length), NaN where a tile can't be read, and the reasons."""
    count = source.keys.num_rows
    features = np.full((count, encoder.length), np.nan, np.float32)
    reasons: list[str | None] = [None] * count
    if count == 0:
        return features, reasons
    with source.open() as read:
        for rows, tiles in _batches(read, count, batch_size, num_workers):
            good: dict[int, np.ndarray] = {}
            for row, tile in zip(rows, tiles, strict=True):
                if isinstance(tile, SlideError):
                    reasons[row] = str(tile)
                else:
                    good[row] = tile
            if good:
                encoded = encoder.encode(list(good.values()))
                features[list(good)] = encoded
                _check_finite(encoded, list(good), source)
            if progress is not None:
                progress(len(rows))
    unreadable = [reason for reason in reasons if reason is not None]
    if len(unreadable) > MAX_UNREADABLE * count:
        raise SlideError(
            f"{len(unreadable)} of {count} tiles can't be read, more than "
            f"{MAX_UNREADABLE:.0%}; the first: {unreadable[0]}",
            kind="unreadable-tiles",
        )
    return features, reasons


def _batches(
    read: ReadTile, count: int, batch_size: int, num_workers: int
) -> Iterator[tuple[range, list[np.ndarray | SlideError]]]:
    """Read tiles in order, always one batch ahead of the encoder."""

    def try_read(row: int) -> np.ndarray | SlideError:
        try:
            return read(row)
        except SlideError as error:
            return error

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        waiting: list[tuple[range, list[Future[np.ndarray | SlideError]]]] = []
        for start in range(0, count, batch_size):
            rows = range(start, min(start + batch_size, count))
            waiting.append((rows, [pool.submit(try_read, row) for row in rows]))
            if len(waiting) > 1:
                ready, futures = waiting.pop(0)
                yield ready, [future.result() for future in futures]
        for ready, futures in waiting:
            yield ready, [future.result() for future in futures]


def _check_finite(encoded: np.ndarray, rows: list[int], source: TileSource) -> None:
    bad = ~np.isfinite(encoded).all(axis=1)
    if bad.any():
        name = source.keys.column("tile")[rows[int(np.argmax(bad))]].as_py()
        raise HistoEncoderError(
            f"The encoder gave a feature that is not finite, first for the tile {name}. Nothing "
            "was written. Check the weights, and try float32."
        )


def _table(keys: pa.Table, features: np.ndarray, reasons: list[str | None], dtype: str) -> pa.Table:
    column = feature_list(features, dtype)
    if any(reasons):
        missing = pa.array([reason is not None for reason in reasons])
        column = pa.FixedSizeListArray.from_arrays(column.values, features.shape[1], mask=missing)
    table = keys.append_column("features", column)
    return table.append_column("unreadable", pa.array(reasons, pa.string()))
