"""The tile whose like is looked for, found by its place on a slide or by its name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from histoencoder_core.clusters import FeatureFile, feature_file
from histoencoder_core.errors import SettingsError, StoreError
from histoencoder_core.similar.exact import Floats, read_rows, unit
from histoencoder_core.slides import read_description
from histoencoder_core.store import Store
from histoencoder_core.store.tables import read_keys, read_table

_SLIDES_TOLD = 8


@dataclass(frozen=True)
class QueryTile:
    """The tile whose like is looked for.

    Attributes:
        file: The features of its slide.
        row: Its row there.
        tile: Its name.
        direction: float32 array of shape (length,): its features, scaled to length 1.
    """

    file: FeatureFile
    row: int
    tile: str
    direction: Floats


def find_tile(store: Store, slide: str, at: tuple[int, int] | str) -> QueryTile:
    """Find a tile that has features.

    Args:
        store: The store.
        slide: The slide's id.
        at: ``x, y`` in level-0 pixels, or the tile's name. Of the tiles that contain the pixel it
            is the one whose centre is nearest.

    Raises:
        SettingsError: The slide has no such tile, or nothing can be compared with it.
        StoreError: There is no such slide, or it has no features.
    """
    known = store.slide_ids()
    if slide not in known:
        some = ", ".join([*known[:_SLIDES_TOLD], *["…"][: len(known) - _SLIDES_TOLD]])
        raise StoreError(f"{store.root}: holds no slide {slide!r}. Slides: {some or 'none'}.")
    file = feature_file(store.slide(slide))
    if file is None:
        raise StoreError(
            f"{store.root / slide}: has no features; run `histoencoder extract` first."
        )
    keys = read_keys(file.path)
    if keys.num_rows == 0:
        raise SettingsError(f"{slide}: has no tiles, so there is nothing to look for.")
    row = _row_of(slide, keys, at) if isinstance(at, str) else _row_at(store, slide, keys, at)
    tile = keys.column("tile")[row].as_py()
    [features] = read_rows(file, np.array([row]))
    if not np.isfinite(features).all():
        raise SettingsError(
            f"{slide}: tile {tile} has no features, since it could not be read"
            f"{_because(file, row)}. Choose another."
        )
    if not features.any():
        raise SettingsError(
            f"{slide}: the features of tile {tile} are all zero, so nothing is like them. Choose "
            "another."
        )
    return QueryTile(file, row, tile, unit(features))


def _row_of(slide: str, keys: pa.Table, tile: str) -> int:
    names = keys.column("tile").to_pylist()
    if tile not in names:
        raise SettingsError(
            f"{slide}: has no tile {tile!r}; its {len(names)} tiles have names such as {names[0]}."
        )
    return int(names.index(tile))


def _row_at(store: Store, slide: str, keys: pa.Table, at: tuple[int, int]) -> int:
    """The row of the tile whose centre is nearest, of those that contain a pixel."""
    x, y = at
    # A place that is not known is NaN, and contains nothing.
    columns = [keys.column(name).cast(pa.float64()).to_numpy() for name in "xywh"]
    left, top, width, height = columns
    away = np.hypot(x - left - width / 2, y - top - height / 2)
    if np.isnan(away).all():
        raise SettingsError(
            f"{slide}: nothing tells where its tiles are. Name one, such as "
            f"{keys.column('tile')[0].as_py()}."
        )
    inside = (left <= x) & (x < left + width) & (top <= y) & (y < top + height)
    if inside.any():
        return int(np.argmin(np.where(inside, away, np.inf)))
    described = read_description(store.slide(slide))
    size = "" if described is None else f" of its {described.width} × {described.height} pixels"
    raise SettingsError(
        f"{slide}: no tile contains the level-0 pixel ({x}, {y}). Its tiles lie within x "
        f"{np.nanmin(left):.0f} to {np.nanmax(left + width):.0f} and y {np.nanmin(top):.0f} to "
        f"{np.nanmax(top + height):.0f}{size}; the nearest to that pixel is "
        f"{keys.column('tile')[int(np.nanargmin(away))].as_py()}."
    )


def _because(file: FeatureFile, row: int) -> str:
    table = read_table(file.path)
    told = table.column("unreadable")[row].as_py() if "unreadable" in table.column_names else None
    return f" ({told})" if told else ""
