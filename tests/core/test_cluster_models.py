"""Cluster models, their numbers checked against scikit-learn, NumPy or by hand."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, pairwise_distances_argmin_min
from test_clusters import LENGTH, assigned, blobs, contents, write_features
from threadpoolctl import threadpool_limits

from histoencoder_core.cli import main
from histoencoder_core.clusters import (
    ClusterModel,
    assign_slide,
    cluster_slide,
    current_model,
    engine,
    feature_files,
    fit,
    kmeans,
    load_model,
    model_versions,
    save_model,
)
from histoencoder_core.clusters.engine import Centroids, computing
from histoencoder_core.clusters.fit import ensure_model, fit_clusters
from histoencoder_core.clusters.match import numbered_after
from histoencoder_core.clusters.quantiles import Distances
from histoencoder_core.clusters.transform import Transform
from histoencoder_core.errors import ClusterError, SettingsError, StoreError
from histoencoder_core.features import execution, lease
from histoencoder_core.settings import ClusterSettings
from histoencoder_core.store import Stamp, Store, layout
from histoencoder_core.store.tables import feature_list, read_table

Floats = npt.NDArray[np.float32]

KS = (3, 8)


def mixture(tiles: int, *, seed: int, patterns: int = 40, shift: float = 0.0) -> Floats:
    """More patterns than clusters, overlapping, in directions of unequal variance."""
    rng = np.random.default_rng([7, seed])
    scale = (np.arange(LENGTH) + 1.0) ** -0.5
    centres = np.random.default_rng(7).normal(0, 2, (patterns, LENGTH)) * scale
    drawn = centres[rng.integers(patterns, size=tiles)] + rng.normal(0, 1, (tiles, LENGTH)) * scale
    return (drawn + shift).astype(np.float32)


@pytest.fixture
def cohort(store: Store) -> Store:
    """Slides of unequal size; 1,500 tiles."""
    for i, tiles in enumerate((40, 700, 10, 450, 300)):
        write_features(store, f"slide-{i}", mixture(tiles, seed=i))
    return store


def all_features(store: Store) -> Floats:
    return np.concatenate([mixture(n, seed=i) for i, n in enumerate((40, 700, 10, 450, 300))])


def fitted(store: Store, *, n_clusters: tuple[int, ...] = KS, **settings: Any) -> ClusterModel:
    return fit_clusters(feature_files(store), ClusterSettings(n_clusters=n_clusters, **settings))


def same(one: ClusterModel, other: ClusterModel) -> bool:
    return one.version == other.version and all(
        np.array_equal(mine[k], theirs[k])
        for mine, theirs in ((one.centroids, other.centroids), (one.distances, other.distances))
        for k in KS
    )


# What is fitted -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sample_size", "within"), [(65536, 1.01), (500, 1.02)])
def test_inertia_is_near_that_of_many_starts_of_lloyd(
    cohort: Store, sample_size: int, within: float
) -> None:
    features = all_features(cohort)
    model = fitted(cohort, n_clusters=(3, 8, 20), batch_size=200, sample_size=sample_size)
    with threadpool_limits(1):
        best = {k: KMeans(k, n_init=20, random_state=0).fit(features) for k in model.inertia}
    for k, inertia in model.inertia.items():
        assert inertia <= within * best[k].inertia_ / len(features)


def test_measures_are_those_of_scikit_learn(cohort: Store) -> None:
    features = all_features(cohort)
    model = fitted(cohort)
    for k in KS:
        clusters, distances = pairwise_distances_argmin_min(
            features.astype(np.float64), model.centroids[k].astype(np.float64)
        )
        assert model.inertia[k] == pytest.approx((distances**2).mean(), rel=1e-5)
        wanted = np.percentile(distances, range(101))
        np.testing.assert_allclose(model.distances[k], wanted, rtol=2e-2)
        np.testing.assert_allclose(model.distances[k][[0, 100]], wanted[[0, 100]], rtol=1e-5)
        found, far = model.assign(features)[k]
        np.testing.assert_array_equal(found, clusters)
        np.testing.assert_allclose(far, distances, rtol=1e-4)
        # Clusters are numbered by size.
        sizes = np.bincount(clusters, minlength=k)
        assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)


def test_centroids_come_to_be_means(cohort: Store) -> None:
    features = all_features(cohort)
    model = fitted(cohort, tolerance=0, max_passes=60, sample_size=300)
    for k in KS:
        clusters = model.assign(features)[k][0]
        means = [features[clusters == cluster].mean(axis=0) for cluster in range(k)]
        np.testing.assert_allclose(model.centroids[k], means, atol=2e-2)


@pytest.mark.parametrize("cores", [1, 3])
def test_neither_memory_nor_cores_decide(
    cohort: Store, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ClusterSettings(n_clusters=KS, batch_size=100, sample_size=700)
    inputs = feature_files(cohort)
    monkeypatch.setattr(engine, "CPU_BLOCK", 32)
    model = fit_clusters(inputs, settings)
    for module in (engine, fit, kmeans):
        monkeypatch.setattr(module, "usable_cores", lambda: cores)
    assert same(fit_clusters(inputs, settings, memory_gb=1.1), model)
    assert same(fit_clusters(inputs[::-1], settings, memory_gb=50), model)


def test_several_k_are_those_of_one_each(cohort: Store) -> None:
    both = fitted(cohort, sample_size=700)
    for k in KS:
        alone = fitted(cohort, n_clusters=(k,), sample_size=700)
        np.testing.assert_allclose(alone.centroids[k], both.centroids[k], atol=1e-4)


def test_memory_that_does_not_suffice_is_told(cohort: Store) -> None:
    settings = ClusterSettings(n_clusters=KS)
    with pytest.raises(
        ClusterError, match=r"length 16 takes \d\.\d GB .* sample of 1500 tiles"
    ) as e:
        fit_clusters(feature_files(cohort), settings, memory_gb=1)
    assert "only 1 GB may be used" in str(e.value)
    assert "HISTOENCODER_CLUSTER_MEMORY_GB" in str(e.value)
    assert "HISTOENCODER_CLUSTERS__SAMPLE_SIZE" in str(e.value)


def test_a_batch_has_a_tile_for_each_centroid(cohort: Store) -> None:
    settings = ClusterSettings(n_clusters=(2, 900), batch_size=10, sample_size=5)
    plan = fit._Plan.within(2, feature_files(cohort), settings)
    assert plan.batch == plan.sample == 900
    assert plan.buffer >= 2 * plan.batch
    model = fit_clusters(feature_files(cohort), settings)
    assert len(np.unique(model.assign(all_features(cohort))[900][0])) == 900


def test_a_damaged_slide_stops_the_fit(cohort: Store) -> None:
    inputs = feature_files(cohort)
    path = cohort.slide("slide-2").record("features")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"slide-2.*can't be read"):
        fit_clusters(inputs, ClusterSettings(n_clusters=KS))


# The arithmetic -----------------------------------------------------------------------------------


def test_far_from_the_origin_no_digits_are_lost() -> None:
    rng = np.random.default_rng(0)
    tiles = (1e4 + rng.normal(0, 1, (3000, LENGTH))).astype(np.float32)
    points = tiles[:5].astype(np.float64)
    gaps = np.linalg.norm(tiles[:, None].astype(np.float64) - points, axis=2)
    with computing() as work:
        centroids = Centroids({5: torch.from_numpy(points)}, work.device)
        found = work.find(torch.from_numpy(tiles), centroids)
        sums = work.sums(torch.from_numpy(tiles), centroids)
    np.testing.assert_array_equal(found.clusters[5], gaps.argmin(axis=1))
    np.testing.assert_allclose(found.squared[5].sqrt(), gaps.min(axis=1), rtol=1e-4)
    assert found.squared[5][:5].tolist() == [0] * 5
    for cluster in range(5):
        members = tiles[gaps.argmin(axis=1) == cluster].astype(np.float64)
        assert sums.counts[5][cluster] == len(members)
        np.testing.assert_allclose(
            sums.moves[5][cluster], (members - points[cluster]).sum(axis=0), atol=0.05
        )
    assert sums.inertia[5] == pytest.approx((gaps.min(axis=1) ** 2).sum(), rel=1e-4)


def test_both_ways_to_add_up_agree() -> None:
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    places = torch.stack([torch.arange(200) % 3, 3 + torch.arange(200) % 5])
    found = [add_up(rows, places, 8) for add_up in (engine.by_index, engine.by_matrix)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(found[0][4], rows[1::5].sum(dim=0))


def test_threads_of_torch_are_given_back() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with computing():
            assert torch.get_num_threads() == 1
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.get_num_threads() == before


def test_a_gpu_is_leased(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int] | None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(lease, "lease_gpu", lambda indices: asked.append(indices) or 1)
    for device in ("auto", "cuda", "cuda:1"):
        with computing(device) as work:
            assert work.device == torch.device("cuda", 1)
    assert asked == [None, None, [1]]
    with pytest.raises(SettingsError, match="no cuda:2"), computing("cuda:2"):
        pass


def test_a_gpu_that_is_not_there_is_refused(cohort: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="finds no GPU"):
        fit_clusters(feature_files(cohort), ClusterSettings(n_clusters=KS), device="cuda")
    assert execution.on_gpu("auto") is False


def test_empty_clusters_take_the_farthest_tiles() -> None:
    tiles = torch.tensor([[0.0, 0], [1, 0], [0, 1], [50, 0], [0, 80]])
    start = torch.tensor([[0.4, 0.4], [900, 900], [-900, -900]], dtype=torch.float64)
    with computing() as work:
        one_step = kmeans.settle(work, tiles, {3: start}, steps=1, tolerance=0)
        rest = kmeans.settle(work, tiles, {3: start}, steps=50, tolerance=0)
    # The first takes all five; then the others take the tile farthest from it, and so on.
    torch.testing.assert_close(one_step.points[3][0], tiles.double().mean(dim=0))
    assert one_step.points[3][1:].tolist() == [[0, 80], [50, 0]]
    assert sorted(rest.counts[3].tolist()) == [1, 1, 3]
    assert rest.inertia[3] == pytest.approx(4 / 3)


def test_fewer_different_tiles_than_clusters(store: Store) -> None:
    features = np.repeat(np.eye(3, LENGTH, dtype=np.float32), 20, axis=0)
    write_features(store, "a", features)
    model = fitted(store, n_clusters=(2, 8))
    assert np.isfinite(model.centroids[8]).all()
    found, distances = model.assign(features)[8]
    assert len(np.unique(found)) == 3
    assert distances.max() == pytest.approx(0, abs=1e-6)
    assert model.inertia[8] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 99, 5000])
def test_quantiles_are_those_of_numpy(count: int) -> None:
    drawn = np.random.default_rng(count).lognormal(2, 2, count).astype(np.float32)
    drawn[: count // 10] = 0
    distances = Distances()
    for part in np.array_split(drawn, 7):
        distances.add(part)
    # NumPy's interpolate between two distances, which may be far apart; these lie at one of them.
    low, high = (np.percentile(drawn, range(101), method=way) for way in ("lower", "higher"))
    found = distances.percentiles()
    assert (found >= low * (1 - 5e-4)).all()
    assert (found <= high * (1 + 5e-4) + 1e-30).all()
    assert (np.diff(found) >= 0).all()
    assert found[[0, 100]].tolist() == [drawn.min(), drawn.max()]


# Transforms ---------------------------------------------------------------------------------------


def test_normalised_features_count_by_direction(store: Store, tmp_path: Path) -> None:
    features = mixture(600, seed=0)
    lengths = np.random.default_rng(0).uniform(0.1, 10, (600, 1)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    write_features(store, "a", features * lengths)
    write_features(Store(tmp_path / "unit"), "a", unit)
    model = fitted(store, normalise=True)
    plain = fitted(Store(tmp_path / "unit"))
    for k in KS:
        np.testing.assert_allclose(model.centroids[k], plain.centroids[k], atol=1e-4)
        found, distances = model.assign(features)[k]
        wanted = pairwise_distances_argmin_min(unit, model.centroids[k])
        np.testing.assert_array_equal(found, wanted[0])
        np.testing.assert_allclose(distances, wanted[1], atol=1e-5)
    assert Transform(normalise=True).apply(torch.zeros(1, LENGTH)).eq(0).all()


def test_whitening_is_that_of_scikit_learn(cohort: Store) -> None:
    features = all_features(cohort)
    model = fitted(cohort, whiten=5)
    moved = model.transform.apply(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(np.cov(moved.T), np.eye(5), atol=2e-3)
    wanted = PCA(5, whiten=True).fit_transform(features.astype(np.float64))
    wanted *= np.sign((wanted * moved).sum(axis=0))
    np.testing.assert_allclose(moved, wanted, atol=2e-3)
    assert model.centroids[8].shape == (8, 5)
    clusters, distances = pairwise_distances_argmin_min(moved, model.centroids[8])
    np.testing.assert_array_equal(model.assign(features)[8][0], clusters)
    assert model.inertia[8] == pytest.approx((distances**2).mean(), rel=1e-3)


@pytest.mark.parametrize("whiten", [10, LENGTH + 1])
def test_whitening_beyond_what_varies_is_refused(store: Store, whiten: int) -> None:
    write_features(store, "a", mixture(9, seed=0))
    with pytest.raises(ClusterError, match=rf"whitened to {whiten} .* 9 tiles drawn vary in 8 "):
        fitted(store, n_clusters=(2,), whiten=whiten)


@pytest.mark.parametrize("settings", [{}, {"normalise": True}, {"normalise": True, "whiten": 4}])
def test_a_model_is_the_same_when_read_again(cohort: Store, settings: dict[str, Any]) -> None:
    model = fitted(cohort, **settings)
    save_model(cohort, model)
    again = current_model(cohort)
    assert again is not None
    assert same(again, model)
    assert again.inertia == model.inertia
    assert again.settings == model.settings
    assert len(again.matches) == 0
    features = all_features(cohort)
    features[5] = np.nan
    for mine, theirs in zip(
        model.assign(features).values(), again.assign(features).values(), strict=True
    ):
        np.testing.assert_array_equal(mine[0], theirs[0])
        np.testing.assert_array_equal(mine[1], theirs[1])
        assert mine[0][5] == -1
        assert np.isnan(mine[1][5])


def test_models_of_earlier_versions_are_read(store: Store) -> None:
    features, _ = blobs(60, 2)
    write_features(store, "a", features)
    [file] = feature_files(store)
    stamp = Stamp.of(
        "cluster_model",
        algorithm=1,
        made_from={
            "space": file.space,
            "settings": {"n_clusters": [2]},
            "features": {"a": file.fingerprint},
        },
    ).with_result(encoder="toy", slides=1, tiles=60, n_clusters=[2], inertia={"2": 1.5})
    columns = {
        "k": pa.array([2, 2], pa.int32()),
        "cluster": pa.array([0, 1], pa.int32()),
        "features": feature_list(features[:2], "float32"),
    }
    path = store.cluster_models / f"{stamp.fingerprint[:12]}.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(stamp.on_table(pa.table(columns)), path)
    (path.parent / "current.json").write_text(json.dumps({"version": path.stem}))
    model = current_model(store)
    assert model is not None
    assert (model.inertia, model.distances, len(model.matches)) == ({2: 1.5}, {}, 0)
    assert model.transform == Transform()
    result = assign_slide(store.slide("a"), model).result
    assert (result["outside"], result["outside_k"]) == (None, 2)
    assert assigned(store, "a", 2) == model.assign(features)[2][0].tolist()
    # It is numbered after, but not taken for a fit of today's algorithm.
    new, was_fitted = ensure_model(store, [file], ClusterSettings(n_clusters=(2,)))
    assert was_fitted
    assert new.stamp.made_from["numbered_after"] == new.stamp.result["previous"] == path.stem
    assert model_versions(store) == sorted([path.stem, new.version])


# Numbers that stay --------------------------------------------------------------------------------


def test_a_match_is_the_best_of_all_permutations(cohort: Store) -> None:
    old = fitted(cohort, n_clusters=(2, 5), sample_size=100, max_passes=1)
    new = numbered_after(fitted(cohort, n_clusters=(3, 5), seed=9, sample_size=100), old)
    raw = fitted(cohort, n_clusters=(3, 5), seed=9, sample_size=100)
    gaps = np.linalg.norm(old.centroids[5][:, None] - raw.centroids[5], axis=2)
    best = min(itertools.permutations(range(5)), key=lambda order: gaps[range(5), order].sum())
    np.testing.assert_array_equal(new.centroids[5], raw.centroids[5][list(best)])
    np.testing.assert_array_equal(new.centroids[3], raw.centroids[3])
    rows = new.matches.to_pylist()
    assert [(row["k"], row["cluster"], row["previous_cluster"]) for row in rows] == [
        (5, i, i) for i in range(5)
    ]
    for i, row in enumerate(rows):
        others = [np.linalg.norm(old.centroids[5][i] - old.centroids[5][j]) for j in range(5)]
        apart = min(gap for j, gap in enumerate(others) if j != i)
        assert row["moved"] == pytest.approx(gaps[i, best[i]], rel=1e-5)
        assert row["moved_relative"] == pytest.approx(gaps[i, best[i]] / apart, rel=1e-5)
        assert row["same"] == (row["moved_relative"] < 0.5)
    assert new.version != raw.version
    save_model(cohort, new)
    assert load_model(cohort, new.version).matches.equals(new.matches)


@pytest.mark.parametrize("settings", [{}, {"whiten": 6}, {"normalise": True, "whiten": 6}])
def test_clusters_keep_their_numbers(store: Store, settings: dict[str, Any]) -> None:
    # Components that whitening drops hold the mean too, which is far from zero in real features.
    away = np.random.default_rng(1).normal(0, 0 if settings.get("normalise") else 20, LENGTH)
    away = away.astype(np.float32)
    for i in range(3):
        write_features(store, f"slide-{i}", away + blobs(300, 6, seed=i)[0])
    asked = ClusterSettings(n_clusters=(6,), **settings)
    old, _ = ensure_model(store, feature_files(store), asked)
    # A new slide of one tissue more, and most of the least frequent cluster so far.
    features, truth = blobs(900, 7, seed=9, weights=[0.05, 0.05, 0.05, 0.05, 0.05, 0.65, 0.1])
    features += away
    write_features(store, "new", features)
    new, was_fitted = ensure_model(store, feature_files(store), asked)
    assert was_fitted
    known = features[truth < 6]
    before, after = old.assign(known)[6][0], new.assign(known)[6][0]
    assert adjusted_rand_score(truth[truth < 6], before) > 0.95
    kept = new.matches.filter(pa.compute.equal(new.matches["same"], True))["cluster"].to_pylist()
    assert len(kept) >= 4
    of_kept = np.isin(before, kept)
    assert (before[of_kept] == after[of_kept]).mean() > 0.95


def test_models_that_differ_too_much_are_not_matched(cohort: Store) -> None:
    old = fitted(cohort)
    others = (
        fitted(cohort, normalise=True),
        fitted(cohort, whiten=4),
        fitted(cohort, n_clusters=(2, 4)),
    )
    for model in others:
        assert numbered_after(model, old) is model
    for i in range(5):
        write_features(cohort, f"slide-{i}", mixture(50, seed=i), weights="w2")
    assert len(numbered_after(fitted(cohort), old).matches) == 0


def test_a_centroid_that_shared_its_place(cohort: Store) -> None:
    model = fitted(cohort, n_clusters=(3,))
    shared = model.centroids[3][[0, 0, 2]]
    rows = numbered_after(model, replace(model, centroids={3: shared})).matches.to_pylist()
    # One of the two that shared a place left it, the other did not move.
    moved = sorted((row["moved_relative"], row["same"]) for row in rows)
    assert moved == [(0, True), (0, True), (np.inf, False)]


def test_a_fit_is_found_again_whatever_it_was_numbered_after(cohort: Store) -> None:
    inputs = feature_files(cohort)
    one, two = ClusterSettings(n_clusters=KS), ClusterSettings(n_clusters=KS, seed=1)
    first, _ = ensure_model(cohort, inputs, one)
    second, was_fitted = ensure_model(cohort, inputs, two)
    assert was_fitted
    assert "numbered_after" not in first.stamp.made_from
    assert second.stamp.made_from["numbered_after"] == first.version
    for settings, known in ((one, first), (two, second), (two, second)):
        model, was_fitted = ensure_model(cohort, inputs, settings)
        assert not was_fitted
        assert same(model, known)
        now = current_model(cohort)
        assert now is not None
        assert now.version == known.version
    assert len(model_versions(cohort)) == 2


def test_a_lost_current_model_does_not_stop_a_fit(
    cohort: Store, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = feature_files(cohort)
    first, _ = ensure_model(cohort, inputs, ClusterSettings(n_clusters=KS))
    (cohort.cluster_models / f"{first.version}.parquet").write_bytes(b"PAR1")
    again, was_fitted = ensure_model(cohort, inputs, ClusterSettings(n_clusters=KS))
    assert was_fitted
    assert same(again, first)
    assert "not numbered after" in caplog.text


# Slides unlike the others -------------------------------------------------------------------------


def test_slides_outside_of_what_the_model_saw(store: Store) -> None:
    for i in range(3):
        write_features(store, f"slide-{i}", mixture(2000, seed=i))
    model = fitted(store)
    for i, shift in ((7, 0.0), (8, 30.0)):
        write_features(store, f"slide-{i}", mixture(2000, seed=i, shift=shift), unreadable=[3])
    results = {s: assign_slide(store.slide(s), model).result for s in store.slide_ids()}
    assert {result["outside_k"] for result in results.values()} == {8}
    seen = [results[f"slide-{i}"]["outside"] for i in range(3)]
    # Of the tiles that it was fitted on, 1 % lie beyond the 99 % quantile.
    assert np.mean(seen) == pytest.approx(0.01, abs=5e-4)
    assert results["slide-7"]["outside"] < 0.03
    assert results["slide-8"]["outside"] == 1
    table = read_table(store.slide("slide-8").record("clusters"))
    wanted = model.assign(mixture(2000, seed=8, shift=30))[8][1]
    distances = table["distance=8"].to_pylist()
    assert [i for i, value in enumerate(distances) if value is None] == [3]
    np.testing.assert_array_equal(distances[4:], wanted[4:])


# One slide by itself ------------------------------------------------------------------------------


def test_a_slide_is_clustered_by_itself(store: Store) -> None:
    features, truth = blobs(200, 4)
    write_features(store, "a", features, unreadable=[7])
    settings = ClusterSettings(n_clusters=(2, 4, 300))
    stamp = cluster_slide(store.slide("a"), settings)
    assert stamp.made_now
    assert stamp.result["n_clusters"] == [2, 4]
    table = read_table(store.slide("a").record("slide_clusters"))
    assert table.column_names[:6] == ["tile", "x", "y", "w", "h", "n_clusters=2"]
    found = table["n_clusters=4"].to_pylist()
    assert [i for i, value in enumerate(found) if value is None] == [7]
    assert adjusted_rand_score(np.delete(truth, 7), np.delete(found, 7)) == 1
    with Image.open(store.slide("a").file(layout.THUMBNAIL_SLIDE_CLUSTERS)) as image:
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 4
    assert not store.cluster_models.exists()
    before = contents(store.root)
    assert not cluster_slide(store.slide("a"), settings).made_now
    assert contents(store.root) == before
    assert cluster_slide(store.slide("a"), settings, overwrite=True).made_now
    assert read_table(store.slide("a").record("slide_clusters")).equals(table)
    write_features(store, "a", blobs(100, 4, seed=3)[0])
    assert cluster_slide(store.slide("a"), settings).made_now


def test_a_slide_of_too_few_tiles_fails_alone(store: Store) -> None:
    write_features(store, "a", blobs(3, 2)[0])
    with pytest.raises(ClusterError, match="3 tiles can't be put into 4 clusters"):
        cluster_slide(store.slide("a"), ClusterSettings(n_clusters=(4,)))
    assert "3 tiles" in store.slide("a").failures()["slide_clusters"]["reason"]
    with pytest.raises(ClusterError, match="has no features"):
        cluster_slide(store.slide("b"), ClusterSettings())


# The command line ---------------------------------------------------------------------------------


@pytest.fixture
def program(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bare_environment: None,
) -> Callable[..., tuple[int, str, str]]:
    """`histoencoder cluster` on the store: exit code, output, error output."""

    def run(*words: object) -> tuple[int, str, str]:
        command = ["histoencoder", "cluster", "-i", str(store.root), *map(str, words)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            sys.exit(main())
        told = capsys.readouterr()
        return int(stop.value.code or 0), told.out, told.err

    return run


def test_the_command_matches_and_transforms(
    cohort: Store, program: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = program("-n", 3, "-n", 8, "--use-cpu")
    assert code == 0
    assert "Fitted cluster model" in out
    assert "Numbered after" not in out
    code, out, _ = program("-n", 3, "-n", 8, "--seed", 5, "--memory", 3, "--device", "cpu")
    assert code == 0
    assert "of 11 clusters are the same" in out
    code, out, _ = program("--normalise", "--whiten", 4, "-n", 3)
    assert code == 0
    model = current_model(cohort)
    assert model is not None
    assert model.settings == ClusterSettings(n_clusters=(3,), normalise=True, whiten=4)
    assert "Using cluster model" in program()[1]
    assert program("--whiten", 40, "-n", 3, "-z")[0] != 0
    code, _, error = program("--memory", 0.2)
    assert code != 0
    assert "cluster_memory_gb" in error


def test_the_command_clusters_each_slide(
    cohort: Store, program: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, error = program("--per-slide", "-n", 12)
    assert code == 1
    assert "slide-2: 10 tiles can't be put into 12 clusters" in error
    assert "5 slides: 4 made, 1 failed" in out
    assert current_model(cohort) is None
    assert read_table(cohort.slide("slide-3").record("slide_clusters")).num_rows == 450


# The benchmark ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_prints_its_measures(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "clusters.py"
    words = ("--slides", "3", "--tiles", "3000", "--length", "16", "--n-clusters", "4", "8")
    done = subprocess.run(
        [sys.executable, str(script), *words, "--repeat", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, peer = map(json.loads, done.stdout.splitlines())
    assert (ours["program"], peer["program"]) == ("ours", "scikit-learn")
    for line in (ours, peer):
        assert line["seconds"]["median"] > 0
        assert 100 < line["peak_rss_mb"]["median"] < 3000
        assert line["inertia"].keys() == {"4", "8"}
        assert line["machine"].keys() == {"cpu", "cores", "load_at_start"}
        assert line["versions"].keys() >= {"torch", "scikit_learn", "ours"}
        assert (line["slides"], line["tiles"], line["length"]) == (3, 3000, 16)
    # What the model tells is what is measured by other code.
    assert ours["told_inertia"] == pytest.approx(ours["inertia"], rel=1e-4)
    assert ours["inertia_ratio"]["8"] == pytest.approx(
        ours["inertia"]["8"] / peer["inertia"]["8"], rel=1e-3
    )
    assert not [*tmp_path.iterdir()]
