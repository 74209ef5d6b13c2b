"""Masks and outlines: how much of a tile's tissue a class covers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
from making import described, halved, tissue_pixels, write_tiff
from PIL import Image
from shapely.geometry import Polygon, box

from histoencoder_core.decoding.images import read_image
from histoencoder_core.errors import LabelError
from histoencoder_core.labels import Annotations, label_slide, why_due
from histoencoder_core.labels.coverage import POINTS, Tissue, read_tissue, shares
from histoencoder_core.labels.masks import CONVENTIONS, Mask, MaskValues, open_mask, read_rules
from histoencoder_core.settings import LabelSettings, TilingSettings
from histoencoder_core.slides.sheet import SheetRow
from histoencoder_core.store import SlideFolder, Store
from histoencoder_core.store.tables import read_table
from histoencoder_core.tiles import cut_tiles, tile_source

SLIDE = (1024, 768)
TILE, SCALE = 128, 4
assert TILE // SCALE == POINTS, "one point a pixel of a mask at this scale: shares are exact"
PLACES = np.array(
    [(x, y, TILE, TILE) for y in range(0, 768, TILE) for x in range(0, 1024, TILE)], np.int64
)
VALUES = MaskValues(labels={1: "stroma", 2: "gland", 5: "cancer"}, background=(9,), unlabelled=(0,))


def blobs(width: int, height: int, values: tuple[int, ...] = (0, 1, 2, 5, 9)) -> np.ndarray:
    """Discs of classes, some over others, on a ground of the first."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:height, :width]
    found = np.full((height, width), values[0], np.uint8)
    for _ in range(40):
        radius = rng.uniform(0.03, 0.15) * width
        inside = (x - rng.uniform(0, width)) ** 2 + (y - rng.uniform(0, height)) ** 2 < radius**2
        found[inside] = rng.choice(values)
    return found


def counted(pixels: np.ndarray, scale: int = SCALE, *, but: tuple[int, ...] = (9,)) -> np.ndarray:
    """The share of each value of `VALUES` in each tile, less pixels that are no tissue."""
    found = []
    for x, y, w, h in PLACES // scale:
        tile = pixels[y : y + h, x : x + w]
        tissue = ~np.isin(tile, but)
        found.append([(tile[tissue] == value).mean() if tissue.any() else 0 for value in (5, 2, 1)])
    return np.array(found)


def shares_of(path: Path, **more: Any) -> np.ndarray:
    values = more.pop("values", VALUES)
    asked: dict[str, Any] = {"tissue": None, "slide_size": SLIDE, **more}
    classes, found = shares(PLACES, (), Mask(path, values), **asked)
    assert classes == sorted(values.labels.values())
    return found


def rgb(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.zeros_like(values), np.zeros_like(values)], axis=2)


def save_palette(path: Path, values: np.ndarray) -> None:
    image = Image.fromarray(values, "P")
    image.putpalette([(37 * i) % 256 for i in range(768)])
    image.save(path)


def save_deep_tiff(path: Path, values: np.ndarray) -> None:
    tifffile.imwrite(path, values.astype(np.uint16), tile=(64, 64), compression="zlib")


def save_grey_pyramid(path: Path, values: np.ndarray) -> None:
    with tifffile.TiffWriter(path) as file:
        for i in range(2):
            part = values[:: 2**i, :: 2**i]
            file.write(part, tile=(64, 64), subfiletype=i, photometric="minisblack")


FORMS: dict[str, tuple[str, Callable[[Path, np.ndarray], Any]]] = {
    "grey": (".png", lambda path, values: Image.fromarray(values).save(path)),
    "palette": (".png", save_palette),
    "16 bits": (".png", lambda p, values: Image.fromarray(values.astype(np.uint16)).save(p)),
    "first channel": (".png", lambda path, values: Image.fromarray(rgb(values)).save(path)),
    "grey in colour": (".png", lambda p, values: Image.fromarray(values).convert("RGBA").save(p)),
    "strips": (".tif", lambda path, values: Image.fromarray(values).save(path)),
    "16 bits in tiles": (".tiff", save_deep_tiff),
    "grey pyramid": (".tiff", save_grey_pyramid),
    "pyramid": (
        ".tiff",
        lambda p, values: write_tiff(p, rgb(values), rgb(values[::2, ::2]), tile=64),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_any_form_is_counted_as_numpy_counts_it(tmp_path: Path, form: str) -> None:
    values = blobs(256, 192)
    suffix, write = FORMS[form]
    path = tmp_path / f"a{suffix}"
    write(path, values)
    np.testing.assert_allclose(shares_of(path), counted(values), atol=1e-12)


@pytest.mark.parametrize("size", [(1024, 768), (2048, 1536), (341, 256), (97, 73)])
def test_a_mask_of_any_scale_gives_the_shares_of_full_resolution(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    full = blobs(1024, 768)
    xs, ys = (np.arange(n) * m // n for n, m in zip(size, (1024, 768), strict=True))
    scaled = full[np.ix_(ys, xs)]
    Image.fromarray(scaled).save(tmp_path / "a.png")
    # An outline through a tile is told to within a pixel of the mask on each side.
    error = 0.02 if size[0] >= 1024 else 3 * 1024 / size[0] / TILE
    found, expected = shares_of(tmp_path / "a.png"), counted(full, 1)
    assert abs(found - expected).max() < error
    assert abs(found - expected).mean() < error / 5


def test_levels_of_a_pyramid_are_read_only_where_they_keep_values(tmp_path: Path) -> None:
    """OpenSlide blends neighbours at levels whose scale is no whole number."""
    full = blobs(1026, 770, (0, 1, 2))
    smooth = halved(full, width=513, height=385)
    odd = full[::4, ::4][:192, :256]
    path = write_tiff(tmp_path / "a.tiff", rgb(full), rgb(smooth), rgb(odd), tile=64)
    values = MaskValues(labels={1: "one", 2: "two"}, unlabelled=(0,))
    places = np.array([(x, 0, 61, 61) for x in range(0, 900, 61)], np.int64)
    _, found = shares(places, (), Mask(path, values), tissue=None, slide_size=(1026, 770))
    steps = ((np.arange(POINTS) + 0.5) * 61 / POINTS).astype(int)
    for (x, y, _, _), row in zip(places, found, strict=True):
        sampled = full[np.ix_(y + steps, x + steps)]
        assert row.tolist() == [(sampled == 1).mean(), (sampled == 2).mean()]


def test_a_large_tile_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = blobs(1024, 768)
    path = write_tiff(tmp_path / "a.tiff", rgb(values), tile=64)
    xs = ys = (np.arange(POINTS) + 0.5) / POINTS
    with open_mask(path, SLIDE) as reader:
        whole = reader.read(xs, ys)
    monkeypatch.setattr("histoencoder_core.labels.masks._PIECE", 1024 * 100)
    with open_mask(path, SLIDE) as reader:
        assert (reader.read(xs, ys) == whole).all()
        assert (reader.read(xs + 0.5, ys + 5) == -1).all()
    assert (whole == values[np.ix_((ys * 768).astype(int), (xs * 1024).astype(int))]).all()


def test_only_tissue_counts(tmp_path: Path) -> None:
    values = blobs(256, 192)
    Image.fromarray(values).save(tmp_path / "a.png")
    tissue = blobs(256, 192, (0, 1)) == 1
    tissue[: TILE // SCALE, : TILE // SCALE] = False  # the first tile has none: all of it counts
    found = shares_of(tmp_path / "a.png", tissue=Tissue(tissue, "1"))
    bare = np.where(tissue, values, 9)
    bare[: TILE // SCALE, : TILE // SCALE] = values[: TILE // SCALE, : TILE // SCALE]
    for x, y, w, h in PLACES // SCALE:
        if not tissue[y : y + h, x : x + w].any():
            bare[y : y + h, x : x + w] = values[y : y + h, x : x + w]
    np.testing.assert_allclose(found, counted(bare), atol=1e-12)


def test_what_lies_beyond_the_slide_is_no_tissue(tmp_path: Path) -> None:
    Image.fromarray(np.full((192, 256), 5, np.uint8)).save(tmp_path / "a.png")
    beyond = np.array([(1024 - 32, 0, 128, 128), (-96, 700, 128, 128)], np.int64)
    classes, found = shares(
        beyond, (), Mask(tmp_path / "a.png", VALUES), tissue=None, slide_size=SLIDE
    )
    assert found[:, classes.index("cancer")].tolist() == [1, 1]


# Outlines -----------------------------------------------------------------------------------------


def star(x: float, y: float, radius: float, seed: int) -> Polygon:
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radii = radius * rng.uniform(0.5, 1, 60)
    hole = shapely.Point(x, y).buffer(radius / 4)
    outline = np.c_[x + radii * np.cos(angles), y + radii * np.sin(angles)]
    return Polygon(outline).difference(hole)


STARS = [("tumour", star(300, 300, 280, 1)), ("stroma", star(700, 400, 350, 2))]


def test_outlines_are_measured_exactly_where_all_of_a_tile_counts() -> None:
    everywhere = Tissue(np.ones((96, 128), bool), "1")
    for tissue in (None, everywhere):
        classes, found = shares(PLACES, STARS, None, tissue=tissue, slide_size=SLIDE)
        for label, geometry in STARS:
            exact = [box(x, y, x + w, y + h).intersection(geometry).area / w / h
                     for x, y, w, h in PLACES.tolist()]  # fmt: skip
            np.testing.assert_allclose(found[:, classes.index(label)], exact, atol=1e-9)


def test_outlines_are_sampled_where_part_of_a_tile_counts() -> None:
    """The tissue is a slanted half of the slide, so that its area is known exactly too."""
    y, x = np.mgrid[:768, :1024] + 0.5
    tissue = Tissue(y < 200 + x / 2, "1")
    below = Polygon([(0, 0), (1024, 0), (1024, 712), (0, 200)])
    classes, found = shares(PLACES, STARS, None, tissue=tissue, slide_size=SLIDE)
    errors = []
    for i, (x0, y0, w, h) in enumerate(PLACES.tolist()):
        tile = box(x0, y0, x0 + w, y0 + h)
        ground = tile.intersection(below) if tile.intersects(below) else tile
        for label, geometry in STARS:
            exact = ground.intersection(geometry).area / ground.area
            errors.append((abs(found[i, classes.index(label)] - exact), ground.area / w / h))
    worst, ground_share = np.array(errors).T
    assert worst[ground_share > 0.05].max() < 0.03
    assert worst.mean() < 0.003


@pytest.mark.parametrize("part", [box(0, 0, 64, 128), box(0, 64, 128, 128), box(64, 0, 128, 128)])
def test_half_a_tile_is_exactly_half_of_it(part: Polygon) -> None:
    tissue = np.zeros((768, 1024), bool)
    tissue[16:112, 16:112] = True  # sampled, but even on all sides
    for known in (None, Tissue(tissue, "1")):
        _, found = shares(PLACES[:1], [("a", part)], None, tissue=known, slide_size=SLIDE)
        assert found.tolist() == [[0.5]]


def test_an_annotation_within_another_takes_its_area_from_it() -> None:
    tumour, necrosis, vessel = box(0, 0, 256, 128), box(0, 0, 64, 128), box(10, 10, 20, 20)
    drawn = [("tumour", tumour), ("necrosis", necrosis), ("tumour", vessel)]
    classes, found = shares(PLACES[:2], drawn, None, tissue=None, slide_size=None)
    inner = 100 / 128**2
    assert classes == ["necrosis", "tumour"]
    np.testing.assert_allclose(found, [[0.5 - inner, 0.5 + inner], [0, 1]])
    same = [("a", tumour), ("b", tumour)]
    _, found = shares(PLACES[:1], same, None, tissue=None, slide_size=None)
    assert found.tolist() == [[1, 1]], "the same area twice is nested neither way"


def test_outlines_and_a_mask_are_taken_together(tmp_path: Path) -> None:
    values = np.zeros((192, 256), np.uint8)
    values[:16, :32] = 5
    Image.fromarray(values).save(tmp_path / "a.png")
    drawn = [("cancer", box(0, 0, 64, 128)), ("vessel", box(0, 0, 128, 128))]
    classes, found = shares(
        PLACES[:1], drawn, Mask(tmp_path / "a.png", VALUES), tissue=None, slide_size=SLIDE
    )
    told = dict(zip(classes, found[0], strict=True))
    assert told == {"cancer": 0.75, "gland": 0, "stroma": 0, "vessel": 0.5}


# What is wrong with a mask ------------------------------------------------------------------------


def jpeg_tiff(path: Path) -> Path:
    tifffile.imwrite(
        path, rgb(blobs(256, 192)), tile=(64, 64), compression="jpeg", photometric="rgb"
    )
    return path


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: Image.fromarray(blobs(256, 200)).save(p / "a.png"), "is no scale of the slide"),
        (
            lambda p: Image.fromarray(blobs(256, 192, (0, 1, 7, 8))).save(p / "a.png"),
            r"its values 7, 8 mean is not told; found were values 0, 1, 7, 8\.",
        ),
        (
            lambda p: Image.fromarray(np.roll(rgb(blobs(256, 192)), 1, axis=2)).save(p / "a.png"),
            "holds colours",
        ),
        (lambda p: (p / "a.png").write_bytes(b"\x89PNG\r\n"), "can't be decoded as PNG"),
        (lambda p: Image.new("F", (256, 192)).save(p / "a.tif"), "float32, not whole numbers"),
        (lambda p: jpeg_tiff(p / "a.tif"), "compression changes pixels"),
    ],
)
def test_what_is_wrong_with_a_mask_is_said(
    tmp_path: Path, make: Callable[[Path], Any], told: str
) -> None:
    make(tmp_path)
    [path] = tmp_path.iterdir()
    with pytest.raises(LabelError, match=told) as caught:
        shares_of(path)
    assert str(path) in str(caught.value)


def test_a_mask_needs_the_size_of_the_slide(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"a\.png: can't be laid over the slide"):
        shares_of(tmp_path / "a.png", slide_size=None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rules: [", "can't be read as YAML"),
        ("{}", "the file: Input should be a valid list"),
        ("- {}", "rule 1: labels needs at least one value"),
        ("- labels: {1: a}\n- labels: {1: no}", "rule 2, labels, 1: Input should be a valid str"),
        ("- labels: {one: a}", "rule 1, labels, one"),
        ("- {labels: {1: a}, background: [1]}", "rule 1: 1: a value can mean one thing only"),
        ("- convention: panda", "rule 1, convention: Input should be 'panda-karolinska' or"),
        ("- {convention: panda-radboud, background: [0]}", "a convention or labels, not both"),
        ("- {convention: panda-radboud, glob: x}", "rule 1, glob: Extra inputs"),
    ],
)
def test_what_is_wrong_with_the_rules_is_said(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "masks.yaml"
    path.write_text(text)
    with pytest.raises(LabelError, match=told) as caught:
        read_rules(path)
    assert str(path) in str(caught.value)


# From a slide and a mask to labels ----------------------------------------------------------------


@pytest.fixture
def slide(store: Store, tmp_path: Path) -> SlideFolder:
    """A slide whose middle half is tissue, in tiles of 128 pixels."""
    path = write_tiff(tmp_path / "slides" / "a.tiff", tissue_pixels(1024, 768))
    folder = described(store, path, SheetRow(facts={"site": "karolinska"}))
    cut_tiles(folder, TilingSettings(tile_px=128, mpp=0.5, overlap=0.5, max_background=0.9))
    return folder


def label(store: Store, annotations: Path, **settings: float) -> dict[str, tuple[str, float]]:
    """Label the slide, and give label and share of its labelled tiles."""
    annotation, source = Annotations(store, annotations).of("a"), tile_source(store, "a")
    assert annotation is not None
    assert source is not None
    label_slide(store.slide("a"), source, annotation, LabelSettings(**settings))
    rows = read_table(store.slide("a").record("labels")).to_pylist()
    return {row["tile"]: (row["label"], row["share"]) for row in rows if row["label"]}


def test_a_convention_of_panda_and_a_share_of_the_tissue(store: Store, slide: SlideFolder) -> None:
    """The mask labels the left half of the tissue and leaves glass and unknown tissue at 0."""
    folder = store.root.parent / "annotations"
    values = np.zeros((768, 1024), np.uint8)
    values[192:576, 256:512] = 2
    values[192:576, 512:640] = 1
    write_tiff(folder / "a_mask.tiff", rgb(values), rgb(values[::4, ::4]))
    rules = "- {site: radboud, convention: panda-radboud}\n- convention: panda-karolinska\n"
    (folder / "masks.yaml").write_text(rules)
    found = label(store, folder)
    tissue = read_image(slide.file("thumbnail_tissue.jpeg"))[..., 0] < 128
    source = tile_source(store, "a")
    assert source is not None
    for name, x, y, w, h in (row.values() for row in source.keys.to_pylist()):
        ground, drawn = (it[y : y + h, x : x + w] for it in (tissue, values))
        cancer, benign = ((drawn[ground] == value).mean() for value in (2, 1))
        if max(cancer, benign) >= 0.52:
            assert found[name][0] == ("cancer" if cancer > benign else "benign")
            assert found[name][1] == pytest.approx(max(cancer, benign), abs=0.02)
        elif max(cancer, benign) < 0.48:
            assert name not in found
    edge = found["x192_y256_w128_h128"]
    assert edge[0] == "cancer", "half of the tile is glass, and all of its tissue cancer"
    assert edge[1] > 0.97
    assert "x640_y256_w128_h128" not in found, "of this tissue nothing is known"
    stamp = slide.stamp("labels")
    assert stamp is not None
    assert stamp.result["rule"] == "the class that covers at least 50 % of a tile's tissue"
    assert read_image(slide.file("thumbnail_labels.jpeg")).shape[1] == 1024


def test_radboud_tells_five_classes() -> None:
    assert CONVENTIONS["panda-radboud"].labels == {
        1: "stroma",
        2: "healthy epithelium",
        3: "Gleason 3",
        4: "Gleason 4",
        5: "Gleason 5",
    }
    assert CONVENTIONS["panda-karolinska"].labels == {1: "benign", 2: "cancer"}


def test_the_first_rule_that_fits_the_slide_counts(store: Store, slide: SlideFolder) -> None:
    folder = store.root.parent / "annotations"
    folder.mkdir()
    Image.fromarray(np.full((96, 128), 1, np.uint8)).save(folder / "a.png")
    told = {}
    for rules in (
        "- {slides: 'b*', labels: {1: wrong}}\n- {slides: 'a*', labels: {1: named}}",
        "- {site: radboud, labels: {1: wrong}}\n- {site: karolinska, labels: {1: sited}}",
        "- {slides: '?', site: karolinska, labels: {1: both}}\n- labels: {1: wrong}",
    ):
        (folder / "masks.yaml").write_text(rules)
        told[rules] = {name for name, _ in label(store, folder).values()}
    assert list(told.values()) == [{"named"}, {"sited"}, {"both"}]
    (folder / "masks.yaml").write_text("- {site: radboud, labels: {1: x}}")
    with pytest.raises(LabelError, match=r"no rule in .* fits the slide a of site karolinska"):
        Annotations(store, folder).of("a")
    (folder / "masks.yaml").unlink()
    with pytest.raises(LabelError, match=r"a\.png: can't be read as a mask.*is not there"):
        Annotations(store, folder).of("a")
    (folder / "masks.yaml").write_text("- labels: {1: x}")
    Image.fromarray(np.zeros((96, 128), np.uint8)).save(folder / "a_mask.tif")
    with pytest.raises(LabelError, match=r"a\.png and .*a_mask\.tif: are both masks of a"):
        Annotations(store, folder).of("a")


def test_a_rule_that_changes_for_other_slides_changes_nothing(
    store: Store, slide: SlideFolder
) -> None:
    folder = store.root.parent / "annotations"
    folder.mkdir()
    Image.fromarray(np.full((96, 128), 1, np.uint8)).save(folder / "a.png")

    def signature(rules: str) -> str | None:
        (folder / "masks.yaml").write_text(rules)
        return Annotations(store, folder).signature("a")

    first = signature("- {slides: a, labels: {1: x}}\n- labels: {1: y}")
    assert signature("- {slides: a, labels: {1: x}}\n- labels: {1: z, 2: w}") == first
    assert signature("- {slides: a, labels: {1: z}}\n- labels: {1: y}") != first
    assert signature("- {slides: b, labels: {1: x}}") != first, "not even told: its own failure"


def test_labels_are_due_again_when_what_they_are_made_from_changes(
    store: Store, slide: SlideFolder
) -> None:
    folder = store.root.parent / "annotations"
    folder.mkdir()
    Image.fromarray(np.full((96, 128), 1, np.uint8)).save(folder / "a.png")
    (folder / "masks.yaml").write_text("- labels: {1: x}")
    label(store, folder)

    def due(**settings: float) -> str | None:
        source = tile_source(store, "a")
        assert source is not None
        asked = LabelSettings(**settings) if settings else None
        return why_due(slide, source, Annotations(store, folder), asked)

    assert due() is None
    assert due(min_share=0.5) is None
    assert due(min_share=0.7) == "made with min_share = 0.5"
    (folder / "a.png").touch()
    assert due() is None, "written again, but it says the same"
    Image.fromarray(np.full((96, 128), 2, np.uint8)).save(folder / "a.png")
    assert due() == "the annotation has changed"
    (folder / "a.png").unlink()
    assert due() == "the annotation is gone"
    Image.fromarray(np.full((96, 128), 1, np.uint8)).save(folder / "a.png")
    assert due() is None
    tiling = TilingSettings(tile_px=128, mpp=0.5, overlap=0.5, max_background=0.9, sigma=1.5)
    cut_tiles(slide, tiling)
    assert read_tissue(slide) is not None
    assert due() == "the tissue has changed"
    cut_tiles(slide, TilingSettings(tile_px=128, mpp=0.5, overlap=0.5, max_background=0.4))
    assert due() == "the tiles have changed"
