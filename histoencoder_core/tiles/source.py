"""Where the pixels of a slide's tiles come from.

Three kinds of folders are valid: cut by this program (read from ``tiles/`` if images were asked
for, else straight from the slide), cut by HistoPrep, or any folder of tile images. Only files with
a stamp of ours are ever written; all others are inputs.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from histoencoder_core.decoding.images import IMAGE_FORMATS, image_size
from histoencoder_core.errors import SlideError, StoreError
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.slides import read_description, unchanged
from histoencoder_core.store import SlideFolder, Stamp, Store, layout
from histoencoder_core.store.tables import Place, key_table, place_of, read_keys, read_table
from histoencoder_core.tiles.pixels import TilePixels, open_image_tiles, open_slide_tiles

TILES_CSV_COLUMNS = ("path", "slide", "x", "y", "label")
_OUR_PICTURES = ("thumbnail",)


@dataclass(frozen=True)
class TileSource:
    """The tiles of one slide, in order, with a way to read them.

    Attributes:
        keys: Table of ``tile, x, y, w, h``.
        upstream: Fingerprint of the tiles: of ``metadata.parquet``, or of the keys and
            the images' content.
        open: Opens the pixels.
    """

    keys: pa.Table
    upstream: Callable[[], str]
    open: Callable[[], contextlib.AbstractContextManager[TilePixels]]


@dataclass(frozen=True)
class TileRow:
    """A row of ``tiles.csv``.

    Attributes:
        path: The image, which need not be there.
        tile: The tile's name.
        x: Left edge in level-0 pixels, if told.
        y: Upper edge in level-0 pixels, if told.
        label: The tile's label, if told.
        line: The row's line in the file.
        mistake: What is wrong with the row, so that only its own slide fails.
    """

    path: Path
    tile: str
    x: int | None
    y: int | None
    label: str | None
    line: int
    mistake: str | None = None


@dataclass(frozen=True)
class _Listing:
    """What ``tiles.csv`` says: rows by slide, and all their images, in folders resolved."""

    rows: dict[str, list[TileRow]]
    images: frozenset[Path]


def slide_ids_with_tiles(store: Store, *, but: Collection[str] = ()) -> list[str]:
    """Ids of all slides that have tiles, whatever made them, without opening any table.

    Args:
        store: The store.
        but: Ids of slides to pass over.

    Returns:
        The ids, sorted. `tile_source` raises for those whose tiles can't be used.

    Raises:
        StoreError: ``tiles.csv`` can't be read.
    """
    listing = _listing(store)
    ids = {*store.slide_ids(), *listing.rows, _root_id(store)}
    return [slide_id for slide_id in sorted(ids.difference(but)) if _has(store, slide_id, listing)]


def tile_source(store: Store, slide_id: str) -> TileSource | None:
    """The tiles of one slide; None if there are none yet.

    Raises:
        StoreError: ``tiles.csv`` or a foreign table can't be read, or this slide's rows of
            ``tiles.csv`` hold a mistake or name an image that is not there.
    """
    return _source(store, slide_id, _listing(store))


def _has(store: Store, slide_id: str, listing: _Listing) -> bool:
    """Whether `_source` finds tiles, or what should be tiles but can't be used."""
    if slide_id in listing.rows:
        return True
    try:
        if _unlisted_images(store, slide_id, listing):
            return True
    except StoreError:
        return True
    return store.slide(slide_id).stamp("tiles") is not None


def _source(store: Store, slide_id: str, listing: _Listing) -> TileSource | None:
    folder = store.slide(slide_id)
    stamp = folder.stamp("tiles")
    if stamp is not None:
        return _own_tiles(folder, stamp)
    if slide_id in listing.rows:
        return _listed_images(store, listing.rows[slide_id])
    images = _unlisted_images(store, slide_id, listing)
    return _foreign_images(folder, images) if images else None


def _unlisted_images(store: Store, slide_id: str, listing: _Listing) -> list[Path]:
    """The images in a slide's folder that ``tiles.csv`` does not give to a slide already."""
    folder = store.slide(slide_id)
    folders = [folder.file(layout.TILES), folder.path]
    if slide_id == _root_id(store):
        folders.append(store.root)
    for path in folders:
        images = _images_in(path)
        if images and listing.images:
            place = path.resolve()
            images = [image for image in images if place / image.name not in listing.images]
        if images:
            return images
    return []


def read_tiles_csv(store: Store) -> dict[str, list[TileRow]]:
    """Read the optional ``tiles.csv``: ``path, slide, x, y, label``; only ``path`` is required.

    Returns:
        Rows by slide. Without a column ``slide``, the folder an image lies in is the slide, or the
        one above where that is called ``tiles``, as HistoPrep does. The images need not be there.

    Raises:
        StoreError: The table can't be read, or a row names no slide that can be.
    """
    return dict(_listing(store).rows)


def _listing(store: Store) -> _Listing:
    try:
        stat = store.tiles_csv.stat()
    except FileNotFoundError:
        return _Listing({}, frozenset())
    except OSError as error:
        raise StoreError(f"{store.tiles_csv}: can't be read ({error}).") from error
    return _read_listing(store.root, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


# Slides are opened one by one, and each needs the whole table.
@functools.lru_cache(maxsize=2)
def _read_listing(root: Path, _version: tuple[int, int, int]) -> _Listing:
    store = Store(root)
    rows: dict[str, dict[Path, TileRow]] = {}
    try:
        with store.tiles_csv.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if "path" not in (reader.fieldnames or []):
                raise StoreError(
                    f"{store.tiles_csv}: needs a column 'path'; it may have "
                    f"{', '.join(TILES_CSV_COLUMNS)}."
                )
            for line in reader:
                slide_id, row = _tile_row(store, line, reader.line_num)
                listed = rows.setdefault(slide_id, {})
                if row.path in listed:
                    row = replace(row, mistake=f"{row.path} is named twice for {slide_id}.")
                listed[row.path] = row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{store.tiles_csv}: can't be read ({error}).") from error
    resolved = functools.cache(Path.resolve)  # thousands of images share a folder
    images = (path for listed in rows.values() for path in listed)
    return _Listing(
        {slide_id: _named(store, listed) for slide_id, listed in rows.items()},
        frozenset(resolved(path.parent) / path.name for path in images),
    )


def _tile_row(store: Store, line: dict[str, str], number: int) -> tuple[str, TileRow]:
    path = store.root / (line["path"] or "").strip()
    slide_id = (line.get("slide") or "").strip() or _slide_of(store, path)
    if not layout.is_slide_id(slide_id):
        raise StoreError(
            f"{store.tiles_csv}, line {number}: {slide_id!r} can't be a slide's id; use letters, "
            "digits, '.', '_' and '-', beginning with a letter or digit, at most 200."
        )
    x = y = mistake = None
    try:
        x, y = (int(text) if (text := (line.get(k) or "").strip()) else None for k in "xy")
    except ValueError as error:
        mistake = f"x and y must be whole level-0 pixels ({error})."
    label = (line.get("label") or "").strip() or None
    return slide_id, TileRow(path, path.stem, x, y, label, number, mistake)


def _slide_of(store: Store, path: Path) -> str:
    """The slide that an image belongs to by the folder it lies in."""
    folder = Path(os.path.normpath(path)).parent
    if folder == store.root:
        return _root_id(store)
    # A folder ``tiles`` of the store itself is found as a slide of that name.
    if folder.name == layout.TILES and folder.parent != store.root:
        folder = folder.parent
    return folder.name


def _named(store: Store, rows: dict[Path, TileRow]) -> list[TileRow]:
    """The rows, sorted by path, with a name for each that no other has."""
    paths = sorted(rows)
    names = _unique_names(paths, store.root)
    return [replace(rows[path], tile=name) for path, name in zip(paths, names, strict=True)]


def _own_tiles(folder: SlideFolder, stamp: Stamp) -> TileSource:
    table = read_table(folder.record("tiles"), ["tile", "x", "y", "w", "h", "level"])
    keys = table.drop_columns(["level"])
    images = folder.file(layout.TILES)
    if images.is_dir():
        paths = [images / f"{name}.jpeg" for name in keys.column("tile").to_pylist()]
        # JPEG compression changes pixels, so features of images are not those of the slide.
        upstream = f"{stamp.fingerprint}:images"
        return _image_source(keys, paths, upstream)

    def pixels() -> str:
        # Of the tiles, only this bears on their pixels: other metrics need no new features.
        places = table.select(["tile", "x", "y", "w", "h", "level"]).to_pydict()
        return fingerprint({"slide": stamp.made_from["slide"], **places})

    return TileSource(keys, pixels, lambda: _open_slide_tiles(folder, table))


@contextlib.contextmanager
def _open_slide_tiles(folder: SlideFolder, table: pa.Table) -> Iterator[TilePixels]:
    description = read_description(folder)
    if description is None:
        raise StoreError(
            f"{folder.path}: says nothing of where its slide is; run the slides stage."
        )
    places = list(zip(*(table.column(name).to_pylist() for name in "xywh"), strict=True))
    levels = table.column("level").to_pylist()
    with unchanged(description) as path, open_slide_tiles(path, places, levels) as pixels:
        yield pixels


def _listed_images(store: Store, rows: list[TileRow]) -> TileSource:
    paths = [row.path for row in rows]
    keys = key_table([row.tile for row in rows], [_listed_place(store, row) for row in rows])
    return _image_source(keys, paths)


def _listed_place(store: Store, row: TileRow) -> Place | None:
    where = f"{store.tiles_csv}, line {row.line}"
    if row.mistake is not None:
        raise StoreError(f"{where}: {row.mistake}")
    if not row.path.is_file():
        raise StoreError(f"{where}: {row.path} is not there. Paths are relative to {store.root}.")
    if row.x is None or row.y is None:
        return place_of(row.path.stem)
    try:
        return row.x, row.y, *image_size(row.path)
    except SlideError as error:
        raise StoreError(f"{where}: {error}") from error


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
    keys = key_table(names, places)
    return _image_source(keys, paths)


def _image_source(keys: pa.Table, paths: list[Path], upstream: str | None = None) -> TileSource:
    return TileSource(
        keys,
        lambda: upstream or _images_fingerprint(keys, paths),
        lambda: open_image_tiles(paths),
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
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_FORMATS
            and not path.name.startswith((".", *_OUR_PICTURES))
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"{folder}: can't be listed ({error}).") from error


def _images_fingerprint(keys: pa.Table, paths: list[Path]) -> str:
    digest = hashlib.sha256(json.dumps(keys.to_pydict()).encode())
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name}:{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _root_id(store: Store) -> str:
    """The slide's id where the input folder itself holds the images."""
    name = store.root.name
    return name if layout.is_slide_id(name) else "slide"
