"""Labels: annotations to one class a tile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from making import keys_of, tissue_pixels
from PIL import Image
from shapely.geometry import Polygon, box

from histoencoder_core.cli import main
from histoencoder_core.errors import LabelError, StoreError
from histoencoder_core.labels import (
    Annotation,
    Annotations,
    label_slide,
    labels_stamp,
    tables,
    why_due,
)
from histoencoder_core.labels.geojson import read_geojson
from histoencoder_core.settings import LabelSettings
from histoencoder_core.slides import FoundSlide, Register
from histoencoder_core.store import Store
from histoencoder_core.store.tables import key_table, read_table
from histoencoder_core.tiles import TileSource, tile_source

HALF = LabelSettings()
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


def polygons(path: Path) -> list[tuple[str, Any]]:
    return read_geojson(path).polygons


def labels_of(store: Store, annotation: Annotation) -> dict[str, str | None]:
    folder = store.slide("a")
    label_slide(folder, source_of(), annotation, HALF)
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
    told = {name: value for name, value in stamp.result.items() if value is not None}
    assert told == {
        "tiles": 6,
        "labelled": 3,
        "labels": {"stroma": 1, "tumour": 2},
        "by": {"area": 3},
        "rule": "the class that covers at least 50 % of a tile's area, as its tissue is not known",
        "source": "a.geojson",
        "seen": {"signature": None},
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
    annotation = Annotation("a", "1", polygons=polygons(path))
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
        [(label, geometry)] = polygons(save(tmp_path / "a.geojson", content))
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
    [(label, _)] = polygons(save(tmp_path / "a.geojson", features))
    assert label == "stroma"


def test_a_polygon_that_crosses_itself_is_mended(tmp_path: Path) -> None:
    bow_tie = [[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]
    path = save(tmp_path / "a.geojson", feature(bow_tie, **classified("tumour")))
    [(_, geometry)] = polygons(path)
    assert geometry.is_valid
    assert geometry.area == 5000


def test_objects_nested_in_one_another_as_qupath_exports_a_hierarchy(tmp_path: Path) -> None:
    """The form of QuPath's `PathObjectTypeAdapter`: children lie in the properties."""
    vessel = feature(ring(2, 2, 4, 4), **classified("vessel"))
    cell = feature(ring(5, 5, 6, 6), objectType="cell", classification={"names": ["immune", "T"]})
    cell["nucleusGeometry"] = {"type": "Polygon", "coordinates": [ring(5.2, 5.2, 5.8, 5.8)]}
    cell["properties"]["measurements"] = {"Area": float("nan")}
    stroma = feature(ring(1, 1, 9, 9), **classified("stroma"), isLocked=True, childObjects=[vessel])
    parts: list[Any] = [
        {"type": "Point", "coordinates": [0, 0]},
        {"type": "Polygon", "coordinates": [ring(20, 0, 30, 10)]},
        {"type": "MultiPolygon", "coordinates": [[ring(40, 0, 50, 10)], [ring(60, 0, 70, 10)]]},
    ]
    collection = {
        "type": "Feature",
        "geometry": {"type": "GeometryCollection", "geometries": parts},
        "properties": classified("tumour"),
    }
    core = feature(ring(0, 0, 100, 100), objectType="tmaCore", name="A-1", isMissing=False)
    core["properties"]["childObjects"] = [stroma, cell, collection]
    missing = {"objectType": "tmaCore", "isMissing": True, "classification": {"name": "tumour"}}
    gone = feature(ring(0, 0, 9, 9), **missing)
    root = {"type": "Feature", "geometry": None, "properties": {"objectType": "root"}}
    root["properties"]["childObjects"] = [core, gone]  # type: ignore[index]
    path = save(tmp_path / "a.geojson", {"type": "FeatureCollection", "features": [root]})
    found = {label: geometry.area for label, geometry in polygons(path)}
    assert found == {"stroma": 64, "vessel": 4, "immune: T": 1, "tumour": 300}


def test_special_classes_are_passed_over_and_told(store: Store, tmp_path: Path) -> None:
    special = [feature(ring(0, 0, 300, 200), **classified(name)) for name in ("Ignore*", "Region*")]
    path = save(tmp_path / "a.geojson", [*special, special[0]])
    with pytest.raises(LabelError, match=r"none of its 3 features.*Ignore\*, Region\* are passed"):
        read_geojson(path)
    save(path, [*special, special[0], feature(ring(0, 0, 100, 100), **classified("tumour"))])
    annotation = Annotations(store, tmp_path, ["a"]).of("a")
    assert annotation is not None
    assert set(labels_of(store, annotation).values()) == {"tumour", None}
    stamp = store.slide("a").stamp("labels")
    assert stamp is not None
    assert stamp.result["note"] == "passed over 2 of class Ignore*, 1 of class Region*"


def test_a_real_file_without_a_class_says_so(data: Path) -> None:
    with pytest.raises(LabelError, match=r"histoqc_holed\.geojson.*classification"):
        read_geojson(data / "odd" / "histoqc_holed.geojson")


def test_a_real_file_whose_classes_are_names(data: Path) -> None:
    found = polygons(data / "odd" / "dlup_qupath05.geojson")
    assert sorted(label for label, _ in found) == ["I", "I", "UT"]
    assert all(isinstance(geometry, Polygon) and geometry.is_valid for _, geometry in found)


def test_a_real_file_with_a_hole(data: Path, tmp_path: Path, store: Store) -> None:
    content = json.loads((data / "odd" / "histoqc_holed.geojson").read_text())
    content["properties"]["classification"] = {"name": "tissue"}
    annotation = Annotation("a", "1", polygons(save(tmp_path / "a.geojson", content)))
    inside_hole, beside_it = (12200, 17950, 64, 64), (10200, 16900, 64, 64)
    folder = store.slide("a")
    label_slide(folder, source_of(inside_hole, beside_it), annotation, HALF)
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
    said = Annotations(store, folder, ["a", "b", "c", "d"])
    assert {slide_id: said.sources(slide_id) for slide_id in said.slides()} == {
        "a": [folder / "site-1.csv"],
        "b": [folder / "site-1.csv"],
        "c": [folder / "c.json"],
    }
    assert said.of("d") is None
    annotation = said.of("a")
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
    said = Annotations(store, folder)
    assert {slide_id: said.sources(slide_id) for slide_id in said.slides()} == here
    assert said.unmatched == [str(lost), f"{table}: F"]
    assert Annotations(store, folder, ["F"]).unmatched == [str(lost)]
    assert Annotations(store, None).unmatched == []
    annotation = said.of("E")
    assert annotation is not None
    assert annotation.points == {(0, 0): "in E"}
    annotation = said.of(second_b)
    assert annotation is not None
    assert [label for label, _ in annotation.polygons] == [second_b]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("slide,x,y\na,0,0\n", "missing: label"),
        ("slide;x;y;label\n", "missing: label, slide"),
        ("", "missing: label, slide"),
        ("slide,x,label\na,0,s\n", "missing: y"),
        ("slide,x,y,label\n,0,0,s\n", "line 2: the column 'slide' is empty"),
        ("slide,x,y,label\na,0,0,Drüse\n", "can't be read"),
    ],
)
def test_what_is_wrong_with_a_whole_table_fails_no_slide_that_it_never_labelled(
    store: Store, tmp_path: Path, text: str, told: str
) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode("latin-1"))
    save(tmp_path / "a.geojson", feature(ring(0, 0, 100, 100), **classified("tumour")))
    (tmp_path / "other.csv").write_text("slide,label\nb,benign\n")
    said = Annotations(store, tmp_path, ["a", "b"])
    [fault] = said.faults
    assert str(path) in fault
    assert told in fault
    assert said.slides() == ["a", "b"]
    annotation = said.of("a")
    assert annotation is not None
    assert annotation.source == "a.geojson"


def test_a_table_that_breaks_fails_the_slides_that_have_labels_from_it(
    store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "labels.csv"
    good = "slide,x,y,label\na,0,0,stroma\n"
    path.write_text(good)
    save(tmp_path / "a.geojson", feature(ring(0, 0, 100, 100), **classified("tumour")))
    save(tmp_path / "b.geojson", feature(ring(0, 0, 100, 100), **classified("tumour")))
    annotation = Annotations(store, tmp_path, ["a", "b"]).of("a")
    assert annotation is not None
    label_slide(store.slide("a"), source_of(), annotation, HALF)
    path.write_text("slide;x;y;label\na;0;0;stroma\n")
    said = Annotations(store, tmp_path, ["a", "b"])
    assert said.signature("a") != annotation.signature
    with pytest.raises(LabelError, match=r"labels\.csv: needs the columns"):
        said.of("a")
    assert said.of("b") is not None
    path.write_text(good)
    mended = Annotations(store, tmp_path, ["a", "b"])
    assert mended.signature("a") == annotation.signature
    assert mended.of("a") == annotation


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("a,,,0,0,s\na,,,0.5,0,s", "line 4: x and y must be"),
        ("a,,,0,,s", "line 3: x and y must be"),
        ("a,,", "line 3: the label is empty"),
        ("a,,,0,0, ", "line 3: the label is empty"),
        ("a,,,0,0,s\na,,,0,0,t", "line 4: labels the tile at (0, 0) 't', but another row 's'"),
        ("a,1,,,,s\na,1,,,,t", "line 4: labels tile 1 't', but another row 's'"),
    ],
)
def test_a_broken_row_fails_its_own_slide(
    store: Store, tmp_path: Path, rows: str, told: str
) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(f"slide,tile,remark,x,y,label\nb,,,0,0,stroma\n{rows}\n")
    said = Annotations(store, tmp_path, ["a", "b"])
    assert (said.slides(), said.faults) == (["a", "b"], [])
    with pytest.raises(LabelError) as caught:
        said.of("a")
    assert f"{path}, {told}" in str(caught.value)
    good = said.of("b")
    assert good is not None
    assert good.points == {(0, 0): "stroma"}


def test_labels_of_whole_slides_and_of_tiles_by_name(store: Store, tmp_path: Path) -> None:
    """What is said of a tile wins over what is drawn, and that over what is said of the slide."""
    (tmp_path / "slides.csv").write_text("slide,label\na,benign\nb,cancer\na,benign\n")
    (tmp_path / "tiles.csv").write_text(
        "tile,label,slide\nx0_y0_w100_h100,vessel,a\nx7_y0_w100_h100,vessel,a\n"
    )
    (tmp_path / "corners.csv").write_text("slide,x,y,label\na,100,0,nerve\n")
    drawn = feature(ring(0, 0, 300, 100), **classified("stroma"))
    save(tmp_path / "a.geojson", drawn)
    said = Annotations(store, tmp_path, ["a", "b"])
    annotation = said.of("a")
    assert annotation is not None
    assert annotation.source == "a.geojson, corners.csv, slides.csv, tiles.csv"
    assert labels_of(store, annotation) == {
        "x0_y0_w100_h100": "vessel",
        "x100_y0_w100_h100": "nerve",
        "x200_y0_w100_h100": "stroma",
        "x0_y100_w100_h100": "benign",
        "x100_y100_w100_h100": "benign",
        "x200_y100_w100_h100": "benign",
    }
    stamp = store.slide("a").stamp("labels")
    assert stamp is not None
    assert stamp.result["by"] == {"area": 1, "slide": 3, "tile": 2}
    assert stamp.result["rows_without_tile"] == 1
    weak = said.of("b")
    assert weak is not None
    assert set(labels_of(store, weak).values()) == {"cancer"}
    stamp = store.slide("a").stamp("labels")
    assert stamp is not None
    assert "min_share" not in stamp.made_from, "nothing was measured"
    assert stamp.result["rule"] is None


def test_a_label_that_a_whole_slide_cannot_have_twice(store: Store, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("slide,label\na,benign\nb,benign\n")
    (tmp_path / "two.csv").write_text("slide,label\na,cancer\n")
    said = Annotations(store, tmp_path, ["a", "b"])
    with pytest.raises(LabelError, match=r"two\.csv: labels the slide 'cancer', .* 'benign'"):
        said.of("a")
    assert said.of("b") is not None


def test_a_table_is_read_once_for_all_slides_and_not_at_all_to_tell_what_changed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    rows = tables._rows

    def counting(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
        read.append(path)
        return rows(path)

    monkeypatch.setattr(tables, "_rows", counting)
    slides = [f"s{i}" for i in range(20)]
    path = tmp_path / "labels.csv"
    path.write_text("slide,label\n" + "".join(f"{name},benign\n" for name in slides))
    before = Annotations(store, tmp_path, slides)
    signs = {name: before.signature(name) for name in slides}
    again = Annotations(store, tmp_path, slides)
    assert signs == {name: again.signature(name) for name in slides}
    assert len(read) == 1
    assert all(again.of(name) for name in slides)
    assert len(read) == 2
    path.write_text(path.read_text().replace("s7,benign", "s7,cancer") + "s3,benign\n")
    changed = Annotations(store, tmp_path, slides)
    assert {name for name in slides if changed.signature(name) != signs[name]} == {"s3", "s7"}


def test_labels_whose_annotation_is_gone_are_withdrawn_and_come_back(
    store: Store, tmp_path: Path
) -> None:
    folder = store.slide("a")
    annotation = Annotation("a.geojson", "1", polygons=[("tumour", box(0, 0, 100, 100))])
    first = label_slide(folder, source_of(), annotation, HALF)
    assert folder.file("thumbnail_labels.jpeg").exists()
    before = folder.record("labels").read_bytes()
    folder.withdraw("labels")
    assert not folder.record("labels").exists()
    assert not folder.file("thumbnail_labels.jpeg").exists()
    folder.withdraw("labels")
    again = label_slide(folder, source_of(), annotation, HALF)
    assert (again.fingerprint, again.made_now) == (first.fingerprint, False)
    assert folder.record("labels").read_bytes() == before
    assert folder.file("thumbnail_labels.jpeg").exists()
    folder.record("labels").write_bytes(b"mine")
    folder.withdraw("labels")
    assert folder.record("labels").read_bytes() == b"mine"


def test_labels_of_the_table_of_tile_images(store: Store) -> None:
    for name in ("tumour/1.png", "stroma/1.png", "stroma/2.png"):
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tissue_pixels(8, 8)).save(store.root / name)
    store.tiles_csv.write_text(
        "path,slide,label\ntumour/1.png,S,tumour\nstroma/1.png,S,stroma\nstroma/2.png,S,\n"
    )
    said = Annotations(store, None, ["S", "T"])
    assert {slide_id: said.sources(slide_id) for slide_id in said.slides()} == {
        "S": [store.tiles_csv]
    }
    annotation, source = said.of("S"), tile_source(store, "S")
    assert annotation is not None
    assert source is not None
    label_slide(store.slide("S"), source, annotation, HALF)
    table = read_table(store.slide("S").record("labels"))
    assert dict(zip(table["tile"].to_pylist(), table["label"].to_pylist(), strict=True)) == {
        "stroma/1.png": "stroma",
        "stroma/2.png": None,
        "tumour/1.png": "tumour",
    }
    assert why_due(store.slide("S"), source, said) is None
    text = store.tiles_csv.read_text()
    for changed, told in ((text.replace("S,tumour", "S,fat"), "changed"), ("path\n", "is gone")):
        store.tiles_csv.write_text(changed)
        again = Annotations(store, None)
        assert told in str(why_due(store.slide("S"), source, again))


def test_changed_annotations_and_tiles_make_labels_due(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    folder = store.slide("a")

    def annotated(x: int) -> Annotation:
        save(path, feature(ring(x, 0, x + 100, 100), **classified("tumour")))
        annotation = Annotations(store, tmp_path, ["a"]).of("a")
        assert annotation is not None
        return annotation

    first = label_slide(folder, source_of(), annotated(0), HALF)
    before = folder.record("labels").read_bytes()
    label_slide(folder, source_of(), annotated(0), HALF)
    assert folder.record("labels").read_bytes() == before
    moved = label_slide(folder, source_of(), annotated(100), HALF)
    assert moved.fingerprint != first.fingerprint
    labels = read_table(folder.record("labels"))["label"].to_pylist()
    assert labels == [None, "tumour", None, None, None, None]
    assert (
        labels_stamp(folder, source_of(*GRID[:3]), annotated(100), HALF).fingerprint
        != moved.fingerprint
    )
    label_slide(folder, source_of(), annotated(0), HALF)
    assert folder.record("labels").read_bytes() == before


def test_annotations_that_meet_no_tile_are_refused(store: Store) -> None:
    elsewhere = Annotation("a.geojson", "1", polygons=[("tumour", box(9000, 0, 9900, 900))])
    folder = store.slide("a")
    with pytest.raises(LabelError, match=r"a\.geojson: labels none of the 6 tiles of a"):
        label_slide(folder, source_of(), elsewhere, HALF)
    assert folder.failures()["labels"]["kind"] == "labels"
    assert not folder.record("labels").exists()
    unplaced = TileSource(
        key_table(["1", "2"], [None, None]), upstream=lambda: "", open=source_of().open
    )
    with pytest.raises(LabelError, match="labels none of the 2 tiles"):
        label_slide(folder, unplaced, elsewhere, HALF)
    named = Annotation("tiles.csv", "1", elsewhere.polygons, names={"2": "stroma"})
    assert label_slide(folder, unplaced, named, HALF).result["labels"] == {"stroma": 1}
    assert folder.failures() == {}


def test_an_empty_slide_can_be_annotated(store: Store) -> None:
    annotation = Annotation("a.geojson", "1", polygons=[("tumour", box(0, 0, 9, 9))])
    empty = TileSource(keys_of(), upstream=lambda: "", open=source_of().open)
    assert label_slide(store.slide("a"), empty, annotation, HALF).result["labelled"] == 0


def test_the_labels_of_another_program_are_left_alone(store: Store) -> None:
    folder = store.slide("a")
    folder.path.mkdir(parents=True)
    folder.record("labels").write_bytes(b"mine")
    annotation = Annotation("a", "1", polygons=[("tumour", box(0, 0, 100, 100))])
    with pytest.raises(StoreError, match=r"labels\.parquet"):
        label_slide(folder, source_of(), annotation, HALF)
    assert folder.record("labels").read_bytes() == b"mine"


def test_the_command_warns_of_what_it_can_not_use_and_labels_the_rest(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bare_environment: None,
) -> None:
    monkeypatch.setattr("histoencoder_core.cli.stages._publish", lambda *_, **__: None)
    for slide_id in "abc":
        for x in (0, 8):
            path = store.slide(slide_id).file(f"x{x}_y0_w8_h8.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(tissue_pixels(8, 8)).save(path)
    folder = tmp_path / "annotations"
    special = feature(ring(0, 0, 8, 8), **classified("Ignore*"))
    save(folder / "a.geojson", [feature(ring(0, 0, 6, 8), **classified("tumour")), special])
    save(folder / "c-1.geojson", feature(ring(0, 0, 8, 8), **classified("tumour")))
    (folder / "tiles.csv").write_text("slide,x,y,label\nb,0,zero,tumour\n")
    (folder / "broken.csv").write_text("slide;label\n")

    def label(*more: str) -> tuple[int, str, str]:
        words = ["histoencoder", "label", "-i", str(store.root), "--annotations", str(folder)]
        monkeypatch.setattr("sys.argv", [*words, *more])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    code, out, error = label("--min-share", "0.7")
    assert code == 1
    assert "a: 1 labelled (passed over 1 of class Ignore*)" in out
    assert "tiles.csv, line 2: x and y must be" in error
    assert "c-1.geojson: matches no slide with tiles" in error
    assert "broken.csv: needs the columns" in error
    assert store.slide("b").failures()["labels"]["kind"] == "labels"
    (folder / "tiles.csv").unlink()
    code, _, error = label("--min-share", "0.8")
    assert (code, "labels none of the 2 tiles of a" in error) == (1, True)
    (folder / "a.geojson").rename(folder / "c.geojson")
    code, _, error = label()
    assert code == 0
    assert "a: has labels, but no annotation in" in error
    assert store.slide("a").record("labels").exists()
