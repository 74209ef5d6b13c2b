"""Clusters and the catalog over them, on features whose clusters are known beforehand."""

from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from histoencoder_core.clusters import (
    ClusterModel,
    FeatureFile,
    assign_slide,
    current_model,
    feature_files,
    load_model,
    model_versions,
    reading,
    save_model,
)
from histoencoder_core.clusters.fit import fit_clusters
from histoencoder_core.clusters.reading import Reader
from histoencoder_core.cohort import build_catalog, run_sql, slide_states
from histoencoder_core.errors import ClusterError, StoreError
from histoencoder_core.settings import ClusterSettings
from histoencoder_core.store import Stamp, Store, layout
from histoencoder_core.store.tables import feature_list, key_table, read_table, tile_name

LENGTH = 16
LEFT = {"catalog.duckdb", ".catalog.lock", "cluster_models"}
"""What a refresh leaves in the cohort's folder."""

SIDE = 256

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def blobs(
    tiles: int, n_clusters: int, *, seed: int = 0, weights: Sequence[float] | None = None
) -> tuple[Floats, Ints]:
    """Features in well separated blobs, the same places for every seed, and which is in which."""
    rng = np.random.default_rng([5, seed])
    truth = rng.choice(n_clusters, tiles, p=weights)
    centres = np.random.default_rng(42).normal(0, 4, (n_clusters, LENGTH))
    return (centres[truth] + rng.normal(0, 0.5, (tiles, LENGTH))).astype(np.float32), truth


def places(count: int) -> list[tuple[int, int, int, int]]:
    return [(SIDE * (i % 10), SIDE * (i // 10), SIDE, SIDE) for i in range(count)]


def keys_for(count: int) -> pa.Table:
    return key_table([tile_name(*place) for place in places(count)], list(places(count)))


def write_features(
    store: Store,
    slide: str,
    features: Floats,
    *,
    encoder: str = "toy",
    weights: str = "w1",
    untrained: bool = False,
    unreadable: Iterable[int] = (),
    **recipe: Any,
) -> None:
    """Write a slide's features as the stage before does."""
    made_from = {"name": encoder, "weights_sha256": weights, "length": features.shape[1], **recipe}
    space = hashlib.sha256(repr(made_from).encode()).hexdigest()
    content = hashlib.sha256(features.tobytes()).hexdigest()
    stamp = Stamp.of(
        "features",
        algorithm=1,
        made_from={"tiles": content, "encoder": made_from},
        untrained=untrained,
    ).with_result(space=space, encoder=encoder, tiles=len(features))
    bad = np.isin(np.arange(len(features)), list(unreadable))
    column = feature_list(np.where(bad[:, None], np.nan, features), "float32")
    if bad.any():
        column = pa.FixedSizeListArray.from_arrays(
            column.values, features.shape[1], mask=pa.array(bad)
        )
    reasons = pa.array(["damaged" if b else None for b in bad], pa.string())
    table = keys_for(len(features)).append_column("features", column)
    with store.slide(slide).writing("features") as writer:
        writer.table(table.append_column("unreadable", reasons), stamp)


def write_foreign_features(store: Store, slide: str, features: Floats) -> Path:
    """Write a slide's features as HistoEncoder does: wide, without a stamp."""
    columns: dict[str, Any] = {f"feat{i + 1}": column for i, column in enumerate(features.T)}
    count = len(features)
    columns["path"] = [f"/elsewhere/tiles/{tile_name(*place)}.jpeg" for place in places(count)]
    for name, values in zip("xywh", zip(*places(count), strict=True), strict=True):
        columns[name] = pa.array(values, pa.int64())
    path = store.slide(slide).record("features")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_labels(store: Store, slide: str, labels: Sequence[str | None]) -> None:
    shares = [None if label is None else 1.0 for label in labels]
    table = keys_for(len(labels)).append_column("label", pa.array(labels, pa.string()))
    stamp = Stamp.of("labels", algorithm=1, made_from={"labels": list(labels)})
    with store.slide(slide).writing("labels") as writer:
        writer.table(table.append_column("share", pa.array(shares, pa.float32())), stamp)


def write_cohort(store: Store, slides: int, n_clusters: int, tiles: int = 300) -> Ints:
    """Write slides of blobs; gives the truth over all of them."""
    drawn = [blobs(tiles + 10 * i, n_clusters, seed=i) for i in range(slides)]
    for i, (features, _) in enumerate(drawn):
        write_features(store, f"slide-{i}", features)
    return np.concatenate([truth for _, truth in drawn])


def cluster(store: Store, **settings: Any) -> ClusterModel:
    """Fit a model on all slides and make it current."""
    model = fit_clusters(feature_files(store), ClusterSettings(**settings))
    save_model(store, model)
    return model


def assigned(store: Store, slide: str, k: int) -> list[int | None]:
    values: list[int | None] = (
        read_table(store.slide(slide).record("clusters")).column(f"n_clusters={k}").to_pylist()
    )
    return values


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same_centroids(one: ClusterModel, other: ClusterModel) -> bool:
    return one.centroids.keys() == other.centroids.keys() and all(
        np.array_equal(one.centroids[k], other.centroids[k]) for k in one.centroids
    )


# Fitting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_clusters", [3, 8, 20])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_known_clusters_are_found(store: Store, n_clusters: int, seed: int) -> None:
    truth = write_cohort(store, slides=4, n_clusters=n_clusters)
    model = cluster(store, n_clusters=(n_clusters,), seed=seed, batch_size=64, sample_size=400)
    found: list[int | None] = []
    for slide in store.slide_ids():
        assert assign_slide(store.slide(slide), model).made_now
        found += assigned(store, slide, n_clusters)
    assert None not in found
    assert adjusted_rand_score(truth, found) > 0.95
    # A blob's tiles lie at a variance of 0.5 ** 2 in each dimension from its centre.
    assert model.inertia[n_clusters] == pytest.approx(LENGTH * 0.25, rel=0.1)
    assert model.stamp.result["tiles"] == len(truth)


def test_rare_tissue_keeps_its_centroid(store: Store) -> None:
    rng = np.random.default_rng(0)
    centres = np.zeros((3, LENGTH))
    centres[1, 0] = centres[2, 1] = 60
    for i in range(3):
        truth = rng.choice(3, 2000, p=[0.994, 0.003, 0.003])
        features = centres[truth] + rng.normal(0, 1, (2000, LENGTH))
        write_features(store, f"slide-{i}", features.astype(np.float32))
    model = cluster(store, n_clusters=(3,), batch_size=500)
    gaps = np.linalg.norm(centres[:, None] - model.centroids[3][None], axis=2)
    assert sorted(gaps.argmin(axis=1)) == [0, 1, 2]
    assert gaps.min(axis=1).max() < 2


def test_same_seed_gives_the_same_centroids(store: Store) -> None:
    write_cohort(store, slides=4, n_clusters=5)
    inputs = feature_files(store)
    settings = ClusterSettings(n_clusters=(2, 5), batch_size=100, sample_size=200)
    model = fit_clusters(inputs, settings)
    for order in ([3, 1, 0, 2], [0, 1, 2, 3]):
        again = fit_clusters([inputs[i] for i in order], settings)
        assert same_centroids(again, model)
        assert again.version == model.version
    other = fit_clusters(inputs, settings.model_copy(update={"seed": 1}))
    assert not same_centroids(other, model)
    assert other.version != model.version


def test_centroids_rest_before_the_last_pass(store: Store) -> None:
    write_cohort(store, slides=2, n_clusters=3)
    assert cluster(store, n_clusters=(3,), max_passes=50).stamp.result["passes"] < 10
    assert cluster(store, n_clusters=(3,), max_passes=1).stamp.result["passes"] == 1
    never = cluster(store, n_clusters=(3,), max_passes=4, tolerance=0)
    assert never.stamp.result["passes"] == 4


def test_too_large_k_is_left_out(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    write_features(store, "a", blobs(6, 2)[0])
    write_features(store, "b", blobs(5, 2)[0], unreadable=[0])
    with caplog.at_level(logging.WARNING):
        model = cluster(store, n_clusters=(2, 10, 11, 64))
    assert list(model.centroids) == model.stamp.result["n_clusters"] == [2, 10]
    assert [record.getMessage() for record in caplog.records] == [
        f"left out K = {k}: there are only 10 tiles" for k in (11, 64)
    ]
    assert model.inertia[10] == pytest.approx(0, abs=1e-6)


def test_too_few_tiles_are_refused(store: Store) -> None:
    write_features(store, "a", blobs(3, 2)[0], unreadable=[2])
    write_features(store, "empty", np.empty((0, LENGTH), np.float32))
    with pytest.raises(ClusterError, match="2 tiles can't be put into 4 clusters"):
        cluster(store, n_clusters=(4, 8))
    assert current_model(store) is None


def test_equal_tiles_can_be_clustered(store: Store) -> None:
    write_features(store, "a", np.ones((40, LENGTH), np.float32))
    model = cluster(store, n_clusters=(2, 8), sample_size=10)
    assert model.inertia == {2: pytest.approx(0), 8: pytest.approx(0)}
    assert all(np.isfinite(centroids).all() for centroids in model.centroids.values())


@pytest.mark.parametrize("settings", [{"normalise": True}, {"whiten": 3}])
def test_few_different_tiles_can_be_clustered_though_transformed(
    store: Store, settings: dict[str, Any]
) -> None:
    """In parts of other sizes a tile is transformed to other last digits, which are no tiles."""
    kinds = np.random.default_rng(0).normal(3, 1, (5, LENGTH)).astype(np.float32)
    for i in range(3):
        write_features(store, f"slide-{i}", kinds[np.random.default_rng(i).integers(5, size=70)])
    model = cluster(store, n_clusters=(3, 8), **settings)
    assert model.inertia[8] == pytest.approx(0, abs=1e-6)


def test_features_too_large_to_be_squared_are_refused(store: Store) -> None:
    write_features(store, "a", np.full((40, LENGTH), 1e30, np.float32) * np.arange(40)[:, None])
    with pytest.raises(ClusterError, match="too large to compute distances"):
        cluster(store, n_clusters=(2,))


def test_no_features_are_refused(store: Store) -> None:
    with pytest.raises(ClusterError, match="no slide has features yet"):
        feature_files(store)


def test_spaces_are_not_mixed(store: Store) -> None:
    features = blobs(20, 2)[0]
    for slide in ("a", "b", "c"):
        write_features(store, slide, features)
    write_features(store, "d", features[:, :8], encoder="smaller")
    write_features(store, "e", features, weights="w2")
    with pytest.raises(ClusterError) as caught:
        feature_files(store)
    message = str(caught.value)
    assert str(store.root) in message
    counts = [part.rpartition(": ")[2] for part in message.split("(")[1].split(")")[0].split("; ")]
    assert counts == ["3", "1", "1"]
    assert "slides by toy, length 16" in message
    assert "slides by smaller, length 8" in message
    assert "toy, length 16, weights w1, space" in message
    assert "toy, length 16, weights w2, space" in message
    assert "smaller, length 8, space" in message
    assert "precision" not in message
    assert len(feature_files(store, slides=["a", "b", "c"])) == 3


def test_what_parts_the_spaces_of_one_encoder_is_told(store: Store) -> None:
    features = blobs(20, 2)[0]
    scale = {"mean": [0.5], "std": [0.2]}
    for slide, precision, normalisation, size in (
        ("a", "float32", scale, 224),
        ("b", "float16", scale, 224),
        ("c", "float32", "slide", 96),
    ):
        write_features(
            store,
            slide,
            features,
            precision=precision,
            normalisation=normalisation,
            input_size=size,
            num_blocks=1,
        )
    write_foreign_features(store, "d", features)
    with pytest.raises(ClusterError) as caught:
        feature_files(store)
    message = str(caught.value)
    same = "slides by toy, length 16, precision"
    assert f"{same} float32, normalisation mean 0.5 deviation 0.2, input size 224, sp" in message
    assert f"{same} float16, normalisation mean 0.5 deviation 0.2, input size 224, sp" in message
    assert f"{same} float32, normalisation slide, input size 96, space" in message
    assert "num blocks" not in message
    assert "weights" not in message
    assert "set `--precision float32` (or HISTOENCODER_ENCODER__PRECISION=float32)" in message


# Drawing a sample and batches --------------------------------------------------------------------


def inputs_of(store: Store, *sizes: int) -> list[FeatureFile]:
    """Slides whose features tell the slide and the row."""
    for i, size in enumerate(sizes):
        features = np.zeros((size, 2), np.float32)
        features[:, 0], features[:, 1] = i, np.arange(size)
        write_features(store, f"slide-{i}", features)
    return feature_files(store)


@pytest.mark.parametrize(
    ("counts", "wanted", "share"),
    [
        ([10, 10, 10], 9, 3),
        ([10, 10, 10], 10, 4),
        ([10, 10, 10], 100, 10),
        ([0, 2, 50], 20, 18),
        ([50, 0, 2], 20, 18),
        ([100, 100], 1, 1),
    ],
)
def test_share(counts: list[int], wanted: int, share: int) -> None:
    assert reading.share_of(counts, wanted) == share


def drawn(inputs: list[FeatureFile], size: int, *, rows: int = 7, seed: int = 0) -> Floats:
    sample, tiles = reading.draw_sample(inputs, Reader(2, 3, rows), seed=seed, size=size)
    assert tiles == sum(file.tiles for file in inputs)
    return sample


@pytest.mark.parametrize("rows", [7, 100])
def test_sample_is_even_over_slides(store: Store, rows: int) -> None:
    inputs = inputs_of(store, 5, 0, 100, 60)
    sample = drawn(inputs, 45, rows=rows)
    assert np.bincount(sample[:, 0].astype(int)).tolist() == [5, 0, 20, 20]
    assert len(np.unique(sample, axis=0)) == len(sample)
    # Not the first ones of a slide, nor the same rows of each.
    of_slide = [set(sample[sample[:, 0] == i, 1].astype(int).tolist()) for i in (2, 3)]
    assert max(of_slide[0]) > 60
    assert of_slide[0] != of_slide[1]
    assert len(drawn(inputs, 120, rows=rows)) >= 120
    np.testing.assert_array_equal(drawn(inputs, 45, rows=5), sample)
    assert not np.array_equal(drawn(inputs, 45, seed=1), sample)


def test_a_slides_sample_is_its_own(store: Store) -> None:
    inputs = inputs_of(store, 30, 30, 30)
    all_three = drawn(inputs, 15)
    np.testing.assert_array_equal(drawn(inputs[2:], 5), all_three[all_three[:, 0] == 2])


def test_unreadable_tiles_are_not_drawn(store: Store) -> None:
    features = np.arange(80, dtype=np.float32).reshape(40, 2)
    write_features(store, "a", features, unreadable=range(35))
    write_features(store, "b", features)
    sample, tiles = reading.draw_sample(feature_files(store), Reader(1, 1, 9), seed=0, size=30)
    # Five of a, so that b gives the other 25.
    assert (len(sample), tiles) == (30, 45)
    np.testing.assert_array_equal(sample[:5], features[35:])
    assert len(np.unique(sample[5:], axis=0)) == 25


def test_unreadable_slides_leave_their_share_to_others(store: Store) -> None:
    write_features(store, "a", blobs(20, 2)[0])
    write_features(store, "b", blobs(50, 2)[0], unreadable=range(50))
    model = cluster(store, n_clusters=(20,), sample_size=10)
    assert list(model.centroids) == [20]


def batched(inputs: list[FeatureFile], size: int, number: int | None = 0) -> list[Floats]:
    buffer = np.empty((3 * size, 2), np.float32)
    rng = None if number is None else np.random.default_rng(number)
    given = reading.batches(inputs, Reader(2, 2, 50), size=size, buffer=buffer, rng=rng)
    return [batch.copy() for batch in given]


def test_batches_hold_every_tile_once(store: Store) -> None:
    inputs = inputs_of(store, 130, 3, 40)
    batches = batched(inputs, 20)
    assert {len(batch) for batch in batches[:-1]} == {20}
    assert 20 <= len(batches[-1]) < 40
    rows = np.concatenate(batches)
    assert len(np.unique(rows, axis=0)) == len(rows) == 173
    again = np.concatenate(batched(inputs, 20))
    np.testing.assert_array_equal(again, rows)
    later = np.concatenate(batched(inputs, 20, number=1))
    assert not np.array_equal(later, rows)
    np.testing.assert_array_equal(np.unique(later, axis=0), np.unique(rows, axis=0))
    in_order = np.concatenate(batched(inputs, 20, number=None))
    np.testing.assert_array_equal(np.unique(in_order, axis=0), np.unique(rows, axis=0))


@pytest.mark.parametrize("at_least", [10, 64, 100, 173])
def test_no_batch_is_smaller_than_asked(store: Store, at_least: int) -> None:
    inputs = inputs_of(store, 130, 3, 40)
    for number in (0, None):
        sizes = [len(batch) for batch in batched(inputs, at_least, number)]
        assert min(sizes) >= at_least
        assert sum(sizes) == 173


# Assigning slides --------------------------------------------------------------------------------


def test_a_new_slide_leaves_the_others_alone(store: Store) -> None:
    write_cohort(store, slides=3, n_clusters=4)
    model = cluster(store, n_clusters=(2, 4))
    for slide in store.slide_ids():
        assign_slide(store.slide(slide), model)
    before = contents(store.root)
    features, truth = blobs(100, 4, seed=9)
    write_features(store, "new", features)
    assign_slide(store.slide("new"), model)
    after = contents(store.root)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parts[0] for name in after.keys() - before.keys()} == {"new"}
    assert adjusted_rand_score(truth, assigned(store, "new", 4)) > 0.95
    assert not assign_slide(store.slide("new"), model).made_now


def test_clusters_table(store: Store) -> None:
    write_features(store, "a", blobs(30, 3)[0])
    model = cluster(store, n_clusters=(2, 3))
    assign_slide(store.slide("a"), model)
    table = read_table(store.slide("a").record("clusters"))
    names = [
        *("tile", "x", "y", "w", "h"),
        *("n_clusters=2", "distance=2", "n_clusters=3", "distance=3", "model"),
    ]
    assert table.column_names == names
    assert table.select(names[:5]).to_pydict() == keys_for(30).to_pydict()
    assert set(table.column("model").to_pylist()) == {model.version}
    assert table.schema.field("n_clusters=2").type == pa.int32()
    assert table.schema.field("distance=2").type == pa.float32()


def test_unreadable_tiles_have_no_cluster(store: Store) -> None:
    write_features(store, "a", blobs(200, 3)[0], unreadable=[0, 57])
    model = cluster(store, n_clusters=(2, 3))
    assign_slide(store.slide("a"), model)
    for k in (2, 3):
        found = assigned(store, "a", k)
        assert [i for i, value in enumerate(found) if value is None] == [0, 57]
    assert model.stamp.result["tiles"] == 198


def test_slide_without_tiles_has_no_rows(store: Store) -> None:
    write_features(store, "a", blobs(50, 2)[0])
    write_features(store, "empty", np.empty((0, LENGTH), np.float32))
    model = cluster(store, n_clusters=(2,))
    stamp = assign_slide(store.slide("empty"), model)
    assert stamp.result["tiles"] == 0
    assert assigned(store, "empty", 2) == []
    assert not store.slide("empty").file(layout.THUMBNAIL_CLUSTERS).exists()


def test_a_slide_of_another_space_is_refused(store: Store) -> None:
    write_features(store, "a", blobs(50, 2)[0])
    model = cluster(store, n_clusters=(2,))
    write_features(store, "b", blobs(50, 2)[0], encoder="other")
    with pytest.raises(ClusterError, match=r"made by other, but .* features of toy"):
        assign_slide(store.slide("b"), model)
    assert "made by other" in store.slide("b").failures()["clusters"]["reason"]


def test_foreign_features_are_clustered_and_left_alone(store: Store) -> None:
    features, truth = blobs(300, 4)
    path = write_foreign_features(store, "theirs", features)
    # Nobody's write access is needed, not even by mistake.
    path.chmod(0o444)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    model = cluster(store, n_clusters=(4,))
    assign_slide(store.slide("theirs"), model)
    assert adjusted_rand_score(truth, assigned(store, "theirs", 4)) > 0.95
    table = read_table(store.slide("theirs").record("clusters"))
    assert table.select(["tile", "x", "y", "w", "h"]).to_pydict() == keys_for(300).to_pydict()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    write_features(store, "ours", features)
    with pytest.raises(ClusterError, match="another program's file"):
        feature_files(store)


def test_foreign_clusters_are_left_alone(store: Store) -> None:
    write_features(store, "a", blobs(50, 2)[0])
    path = store.slide("a").record("clusters")
    pq.write_table(pa.table({"x": [0], "y": [0], "w": [8], "h": [8], "n_clusters=2": [1]}), path)
    before = path.read_bytes()
    model = cluster(store, n_clusters=(2,))
    with pytest.raises(StoreError, match=r"clusters\.parquet: was not written by this program"):
        assign_slide(store.slide("a"), model)
    assert path.read_bytes() == before
    assert {p.name for p in store.slide("a").path.iterdir()} == {
        layout.FEATURES,
        layout.CLUSTERS,
        layout.FAILURES,
        layout.LOCK,
    }


# Versions ----------------------------------------------------------------------------------------


def test_a_refit_moves_current_and_keeps_the_old_model(store: Store) -> None:
    write_cohort(store, slides=2, n_clusters=3)
    old = cluster(store, n_clusters=(3,))
    old_file = store.cluster_models / f"{old.version}.parquet"
    before = old_file.read_bytes()
    assign_slide(store.slide("slide-0"), old)
    first = assigned(store, "slide-0", 3)
    new = cluster(store, n_clusters=(2, 3), seed=5)
    current = current_model(store)
    assert current is not None
    assert current.version == new.version != old.version
    assert same_centroids(current, new)
    assert current.inertia == new.inertia
    assert current.settings == ClusterSettings(n_clusters=(2, 3), seed=5)
    assert model_versions(store) == sorted([old.version, new.version])
    assert old_file.read_bytes() == before
    assert same_centroids(load_model(store, old.version), old)
    assert assign_slide(store.slide("slide-0"), new).made_now
    # Back to the old model, nothing is computed again.
    assert not assign_slide(store.slide("slide-0"), old).made_now
    assert assigned(store, "slide-0", 3) == first


def test_damaged_models_are_reported(store: Store) -> None:
    write_features(store, "a", blobs(50, 2)[0])
    model = cluster(store, n_clusters=(2,))
    with pytest.raises(ClusterError, match=rf"no-such.*at hand: {model.version}"):
        load_model(store, "no-such")
    current = store.cluster_models / "current.json"
    current.write_text("{}")
    with pytest.raises(ClusterError, match=r"current\.json: is damaged"):
        current_model(store)
    current.write_text(f'{{"version": "{model.version}"}}')
    (store.cluster_models / f"{model.version}.parquet").write_bytes(b"PAR1")
    with pytest.raises(ClusterError, match="missing or damaged"):
        current_model(store)


# The picture -------------------------------------------------------------------------------------


def picture_of(store: Store, *, untrained: bool) -> npt.NDArray[np.uint8]:
    write_features(store, "a", blobs(100, 3)[0], untrained=untrained)
    assign_slide(store.slide("a"), cluster(store, n_clusters=(3,)))
    assert store.slide("a").stamp("clusters").untrained == untrained  # type: ignore[union-attr]
    with Image.open(store.slide("a").file(layout.THUMBNAIL_CLUSTERS)) as image:
        return np.asarray(image.convert("RGB"))


def test_picture_shows_clusters_and_says_untrained(tmp_path: Path) -> None:
    trained = picture_of(Store(tmp_path / "trained"), untrained=False)
    untrained = picture_of(Store(tmp_path / "untrained"), untrained=True)
    assert trained.shape == untrained.shape
    red = (np.abs(untrained.astype(int) - (200, 0, 0)) < 40).all(axis=2)
    assert red.sum() > 500
    assert not (np.abs(trained.astype(int) - (200, 0, 0)) < 40).all(axis=2).any()
    below = slice(trained.shape[0] // 2, None)
    np.testing.assert_array_equal(trained[below], untrained[below])
    # Each tile has its cluster's colour, blended with white.
    found = assigned(Store(tmp_path / "trained"), "a", 3)
    step = trained.shape[1] // 10
    colours: dict[int | None, list[Floats]] = {}
    for i, value in enumerate(found):
        y, x = (step * n + step // 2 for n in divmod(i, 10))
        colours.setdefault(value, []).append(trained[y, x].astype(np.float32))
    means = [np.mean(group, axis=0) for group in colours.values()]
    assert max(np.ptp(group, axis=0).max() for group in colours.values()) < 20
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(means, 2)) > 30


# The catalog -------------------------------------------------------------------------------------


LABELS = ("stroma", "tumour", "mucus")


@pytest.fixture
def labelled(store: Store) -> Store:
    """Three slides, two of them labelled, one of which disagrees with its features at times."""
    for i, slide in enumerate(("a", "b", "c")):
        features, truth = blobs(60 + 20 * i, 3, seed=i)
        write_features(store, slide, features)
        labels: list[str | None] = [LABELS[value] for value in truth]
        if slide == "b":
            labels = [LABELS[(value + (j % 5 == 0)) % 3] for j, value in enumerate(truth)]
            labels[7] = None
        if slide != "c":
            write_labels(store, slide, labels)
    model = cluster(store, n_clusters=(2, 3))
    for slide in store.slide_ids():
        assign_slide(store.slide(slide), model)
    return store


def joined(store: Store, k: int, slides: Iterable[str]) -> Iterator[tuple[str, int, str | None]]:
    for slide in slides:
        clusters = assigned(store, slide, k)
        labels: list[str | None] = [None] * len(clusters)
        if store.slide(slide).stamp("labels") is not None:
            labels = read_table(store.slide(slide).record("labels")).column("label").to_pylist()
        for value, label in zip(clusters, labels, strict=True):
            if value is not None:
                yield slide, value, label


def expected_purity(store: Store, slides: Sequence[str]) -> list[dict[str, Any]]:
    expected = []
    for k in (2, 3):
        rows = list(joined(store, k, slides))
        for value in sorted({c for _, c, _ in rows}):
            labels = [label for _, c, label in rows if c == value and label is not None]
            names, counts = np.unique(labels, return_counts=True)
            shares = counts / max(1, counts.sum())
            expected.append(
                {
                    "k": k,
                    "cluster": value,
                    "tiles": sum(c == value for _, c, _ in rows),
                    "slides": len({slide for slide, c, _ in rows if c == value}),
                    "labelled_tiles": len(labels),
                    "label": str(names[counts.argmax()]) if labels else None,
                    "purity": shares.max() if labels else None,
                    "entropy": -(shares * np.log(shares)).sum() if labels else None,
                }
            )
    return expected


def assert_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert {name: got[name] for name in wanted} == {
            name: pytest.approx(value) if isinstance(value, float) else value
            for name, value in wanted.items()
        }


def test_purity_and_entropy_are_those_of_numpy(labelled: Store) -> None:
    summary = build_catalog(labelled)
    found = run_sql(labelled, "SELECT * FROM cluster_purity ORDER BY k, cluster").to_pylist()
    expected = expected_purity(labelled, ["a", "b", "c"])
    assert min(row["entropy"] for row in expected if row["k"] == 3) > 0
    assert_rows(found, expected)
    assert summary.purity.to_pylist() == found
    model = current_model(labelled)
    assert model is not None
    told = {(row["model"], row["encoder"], row["untrained"]) for row in found}
    assert told == {(model.version, "toy", False)}
    assert (summary.slides, summary.tiles, summary.labelled_tiles) == (3, 240, 60 + 79)


def test_purity_of_a_few_tiles_by_hand(store: Store) -> None:
    near, far = np.zeros((4, 2), np.float32), np.full((5, 2), 9, np.float32)
    write_features(store, "a", np.concatenate([near, far]))
    write_labels(store, "a", ["x", "x", "x", "y", None, None, None, None, None])
    assign_slide(store.slide("a"), cluster(store, n_clusters=(2,)))
    build_catalog(store)
    query = (
        "SELECT tiles, labelled_tiles, label, purity, entropy FROM cluster_purity ORDER BY tiles"
    )
    one, two = run_sql(store, query).to_pylist()
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert_rows(
        [one],
        [{"tiles": 4, "labelled_tiles": 4, "label": "x", "purity": 0.75, "entropy": entropy}],
    )
    assert two == {
        "tiles": 5,
        "labelled_tiles": 0,
        "label": None,
        "purity": None,
        "entropy": None,
    }
    shares = run_sql(store, "SELECT share FROM slide_composition ORDER BY share").to_pydict()
    assert shares == {"share": [pytest.approx(4 / 9), pytest.approx(5 / 9)]}


def test_composition_is_that_of_numpy(labelled: Store) -> None:
    build_catalog(labelled)
    expected = []
    for slide, k in itertools.product("abc", (2, 3)):
        values, counts = np.unique(assigned(labelled, slide, k), return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            share = count / counts.sum()
            expected.append(
                {"slide": slide, "k": k, "cluster": value, "tiles": count, "share": float(share)}
            )
    query = "SELECT * FROM slide_composition ORDER BY slide, k, cluster"
    assert_rows(run_sql(labelled, query).to_pylist(), expected)
    sums = run_sql(labelled, "SELECT sum(share) AS s FROM slide_composition GROUP BY slide, k")
    assert sums.column("s").to_pylist() == pytest.approx([1.0] * 6)


def test_slides_of_an_old_model_do_not_count(labelled: Store) -> None:
    old = current_model(labelled)
    new = cluster(labelled, n_clusters=(2, 3), seed=3)
    assert old is not None
    for slide in ("a", "b"):
        assign_slide(labelled.slide(slide), new)
    build_catalog(labelled)
    found = run_sql(labelled, "SELECT * FROM cluster_purity ORDER BY k, cluster").to_pylist()
    assert_rows(found, expected_purity(labelled, ["a", "b"]))
    assert sum(row["tiles"] for row in found if row["k"] == 3) == 60 + 80
    query = "SELECT slide, model, current FROM clusters GROUP BY ALL ORDER BY slide"
    assert [tuple(row.values()) for row in run_sql(labelled, query).to_pylist()] == [
        ("a", new.version, True),
        ("b", new.version, True),
        ("c", old.version, False),
    ]
    assert run_sql(labelled, "SELECT DISTINCT slide FROM slide_composition").num_rows == 2
    query = "SELECT slide, state, reason FROM completeness WHERE stage = 'clusters' ORDER BY slide"
    assert [tuple(row.values()) for row in run_sql(labelled, query).to_pylist()] == [
        ("a", "done", None),
        ("b", "done", None),
        ("c", "stale", f"of model {old.version}, not {new.version}"),
    ]


def test_clusters_of_changed_features_are_stale(labelled: Store) -> None:
    write_features(labelled, "a", blobs(60, 3, seed=77)[0])
    model = current_model(labelled)
    states = {s.slide: s for s in slide_states(labelled, model=model) if s.stage == "clusters"}
    assert (states["a"].state, states["a"].reason) == ("stale", "the features have changed")
    assert states["b"].state == "done"


def test_catalog_before_any_model(store: Store) -> None:
    write_features(store, "a", blobs(10, 2)[0])
    summary = build_catalog(store)
    assert summary.purity.num_rows == 0
    assert run_sql(store, "SELECT slide, tiles, encoder, model FROM slides").to_pylist() == [
        {"slide": "a", "tiles": 10, "encoder": "toy", "model": None}
    ]


def test_foreign_clusters_are_listed_but_do_not_count(labelled: Store) -> None:
    path = write_foreign_features(labelled, "theirs", blobs(20, 2)[0])
    columns = ["path", "x", "y", "w", "h"]
    table = pq.read_table(path).select(columns).append_column("n_clusters=2", pa.array([0] * 20))
    pq.write_table(table, labelled.slide("theirs").record("clusters"))
    build_catalog(labelled)
    query = "SELECT DISTINCT k, model, current FROM clusters WHERE slide = 'theirs'"
    assert run_sql(labelled, query).to_pylist() == [{"k": 2, "model": None, "current": False}]
    found = run_sql(labelled, "SELECT * FROM cluster_purity ORDER BY k, cluster").to_pylist()
    assert_rows(found, expected_purity(labelled, ["a", "b", "c"]))


def test_a_damaged_file_is_told_and_costs_only_its_slide(labelled: Store) -> None:
    clusters = labelled.slide("c").record("clusters")
    content = bytearray(clusters.read_bytes())
    content[4:400] = bytes(396)
    clusters.write_bytes(content)
    build_catalog(labelled)
    query = "SELECT slide, state, reason FROM completeness WHERE stage = 'clusters'"
    states = {row["slide"]: row for row in run_sql(labelled, query).to_pylist()}
    assert (states["a"]["state"], states["b"]["state"]) == ("done", "done")
    assert states["c"]["state"] == "failed"
    assert str(clusters) in states["c"]["reason"]
    counted = run_sql(labelled, "SELECT DISTINCT slide FROM clusters ORDER BY slide").to_pydict()
    assert counted == {"slide": ["a", "b"]}


def test_a_failed_rebuild_leaves_the_old_catalog(labelled: Store) -> None:
    build_catalog(labelled)
    before = labelled.catalog_path.read_bytes()
    for model in labelled.cluster_models.glob("*.parquet"):
        model.write_bytes(b"damaged")
    with pytest.raises(ClusterError, match="missing or damaged"):
        build_catalog(labelled)
    assert labelled.catalog_path.read_bytes() == before
    assert {p.name for p in labelled.cohort.iterdir()} == LEFT


# Queries -----------------------------------------------------------------------------------------


def test_queries_of_all_reading_kinds_are_answered(labelled: Store) -> None:
    build_catalog(labelled)
    assert run_sql(labelled, "SELECT count(*) AS n FROM tiles").to_pydict() == {"n": [240]}
    assert "cluster_purity" in run_sql(labelled, "SHOW TABLES").column("name").to_pylist()
    assert run_sql(labelled, "DESCRIBE labels").num_rows == 4
    assert run_sql(labelled, "SUMMARIZE tiles").num_rows > 4
    pivot = "PIVOT slide_composition ON cluster USING sum(tiles) GROUP BY slide"
    assert run_sql(labelled, pivot).num_rows == 3
    with pytest.raises(StoreError, match="no_such_table"):
        run_sql(labelled, "SELECT * FROM no_such_table")


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO labels VALUES ('a', 'b', 'c', 1)",
        "DELETE FROM tiles",
        "DROP TABLE tiles",
        "CREATE TABLE mine AS SELECT 1",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM read_text('{catalog}')",
        "SELECT * FROM glob('{cohort}/*')",
        "COPY tiles TO '{cohort}/tiles.csv'",
        "COPY tiles TO '{catalog}' (FORMAT csv, USE_TMP_FILE false)",
        "COPY tiles TO '{catalog}.wal' (FORMAT csv)",
        "COPY tiles TO '{catalog}.tmp/tiles' (FORMAT csv)",
        "EXPLAIN ANALYZE COPY tiles TO '{catalog}.wal' (FORMAT csv)",
        "EXPORT DATABASE '{cohort}/export'",
        "ATTACH '{cohort}/new.duckdb'",
        "ATTACH '{catalog}' AS mine (READ_WRITE)",
        "USE memory; DETACH catalog; ATTACH '{catalog}' AS mine; DROP TABLE mine.main.tiles",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT * FROM 'http://127.0.0.1:9/x.csv'",
        "SET threads = 1",
        "PRAGMA threads = 1",
        "SET enable_external_access = true",
        "SET disabled_filesystems = ''",
        "RESET disabled_filesystems",
        "SET lock_configuration = false",
        "RESET lock_configuration",
        "SET temp_directory = '{cohort}'",
    ],
)
def test_queries_change_and_reach_nothing(
    refusing: tuple[Store, dict[str, str]], query: str
) -> None:
    store, before = refusing
    catalog, cohort = (str(path).replace("'", "''") for path in (store.catalog_path, store.cohort))
    with pytest.raises(StoreError, match="The query failed") as caught:
        run_sql(store, query.format(catalog=catalog, cohort=cohort))
    assert "Parser Error" not in str(caught.value)
    assert contents(store.root) == before


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, str]]:
    store = Store(tmp_path_factory.mktemp("refusing") / "o'clock")
    write_features(store, "a", blobs(10, 2)[0])
    build_catalog(store)
    return store, contents(store.root)


def test_rebuild_under_an_open_reader(labelled: Store) -> None:
    build_catalog(labelled)
    with duckdb.connect(str(labelled.catalog_path), read_only=True) as reader:
        assert reader.sql("SELECT count(*) FROM slides").fetchall() == [(3,)]
        write_features(labelled, "d", blobs(10, 3)[0])
        build_catalog(labelled)
        assert reader.sql("SELECT count(*) FROM slides").fetchall() == [(3,)]
        assert reader.sql("SELECT count(*) FROM tiles").fetchall() == [(240,)]
        assert run_sql(labelled, "SELECT count(*) AS n FROM slides").to_pydict() == {"n": [4]}
        # Another's query does not lock this reader's settings.
        reader.execute("SET threads = 1")
    assert {p.name for p in labelled.cohort.iterdir()} == LEFT


def test_queries_run_side_by_side(labelled: Store) -> None:
    build_catalog(labelled)
    query = "SELECT count(*) AS n FROM tiles a, tiles b, tiles c WHERE a.x <= b.x + c.x"
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: run_sql(labelled, query).to_pydict(), range(8)))
    assert answers[1:] == answers[:-1]


def test_query_without_a_catalog(store: Store) -> None:
    with pytest.raises(StoreError, match="there is no catalog yet"):
        run_sql(store, "SELECT 1")


def test_store_can_be_moved(labelled: Store, tmp_path: Path) -> None:
    model = current_model(labelled)
    shutil.move(labelled.root, tmp_path / "moved")
    moved = Store(tmp_path / "moved")
    assert model is not None
    assert not assign_slide(moved.slide("a"), model).made_now
    assert [f.slide for f in feature_files(moved)] == ["a", "b", "c"]
