"""Where tiles come from, whatever program made them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import contents, keys_of, stamp_of, tissue_pixels
from PIL import Image

from histoencoder_core.errors import SlideError, StoreError
from histoencoder_core.store import Store
from histoencoder_core.store.tables import (
    feature_length,
    feature_list,
    iter_features,
    read_features,
    widen,
)
from histoencoder_core.tiles import TileSource, tile_source
from histoencoder_core.tiles.pixels import Tile
from histoencoder_core.tiles.source import slide_ids_with_tiles


def save_images(folder: Path, *names: str) -> None:
    """Write images that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(tissue_pixels(20, 10, seed=i)).save(folder / name, quality=100)


def names_of(source: TileSource | None) -> list[str]:
    assert source is not None
    return source.keys.column("tile").to_pylist()


def sources_of(store: Store) -> dict[str, TileSource]:
    """All slides that have tiles, with them."""
    found = {slide_id: tile_source(store, slide_id) for slide_id in slide_ids_with_tiles(store)}
    return {slide_id: source for slide_id, source in found.items() if source is not None}


def read_all(source: TileSource) -> list[Tile]:
    """The tiles by row; each row is in one block."""
    tiles: dict[int, Tile] = {}
    with source.open() as pixels:
        for rows in pixels.blocks:
            assert tiles.keys().isdisjoint(rows)
            tiles.update(zip(rows, pixels.read(rows), strict=True))
    assert len(tiles) == source.keys.num_rows
    return [tiles[row] for row in range(len(tiles))]


def places_of(source: TileSource) -> list[tuple[int | None, ...]]:
    return list(zip(*(source.keys.column(name).to_pylist() for name in "xywh"), strict=True))


def test_histopreps_own_folder(data: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    shutil.copytree(data / "tiles" / "histoencoder_slide", tmp_path / "slide")
    before = contents(tmp_path)
    assert slide_ids_with_tiles(store) == ["slide"]
    source = tile_source(store, "slide")
    assert source is not None
    names, places = names_of(source), places_of(source)
    assert len(set(names)) == 90
    for name, (x, y, w, h) in zip(names, places, strict=True):
        assert name == f"x{x}_y{y}_w{w}_h{h}"
        assert (w, h) == (224, 224)
    pixels = read_all(source)[names.index("x448_y224_w224_h224")]
    image = tmp_path / "slide" / "tiles" / "x448_y224_w224_h224.jpeg"
    assert np.array_equal(pixels, np.asarray(Image.open(image)))
    assert contents(tmp_path) == before


def test_a_folder_of_images_for_each_class(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "tiles" / "kather2016_24", tmp_path / "k")
    sources = sources_of(Store(tmp_path / "k"))
    assert len(sources) == 8
    for slide_id, source in sources.items():
        files = sorted((tmp_path / "k" / slide_id).iterdir())
        assert names_of(source) == [file.stem for file in files]
        assert places_of(source) == [(None,) * 4] * 3
        for pixels, file in zip(read_all(source), files, strict=True):
            assert np.array_equal(pixels, np.asarray(Image.open(file)))


def test_images_in_the_root_itself(tmp_path: Path) -> None:
    root = tmp_path / "my-tiles"
    save_images(root, "x0_y8_w20_h10.png", "b.jpg", "thumbnail.jpeg", ".hidden.png", "notes.webp")
    sources = sources_of(Store(root))
    assert list(sources) == ["my-tiles"]
    assert names_of(sources["my-tiles"]) == ["b", "x0_y8_w20_h10"]
    assert places_of(sources["my-tiles"]) == [(None,) * 4, (0, 8, 20, 10)]
    (tmp_path / "my-tiles").rename(tmp_path / "my tiles")  # not a name that an id can have
    assert slide_ids_with_tiles(Store(tmp_path / "my tiles")) == ["slide"]


def test_images_of_the_same_stem_are_told_apart(tmp_path: Path) -> None:
    save_images(tmp_path / "s", "a.png", "a.jpg", "b.png")
    assert names_of(tile_source(Store(tmp_path), "s")) == ["a.jpg", "a.png", "b.png"]


def test_folders_without_tiles_are_no_sources(store: Store) -> None:
    save_images(store.slide("described").path, "thumbnail.jpeg", "thumbnail_tiles.jpeg")
    (store.slide("empty").path / "tiles").mkdir(parents=True)
    assert slide_ids_with_tiles(store) == []
    assert tile_source(store, "not-there") is None


def test_other_pixels_under_the_same_names_are_other_tiles(store: Store) -> None:
    folder = store.slide("a").path
    save_images(folder, "1.png", "2.png")
    source = tile_source(store, "a")
    assert source is not None
    before = source.upstream()
    assert before == source.upstream()
    Image.fromarray(tissue_pixels(20, 10, seed=9)).save(folder / "2.png")
    assert source.upstream() != before


def test_the_table_of_tile_images(store: Store) -> None:
    save_images(store.root / "img", "1.png", "2.png", "3.png")
    save_images(store.root / "other", "1.png")
    store.tiles_csv.write_text(
        "\ufeffpath, slide, x, y, label\n"
        "img/2.png,S1,100,200,tumour\n"
        "img/1.png,S1,0,0,\n"
        "other/1.png,,,,stroma\n"
    )
    sources = sources_of(store)
    assert set(sources) == {"S1", "img", "other"}
    assert slide_ids_with_tiles(store, but=["img", "S1", "unknown"]) == ["other"]
    assert names_of(sources["S1"]) == ["1", "2"]
    assert places_of(sources["S1"]) == [(0, 0, 20, 10), (100, 200, 20, 10)]
    assert names_of(sources["other"]) == ["1"]
    assert places_of(sources["other"]) == [(None,) * 4]
    assert np.array_equal(read_all(sources["S1"])[1], tissue_pixels(20, 10, seed=1))


def test_tiles_of_one_slide_from_several_folders_keep_apart(store: Store) -> None:
    save_images(store.root / "tumour", "1.png", "2.png")
    save_images(store.root / "stroma", "1.png")
    store.tiles_csv.write_text(
        "path,slide,label\ntumour/1.png,S1,tumour\nstroma/1.png,S1,stroma\ntumour/2.png,S1,tumour\n"
    )
    assert names_of(tile_source(store, "S1")) == ["stroma/1.png", "tumour/1.png", "tumour/2.png"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,slide\nimg/1.png,S\n\nimg/lost.png,S\n", r"line 4: .*img/lost\.png is not there"),
        ("slide,path\nS\n", "line 2: .* is not there"),
        ("file,slide\nimg/1.png,S\n", "needs a column 'path'"),
        ("path,slide,x,y\nimg/1.png,S,1.5,2\n", "line 2: x and y must be whole"),
        ("path,slide\nimg/1.png,S\nimg/1.png,S\n", r"line 3: .*img/1\.png is named twice for S"),
        ("path,slide\nimg/1.png,../S\n", r"line 2: '\.\./S' can't be a slide's id"),
        ("path,slide,x,y\nimg/half.png,S,1,2\n", r"line 2: .*half\.png: can't be decoded as PNG"),
    ],
)
def test_mistakes_in_the_table_are_told(store: Store, text: str, told: str) -> None:
    save_images(store.root / "img", "1.png")
    (store.root / "img" / "half.png").write_bytes(b"\x89PNG")
    store.tiles_csv.write_text(text)
    with pytest.raises(StoreError, match=told) as caught:
        tile_source(store, "S")
    assert str(store.tiles_csv) in str(caught.value)


def test_what_spoils_one_slide_does_not_stop_the_others(store: Store) -> None:
    for slide_id in ("good", "torn"):
        save_images(store.slide(slide_id).path, "1.png")
    store.slide("torn").record("tiles").write_bytes(b"PAR1 torn")
    save_images(store.root / "listed", "1.png")
    store.tiles_csv.write_text("path,slide\nlisted/1.png,whole\nlisted/lost.png,lost\n")
    assert slide_ids_with_tiles(store) == ["good", "lost", "torn", "whole"]
    assert slide_ids_with_tiles(store, but=["torn", "whole"]) == ["good", "lost"]
    assert names_of(tile_source(store, "good")) == names_of(tile_source(store, "whole")) == ["1"]
    with pytest.raises(StoreError, match=r"torn/metadata\.parquet"):
        tile_source(store, "torn")
    with pytest.raises(StoreError, match=r"tiles\.csv, line 3"):
        tile_source(store, "lost")
    store.tiles_csv.write_text("image\nlisted/1.png\n")
    with pytest.raises(StoreError, match="needs a column 'path'"):
        slide_ids_with_tiles(store)


def test_an_image_in_the_table_is_counted_once(store: Store) -> None:
    save_images(store.root, "flat.png")
    save_images(store.root / "all" / "tiles", "1.png", "2.png")
    save_images(store.root / "some", "1.png", "2.png")
    listed = ["flat.png", "all/tiles/1.png", "some/../all/tiles/2.png", store.root / "some/1.png"]
    store.tiles_csv.write_text("path,slide\n" + "".join(f"{path},S\n" for path in listed))
    assert slide_ids_with_tiles(store) == ["S", "some"]
    sources = sources_of(store)
    assert {slide_id: source.keys.num_rows for slide_id, source in sources.items()} == {
        "S": 4,
        "some": 1,
    }
    assert names_of(tile_source(store, "some")) == ["2"]
    assert tile_source(store, "all") is None


def test_a_table_without_slides_goes_by_the_folders(store: Store) -> None:
    images = {"a/tiles/1.png": "a", "b/1.png": "b", "tiles/1.png": "tiles", "1.png": "store"}
    for image in images:
        save_images((store.root / image).parent, "1.png")
    without = slide_ids_with_tiles(store)
    store.tiles_csv.write_text("path\n" + "\n".join(images))
    assert slide_ids_with_tiles(store) == without == sorted(images.values())
    assert all(names_of(source) == ["1"] for source in sources_of(store).values())


def test_a_folder_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path / "flat", "1.png")
    monkeypatch.chdir(tmp_path / "flat")
    source = tile_source(Store("."), "flat")
    assert names_of(source) == ["1"]
    assert slide_ids_with_tiles(Store(".")) == ["flat"]


def test_other_places_of_the_same_pixels_are_other_tiles(store: Store) -> None:
    save_images(store.root / "img", "1.png", "2.png")

    def upstream(*lines: str) -> str:
        store.tiles_csv.write_text("path,slide,x,y\n" + "\n".join(lines))
        source = tile_source(store, "S")
        assert source is not None
        return source.upstream()

    before = upstream("img/1.png,S,0,0", "img/2.png,S,20,0")
    assert upstream("img/1.png,S,0,0", "img/2.png,S,40,0") != before
    assert upstream("img/1.png,S,0,0", "img/2.png,S,20,0") == before


def test_places_in_the_table_need_no_decoding(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_images(store.root / "img", "1.png")
    store.tiles_csv.write_text("path,slide,x,y\nimg/1.png,S,5,6\n")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    source = tile_source(store, "S")
    assert source is not None
    assert places_of(source) == [(5, 6, 20, 10)]


def test_a_damaged_image_is_named(store: Store) -> None:
    save_images(store.slide("a").path, "1.png", "2.png")
    (store.slide("a").path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    source = tile_source(store, "a")
    assert source is not None
    good, bad = read_all(source)
    assert isinstance(good, np.ndarray)
    assert good.shape == (10, 20, 3)
    assert isinstance(bad, SlideError)
    assert re.search(r"a/2\.png: can't be decoded as PNG", str(bad))


FEATURES = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
PLACES = [(256 * i, 0, 256, 256) for i in range(5)]


def save_wide(target: Path, **columns: list[object]) -> None:
    """Write features as HistoEncoder does: feat1 … feat12, and how a tile is named."""
    wide = {f"feat{i + 1}": FEATURES[:, i] for i in range(12)}
    # Column order is not to be relied on: feat10 sorts before feat2.
    pq.write_table(pa.table(columns | dict(sorted(wide.items()))), target)


@pytest.mark.parametrize("folder", ["/data/jopo/tiles/", "C:\\scans\\a\\tiles\\", ""])
def test_histoencoders_wide_features(tmp_path: Path, folder: str) -> None:
    path = tmp_path / "features.parquet"
    names = [f"x{x}_y{y}_w{w}_h{h}" for x, y, w, h in PLACES]
    save_wide(path, path=[f"{folder}{name}.jpeg" for name in names])
    keys, features = read_features(path)
    assert keys.equals(keys_of(*PLACES))
    assert np.array_equal(features, FEATURES)
    assert feature_length(path) == 12


def test_wide_features_with_places_but_no_names(tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    columns = {name: [place[i] for place in PLACES] for i, name in enumerate("xywh")}
    save_wide(path, **columns)
    assert read_features(path)[0].equals(keys_of(*PLACES))


def test_wide_features_whose_names_tell_no_place(tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    names = ["1A11_CRC-Prim-HE-07.tif_Row_1", "b", "c.d", "x1_y2", "e"]
    nothing = [-9223372036854775808] * 5  # HistoEncoder 0.1.1 casts NaN to an integer
    save_wide(path, path=[f"t/{name}.tif" for name in names], **dict.fromkeys("xywh", nothing))
    keys, _ = read_features(path)
    assert keys.column("tile").to_pylist() == names
    for name in "xywh":
        assert keys.column(name).null_count == 5


def test_features_come_back_in_batches_and_in_order(tmp_path: Path) -> None:
    mask = pa.array([False, False, True, False, False])
    column = feature_list(FEATURES, "float32")
    column = pa.FixedSizeListArray.from_arrays(column.values, 12, mask=mask)
    table = stamp_of("x").on_table(keys_of(*PLACES).append_column("features", column))
    expected = FEATURES.copy()
    expected[2] = np.nan
    for name, stored in {"ours": table, "wide": widen(table)}.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(stored, path)
        batches = list(iter_features(path, batch_rows=2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert all(batch.dtype == np.float32 for batch in batches)
        np.testing.assert_array_equal(np.concatenate(batches), expected)
        keys, features = read_features(path)
        np.testing.assert_array_equal(features, expected)
        assert keys.equals(keys_of(*PLACES))


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    column = feature_list(FEATURES, "float16")
    pq.write_table(keys_of(*PLACES).append_column("features", column), path)
    _, features = read_features(path)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, FEATURES, atol=2e-3)


def test_a_slide_without_tiles_has_features_of_the_right_length(tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    empty = feature_list(np.empty((0, 12), np.float32), "float32")
    pq.write_table(keys_of().append_column("features", empty), path)
    keys, features = read_features(path)
    assert (keys.num_rows, features.shape) == (0, (0, 12))


def test_files_that_are_no_features_are_named(tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    pq.write_table(keys_of(*PLACES), path)
    with pytest.raises(StoreError, match=r"features\.parquet: holds no features"):
        read_features(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"features\.parquet: can't be read as parquet"):
        list(iter_features(path))
    save_wide(path, path=["a.png", "b.png", "a.png", "c.png", "d.png"])
    with pytest.raises(StoreError, match=r"features\.parquet: two rows have the same tile name"):
        read_features(path)
