"""Ink is no tissue, tissue is no ink, and tiles tell how much of what they hold."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from making import GLASS, described, tissue_pixels, write_tiff
from PIL import Image

from histoencoder_core.demo.synthetic import make_synthetic_cohort
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import open_slide
from histoencoder_core.store import SlideFolder, Store, layout
from histoencoder_core.tiles import cut_tiles
from histoencoder_core.tiles.ink import find_ink
from histoencoder_core.tiles.quality import blur
from histoencoder_core.tiles.tissue import Tissue, find_tissue

PENS = {"green": (1.6, 0.55, 0.65), "blue": (2.2, 1.4, 0.5), "black": (2.3, 2.5, 2.8)}
"""Absorbance of ink in red, green and blue."""


def read(path: Path) -> np.ndarray:
    if path.suffix in {".png", ".tif"}:
        return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    with open_slide(path) as slide:
        return slide.overview(8192)


def tissue_of(pixels: np.ndarray, method: str = "without-ink", **settings: object) -> Tissue:
    return find_tissue(pixels, TilingSettings(tissue=method, **settings), path=Path("a.svs"))


def inked(pixels: np.ndarray, pen: str, *, upper: int, lower: int) -> np.ndarray:
    """A stroke from left to right between two rows."""
    thick = np.zeros(pixels.shape[:2], np.float32)
    thick[upper:lower] = 1
    thick = cv2.GaussianBlur(thick, (0, 0), 2)[..., None]
    return (pixels * np.exp(-thick * np.array(PENS[pen], np.float32))).astype(np.uint8)


# Real slides -------------------------------------------------------------------------------------


def test_green_ink_around_tissue_is_left_out(data: Path) -> None:
    pixels = read(data / "ink" / "histoqc_pen_green.png")
    ink = read(data / "ink" / "histoqc_pen_green_mask.png")[..., 0] > 127
    otsu, found = (tissue_of(pixels, method).mask == 1 for method in ("otsu", "without-ink"))
    assert otsu[ink].mean() > 0.99
    assert found[ink].mean() < 0.01
    # The mask ends where ink can still be seen, and tells nothing of the blue dot.
    elsewhere = cv2.dilate(ink.astype(np.uint8), np.ones((21, 21))) == 0
    elsewhere[435:485, 165:215] = False
    assert found[otsu & elsewhere].mean() > 0.999


def test_black_ink_alone_is_no_tissue(data: Path) -> None:
    pixels = read(data / "ink" / "histoqc_pen_black.png")
    ink = read(data / "ink" / "histoqc_pen_black_mask.png")[..., 0] > 127
    assert tissue_of(pixels, "otsu").mask[ink].all()
    assert not tissue_of(pixels).mask.any()


def test_blue_ink_over_tissue_is_left_out(data: Path) -> None:
    pixels = read(data / "slides" / "histoprep_slide_with_ink.jpeg")
    on_glass, over_tissue = np.s_[885:915, 3700:3980], np.s_[800:880, 3800:3900]
    otsu, found = (tissue_of(pixels, method).mask for method in ("otsu", "without-ink"))
    assert min(otsu[on_glass].mean(), otsu[over_tissue].mean()) > 0.99
    assert max(found[on_glass].mean(), found[over_tissue].mean()) < 0.05
    # Without ink, Otsu's threshold is a little higher.
    assert found[:, :3600][otsu[:, :3600] == 1].mean() > 0.999
    assert found[:, :3600].mean() == pytest.approx(otsu[:, :3600].mean(), rel=0.02)


@pytest.mark.parametrize(
    "name", ["histoprep_slide.jpeg", "histoprep_tma_spots.jpeg", "rationai_CMU-1-small.tiff"]
)
def test_slides_without_ink_lose_nothing(data: Path, name: str) -> None:
    pixels = read(data / "slides" / name)
    assert np.array_equal(tissue_of(pixels).mask, tissue_of(pixels, "otsu").mask)


def test_no_class_of_tissue_is_ink(data: Path, tmp_path: Path) -> None:
    tiles = sorted((data / "tiles" / "kather2016_24").glob("*/*.tif"))
    assert len(tiles) == 24
    for path in (*tiles, *make_synthetic_cohort(tmp_path, slides=3)):  # the third has blue mucin
        assert not find_ink(read(path)).mask.any(), path


# Drawn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pen", PENS)
def test_a_stroke_across_tissue_and_glass(pen: str) -> None:
    clean = tissue_pixels(800, 600)
    pixels = inked(clean, pen, upper=280, lower=320)
    assert tissue_of(pixels, "otsu").mask[282:318].mean() > 0.99
    tissue = tissue_of(pixels)
    assert tissue.ink is not None
    assert tissue.ink.mask[282:318].mean() > 0.99
    assert tissue.mask[282:318].mean() < 0.01
    far = np.r_[0:265, 335:600]
    assert np.array_equal(tissue.mask[far], tissue_of(clean, "otsu").mask[far])


def test_black_ink_does_not_hide_pale_tissue() -> None:
    pixels = np.full((600, 800, 3), GLASS, np.uint8)
    pixels[150:450, 100:500] = (226, 196, 214)
    pixels[:, 600:700] = (22, 20, 18)
    assert not tissue_of(pixels, "otsu").mask[150:450, 100:500].any()
    mask = tissue_of(pixels).mask
    assert mask[150:450, 100:500].all()
    assert mask.sum() == pytest.approx(300 * 400, rel=0.02)


@pytest.mark.parametrize(
    "colour",
    [
        (70, 60, 130),  # haematoxylin, dense
        (150, 100, 60),  # DAB
        (90, 55, 45),  # DAB, dense
        (150, 20, 60),  # eosin, dense
        (200, 60, 80),  # blood
        (170, 185, 215),  # mucin
    ],
)
def test_stains_are_no_ink(colour: tuple[int, int, int]) -> None:
    pixels = tissue_pixels(800, 600)
    pixels[200:400, 300:500] = colour
    assert not find_ink(pixels).mask.any()


def test_without_eosin_only_black_is_ink() -> None:
    """A blue counterstain is as blue as a pen."""
    pixels = np.full((600, 800, 3), GLASS, np.uint8)
    pixels[100:300, 100:700] = (110, 130, 190)
    pixels[150:200, 200:400] = (130, 90, 60)
    pixels[400:440] = (22, 20, 18)
    ink = find_ink(pixels)
    assert not ink.coloured
    assert ink.mask[402:438].all()
    assert not ink.mask[:380].any()
    pixels[450:590, 100:700] = (215, 130, 175)
    assert find_ink(pixels).coloured


def test_a_dark_background_has_no_ink(store: Store, tmp_path: Path) -> None:
    shining = 255 - inked(tissue_pixels(1000, 700), "green", upper=300, lower=340)
    folder = described(store, write_tiff(tmp_path / "a.tiff", shining))
    stamp = cut_tiles(folder, TilingSettings(background="dark", tile_px=64))
    assert stamp.result["ink_share"] is None
    table = pq.read_table(folder.record("tiles"))
    assert table.num_rows == table.column("ink").null_count > 10
    assert table.column("blank").null_count == 0


def test_even_a_fixed_threshold_does_not_make_tissue_of_ink() -> None:
    pixels = inked(tissue_pixels(800, 600), "green", upper=280, lower=320)
    mask = tissue_of(pixels, threshold=255).mask
    assert mask[:260].all()
    assert not mask[285:315].any()


# Tiles -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> SlideFolder:
    """A described slide with a green stroke over its tissue, whose left half is out of focus."""
    pixels = tissue_pixels(1024, 768)
    nuclei = np.random.default_rng(1).random((768 // 4, 1024 // 4)) < 0.1
    nuclei = np.kron(nuclei, np.ones((4, 4), bool))
    nuclei[: 768 // 4] = nuclei[576:] = nuclei[:, :256] = nuclei[:, 768:] = False
    pixels[nuclei] = (90, 60, 130)
    pixels[:, :512] = cv2.GaussianBlur(pixels, (0, 0), 4)[:, :512]
    pixels = inked(pixels, "green", upper=368, lower=400)
    return described(store, write_tiff(tmp_path / "a.tiff", pixels))


def cut(
    folder: SlideFolder, **settings: object
) -> tuple[list[dict[str, object]], dict[str, object]]:
    asked = {"tile_px": 64, "overlap": 0.0, "metrics": "tile", "tissue": "otsu"}
    stamp = cut_tiles(folder, TilingSettings(**{**asked, **settings}))
    return pq.read_table(folder.record("tiles")).to_pylist(), stamp.result


def test_tiles_tell_what_they_hold(folder: SlideFolder) -> None:
    rows, told = cut(folder, max_background=0.9)
    assert told["metrics_mpp"] == 0.5
    by_place = {(row["x"], row["y"]): row for row in rows}
    # Ink is a quarter of a tile high with its soft rim, and reaches over tissue and glass.
    for x in (192, 320, 576):
        assert by_place[x, 384]["ink"] == pytest.approx(0.3, abs=0.06)
    assert by_place[320, 192]["ink"] == by_place[320, 192]["blank"] == 0
    assert by_place[320, 192]["blur"] > 0.5 > 0.45 > by_place[576, 192]["blur"]
    without, _ = cut(folder, max_background=0.9, tissue="without-ink")
    for row in without:
        assert row["background"] == pytest.approx(row["ink"] + row["blank"], abs=1e-6)


def test_filters_drop_tiles_and_say_how_many(folder: SlideFolder) -> None:
    rows, told = cut(folder, max_background=0.9)
    assert not {"dropped_ink", "dropped_blank", "dropped_blur"} & told.keys()
    inky = [row for row in rows if row["ink"] > 0.1]
    blank = [row for row in rows if row["ink"] <= 0.1 and row["blank"] > 0.4]
    blurred = [r for r in rows if r["ink"] <= 0.1 and r["blank"] <= 0.4 and r["blur"] > 0.5]
    assert min(len(inky), len(blurred)) > 5
    kept, told = cut(folder, max_background=0.9, max_ink=0.1, max_blank=0.4, max_blur=0.5)
    assert (told["dropped_ink"], told["dropped_blank"], told["dropped_blur"]) == (
        len(inky), len(blank), len(blurred)
    )  # fmt: skip
    assert kept == [row for row in rows if row not in inky + blank + blurred]
    assert told["tiles"] == len(kept) > 5


def test_a_slide_whose_tiles_are_all_dropped_says_why(folder: SlideFolder) -> None:
    rows, told = cut(folder, max_blur=0.0)
    assert not rows
    assert told["reason"] == (
        f"all tiles with enough tissue were dropped: {told['dropped_blur']} for blur"
    )


def test_the_picture_of_tiles_shows_ink_in_yellow(folder: SlideFolder) -> None:
    cut(folder, tissue="without-ink", max_background=0.0)
    with Image.open(folder.file(layout.THUMBNAIL_TILES)) as picture:
        shown = np.asarray(picture).astype(int)
    assert np.abs(shown[375:395] - (255, 215, 0)).mean() < 12
    assert np.abs(shown[100:150] - GLASS).mean() < 12


def test_what_can_not_be_measured_is_null_and_not_dropped(store: Store, tmp_path: Path) -> None:
    flat = described(store, write_tiff(tmp_path / "a.tiff", np.full((256, 256, 3), 200, np.uint8)))
    asked = {"tile_px": 64, "overlap": 0.0, "threshold": 255, "max_background": 1.0}
    stamp = cut_tiles(flat, TilingSettings(**asked, metrics="tile", max_blur=0.0))
    assert pq.read_table(flat.record("tiles")).column("blur").null_count == 16
    assert stamp.result["dropped_blur"] == 0


# Blur --------------------------------------------------------------------------------------------


def test_blur_grows_with_blur_whatever_the_tissue(data: Path) -> None:
    tiles = sorted((data / "tiles" / "kather2016_24").glob("0[1-7]*/*.tif"))
    assert len(tiles) == 21
    measured = []
    for path in tiles:
        grey = cv2.cvtColor(read(path), cv2.COLOR_RGB2GRAY)
        measured.append([blur(grey), *(blur(cv2.GaussianBlur(grey, (0, 0), s)) for s in (1, 2, 4))])
    found = np.array(measured)
    assert (np.diff(found, axis=1) > 0).all()
    # The sharpest of the blurred is more blurred than any that is in focus.
    assert found[:, 0].max() < 0.45 < 0.5 < found[:, 2].min()
    assert found.max() <= 1
