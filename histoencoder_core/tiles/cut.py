"""Cutting a slide into tiles: ``metadata.parquet``, its pictures, and tile images if asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from histoencoder_core.decoding.images import pad_white
from histoencoder_core.errors import SlideError
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import (
    Description,
    Slide,
    open_slide,
    read_description,
    unchanged,
)
from histoencoder_core.slides.describe import THUMBNAIL_DIMENSION
from histoencoder_core.store import SlideFolder, Stamp, layout
from histoencoder_core.store.folder import StageWriter
from histoencoder_core.store.tables import Place, key_table, tile_name
from histoencoder_core.tiles.grid import Grid, lay_grid, plan_grid
from histoencoder_core.tiles.quality import METRICS, ink_and_blank, metrics_table, tile_metrics
from histoencoder_core.tiles.tissue import Tissue, find_tissue

ALGORITHM = 2

_RED, _BLUE, _YELLOW = (214, 39, 40), (31, 119, 180), (255, 215, 0)


def tiles_stamp(slide: Description, settings: TilingSettings) -> Stamp:
    """The stamp that the slide's tiles carry if they are cut as asked."""
    made_from = {
        "slide": slide.content,
        "mpp": [slide.mpp_x, slide.mpp_y],
        "tiling": settings.model_dump(mode="json", exclude_defaults=True),
    }
    return Stamp.of("tiles", algorithm=ALGORITHM, made_from=made_from)


def cut_tiles(
    folder: SlideFolder,
    settings: TilingSettings,
    *,
    save_images: bool = False,
    overwrite: bool = False,
    num_workers: int = 2,
) -> Stamp:
    """Find a slide's tissue and its tiles, unless that is done already.

    A slide without tissue is a result with zero rows and a reason in the stamp.

    Args:
        folder: A slide's folder with its description.
        settings: What tiles are asked for.
        save_images: Also write each tile as a JPEG into ``tiles/``.
        overwrite: Do it again even where it is done.
        num_workers: Threads that read and write tile images.

    Returns:
        The stamp of ``metadata.parquet``.

    Raises:
        SlideError: The slide can't be read or the request can't be met. The failure is recorded.
        StoreError: Another program's files stand in the way.
    """
    with folder.locked():
        slide = read_description(folder)
        if slide is None:
            raise SlideError(
                f"{folder.path}: holds no description of a slide by this program; run "
                "`histoencoder tile` on the slide first.",
                kind="missing",
            )
        stamp = tiles_stamp(slide, settings)
        if not overwrite and folder.fetch("tiles", stamp.fingerprint):
            done = folder.stamp("tiles") or stamp
            images_due = save_images and not folder.file(layout.TILES).is_dir()
            if not images_due or done.result.get("tiles") == 0:
                folder.clear_failure("tiles")
                return done
        try:
            return _cut(folder, slide, settings, stamp, save_images, num_workers)
        except Exception as error:
            folder.record_failure("tiles", error, inputs=stamp.fingerprint)
            raise


def _cut(
    folder: SlideFolder,
    slide: Description,
    settings: TilingSettings,
    stamp: Stamp,
    save_images: bool,  # noqa: FBT001 - private
    num_workers: int,
) -> Stamp:
    started = time.perf_counter()
    grid = plan_grid(slide, settings)
    # The file is looked at once more before the tiles are put in place.
    with folder.writing("tiles") as writer, unchanged(slide) as path, open_slide(path) as opened:
        overview = opened.overview(settings.max_dimension)
        tissue = find_tissue(overview, settings, path=path)
        places, background = lay_grid(
            slide,
            grid,
            tissue.mask,
            max_background=settings.max_background,
            in_bounds=settings.in_bounds,
        )
        shares = ink_and_blank(places, tissue, (slide.width, slide.height))
        table = _table(grid, places, {"background": background, **shares})
        dropped: dict[str, int] = {}
        for name, most in (("ink", settings.max_ink), ("blank", settings.max_blank)):
            table = _drop(table, name, most, dropped)
        pixels: Iterable[np.ndarray] = _crops(overview, _places(table), slide)
        if settings.metrics == "tile":
            pixels = (_image(opened, grid, place) for place in _places(table).tolist())
        measured = metrics_table(_measure(tile, tissue, settings) for tile in pixels)
        for name in METRICS:
            table = table.append_column(name, measured.column(name))
        table = _drop(table, "blur", settings.max_blur, dropped)
        places, ink = _places(table), tissue.ink
        seconds = time.perf_counter() - started
        stamp = stamp.with_result(
            tiles=len(places),
            reason=_why_empty(tissue, len(places), dropped),
            threshold=tissue.threshold,
            tissue_share=round(float(tissue.mask.mean()), 4),
            ink_share=None if ink is None else round(float(ink.mask.mean()), 4),
            coloured_ink=None if ink is None else ink.coloured,
            **{f"dropped_{name}": count for name, count in dropped.items()},
            level=grid.level,
            mpp=grid.mpp and grid.mpp[0],
            metrics_mpp=_metrics_mpp(slide, grid, overview, settings),
            tile_images=save_images,
            settings=settings.model_dump(mode="json"),
            seconds=round(seconds, 3),
        )
        _draw(writer, overview, tissue, places, slide, stamp)
        if save_images:
            _save_images(writer, opened, grid, places, stamp, num_workers)
        writer.table(table, stamp)
    return stamp.just_made()


def _table(grid: Grid, places: np.ndarray, shares: dict[str, np.ndarray]) -> pa.Table:
    listed: list[Place] = [tuple(place) for place in places.tolist()]
    table = key_table([tile_name(*place) for place in listed], listed)
    count = len(listed)
    mpp = [None, None] if grid.mpp is None else list(grid.mpp)
    table = table.append_column("level", pa.array([grid.level] * count, pa.int32()))
    table = table.append_column("mpp_x", pa.array([mpp[0]] * count, pa.float64()))
    table = table.append_column("mpp_y", pa.array([mpp[1]] * count, pa.float64()))
    for name, share in shares.items():
        table = table.append_column(name, pa.array(share, from_pandas=True))
    return table


def _places(table: pa.Table) -> np.ndarray:
    return np.column_stack([table.column(name).to_numpy() for name in "xywh"])


def _drop(table: pa.Table, name: str, most: float | None, dropped: dict[str, int]) -> pa.Table:
    """The tiles that hold no more of something than asked for; how many do is noted."""
    if most is None:
        return table
    column = table.column(name)
    little = pc.less_equal(column, pa.scalar(most, pa.float32()))
    kept = table.filter(pc.or_kleene(little, column.is_null()))  # null is not too much
    dropped[name] = table.num_rows - kept.num_rows
    return kept


def _image(slide: Slide, grid: Grid, place: list[int]) -> np.ndarray:
    """A tile at the resolution asked for."""
    pixels = slide.read(tuple(place), level=grid.level)  # type: ignore[arg-type]
    if pixels.shape[1::-1] != grid.image_size:
        pixels = cv2.resize(pixels, grid.image_size, interpolation=cv2.INTER_AREA)
    return pixels


def _metrics_mpp(
    slide: Description, grid: Grid, overview: np.ndarray, settings: TilingSettings
) -> float | None:
    """The resolution in µm/px at which tiles were measured, if the slide's is known."""
    if slide.mpp_x is None or grid.mpp is None:
        return None
    if settings.metrics == "tile":
        return grid.mpp[0]
    return float(slide.mpp_x * slide.width / overview.shape[1])


def _crops(overview: np.ndarray, places: np.ndarray, slide: Description) -> Iterator[np.ndarray]:
    """Each tile's part of the overview; what lies outside of the slide is white."""
    down_x, down_y = slide.width / overview.shape[1], slide.height / overview.shape[0]
    for x, y, w, h in places.tolist():
        left, top = round(x / down_x), round(y / down_y)
        width, height = max(1, round(w / down_x)), max(1, round(h / down_y))
        yield pad_white(overview[top : top + height, left : left + width], (height, width))


def _measure(tile: np.ndarray, tissue: Tissue, settings: TilingSettings) -> dict[str, float]:
    grey = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)
    if settings.background == "dark":
        grey = 255 - grey
    return tile_metrics(tile, (grey <= (tissue.threshold or 0)).astype(np.uint8))


def _why_empty(tissue: Tissue, tiles: int, dropped: dict[str, int]) -> str | None:
    if tiles:
        return None
    if any(dropped.values()):
        told = ", ".join(f"{count} for {name}" for name, count in dropped.items() if count)
        return f"all tiles with enough tissue were dropped: {told}"
    if not tissue.mask.any():
        return "no tissue was found"
    share = 100 * float(tissue.mask.mean())
    return f"{share:.1f} % of the slide is tissue, but no tile holds enough of it"


def _draw(
    writer: StageWriter,
    overview: np.ndarray,
    tissue: Tissue,
    places: np.ndarray,
    slide: Description,
    stamp: Stamp,
) -> None:
    scale = min(1.0, THUMBNAIL_DIMENSION / max(overview.shape[:2]))
    size = (max(1, round(overview.shape[1] * scale)), max(1, round(overview.shape[0] * scale)))
    mask = cv2.resize(255 - 255 * tissue.mask, size, interpolation=cv2.INTER_AREA)
    writer.image(layout.THUMBNAIL_TISSUE, mask, stamp)
    canvas = cv2.resize(overview, size, interpolation=cv2.INTER_AREA)
    if tissue.ink is not None:
        canvas[cv2.resize(tissue.ink.mask, size, interpolation=cv2.INTER_NEAREST) == 1] = _YELLOW
    per_x, per_y = size[0] / slide.width, size[1] / slide.height
    # The first tile is drawn last and in another colour: it shows a tile's size among overlaps.
    for i in range(len(places) - 1, -1, -1):
        x, y, w, h = places[i]
        start = (round(x * per_x), round(y * per_y))
        end = (round((x + w) * per_x) - 1, round((y + h) * per_y) - 1)
        cv2.rectangle(canvas, start, end, _RED if i else _BLUE, 1 if i else 2)
    writer.image(layout.THUMBNAIL_TILES, canvas, stamp)


def _save_images(
    writer: StageWriter,
    slide: Slide,
    grid: Grid,
    places: np.ndarray,
    stamp: Stamp,
    num_workers: int,
) -> None:
    def save(place: list[int]) -> None:
        x, y, w, h = place
        pixels = _image(slide, grid, place)
        writer.image(f"{layout.TILES}/{tile_name(x, y, w, h)}.jpeg", pixels, stamp)

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for _ in pool.map(save, places.tolist()):
            pass
