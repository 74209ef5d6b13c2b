"""Annotation by cluster: what clusters mean, slides annotated by it, and how well that works."""

from __future__ import annotations

import json
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from making import contents, description, keys_of, stamp_of
from shapely.geometry import shape
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from histoencoder_core.annotate import (
    annotate_slide,
    derive_labels,
    ensure_evaluation,
    evaluation,
    read_evaluation,
)
from histoencoder_core.annotate.evaluation import evaluation_path, split_groups
from histoencoder_core.annotate.polygons import as_geojson, merge, own_parts
from histoencoder_core.cli import main
from histoencoder_core.clusters import assign_slide, current_model, feature_files, save_model
from histoencoder_core.clusters import fit as fitting_module
from histoencoder_core.clusters.fit import fit_clusters
from histoencoder_core.clusters.naming import (
    ClusterLabels,
    NamedCluster,
    annotations_stamp,
    current_cluster_labels,
    derived_path,
    write_derived,
)
from histoencoder_core.cohort import build_catalog
from histoencoder_core.colours import label_colours
from histoencoder_core.errors import ClusterError, LabelError, SettingsError, StoreError
from histoencoder_core.settings import AnnotationSettings, ClusterSettings
from histoencoder_core.store import SlideFolder, Stamp, Store, layout
from histoencoder_core.store.tables import feature_list, read_table

SIDE = 100
LENGTH = 6
WIDTH, HEIGHT = 1000, 5000

Label = str | None


def grid(count: int, *, columns: int = 10) -> list[tuple[int, int, int, int]]:
    return [(SIDE * (i % columns), SIDE * (i // columns), SIDE, SIDE) for i in range(count)]


def boxes_of(parts: np.ndarray) -> np.ndarray:
    drawn: np.ndarray = shapely.box(*parts.T)
    return drawn


# Polygons ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [100, 50, 25, 33])
def test_tiles_of_a_grid_own_one_step_around_their_centres(step: int) -> None:
    column, row = (a.ravel() for a in np.meshgrid(np.arange(15), np.arange(20)))
    away = np.hypot((column - 7) / 7, (row - 10) / 10)
    tissue = (away < 1) & (away > 0.25) & (column != 9)  # a ring, and a gap through it
    places = np.stack([column * step, row * step, *[np.full(300, 100)] * 2], axis=1)[tissue]
    parts = own_parts(places)
    start = places[:, :2] + (100 - step) // 2
    assert np.array_equal(parts, np.concatenate([start, start + step], axis=1))
    assert_apart(parts)


def assert_apart(parts: np.ndarray) -> None:
    drawn = boxes_of(parts)
    assert shapely.area(drawn).sum() == shapely.union_all(drawn).area


@pytest.mark.parametrize("seed", range(5))
def test_tiles_at_any_place_are_cut_half_way(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = np.concatenate([rng.integers(0, 600, (80, 2)), rng.integers(60, 140, (80, 2))], axis=1)
    parts = own_parts(places)
    assert_apart(parts)
    assert shapely.covers(boxes_of(np.c_[places[:, :2], places[:, :2] + places[:, 2:]]),
                          boxes_of(parts)).all()  # fmt: skip
    centre = 2 * places[:, :2] + places[:, 2:]
    assert ((2 * parts[:, :2] - 1 <= centre) & (centre <= 2 * parts[:, 2:] + 1)).all()


def test_parts_by_hand() -> None:
    assert own_parts(np.empty((0, 4), np.int64)).shape == (0, 4)
    alone = own_parts(np.array([[10, 20, 100, 60]]))
    assert alone.tolist() == [[10, 20, 110, 80]]
    two = own_parts(np.array([[0, 0, 100, 100], [60, 0, 100, 100], [60, 0, 100, 100]]))
    assert two[:2].tolist() == [[0, 0, 80, 100], [80, 0, 160, 100]]
    assert (two[2, 2:] == two[2, :2]).all()
    beyond = own_parts(np.array([[0, 0, 100, 100], [100, 0, 100, 100]]), (150, 70))
    assert beyond.tolist() == [[0, 0, 100, 70], [100, 0, 150, 70]]


def test_merged_boxes_have_holes_and_corners_only() -> None:
    ring = [(x, y) for y in range(3) for x in range(3) if (x, y) != (1, 1)]
    apart = [(4, 4), (5, 5)]  # touch in a corner
    parts = np.array([(10 * x, 10 * y, 10 * x + 10, 10 * y + 10) for x, y in ring + apart])
    merged = merge(np.random.default_rng(0).permutation(parts))
    assert merged.is_valid
    assert shapely.equals_exact(merged, merge(parts))
    assert merged.area == 10 * 100
    written = as_geojson(merged)
    assert written["type"] == "MultiPolygon"
    holed, *squares = sorted(written["coordinates"], key=len, reverse=True)
    assert [len(r) for r in holed] == [5, 5]
    assert [[len(r) for r in square] for square in squares] == [[5], [5]]
    assert sorted(map(tuple, holed[1][:-1])) == [(10, 10), (10, 20), (20, 10), (20, 20)]


# A slide -----------------------------------------------------------------------------------------


def write_description(store: Store, slide: str, **facts: str) -> None:
    """What the slides stage writes, and a thumbnail of white."""
    told = description(slide=slide, width=WIDTH, height=HEIGHT, facts=facts)
    stamp = stamp_of(slide, "slides")
    with store.slide(slide).writing("slides") as writer:
        writer.image(layout.THUMBNAIL, np.full((500, 100, 3), 255, np.uint8), stamp)
        writer.json(asdict(told), stamp)


def write_clusters(
    store: Store,
    slide: str,
    places: Sequence[tuple[int, int, int, int]],
    clusters: Sequence[int | None],
    *,
    k: int = 4,
    model: str = "m1",
    untrained: bool = False,
) -> SlideFolder:
    folder = store.slide(slide)
    stamp = Stamp.of(
        "clusters",
        algorithm=1,
        made_from={"features": repr(clusters), "model": model},
        untrained=untrained,
    )
    table = keys_of(*places).append_column(f"n_clusters={k}", pa.array(clusters, pa.int32()))
    with folder.writing("clusters") as writer:
        writer.table(table, stamp)
    return folder


MEANING: dict[int, Label] = {0: "tumour", 1: "stroma", 2: None, 3: "tumour"}
LABELS = ClusterLabels("m1", 4, MEANING, "derived", {0: 0.9, 1: 0.8, 3: 0.7})


@pytest.fixture
def annotated(store: Store) -> tuple[SlideFolder, dict[str, Any], list[dict[str, Any]]]:
    """Half-overlapping tiles over a whole slide; its folder, the GeoJSON and the table."""
    rng = np.random.default_rng(3)
    places = [(x, y, SIDE, SIDE) for y in range(0, 1000, 50) for x in range(0, WIDTH, 50)]
    clusters: list[int | None] = rng.choice(4, len(places), p=[0.5, 0.2, 0.2, 0.1]).tolist()
    clusters[7] = None  # unreadable
    for i in range(len(places)):  # a tile of stroma, and one that abstains, amid tumour
        x, y = places[i][:2]
        if 300 <= x <= 500 and 300 <= y <= 500:
            clusters[i] = 0
    clusters[places.index((350, 400, SIDE, SIDE))] = 1
    clusters[places.index((450, 400, SIDE, SIDE))] = 2
    write_description(store, "a")
    folder = write_clusters(store, "a", places, clusters)
    assert annotate_slide(folder, LABELS).made_now
    told = json.loads(folder.file(layout.ANNOTATIONS_GEOJSON).read_text("utf-8"))
    return folder, told, read_table(folder.record("annotations")).to_pylist()


def rings(geometry: dict[str, Any]) -> Iterator[tuple[bool, list[list[float]]]]:
    parts = geometry["coordinates"]
    for part in parts if geometry["type"] == "MultiPolygon" else [parts]:
        for i, ring in enumerate(part):
            yield i == 0, ring


def test_geojson_has_the_form_that_qupath_documents(annotated: Any) -> None:
    folder, told, _ = annotated
    assert told["type"] == "FeatureCollection"
    colours = label_colours(["stroma", "tumour"])
    assert len(told["features"]) == 2
    for feature, label in zip(told["features"], ["stroma", "tumour"], strict=True):
        assert feature["type"] == "Feature"
        assert uuid.UUID(feature["id"]).version == 5
        properties = feature["properties"]
        assert properties["objectType"] == "annotation"
        assert properties["classification"] == {"name": label, "color": list(colours[label])}
        assert properties["isLocked"] is False
        assert "name" not in properties
        assert all(isinstance(v, (int, float)) for v in properties["measurements"].values())
        assert all(isinstance(v, str) for v in properties["metadata"].values())
        assert feature["geometry"]["type"] in {"Polygon", "MultiPolygon"}
        for outer, ring in rings(feature["geometry"]):
            assert len(ring) >= 4
            assert ring[0] == ring[-1]
            assert all(isinstance(value, int) for corner in ring for value in corner)
            assert shapely.is_ccw(shapely.LinearRing(ring)) == outer
    assert len({feature["id"] for feature in told["features"]}) == 2
    stamp = folder.stamp("annotations")
    assert told["histoencoder"]["fingerprint"] == stamp.fingerprint


def test_polygons_are_the_tiles_that_have_the_label(annotated: Any) -> None:
    _, told, rows = annotated
    shapes = {f["properties"]["classification"]["name"]: shape(f["geometry"])
              for f in told["features"]}  # fmt: skip
    assert all(geometry.is_valid for geometry in shapes.values())
    assert shapes["tumour"].intersection(shapes["stroma"]).area == 0
    bounds = shapely.box(0, 0, WIDTH, HEIGHT)
    assert all(bounds.covers(geometry) for geometry in shapes.values())
    for row in rows:
        centre = shapely.Point(row["x"] + SIDE / 2, row["y"] + SIDE / 2)
        if bounds.contains(centre):
            found = [label for label, geometry in shapes.items() if geometry.contains(centre)]
            assert found == ([] if row["label"] is None else [row["label"]])
    for label, geometry in shapes.items():
        mine = [row for row in rows if row["label"] == label]
        # Each tile owns a step of 50 pixels around its centre, as far as the slide reaches.
        own = [shapely.box(r["x"] + 25, r["y"] + 25, r["x"] + 75, r["y"] + 75) for r in mine]
        union = shapely.union_all(own).intersection(bounds)
        assert geometry.equals(union)
        measured = next(f["properties"]["measurements"] for f in told["features"]
                        if f["properties"]["classification"]["name"] == label)  # fmt: skip
        assert measured["Annotated area µm^2"] == pytest.approx(union.area * 0.25**2, abs=0.01)
        outside = [not bounds.intersects(box.buffer(-1)) for box in own]
        assert measured["Tiles"] == len(mine) - sum(outside)
    holes = [shapely.Polygon(ring) for outer, ring in rings(told["features"][1]["geometry"])
             if not outer]  # fmt: skip
    # The abstaining tile, the only one of its kind there, is a hole.
    assert any(hole.equals(shapely.box(475, 425, 525, 475)) for hole in holes)


def test_table_of_annotations(annotated: Any) -> None:
    folder, _, rows = annotated
    names = ["tile", "x", "y", "w", "h", "cluster", "label", "purity"]
    assert read_table(folder.record("annotations")).column_names == names
    for row in rows:
        label = None if row["cluster"] is None else MEANING[row["cluster"]]
        assert row["label"] == label
        share = LABELS.purity.get(row["cluster"]) if label is not None else None
        assert row["purity"] == (None if share is None else pytest.approx(share))
    stamp = folder.stamp("annotations")
    counts = Counter(row["label"] for row in rows)
    said = counts["stroma"] + counts["tumour"]
    assert stamp.result["tiles"] == len(rows) == 400
    assert stamp.result["annotated"] == said
    assert stamp.result["coverage"] == pytest.approx(said / 400, abs=1e-4)
    assert stamp.result["labels"] == {"stroma": counts["stroma"], "tumour": counts["tumour"]}
    assert stamp.made_from == {
        "clusters": folder.stamp("clusters").fingerprint,
        "cluster_labels": LABELS.fingerprint,
    }
    assert folder.file(layout.THUMBNAIL_ANNOTATIONS).exists()
    assert "agreement" not in stamp.result


def test_annotating_again_makes_nothing(annotated: Any) -> None:
    folder, _, _ = annotated
    before = contents(folder.path)
    assert not annotate_slide(folder, LABELS).made_now
    # Another purity alone is no other annotation.
    assert not annotate_slide(folder, ClusterLabels("m1", 4, MEANING, "edited")).made_now
    assert contents(folder.path) == before
    other = ClusterLabels("m1", 4, {**MEANING, 2: "mucus"})
    assert annotate_slide(folder, other).made_now
    told = json.loads(folder.file(layout.ANNOTATIONS_GEOJSON).read_text("utf-8"))
    named = [feature["properties"]["classification"]["name"] for feature in told["features"]]
    assert named == ["mucus", "stroma", "tumour"]
    assert not annotate_slide(folder, LABELS).made_now  # kept as a version
    shutil.rmtree(folder.path / "versions")
    made = {name: data for name, data in contents(folder.path).items() if name.endswith("geojson")}
    assert made == {name: before[name] for name in made}


def test_a_slide_of_which_nothing_is_said(store: Store) -> None:
    folder = write_clusters(store, "a", grid(6), [2, 2, None, 2, 2, 2])
    stamp = annotate_slide(folder, LABELS)
    assert (stamp.result["coverage"], stamp.result["labels"]) == (0, {})
    told = json.loads(folder.file(layout.ANNOTATIONS_GEOJSON).read_text("utf-8"))
    assert told["features"] == []
    assert not folder.file(layout.THUMBNAIL_ANNOTATIONS).exists()
    none = annotate_slide(write_clusters(store, "b", [], []), LABELS)
    assert (none.result["tiles"], none.result["coverage"]) == (0, None)


def test_tiles_without_a_place_have_no_polygon(store: Store) -> None:
    folder = write_clusters(store, "a", grid(3), [0, 0, 1])
    table = pq.read_table(folder.record("clusters"))
    for name in "xywh":
        values = [None, *table.column(name).to_pylist()[1:]]
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(values, pa.int32()))
    pq.write_table(table, folder.record("clusters"))
    stamp = annotate_slide(folder, LABELS)
    assert stamp.result["annotated"] == 3
    told = json.loads(folder.file(layout.ANNOTATIONS_GEOJSON).read_text("utf-8"))
    areas = [shape(feature["geometry"]).area for feature in told["features"]]
    assert areas == [SIDE * SIDE, SIDE * SIDE]
    # No slide was described: nothing is known of its resolution.
    assert "Annotated area µm^2" not in told["features"][0]["properties"]["measurements"]


def test_an_untrained_encoder_is_told_everywhere(store: Store) -> None:
    write_description(store, "a")
    trained = write_clusters(store, "a", grid(4), [0, 0, 1, 2])
    annotate_slide(trained, LABELS)
    plain = trained.file(layout.THUMBNAIL_ANNOTATIONS).read_bytes()
    folder = write_clusters(store, "a", grid(4), [0, 0, 1, 2], model="m2", untrained=True)
    stamp = annotate_slide(folder, ClusterLabels("m2", 4, MEANING))
    assert stamp.untrained
    told = json.loads(folder.file(layout.ANNOTATIONS_GEOJSON).read_text("utf-8"))
    assert told["histoencoder"]["untrained"]
    for feature in told["features"]:
        assert "UNTRAINED" in feature["properties"]["name"]
        assert "UNTRAINED" in feature["properties"]["metadata"]["Encoder"]
        assert "UNTRAINED" not in feature["properties"]["classification"]["name"]
    assert folder.file(layout.THUMBNAIL_ANNOTATIONS).read_bytes() != plain


def test_clusters_that_do_not_fit_are_refused(store: Store) -> None:
    with pytest.raises(ClusterError, match="histoencoder cluster"):
        annotate_slide(store.slide("a"), LABELS)
    folder = write_clusters(store, "a", grid(4), [0, 0, 1, 2], model="old")
    with pytest.raises(ClusterError, match="is of cluster model old, but the labels are of m1"):
        annotate_slide(folder, LABELS)
    assert "model old" in folder.failures()["annotations"]["reason"]
    assert annotate_slide(folder, ClusterLabels("old", 4, MEANING)).made_now
    assert folder.failures() == {}


# What clusters mean ------------------------------------------------------------------------------


def centre_of(blob: int) -> np.ndarray:
    return np.random.default_rng([9, blob]).normal(0, 8, LENGTH)


def write_slide(
    store: Store,
    slide: str,
    blobs: Sequence[int],
    labels: Sequence[Label] = (),
    *,
    untrained: bool = False,
    **facts: str,
) -> None:
    """A slide whose tiles' features lie around the centres of blobs."""
    rng = np.random.default_rng([len(slide), *slide.encode()])
    features = np.array([centre_of(blob) for blob in blobs]) + rng.normal(
        0, 0.3, (len(blobs), LENGTH)
    )
    write_description(store, slide, **facts)
    write_features(store, slide, features.astype(np.float32), untrained=untrained)
    if labels:
        write_labels(store, slide, labels)


def write_features(
    store: Store, slide: str, features: np.ndarray, *, untrained: bool = False
) -> None:
    stamp = Stamp.of(
        "features",
        algorithm=layout.FEATURES_ALGORITHM,
        made_from={"tiles": repr(features), "encoder": {"name": "toy"}},
        untrained=untrained,
    ).with_result(space="toy", encoder="toy", tiles=len(features))
    keys = keys_of(*grid(len(features)))
    with store.slide(slide).writing("features") as writer:
        writer.table(keys.append_column("features", feature_list(features, "float32")), stamp)


def write_labels(store: Store, slide: str, labels: Sequence[Label]) -> None:
    stamp = Stamp.of("labels", algorithm=1, made_from={"labels": list(labels)})
    table = keys_of(*grid(len(labels))).append_column("label", pa.array(labels, pa.string()))
    shares = [None if label is None else 1.0 for label in labels]
    with store.slide(slide).writing("labels") as writer:
        writer.table(table.append_column("share", pa.array(shares, pa.float32())), stamp)


def cluster(store: Store, *n_clusters: int) -> str:
    """Fit a model, assign every slide, build the catalog; gives the model's version."""
    settings = ClusterSettings(n_clusters=n_clusters)
    save_model(store, fit_clusters(feature_files(store), settings))
    model = current_model(store)
    assert model is not None
    for slide in store.slide_ids():
        assign_slide(store.slide(slide), model)
    build_catalog(store)
    return model.version


def cluster_of(store: Store, slide: str, k: int) -> list[int]:
    found: list[int] = (
        read_table(store.slide(slide).record("clusters")).column(f"n_clusters={k}").to_pylist()
    )
    return found


@pytest.fixture
def named(store: Store) -> Store:
    """Four blobs of known labels: 3 of 4 tumour, 5 stroma, half and half of ten, four of mucus."""
    write_slide(
        store,
        "a",
        [0] * 4 + [1] * 5 + [2] * 10 + [3] * 4,
        ["tumour"] * 3 + ["stroma"] + ["stroma"] * 5 + ["tumour", "stroma"] * 5 + ["mucus"] * 4,
    )
    write_slide(store, "b", [0] * 4 + [3] * 2 + [1] * 3)
    return store


def test_clusters_are_named_by_hand(named: Store) -> None:
    version = cluster(named, 2, 4)
    blob = dict(zip(cluster_of(named, "a", 4), [0] * 4 + [1] * 5 + [2] * 10 + [3] * 4, strict=True))
    rows = derive_labels(named, AnnotationSettings(min_purity=0.75, min_labelled=4))
    expected = {
        0: ("tumour", "tumour", 0.75, 4, 8, 2),
        1: ("stroma", "stroma", 1.0, 5, 8, 2),
        2: (None, "stroma", 0.5, 10, 10, 1),
        3: ("mucus", "mucus", 1.0, 4, 6, 2),
    }
    assert rows == [NamedCluster(c, *expected[blob[c]]) for c in range(4)]
    labels = current_cluster_labels(named, AnnotationSettings())
    assert labels is not None
    assert (labels.model, labels.k, labels.source) == (version, 4, "derived")
    assert labels.labels == {c: expected[blob[c]][0] for c in range(4)}
    assert labels.names == ["mucus", "stroma", "tumour"]
    assert labels.purity == {c: expected[blob[c]][2] for c in range(4) if blob[c] != 2}


@pytest.mark.parametrize(
    ("purity", "labelled", "names"),
    [
        (0.5, 1, ["mucus", "stroma", "tumour"]),
        (0.75, 5, ["stroma"]),
        (0.7501, 4, ["mucus", "stroma"]),
        (1.0, 6, []),
    ],
)
def test_abstention(named: Store, purity: float, labelled: int, names: list[str]) -> None:
    cluster(named, 4)
    rows = derive_labels(named, AnnotationSettings(min_purity=purity, min_labelled=labelled))
    assert sorted({row.label for row in rows if row.label is not None}) == names


def test_k_is_the_one_asked_for(named: Store) -> None:
    cluster(named, 2, 4)
    assert len(derive_labels(named, AnnotationSettings(n_clusters=2))) == 2
    labels = current_cluster_labels(named, AnnotationSettings(n_clusters=2))
    assert labels is not None
    assert labels.k == 2
    assert current_cluster_labels(named, AnnotationSettings()) is None  # not derived yet
    assert current_cluster_labels(named, None) == labels  # the last one will do
    derive_labels(named, AnnotationSettings())
    derive_labels(named, AnnotationSettings(n_clusters=2))
    assert current_cluster_labels(named, None) == labels
    with pytest.raises(SettingsError, match=r"K = 3, which cluster model \w+ does not have.* 2, 4"):
        derive_labels(named, AnnotationSettings(n_clusters=3))
    shutil.copy(derived_path(named, labels.model, 4), named.cluster_labels_csv)
    edited = current_cluster_labels(named, None)
    assert edited is not None
    assert edited.k == 4
    named.cluster_labels_csv.unlink()
    cluster(named, 4)
    assert current_cluster_labels(named, None) is None  # that was of the model before


def test_what_is_needed_first_is_told(named: Store) -> None:
    with pytest.raises(ClusterError, match="no cluster model yet"):
        derive_labels(named, AnnotationSettings())
    assert current_cluster_labels(named, AnnotationSettings()) is None
    cluster(named, 4)
    save_model(named, fit_clusters(feature_files(named), ClusterSettings(n_clusters=(3,))))
    with pytest.raises(StoreError, match="Refresh it"):
        derive_labels(named, AnnotationSettings())


def test_the_table_is_written_only_when_it_changes(named: Store) -> None:
    version = cluster(named, 4)
    derive_labels(named, AnnotationSettings())
    path = derived_path(named, version, 4)
    before = path.stat().st_ino, path.stat().st_mtime_ns
    derive_labels(named, AnnotationSettings())
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    derive_labels(named, AnnotationSettings(min_labelled=6))
    assert path.stat().st_ino != before[0]
    assert path.read_bytes().startswith(b"\xef\xbb\xbfmodel,k,cluster,label,")


# The edited table --------------------------------------------------------------------------------


@pytest.fixture
def editable(named: Store) -> tuple[Store, str]:
    version = cluster(named, 2, 4)
    derive_labels(named, AnnotationSettings(min_labelled=4))
    return named, version


def test_a_copy_of_the_derived_table_says_the_same(editable: tuple[Store, str]) -> None:
    store, version = editable
    derived = current_cluster_labels(store, AnnotationSettings())
    shutil.copy(derived_path(store, version, 4), store.cluster_labels_csv)
    edited = current_cluster_labels(store, AnnotationSettings())
    assert derived is not None
    assert edited is not None
    assert (derived.source, edited.source) == ("derived", "edited")
    assert (edited.labels, edited.purity) == (derived.labels, derived.purity)
    assert edited.fingerprint == derived.fingerprint


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_edited_rows_win_and_the_others_stay(
    editable: tuple[Store, str], encoding: str, delimiter: str, newline: str
) -> None:
    store, version = editable
    before = current_cluster_labels(store, AnnotationSettings())
    assert before is not None
    by_label = {label: c for c, label in before.labels.items()}
    lines = [
        ["Model", "K", " cluster ", "label", "comment", "purity"],
        [version, "4", str(by_label["mucus"]), "", "folded", "0,5"],
        [f"model-{version}", "4", str(by_label[None]), " kürettage ", "", ""],
        ["", "", "", "", "", ""],
    ]
    text = newline.join(delimiter.join(line) for line in lines) + newline
    store.cluster_labels_csv.write_bytes(text.encode(encoding))
    labels = current_cluster_labels(store, AnnotationSettings())
    assert labels is not None
    assert labels.labels == {
        **before.labels,
        by_label["mucus"]: None,
        by_label[None]: "kürettage",
    }
    # What is known of a derived label is not said of another.
    assert set(labels.purity) == {by_label["stroma"], by_label["tumour"]}
    assert labels.fingerprint != before.fingerprint
    # The derived table does not depend on it.
    assert [row.label for row in derive_labels(store, AnnotationSettings(min_labelled=4))] == [
        before.labels[c] for c in range(4)
    ]


def test_the_edited_table_chooses_k_and_needs_no_labelled_slide(store: Store) -> None:
    write_slide(store, "a", [0] * 4 + [1] * 4)
    version = cluster(store, 2, 4)
    store.cluster_labels_csv.write_text(f"model,k,cluster,label\n{version},2,1,tumour\n")
    labels = current_cluster_labels(store, AnnotationSettings())
    assert labels is not None
    assert (labels.k, labels.labels, labels.purity) == (2, {0: None, 1: "tumour"}, {})
    assert len(derive_labels(store, AnnotationSettings())) == 2


HEAD = "model,k,cluster,label"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["model,cluster,label", "{v},0,x"], "its first line must name .* missing: k"),
        ([], "its first line must name"),
        ([HEAD], "names no cluster"),
        ([HEAD, "{v},4,4,x"], "line 2: there is no cluster 4; with K = 4 they are 0 to 3"),
        ([HEAD, "{v},4,-1,x"], "line 2: cluster is '-1'; give a whole number"),
        ([HEAD, "{v},4,one,x"], "line 2: cluster is 'one'; give a whole number"),
        ([HEAD, "{v},4,0"], None),
        ([HEAD, "{v},4,0,x", "", "{v},4,0,y"], "line 4: cluster 0 is named twice"),
        ([HEAD, "{v},4,0,x", "{v},2,1,y"], "line 3: is of model .* and K = 2, but the lines above"),
        ([HEAD, "old,4,0,x"], "line 2: names clusters of model 'old', .* may have moved"),
        ([HEAD, "{v},8,0,x"], "line 2: k is 8, but model .* has only K = 2, 4"),
        ([HEAD, "{v},,0,x"], "line 2: k is ''; give a whole number"),
    ],
)
def test_faults_of_the_edited_table_are_told(
    editable: tuple[Store, str], lines: list[str], told: str | None
) -> None:
    store, version = editable
    store.cluster_labels_csv.write_text("\n".join(lines).format(v=version))
    if told is None:
        assert current_cluster_labels(store, AnnotationSettings()) is not None
        return
    with pytest.raises(LabelError, match=told) as caught:
        current_cluster_labels(store, AnnotationSettings())
    assert str(store.cluster_labels_csv) in str(caught.value)
    # The table that is to be edited instead can still be made.
    assert len(derive_labels(store, AnnotationSettings())) == 4


def test_an_edited_table_of_another_k_or_encoding_is_told(editable: tuple[Store, str]) -> None:
    store, version = editable
    store.cluster_labels_csv.write_text(f"{HEAD}\n{version},4,0,x\n")
    with pytest.raises(LabelError, match="k is 4, but annotation is asked for with K = 2"):
        current_cluster_labels(store, AnnotationSettings(n_clusters=2))
    assert current_cluster_labels(store, AnnotationSettings(n_clusters=4)) is not None
    store.cluster_labels_csv.write_bytes(f"{HEAD}\n{version},4,0,kürettage\n".encode("cp1252"))
    with pytest.raises(LabelError, match="CSV UTF-8"):
        current_cluster_labels(store, AnnotationSettings())


def test_a_version_that_looks_like_a_number_survives_a_spreadsheet(store: Store) -> None:
    write_derived(store, "123456789012", 2, [NamedCluster(0, "x", "x", 1.0, 5, 5, 1)])
    text = derived_path(store, "123456789012", 2).read_text("utf-8-sig")
    assert text.splitlines()[1].startswith("model-123456789012,2,0,x,")


# Evaluation --------------------------------------------------------------------------------------

CLASSES = ("mucus", "stroma", "tumour")


def noisy(rng: np.random.Generator, blob: int) -> str:
    """Blobs 0 to 2 are mostly one class each; blob 3 is anything."""
    if blob < 3 and rng.random() < 0.85:
        return CLASSES[blob]
    return str(rng.choice(CLASSES))


def write_cohort(store: Store, *, patients: bool, test: Sequence[int] = ()) -> dict[str, Any]:
    """Nine slides, two a patient where told, the last two without labels; blobs and labels."""
    truth = {}
    for i in range(9):
        rng = np.random.default_rng([7, i])
        blobs = rng.choice(4, 30 + 7 * i, p=rng.dirichlet([2, 2, 2, 1])).tolist()
        labels: list[Label] = [noisy(rng, blob) for blob in blobs]
        labels[i] = None
        facts = {"patient": f"p{i // 2}"} if patients else {}
        if i in test:
            facts["split"] = "Test"
        labels = labels if i < 7 else []
        write_slide(store, f"s{i}", blobs, labels, **facts)
        truth[f"s{i}"] = (np.array(blobs), labels)
    cluster(store, 4, 5)
    return truth


SETTINGS = AnnotationSettings(n_clusters=4, folds=3, seed=2)


def recomputed(
    truth: dict[str, Any], held: Sequence[str], left_out: Sequence[str]
) -> tuple[list[str], list[str]]:
    """What held-out tiles are and what they are called, from the blobs that clusters stand for."""
    names = {}
    for blob in range(4):
        said = [
            label
            for slide, (blobs, labels) in truth.items()
            if slide not in left_out
            for b, label in zip(blobs, labels, strict=False)
            if b == blob and label is not None
        ]
        label, count = Counter(said).most_common(1)[0]
        if count / len(said) >= 0.7 and len(said) >= 5:
            names[blob] = label
    pairs = [
        (label, names.get(blob, ""))
        for slide in held
        for blob, label in zip(*truth[slide], strict=True)
        if label is not None
    ]
    true, called = zip(*pairs, strict=True)
    return list(true), list(called)


def assert_numbers(told: dict[str, Any], true: list[str], called: list[str]) -> None:
    covered = [(t, c) for t, c in zip(true, called, strict=True) if c]
    assert told["tiles"] == len(true)
    assert told["coverage"] == pytest.approx(len(covered) / len(true))
    assert told["accuracy"] == pytest.approx(accuracy_score(*zip(*covered, strict=True)))


@pytest.mark.parametrize("patients", [True, False])
def test_evaluation_is_that_of_scikit_learn(store: Store, patients: bool) -> None:
    truth = write_cohort(store, patients=patients)
    told, made = ensure_evaluation(store, SETTINGS)
    assert made
    assert told["measured"]
    assert told["split_by"] == ("patients" if patients else "slides")
    assert len(told["folds"]) == 3
    assert sorted(s for fold in told["folds"] for s in fold["held_out"]) == [
        f"s{i}" for i in range(7)
    ]
    true: list[str] = []
    called: list[str] = []
    majority: list[str] = []
    for fold in told["folds"]:
        of_patients = {int(slide[1:]) // 2 for slide in fold["held_out"]}
        left_out = [s for s in truth if int(s[1:]) // 2 in of_patients] if patients else fold[
            "held_out"
        ]  # fmt: skip
        assert fold["fitted_on"] == 9 - len(left_out)
        assert fold["named_on"] == 7 - len(fold["held_out"])
        there, said = recomputed(truth, fold["held_out"], left_out)
        assert_numbers(fold, there, said)
        rest = [x for s, (_, labels) in truth.items() if s not in left_out for x in labels if x]
        most = Counter(rest).most_common(1)[0][0]
        true, called, majority = true + there, called + said, majority + [most] * len(there)
    assert_numbers(told, true, called)
    covered = np.array([c != "" for c in called])
    baseline = accuracy_score(np.array(true)[covered], np.array(majority)[covered])
    assert told["majority_accuracy"] == pytest.approx(baseline)
    assert told["macro_f1"] == pytest.approx(
        f1_score(true, called, labels=CLASSES, average="macro", zero_division=0)
    )
    precision, recall, f1, tiles = precision_recall_fscore_support(
        true, called, labels=CLASSES, zero_division=np.nan
    )
    for i, label in enumerate(CLASSES):
        assert told["classes"][label] == {
            "tiles": tiles[i],
            "precision": pytest.approx(precision[i]) if called.count(label) else None,
            "recall": pytest.approx(recall[i]),
            "f1": pytest.approx(f1[i]),
        }
    expected = confusion_matrix(true, called, labels=[*CLASSES, ""])
    assert told["confusion"]["labels"] == list(CLASSES)
    assert told["confusion"]["annotations"] == [*CLASSES, None]
    assert told["confusion"]["tiles"] == expected[:3].tolist()
    # The labels are noisy on purpose: nothing above holds by being perfect, or empty.
    assert told["majority_accuracy"] + 0.1 < told["accuracy"] < 1
    assert 0.5 < told["coverage"] < 1


def test_intervals_come_from_drawing_patients(store: Store) -> None:
    write_cohort(store, patients=True)
    told, _ = ensure_evaluation(store, SETTINGS)
    by_patient: dict[int, np.ndarray] = {}
    for name, numbers in told["slides"].items():
        called = numbers["tiles"] * numbers["coverage"]
        counts = np.array([called * (numbers["accuracy"] or 0), called, numbers["tiles"]])
        patient = int(name[1:]) // 2
        by_patient[patient] = by_patient.get(patient, 0) + counts
    groups = np.array(list(by_patient.values()))
    assert told["held_out_groups"] == len(groups) == 4
    # All 4 ** 4 draws there are, rather than some of them.
    every = np.stack(np.meshgrid(*[range(4)] * 4), axis=-1).reshape(-1, 4)
    right, called, tiles = groups[every].sum(axis=1).T
    for name, values in {"accuracy": right / called, "coverage": called / tiles}.items():
        low, high = told[f"{name}_interval"]
        assert low < told[name] < high
        assert [low, high] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.01)


def test_evaluation_is_measured_again_only_if_something_changed(store: Store) -> None:
    truth = write_cohort(store, patients=False)
    told, made = ensure_evaluation(store, SETTINGS)
    assert made
    before = evaluation_path(store).read_bytes()
    assert ensure_evaluation(store, SETTINGS) == (told, False)
    assert read_evaluation(store) == json.loads(before) == told
    other = SETTINGS.model_copy(update={"min_purity": 0.9})
    assert ensure_evaluation(store, other)[1]
    assert ensure_evaluation(store, SETTINGS)[1]
    assert evaluation_path(store).read_bytes() == before  # to the last byte
    labels = list(truth["s3"][1])
    labels[0] = "tumour" if labels[0] != "tumour" else "mucus"
    write_labels(store, "s3", labels)
    build_catalog(store)
    assert ensure_evaluation(store, SETTINGS)[1]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What each fold fitted and how it named its clusters."""
    seen: dict[str, list[Any]] = {"slides": [], "centroids": [], "meaning": []}
    fit, name = fitting_module.fit_clusters, evaluation._meaning

    def fitting(inputs: Any, *args: Any, **options: Any) -> Any:
        model = fit(inputs, *args, **options)
        seen["slides"].append({file.slide for file in inputs})
        seen["centroids"].append(model.centroids[4])
        return model

    def naming(*args: Any) -> Any:
        seen["meaning"].append((args[0].tolist(), name(*args)))
        return seen["meaning"][-1][1]

    monkeypatch.setattr(fitting_module, "fit_clusters", fitting)
    monkeypatch.setattr(evaluation, "_meaning", naming)
    return seen


def test_held_out_slides_have_no_part_in_anything(
    store: Store, watched: dict[str, list[Any]]
) -> None:
    truth = write_cohort(store, patients=True)
    told, _ = ensure_evaluation(store, SETTINGS)
    folds = [fold["held_out"] for fold in told["folds"]]
    assert [len(watched[name]) for name in watched] == [3, 3, 3]
    for held, fitted in zip(folds, watched["slides"], strict=True):
        patients = {int(slide[1:]) // 2 for slide in held}
        assert patients.isdisjoint(int(slide[1:]) // 2 for slide in fitted)
        assert all(slide in held for slide in truth
                   if int(slide[1:]) // 2 in patients and truth[slide][1])  # fmt: skip
    before = {name: list(values) for name, values in watched.items()}
    # Make nonsense of one patient's slides, also of what is not labelled (s7 is of p3, with s6).
    spoilt = next(i for i, held in enumerate(folds) if "s6" in held)
    rng = np.random.default_rng(0)
    for slide in ("s6", "s7"):
        blobs, labels = truth[slide]
        write_features(store, slide, rng.normal(50, 30, (len(blobs), LENGTH)).astype(np.float32))
        if labels:
            write_labels(store, slide, ["mucus" if x != "mucus" and x else x for x in labels])
    build_catalog(store)
    for values in watched.values():
        values.clear()
    again, made = ensure_evaluation(store, SETTINGS)
    assert made
    assert [fold["held_out"] for fold in again["folds"]] == folds
    for i in range(3):
        same = np.array_equal(watched["centroids"][i], before["centroids"][i])
        assert same == (i == spoilt)
        assert (watched["meaning"][i] == before["meaning"][i]) == (i == spoilt)
    assert again["slides"]["s6"] != told["slides"]["s6"]


def test_the_test_split_is_what_is_held_out(store: Store, watched: dict[str, list[Any]]) -> None:
    # s2 is of the same patient as s3, but not of the split: it is left out of everything.
    truth = write_cohort(store, patients=True, test=(3, 4, 5))
    told, _ = ensure_evaluation(store, SETTINGS)
    assert told["split_by"] == "slides.csv"
    [fold] = told["folds"]
    assert fold["held_out"] == sorted(told["slides"]) == ["s3", "s4", "s5"]
    assert watched["slides"] == [{"s0", "s1", "s6", "s7", "s8"}]
    assert_numbers(told, *recomputed(truth, ["s3", "s4", "s5"], ["s2", "s3", "s4", "s5"]))


@pytest.mark.parametrize(
    ("slides", "split", "told"),
    [
        ({"a": {"patient": "p"}, "b": {"patient": "p"}}, "patients", "Needs labelled patients"),
        ({"a": {}}, "slides", "there are 1"),
        ({"a": {"split": "test"}, "b": {"split": "test"}}, "slides.csv", "all of the test split"),
        ({}, "slides", "there are 0"),
    ],
)
def test_too_few_groups_are_told(
    store: Store, slides: dict[str, dict[str, str]], split: str, told: str
) -> None:
    write_slide(store, "z", [0, 1] * 5)
    for name, facts in slides.items():
        write_slide(store, name, [0, 1] * 5, ["x", "y"] * 5, **facts)
    cluster(store, 2)
    content, _ = ensure_evaluation(store, AnnotationSettings())
    assert not content["measured"]
    assert content["split_by"] == split
    assert told in content["reason"]
    assert not ensure_evaluation(store, AnnotationSettings())[1]


def test_too_few_tiles_for_a_fold_are_told(store: Store) -> None:
    for name in ("a", "b"):
        write_slide(store, name, [0, 1, 2] * 2, ["x", "y", "z"] * 2)
    cluster(store, 8)
    content, _ = ensure_evaluation(store, AnnotationSettings())
    assert not content["measured"]
    assert "6 tiles can't be put into 8 clusters" in content["reason"]


def test_unreadable_tiles_are_not_covered(store: Store) -> None:
    for name in ("a", "b"):
        write_slide(store, name, [0, 1] * 10, ["x", "y"] * 10)
    cluster(store, 2)
    settings = AnnotationSettings(min_labelled=1)
    assert ensure_evaluation(store, settings)[0]["coverage"] == 1
    features = np.concatenate([np.array([centre_of(i % 2)]) for i in range(20)])
    features[:5] = np.nan
    write_features(store, "b", features.astype(np.float32))
    told, _ = ensure_evaluation(store, settings)
    assert told["slides"]["b"]["coverage"] == 15 / 20
    assert told["accuracy"] == told["slides"]["a"]["coverage"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_folds_are_even(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiles = {f"g{i}": int(n) for i, n in enumerate(rng.integers(1, 200, 23))}
    folds = split_groups(tiles, 5, seed=seed)
    assert sorted(name for fold in folds for name in fold) == sorted(tiles)
    sizes = [sum(tiles[name] for name in fold) for fold in folds]
    assert max(sizes) - min(sizes) <= max(tiles.values())
    assert folds == split_groups(dict(reversed(tiles.items())), 5, seed=seed)
    assert folds != split_groups(tiles, 5, seed=seed + 1)
    assert len(split_groups({"a": 1, "b": 1}, 5, seed=seed)) == 2


# The command -------------------------------------------------------------------------------------


@pytest.fixture
def program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bare_environment: None
) -> Any:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["histoencoder", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_the_command_on_the_synthetic_cohort(
    cohort_store: Store, tmp_path: Path, program: Any
) -> None:
    store = Store(tmp_path / "copy")
    shutil.copytree(cohort_store.root, store.root)
    code, out, err = program("annotate", "-i", store.root)
    assert code == 0, err
    assert "untrained" in err
    assert "6 slides: 6 made" in out
    told = read_evaluation(store)
    assert told is not None
    assert told["untrained"]
    assert f"On {told['held_out_slides']} held-out slides (the test split of slides.csv)" in out
    assert f"{told['accuracy']:.2f} (95 % interval" in out
    for slide in store.slide_ids():
        folder = store.slide(slide)
        content = json.loads(folder.file(layout.ANNOTATIONS_GEOJSON).read_text("utf-8"))
        rows = read_table(folder.record("annotations")).to_pylist()
        labels = {row["tile"]: row["label"] for row in rows}
        stamp = folder.stamp("annotations")
        assert stamp is not None
        clusters = folder.stamp("clusters")
        assert clusters is not None
        current = current_cluster_labels(store, AnnotationSettings())
        assert current is not None
        assert stamp.fingerprint == annotations_stamp(clusters, current).fingerprint
        area = sum(shape(feature["geometry"]).area for feature in content["features"])
        assert area == 256**2 * stamp.result["annotated"]
        if folder.stamp("labels") is not None:
            said = read_table(folder.record("labels")).to_pylist()
            both = [(labels[r["tile"]], r["label"]) for r in said if labels[r["tile"]]]
            both = [(ours, theirs) for ours, theirs in both if theirs is not None]
            assert stamp.result["agreement_tiles"] == len(both)
            agree = sum(ours == theirs for ours, theirs in both) / len(both)
            assert stamp.result["agreement"] == pytest.approx(agree, abs=1e-4)
    before = {k: v for k, v in contents(store.root).items() if "catalog" not in k}
    code, out, err = program("annotate", "-i", store.root)
    assert code == 0, err
    assert "6 slides: 6 up to date" in out
    assert {k: v for k, v in contents(store.root).items() if "catalog" not in k} == before


def test_the_command_with_an_edited_table(named: Store, program: Any) -> None:
    version = cluster(named, 4)
    named.cluster_labels_csv.write_text(f"{HEAD}\n{version},4,0,fat\n")
    code, out, err = program("annotate", "-i", named.root, "--min-labelled", 4, "--no-evaluate")
    assert code == 0, err
    assert "cluster_labels.csv names 1 otherwise than derived" in out
    assert read_evaluation(named) is None
    stamp = named.slide("b").stamp("annotations")
    assert stamp is not None
    assert stamp.result["source"] == "edited"
    code, out, err = program("annotate", "-i", named.root, "--min-labelled", 4)
    assert "Accuracy is not measured. Needs labelled slides" in out
    named.cluster_labels_csv.write_text(f"{HEAD}\nolder,4,0,fat\n")
    code, out, err = program("annotate", "-i", named.root)
    assert code == 1
    assert "may have moved" in err


def test_the_command_without_labels_or_clusters(store: Store, program: Any) -> None:
    write_slide(store, "a", [0, 1] * 5)
    code, _, err = program("annotate", "-i", store.root)
    assert (code, "no cluster model yet" in err) == (1, True)
    cluster(store, 2)
    code, _, err = program("annotate", "-i", store.root)
    assert (code, "no slide with clusters is labelled" in err) == (1, True)
