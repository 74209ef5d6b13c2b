"""Pictures of many tiles."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from making import damage_tiles, described, gradient_pixels, write_tiff
from PIL import Image

from histoencoder_core import montage as module
from histoencoder_core.montage import FRAME, GAP, STRIP, montage
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import Slide
from histoencoder_core.store import Store
from histoencoder_core.store.tables import place_of
from histoencoder_core.tiles import cut_tiles, tile_source

SIDE = 32
GREY = module._MISSING


def cut(store: Store, path: Path, *, width: int = 128) -> list[tuple[str, str]]:
    """Lay tiles over all of a slide, and give them."""
    folder = described(store, path)
    settings = TilingSettings.histoprep(width=width, overlap=0, threshold=255, in_bounds=True)
    cut_tiles(folder, settings)
    source = tile_source(store, path.stem)
    assert source is not None
    return [(path.stem, name) for name in source.keys.column("tile").to_pylist()]


def box(picture: np.ndarray, number: int, *, columns: int, captions: bool = False) -> np.ndarray:
    """A place of the montage."""
    cell = SIDE + GAP + STRIP * captions
    top, left = GAP + number // columns * cell, GAP + number % columns * (SIDE + GAP)
    return picture[top : top + SIDE, left : left + SIDE]


@pytest.fixture
def slides(store: Store, tmp_path: Path) -> dict[str, np.ndarray]:
    """The pixels of two slides that have been cut."""
    pixels = {"a": gradient_pixels(640, 256), "b": gradient_pixels(256, 256)[:, ::-1]}
    for name, content in pixels.items():
        write_tiff(tmp_path / f"{name}.tiff", np.ascontiguousarray(content))
    return pixels


def expected(pixels: np.ndarray, tile: str) -> np.ndarray:
    place = place_of(tile)
    assert place is not None
    x, y, w, h = place
    return cv2.resize(pixels[y : y + h, x : x + w], (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def test_tiles_stand_in_the_order_asked_for(
    store: Store, tmp_path: Path, slides: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = [t for name in slides for t in cut(store, tmp_path / f"{name}.tiff")]
    assert len(tiles) == 14
    shuffled = [tiles[i] for i in np.random.default_rng(0).permutation(len(tiles))]
    opened = []
    init = Slide.__init__
    monkeypatch.setattr(Slide, "__init__", lambda s, p: opened.append(p) or init(s, p))
    asked = [*shuffled[:3], None, *shuffled[3:], shuffled[0]]
    picture = montage(store, asked, columns=4, side=SIDE)
    assert sorted(path.name for path in opened) == ["a.tiff", "b.tiff"]
    for i, tile in enumerate(asked):
        shown = box(picture, i, columns=4)
        if tile is None:
            assert (shown == 255).all()
        else:
            assert np.array_equal(shown, expected(slides[tile[0]], tile[1])), tile
    # Four rows of four, and below them the scale: 64 µm are 32 px, so 20 µm are 10.
    grid = 4 * (SIDE + GAP) + GAP
    assert picture.shape == (grid + STRIP + GAP, grid, 3)
    line = picture[grid + STRIP // 2, :, 0]
    assert np.flatnonzero(line[: GAP + 12] < 255).tolist() == list(range(GAP, GAP + 10))


def test_what_can_not_be_read_is_a_grey_box(
    store: Store, tmp_path: Path, slides: dict[str, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    tiles = cut(store, tmp_path / "a.tiff")
    gone = cut(store, tmp_path / "b.tiff")[0]
    (tmp_path / "b.tiff").unlink()
    damage_tiles(tmp_path / "a.tiff", [1])
    asked = [*tiles, gone, ("a", "x7_y7_w1_h1"), ("nobody", "x0_y0_w1_h1"), ("../a", "x")]
    with caplog.at_level(logging.WARNING):
        picture = montage(store, asked, columns=4, side=SIDE)
    bad = [i for i in range(len(asked)) if (box(picture, i, columns=4)[SIDE // 2, 2] == GREY).all()]
    assert bad == [tiles.index(("a", "x128_y0_w128_h128")), 10, 11, 12, 13]
    for i in set(range(10)) - set(bad):
        assert np.array_equal(box(picture, i, columns=4), expected(slides["a"], tiles[i][1]))
    told = caplog.text
    assert "a: 2 of its tiles can't be shown: there is no tile x7_y7_w1_h1" in told
    assert "b.tiff: is not there" in told
    assert "nobody: has no tiles" in told


def test_images_keep_their_proportions_and_have_captions_and_frames(store: Store) -> None:
    folder = store.root / "images"
    folder.mkdir(parents=True)
    for name, (width, height) in {"wide": (80, 20), "small": (8, 8)}.items():
        Image.fromarray(np.full((height, width, 3), 60, np.uint8)).save(folder / f"{name}.png")
    asked = [("images", "wide"), ("images", "small")]
    picture = montage(
        store,
        asked,
        columns=3,
        side=SIDE,
        captions=["µm", "a text that is far too long"],
        frames=[(213, 94, 0), None],
    )
    # No scale bar: nothing tells the size of these tiles.
    assert picture.shape == (SIDE + STRIP + 2 * GAP, 3 * (SIDE + GAP) + GAP, 3)
    wide, small, nothing = (box(picture, i, columns=3, captions=True) for i in range(3))
    assert (wide[:FRAME] == (213, 94, 0)).all()
    inner = wide[FRAME:-FRAME, FRAME:-FRAME, 0]
    assert [len(np.unique(row)) for row in inner] == [1] * len(inner)
    assert (inner[:, 0] == 60).sum() == 8
    assert (small == 60).all()
    assert (nothing == 255).all()
    below = picture[GAP + SIDE :]
    for column, most in ((0, 25), (1, SIDE)):
        left = GAP + column * (SIDE + GAP)
        ink = np.flatnonzero((below[:, left : left + SIDE + GAP] < 200).any(axis=(0, 2)))
        assert 8 < len(ink) <= most
        assert ink.max() < SIDE
    assert (below[:, GAP + 2 * (SIDE + GAP) :] == 255).all()


def test_no_tiles_are_an_empty_picture(store: Store) -> None:
    assert (montage(store, [], columns=2, side=SIDE) == 255).all()
