"""Labels: annotations to one class a tile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from making import keys_of, tissue_pixels
from PIL import Image
from shapely.geometry import Polygon, box

from histoencoder_core.errors import LabelError, StoreError
from histoencoder_core.labels import (
    Annotation,
    find_annotation,
    find_annotations,
    label_slide,
    labels_stamp,
)
from histoencoder_core.labels.annotations import read_geojson, unmatched_annotations
from histoencoder_core.slides import FoundSlide, Register
from histoencoder_core.store import Store
from histoencoder_core.store.tables import key_table, read_table
from histoencoder_core.tiles import TileSource, tile_source

GRID = [(x, y, 100, 100) for y in (0, 100) for x in (0, 100, 200)]


def source_of(*places: tuple[int, int, int, int]) -> TileSource:
    def closed() -> Any:
        raise AssertionError("labels need no pixels")

    return TileSource(keys_of(*(places or GRID)), upstream=closed, open=closed)


def feature(*rings: list[list[float]], **properties: Any) -> dict[str, Any]:
    geometry = {"type": "Polygon", "coordinates": rings}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def ring(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def classified(name: str) -> dict[str, Any]:
    return {"objectType": "annotation", "classification": {"name": name, "color": [1, 2, 3]}}


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def labels_of(store: Store, annotation: Annotation) -> dict[str, str | None]:
    folder = store.slide("a")
    label_slide(folder, source_of(), annotation)
    table = read_table(folder.record("labels"))
    return dict(zip(table["tile"].to_pylist(), table["label"].to_pylist(), strict=True))


def test_a_tile_has_the_class_that_covers_half_of_it(store: Store) -> None:
    annotation = Annotation(
        "a.geojson",
        "1",
        polygons=[
            ("tumour", box(0, 0, 150, 100)),  # all of the first tile and half of the second
            ("stroma", box(251, 0, 300, 100)),  # 49 % of the third
            ("stroma", box(0, 100, 40, 200)),  # two parts of one class make 80 % together
            ("stroma", box(20, 100, 80, 200)),
            ("tumour", box(0, 100, 55, 200)),  # 55 %, but the other class has more
        ],
    )
    assert labels_of(store, annotation) == {
        "x0_y0_w100_h100": "tumour",
        "x100_y0_w100_h100": "tumour",
        "x200_y0_w100_h100": None,
        "x0_y100_w100_h100": "stroma",
        "x100_y100_w100_h100": None,
        "x200_y100_w100_h100": None,
    }
    folder = store.slide("a")
    table = read_table(folder.record("labels"))
    assert table.column_names == ["tile", "x", "y", "w", "h", "label", "share"]
    assert table["share"].to_pylist() == pytest.approx([1.0, 0.5, None, 0.8, None, None])
    stamp = folder.stamp("labels")
    assert stamp is not None
    assert stamp.result == {
        "tiles": 6,
        "labelled": 3,
        "labels": {"stroma": 1, "tumour": 2},
        "source": "a.geojson",
    }


def test_holes_and_parts(store: Store, tmp_path: Path) -> None:
    holed = feature(ring(0, 0, 300, 200), ring(101, 1, 199, 99), **classified("tumour"))
    parts = {
        "type": "Feature",
        "geometry": {
            "type": "MultiPolygon",
            "coordinates": [
                [ring(110, 10, 140, 100)],
                [ring(150, 10, 190, 100), ring(160, 20, 165, 25)],
            ],
        },
        "properties": {"classification": "vessel"},
    }
    path = save(tmp_path / "a.geojson", {"type": "FeatureCollection", "features": [holed, parts]})
    annotation = Annotation("a", "1", polygons=read_geojson(path))
    labels = labels_of(store, annotation)
    assert labels.pop("x100_y0_w100_h100") == "vessel"
    assert set(labels.values()) == {"tumour"}


@pytest.mark.parametrize(
    "properties",
    [
        classified("tumour"),
        {"classification": {"names": ["tumour"], "color": [1, 2, 3]}},
        {"classification": "tumour"},
        {"name": " tumour "},
        {"name": "region 1", "classification": {"name": "tumour"}},
    ],
)
def test_the_ways_a_class_is_written(tmp_path: Path, properties: dict[str, Any]) -> None:
    one = feature(ring(0, 0, 10, 10), **properties)
    for content in (one, [one], {"type": "FeatureCollection", "features": [one]}):
        [(label, geometry)] = read_geojson(save(tmp_path / "a.geojson", content))
        assert (label, geometry.area) == ("tumour", 100)


def test_what_has_no_area_or_no_class_is_passed_over(tmp_path: Path) -> None:
    point = {"type": "Point", "coordinates": [1, 2]}
    line = {"type": "LineString", "coordinates": [[0, 0], [5, 5]]}
    features = [
        {"type": "Feature", "geometry": geometry, "properties": classified("tumour")}
        for geometry in (point, line, None)
    ]
    features += [feature(ring(0, 0, 5, 5)), feature(ring(0, 0, 5, 5), classification=None)]
    features.append({**feature(ring(0, 0, 5, 5)), "properties": None})
    features.append(feature(ring(0, 0, 10, 10), **classified("stroma")))
    [(label, _)] = read_geojson(save(tmp_path / "a.geojson", features))
    assert label == "stroma"


def test_a_polygon_that_crosses_itself_is_mended(tmp_path: Path) -> None:
    bow_tie = [[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]
    path = save(tmp_path / "a.geojson", feature(bow_tie, **classified("tumour")))
    [(_, geometry)] = read_geojson(path)
    assert geometry.is_valid
    assert geometry.area == 5000


def test_a_real_file_without_a_class_says_so(data: Path) -> None:
    with pytest.raises(LabelError, match=r"histoqc_holed\.geojson.*classification"):
        read_geojson(data / "odd" / "histoqc_holed.geojson")


def test_a_real_file_whose_classes_are_names(data: Path) -> None:
    found = read_geojson(data / "odd" / "dlup_qupath05.geojson")
    assert sorted(label for label, _ in found) == ["I", "I", "UT"]
    assert all(isinstance(geometry, Polygon) and geometry.is_valid for _, geometry in found)


def test_a_real_file_with_a_hole(data: Path, tmp_path: Path, store: Store) -> None:
    content = json.loads((data / "odd" / "histoqc_holed.geojson").read_text())
    content["properties"]["classification"] = {"name": "tissue"}
    annotation = Annotation("a", "1", read_geojson(save(tmp_path / "a.geojson", content)))
    inside_hole, beside_it = (12200, 17950, 64, 64), (10200, 16900, 64, 64)
    folder = store.slide("a")
    label_slide(folder, source_of(inside_hole, beside_it), annotation)
    assert read_table(folder.record("labels"))["label"].to_pylist() == [None, "tissue"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "can't be read as GeoJSON"),
        ('{"type": "FeatureCollection"}', "can't be read as GeoJSON"),
        ('{"type": "Topology", "objects": {}}', "its type is 'Topology'"),
        ('[{"type": "Feature", "properties": {}}]', "can't be read as GeoJSON"),
        ("[5]", "can't be read as GeoJSON"),
        ('{"type": "FeatureCollection", "features": []}', "none of its 0 features"),
        (
            '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0]]]}}',
            "can't be",
        ),
    ],
)
def test_a_damaged_annotation_is_named(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(text)
    with pytest.raises(LabelError, match=told) as caught:
        read_geojson(path)
    assert str(path) in str(caught.value)


def test_labels_for_tiles_from_a_csv(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "site-1.csv").write_text(
        "\ufeffslide, x, y, label\na, 100, 0, tumour\nb,0,0,stroma\na,200,100,stroma\n"
    )
    save(folder / "c.json", feature(ring(0, 0, 9, 9), **classified("x")))
    assert find_annotations(store, folder, ["a", "b", "c", "d"]) == {
        "a": [folder / "site-1.csv"],
        "b": [folder / "site-1.csv"],
        "c": [folder / "c.json"],
    }
    assert find_annotation(store, folder, "d") is None
    annotation = find_annotation(store, folder, "a")
    assert annotation is not None
    labels = labels_of(store, annotation)
    assert {tile: label for tile, label in labels.items() if label} == {
        "x100_y0_w100_h100": "tumour",
        "x200_y100_w100_h100": "stroma",
    }


def test_annotations_name_slides_as_people_know_them(store: Store, tmp_path: Path) -> None:
    relatives = ["CMU (1).svs", "b/B.svs", "B.svs", "c/C.tif", "d/D.ndpi", "E.svs"]
    Register(store).assign(FoundSlide(tmp_path / name, name) for name in relatives)
    ids = list(Register(store).entries())
    second_b = ids[2]
    assert ids == ["CMU_1", "B", second_b, "C", "D", "E"]
    folder = tmp_path / "annotations"
    here = {}
    for slide_id, name in [
        ("CMU_1", "CMU (1).geojson"),
        ("B", "B.geojson"),
        (second_b, "B.svs.geojson"),  # its path, which goes before the other's file name
        ("C", "c/C.tif.json"),
        ("D", "D.ndpi.GeoJSON"),
    ]:
        polygon = feature(ring(0, 0, 100, 100), **classified(slide_id))
        here[slide_id] = [save(folder / name, polygon)]
    lost = save(folder / "CMU-1.geojson", feature(ring(0, 0, 9, 9), **classified("x")))
    table = folder / "site.CSV"
    table.write_text("slide,x,y,label\nE.svs,0,0,in E\nD,100,0,in D\nF,0,0,in F\n")
    here["D"].append(table)
    here["E"] = [table]
    assert find_annotations(store, folder, ids) == here
    assert find_annotations(store, folder, ["C"]) == {"C": here["C"]}
    assert unmatched_annotations(store, folder, ids) == [str(lost), f"{table}: F"]
    assert unmatched_annotations(store, folder, [*ids, "F"]) == [str(lost)]
    assert unmatched_annotations(store, None, ids) == []
    annotation = find_annotation(store, folder, "E")
    assert annotation is not None
    assert annotation.points == {(0, 0): "in E"}
    annotation = find_annotation(store, folder, second_b)
    assert annotation is not None
    assert [label for label, _ in annotation.polygons] == [second_b]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("slide,x,y\na,0,0\n", "missing: label"),
        ("slide;x;y;label\n", "missing: label, slide, x, y"),
        ("", "missing: label, slide, x, y"),
        ("slide,x,y,label\na,0,0,s\n\na,0.5,0,s\n", "line 4: x and y must be"),
        ("slide,x,y,label\na,0,,s\n", "line 2: x and y must be"),
        ("slide,x,y,label\na,0\n", "line 2: x and y must be"),
        ("slide,x,y,label\na,0,0, \n", "line 2: slide or label is empty"),
        ("slide,x,y,label\n,0,0,s\n", "line 2: slide or label is empty"),
    ],
)
def test_mistakes_in_a_csv_are_told_by_file_and_line(
    store: Store, tmp_path: Path, text: str, told: str
) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(LabelError) as caught:
        find_annotations(store, tmp_path, ["a"])
    assert str(path) in str(caught.value)
    assert told in str(caught.value)


def test_a_csv_in_another_encoding_is_named(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes("slide,x,y,label\na,0,0,Drüse\n".encode("latin-1"))
    with pytest.raises(LabelError, match=r"labels\.csv: can't be read"):
        find_annotations(store, tmp_path, ["a"])


def test_labels_of_the_table_of_tile_images(store: Store) -> None:
    for name in ("tumour/1.png", "stroma/1.png", "stroma/2.png"):
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tissue_pixels(8, 8)).save(store.root / name)
    store.tiles_csv.write_text(
        "path,slide,label\ntumour/1.png,S,tumour\nstroma/1.png,S,stroma\nstroma/2.png,S,\n"
    )
    assert find_annotations(store, None, ["S", "T"]) == {"S": [store.tiles_csv]}
    annotation, source = find_annotation(store, None, "S"), tile_source(store, "S")
    assert annotation is not None
    assert source is not None
    label_slide(store.slide("S"), source, annotation)
    table = read_table(store.slide("S").record("labels"))
    assert dict(zip(table["tile"].to_pylist(), table["label"].to_pylist(), strict=True)) == {
        "stroma/1.png": "stroma",
        "stroma/2.png": None,
        "tumour/1.png": "tumour",
    }


def test_changed_annotations_and_tiles_make_labels_due(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    folder = store.slide("a")

    def annotated(x: int) -> Annotation:
        save(path, feature(ring(x, 0, x + 100, 100), **classified("tumour")))
        annotation = find_annotation(store, tmp_path, "a")
        assert annotation is not None
        return annotation

    first = label_slide(folder, source_of(), annotated(0))
    before = folder.record("labels").read_bytes()
    label_slide(folder, source_of(), annotated(0))
    assert folder.record("labels").read_bytes() == before
    moved = label_slide(folder, source_of(), annotated(100))
    assert moved.fingerprint != first.fingerprint
    labels = read_table(folder.record("labels"))["label"].to_pylist()
    assert labels == [None, "tumour", None, None, None, None]
    assert labels_stamp(source_of(*GRID[:3]), annotated(100)).fingerprint != moved.fingerprint
    label_slide(folder, source_of(), annotated(0))
    assert folder.record("labels").read_bytes() == before


def test_annotations_that_meet_no_tile_are_refused(store: Store) -> None:
    elsewhere = Annotation("a.geojson", "1", polygons=[("tumour", box(9000, 0, 9900, 900))])
    folder = store.slide("a")
    with pytest.raises(LabelError, match=r"a\.geojson: labels none of the 6 tiles of a"):
        label_slide(folder, source_of(), elsewhere)
    assert folder.failures()["labels"]["kind"] == "LabelError"
    assert not folder.record("labels").exists()
    unplaced = TileSource(
        key_table(["1", "2"], [None, None]), upstream=lambda: "", open=source_of().open
    )
    with pytest.raises(LabelError, match="labels none of the 2 tiles"):
        label_slide(folder, unplaced, elsewhere)
    named = Annotation("tiles.csv", "1", elsewhere.polygons, names={"2": "stroma"})
    assert label_slide(folder, unplaced, named).result["labels"] == {"stroma": 1}
    assert folder.failures() == {}


def test_an_empty_slide_can_be_annotated(store: Store) -> None:
    annotation = Annotation("a.geojson", "1", polygons=[("tumour", box(0, 0, 9, 9))])
    empty = TileSource(keys_of(), upstream=lambda: "", open=source_of().open)
    assert label_slide(store.slide("a"), empty, annotation).result["labelled"] == 0


def test_the_labels_of_another_program_are_left_alone(store: Store) -> None:
    folder = store.slide("a")
    folder.path.mkdir(parents=True)
    folder.record("labels").write_bytes(b"mine")
    annotation = Annotation("a", "1", polygons=[("tumour", box(0, 0, 100, 100))])
    with pytest.raises(StoreError, match=r"labels\.parquet"):
        label_slide(folder, source_of(), annotation)
    assert folder.record("labels").read_bytes() == b"mine"
