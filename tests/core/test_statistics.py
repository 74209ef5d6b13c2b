"""Bootstraps and permutations, against straightforward loops over tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cohorts import Truth, copy_of, truth_of, write_cohort_of

from histoencoder_core.cohort import build_catalog, ensure_statistics, publish_catalog, run_sql
from histoencoder_core.store import Store

K = 8
MANY = 1000
"""Replicates, here and there: their means agree within a few standard errors."""


@pytest.fixture(scope="module")
def copied(cohort_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The cohort with statistics of many replicates."""
    store = copy_of(cohort_store, tmp_path_factory.mktemp("statistics") / "store")
    build_catalog(store)
    ensure_statistics(store, replicates=MANY, seed=1)
    build_catalog(store)
    return store


@pytest.fixture(scope="module")
def truth(cohort_store: Store) -> Truth:
    return truth_of(cohort_store)


def purities(clusters: np.ndarray, labels: np.ndarray) -> dict[int, tuple[int, float]]:
    """Labelled tiles and purity of each cluster."""
    found = {}
    for cluster in set(clusters.tolist()):
        _, counts = np.unique(labels[clusters == cluster], return_counts=True)
        found[cluster] = (int(counts.sum()), counts.max() / counts.sum())
    return found


def drawn_slides(truth: Truth, rng: np.random.Generator) -> dict[int, tuple[int, float]]:
    slides, clusters, labels = truth.labelled(K)
    ids = np.unique(slides)
    rows = np.concatenate([np.flatnonzero(slides == s) for s in rng.choice(ids, len(ids))])
    return purities(clusters[rows], labels[rows])


def permuted(truth: Truth, rng: np.random.Generator) -> dict[int, tuple[int, float]]:
    _, clusters, labels = truth.labelled(K)
    return purities(clusters, rng.permutation(labels))


def permuted_within_slides(truth: Truth, rng: np.random.Generator) -> dict[int, tuple[int, float]]:
    slides, clusters, labels = truth.labelled(K)
    labels = labels.copy()
    for slide in np.unique(slides):
        own = slides == slide
        labels[own] = rng.permutation(labels[own])
    return purities(clusters, labels)


def coverage(found: dict[int, tuple[int, float]], threshold: float) -> float:
    covered = sum(tiles for tiles, purity in found.values() if purity >= threshold)
    return covered / sum(tiles for tiles, _ in found.values())


def replicates_of(store: Store, scheme: str) -> list[dict[int, tuple[int, float]]]:
    rows = run_sql(
        store,
        f"FROM purity_replicates WHERE scheme = '{scheme}' AND k = {K} ORDER BY replicate, cluster",
    ).to_pylist()
    found: dict[int, dict[int, tuple[int, float]]] = {}
    for row in rows:
        if row["labelled_tiles"]:
            told = row["labelled_tiles"], row["purity"]
            found.setdefault(row["replicate"], {})[row["cluster"]] = told
    return list(found.values())


@pytest.mark.parametrize(
    ("scheme", "draw"),
    [
        ("bootstrap", drawn_slides),
        ("all", permuted),
        ("within_slides", permuted_within_slides),
    ],
)
def test_replicates_are_those_of_a_loop_over_tiles(
    copied: Store, truth: Truth, scheme: str, draw: Any
) -> None:
    rng = np.random.default_rng(7)
    expected = [draw(truth, rng) for _ in range(MANY)]
    found = replicates_of(copied, scheme)
    assert len(found) == MANY
    for cluster in range(K):
        for number in (0, 1):  # labelled tiles, purity
            one, two = (
                np.array([one[cluster][number] for one in drawn if cluster in one])
                for drawn in (expected, found)
            )
            assert len(two) == pytest.approx(len(one), abs=4 * np.sqrt(MANY) / 2)
            close(one, two)
            if scheme != "bootstrap" and number == 0:
                assert set(one) == set(two)  # the margins stand
                assert len(set(two)) == 1
    for threshold in (0.3, 0.5, 0.9):
        close(*([coverage(one, threshold) for one in drawn] for drawn in (expected, found)))


def close(one: Any, two: Any) -> None:
    """Two samples have the same mean, and about the same spread."""
    error = np.sqrt((np.var(one) + np.var(two)) / len(one))
    assert abs(np.mean(one) - np.mean(two)) <= 4.5 * error + 1e-12
    assert np.std(two) == pytest.approx(np.std(one), rel=0.2, abs=2e-3)


def test_intervals_are_quantiles_of_the_replicates(copied: Store) -> None:
    drawn = replicates_of(copied, "bootstrap")
    for row in run_sql(copied, f"FROM cluster_purity({K})").to_pylist():
        values = [one[row["cluster"]][1] for one in drawn if row["cluster"] in one]
        expected = np.quantile(values, [0.025, 0.975])
        assert [row["bootstrap_low"], row["bootstrap_high"]] == pytest.approx(expected.tolist())
    for threshold in (0.5, 0.9):
        [row] = run_sql(copied, f"FROM coverage_at({K}, {threshold})").to_pylist()
        expected = np.quantile([coverage(one, threshold) for one in drawn], [0.025, 0.975])
        assert [row["low"], row["high"]] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_p_values_count_the_replicates_that_reach_what_was_seen(
    copied: Store, threshold: float
) -> None:
    [seen] = run_sql(copied, f"FROM coverage_at({K}, {threshold})").to_pylist()
    rows = run_sql(copied, f"FROM coverage_null({K}, {threshold})").to_pylist()
    assert [row["scheme"] for row in rows] == ["all", "within_slides"]
    for row in rows:
        null = [coverage(one, threshold) for one in replicates_of(copied, row["scheme"])]
        assert row["observed"] == seen["coverage"]
        assert row["null_mean"] == pytest.approx(np.mean(null))
        interval = np.quantile(null, [0.025, 0.975]).tolist()
        assert [row["null_low"], row["null_high"]] == pytest.approx(interval)
        reached = sum(value >= row["observed"] for value in null)
        assert row["p_value"] == pytest.approx((1 + reached) / (1 + MANY))
        assert row["replicates"] == MANY


def test_the_same_seed_gives_the_same_and_another_another(copied: Store, tmp_path: Path) -> None:
    table = "FROM purity_replicates ORDER BY ALL"
    store = copy_of(copied, tmp_path / "store")
    found = {}
    for seed in (0, 1, 0):
        (store.statistics / "purity_replicates.parquet").unlink()
        stamp = ensure_statistics(store, replicates=20, seed=seed)
        assert stamp is not None
        assert stamp.made_now
        build_catalog(store)
        rows = run_sql(store, table).to_pylist()
        assert rows == found.setdefault(seed, rows)
        again = ensure_statistics(store, replicates=20, seed=seed)
        assert again is not None
        assert not again.made_now
    assert found[0] != found[1]


def test_statistics_of_other_data_are_told_and_not_used(copied: Store, tmp_path: Path) -> None:
    store = copy_of(copied, tmp_path / "store")
    publish_catalog(store)

    def told() -> tuple[Any, ...]:
        [statistics] = run_sql(store, "SELECT state, labelled_slides FROM statistics").to_pylist()
        [row] = run_sql(store, f"FROM coverage_at({K}, 0.9)").to_pylist()
        [null, _] = run_sql(store, f"FROM coverage_null({K}, 0.9)").to_pylist()
        known = run_sql(store, "SELECT count(bootstrap_low) AS n FROM cluster_purity").to_pylist()
        return (
            *statistics.values(), row["low"] is not None, null["p_value"] is not None,
            null["replicates"], known[0]["n"] > 0,
        )  # fmt: skip

    assert told() == ("current", 5, True, True, 200, True)
    kept = store.slide("synthetic-01").record("labels")
    kept.rename(tmp_path / "kept")
    build_catalog(store)
    assert told() == ("stale", 5, False, False, 0, False)
    (tmp_path / "kept").rename(kept)
    build_catalog(store)  # the data are the old ones again
    assert told() == ("current", 5, True, True, 200, True)
    kept.unlink()
    publish_catalog(store)
    assert told() == ("current", 4, True, True, 200, True)
    for path in store.statistics.iterdir():
        path.unlink()
    build_catalog(store)
    assert told() == ("missing", None, False, False, 0, False)


def test_clusters_that_tell_nothing_and_clusters_that_tell_all(store: Store) -> None:
    """Chance covers what clusters without meaning cover, and never what perfect ones do."""
    rng = np.random.default_rng(0)
    kinds = {f"s{i}": rng.integers(3, size=120) for i in range(6)}
    write_cohort_of(store, kinds, clusters={2: lambda n: rng.integers(2, size=len(n)),
                                            3: lambda n: n})  # fmt: skip
    publish_catalog(store)
    rows = run_sql(store, "FROM coverage_null(2, 0.35)").to_pylist()
    assert [row["p_value"] > 0.05 for row in rows] == [True, True]
    rows = run_sql(store, "FROM coverage_null(3, 0.99)").to_pylist()
    assert [(row["observed"], row["null_mean"]) for row in rows] == [(1, 0), (1, 0)]
    assert [row["p_value"] for row in rows] == [pytest.approx(1 / 201)] * 2
    [row] = run_sql(store, "FROM coverage_at(3, 0.99)").to_pylist()
    assert (row["coverage"], row["low"], row["high"]) == (1, 1, 1)


def test_labels_that_only_tell_slides_apart_are_unmasked(store: Store) -> None:
    """Each slide has one label and one cluster: tiles seem pure, but within slides none are."""
    kinds = {f"s{i}": np.full(50, i % 2) for i in range(6)}
    write_cohort_of(store, kinds, clusters={2: lambda n: n})
    publish_catalog(store)
    over_all, within = run_sql(store, "FROM coverage_null(2, 0.99)").to_pylist()
    assert over_all["p_value"] == pytest.approx(1 / 201)
    assert (within["p_value"], within["null_mean"]) == (1, 1)


@pytest.mark.parametrize("kinds", [np.zeros(40, int), np.arange(40) % 2])
def test_where_only_one_table_is_possible_chance_gives_what_is_there(
    store: Store, kinds: np.ndarray
) -> None:
    """One label only, or all tiles in one cluster: permuted, they are what they were."""
    slides = {"a": kinds, "b": kinds}
    ones = {2: lambda n: np.zeros(len(n), int), 3: lambda n: np.arange(len(n)) % (1 + n.max())}
    write_cohort_of(store, slides, clusters=ones)
    publish_catalog(store)
    [row] = run_sql(store, "FROM coverage_at(2, 0.5)").to_pylist()
    for null in run_sql(store, "FROM coverage_null(2, 0.5)").to_pylist():
        assert (row["coverage"], null["null_mean"], null["p_value"]) == (1, 1, 1)


def test_one_slide_tells_of_no_other(store: Store) -> None:
    write_cohort_of(store, {"s": np.arange(60) % 2}, clusters={2: lambda n: n})
    publish_catalog(store)
    [row] = run_sql(store, "FROM coverage_at(2, 0.9)").to_pylist()
    assert (row["coverage"], row["low"], row["high"]) == (1, None, None)
    assert (
        run_sql(store, "FROM coverage_null(2, 0.9)").column("replicates").to_pylist() == [200] * 2
    )


def test_without_labels_there_are_no_statistics(store: Store) -> None:
    write_cohort_of(store, {"s": np.full(30, -1)}, clusters={2: lambda n: n % 2})
    publish_catalog(store)
    assert ensure_statistics(store) is None
    assert not store.statistics.exists()
