"""Where the pixels of a slide's tiles come from.

Three kinds of folders are valid: cut by this program (read from ``tiles/`` if images were asked
for, else straight from the slide), cut by HistoPrep, or any folder of tile images. Only files with
a stamp of ours are ever written; all others are inputs.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from histoencoder_core.errors import StoreError
from histoencoder_core.slides import open_slide, read_description
from histoencoder_core.slides.images import read_image
from histoencoder_core.store import SlideFolder, Store, layout
from histoencoder_core.store.tables import key_table, place_of, read_keys, read_table

ReadTile = Callable[[int], np.ndarray]

TILES_CSV_COLUMNS = ("path", "slide", "x", "y", "label")
_OUR_PICTURES = ("thumbnail",)


@dataclass(frozen=True)
class TileSource:
    """The tiles of one slide, in order, with a way to read them.

    Attributes:
        keys: Table of ``tile, x, y, w, h``.
        upstream: Fingerprint of the tiles: of ``metadata.parquet``, or of the images' content.
        open: Opens the source; gives a function from a row to uint8 pixels (height, width, 3).
    """

    keys: pa.Table
    upstream: Callable[[], str]
    open: Callable[[], contextlib.AbstractContextManager[ReadTile]]


@dataclass(frozen=True)
class TileRow:
    """A row of ``tiles.csv``."""

    path: Path
    tile: str
    x: int | None
    y: int | None
    label: str | None


def find_sources(store: Store, *, but: Collection[str] = ()) -> dict[str, TileSource]:
    """All slides of a store that have tiles, whatever made them.

    Args:
        store: The store.
        but: Ids of slides to pass over; opening thousands takes its time.

    Returns:
        The tiles by slide.

    Raises:
        StoreError: ``tiles.csv`` or a foreign table can't be read.
    """
    listed = read_tiles_csv(store)
    ids = {*store.slide_ids(), *listed}
    if _images_in(store.root):
        ids.add(_root_id(store))
    wanted = sorted(ids.difference(but))
    sources = {slide_id: _source(store, slide_id, listed) for slide_id in wanted}
    return {slide_id: source for slide_id, source in sources.items() if source is not None}


def tile_source(store: Store, slide_id: str) -> TileSource | None:
    """The tiles of one slide; None if there are none yet.

    Raises:
        StoreError: ``tiles.csv`` or a foreign table can't be read.
    """
    return _source(store, slide_id, read_tiles_csv(store))


def _source(store: Store, slide_id: str, listed: dict[str, list[TileRow]]) -> TileSource | None:
    folder = store.slide(slide_id)
    stamp = folder.stamp("tiles")
    if stamp is not None:
        return _own_tiles(folder, stamp.fingerprint)
    if slide_id in listed:
        return _listed_images(listed[slide_id])
    images = _images_in(folder.file(layout.TILES)) or _images_in(folder.path)
    if not images and store.root.name and slide_id == _root_id(store):
        images = _images_in(store.root)
    return _foreign_images(folder, images) if images else None


def read_tiles_csv(store: Store) -> dict[str, list[TileRow]]:
    """Read the optional ``tiles.csv``: ``path, slide, x, y, label``; only ``path`` is required.

    Returns:
        Rows by slide. Without a column ``slide``, the folder an image lies in is the slide.

    Raises:
        StoreError: The table can't be read, or names an image that is not there.
    """
    if not store.tiles_csv.is_file():
        return {}
    try:
        with store.tiles_csv.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if "path" not in (reader.fieldnames or []):
                raise StoreError(
                    f"{store.tiles_csv}: needs a column 'path'; it may have "
                    f"{', '.join(TILES_CSV_COLUMNS)}."
                )
            rows: dict[str, dict[Path, TileRow]] = {}
            for line in reader:
                where = f"{store.tiles_csv}, line {reader.line_num}"
                slide_id, row = _tile_row(store, line, where)
                listed = rows.setdefault(slide_id, {})
                if row.path in listed:
                    raise StoreError(f"{where}: {row.path} is named twice for {slide_id}.")
                listed[row.path] = row
            return {slide_id: _named(store, listed) for slide_id, listed in rows.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{store.tiles_csv}: can't be read ({error}).") from error


def _tile_row(store: Store, line: dict[str, str], where: str) -> tuple[str, TileRow]:
    path = store.root / (line["path"] or "").strip()
    if not path.is_file():
        raise StoreError(f"{where}: {path} is not there. Paths are relative to {store.root}.")
    slide_id = (line.get("slide") or path.parent.name).strip()
    store.slide(slide_id)  # refuses an id that can't be a folder
    try:
        x, y = (int(text) if (text := (line.get(k) or "").strip()) else None for k in "xy")
    except ValueError as error:
        raise StoreError(f"{where}: x and y must be whole level-0 pixels ({error}).") from error
    label = (line.get("label") or "").strip() or None
    return slide_id, TileRow(path, path.stem, x, y, label)


def _named(store: Store, rows: dict[Path, TileRow]) -> list[TileRow]:
    """The rows, sorted by path, with a name for each that no other has."""
    paths = sorted(rows)
    names = _unique_names(paths, store.root)
    return [replace(rows[path], tile=name) for path, name in zip(paths, names, strict=True)]


def _own_tiles(folder: SlideFolder, fingerprint: str) -> TileSource:
    table = read_table(folder.record("tiles"))
    keys = table.select(["tile", "x", "y", "w", "h"])
    images = folder.file(layout.TILES)
    if images.is_dir():
        paths = [images / f"{name}.jpeg" for name in keys.column("tile").to_pylist()]
        # JPEG compression changes pixels, so features of images are not those of the slide.
        return TileSource(keys, lambda: f"{fingerprint}:images", lambda: _open_images(paths))
    return TileSource(keys, lambda: fingerprint, lambda: _open_slide_tiles(folder, table))


@contextlib.contextmanager
def _open_slide_tiles(folder: SlideFolder, table: pa.Table) -> Iterator[ReadTile]:
    description = read_description(folder)
    if description is None:
        raise StoreError(
            f"{folder.path}: says nothing of where its slide is; run the slides stage."
        )
    places = list(zip(*(table.column(name).to_pylist() for name in "xywh"), strict=True))
    levels = table.column("level").to_pylist()
    with open_slide(Path(description.path)) as slide:
        yield lambda i: slide.read(places[i], level=levels[i])


@contextlib.contextmanager
def _open_images(paths: list[Path]) -> Iterator[ReadTile]:
    yield lambda i: read_image(paths[i])


def _listed_images(rows: list[TileRow]) -> TileSource:
    paths = [row.path for row in rows]
    places = []
    for row in rows:
        height, width = read_image(row.path).shape[:2] if row.x is not None else (0, 0)
        known = row.x is not None and row.y is not None
        places.append((row.x, row.y, width, height) if known else place_of(row.path.stem))
    return TileSource(
        key_table([row.tile for row in rows], places),  # type: ignore[arg-type]
        lambda: _images_fingerprint(paths),
        lambda: _open_images(paths),
    )


def _foreign_images(folder: SlideFolder, paths: list[Path]) -> TileSource:
    names = _unique_names(paths, folder.path)
    places = [place_of(path.stem) for path in paths]
    metadata = folder.record("tiles")
    if metadata.exists():
        told = read_keys(metadata)
        columns = [told.column(name).to_pylist() for name in ("tile", "x", "y", "w", "h")]
        by_name = {
            name: place if None not in place else None
            for name, *place in zip(*columns, strict=True)
        }
        places = [by_name.get(n) or p for n, p in zip(names, places, strict=True)]  # type: ignore[misc]
    return TileSource(
        key_table(names, places),
        lambda: _images_fingerprint(paths),
        lambda: _open_images(paths),
    )


def _unique_names(paths: list[Path], root: Path) -> list[str]:
    """A tile's key is its file's stem; its name or path from a folder where two share that."""
    stems = [path.stem for path in paths]
    names = [path.name for path in paths]
    for keys in (stems, names):
        if len(set(keys)) == len(keys):
            return keys
    return [Path(os.path.relpath(path, root)).as_posix() for path in paths]


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in layout.IMAGE_FORMATS
        and not path.name.startswith((".", *_OUR_PICTURES))
    )


def _images_fingerprint(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name}:{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _root_id(store: Store) -> str:
    """The slide's id where the input folder itself holds the images."""
    name = store.root.resolve().name
    return name if layout.is_slide_id(name) else "slide"
