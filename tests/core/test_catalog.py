"""The catalog: its numbers against another way of computing them, and its refresh."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from cohorts import COHORT_K, Truth, copy_of, tables_of, truth_of
from scipy.stats import binomtest, entropy
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from test_cli import UNTRAINED, program  # noqa: F401 - a fixture

from histoencoder_core.clusters import assign_slide, current_model, feature_files
from histoencoder_core.clusters.fit import ensure_model
from histoencoder_core.clusters.naming import NamedCluster, write_derived
from histoencoder_core.cohort import build_catalog, catalog, run_sql
from histoencoder_core.labels import Annotations, label_annotated
from histoencoder_core.settings import ClusterSettings, LabelSettings, TilingSettings
from histoencoder_core.slides import describe_slide
from histoencoder_core.slides.find import FoundSlide
from histoencoder_core.slides.sheet import SheetRow
from histoencoder_core.store import Store
from histoencoder_core.tiles import cut_tiles, tile_source

THRESHOLDS = (0.0, 0.6, 0.9, 1.0)


@pytest.fixture(scope="module")
def truth(cohort_store: Store) -> Truth:
    return truth_of(cohort_store)


@pytest.fixture(scope="module")
def facts(cohort_store: Store) -> dict[str, dict[str, str]]:
    with (cohort_store.root.parent / "slides" / "slides.csv").open() as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


# Numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", COHORT_K)
def test_purity_is_that_of_numpy_and_scipy(cohort_store: Store, truth: Truth, k: int) -> None:
    found = run_sql(cohort_store, f"FROM cluster_purity({k})").to_pylist()
    assert found == run_sql(cohort_store, f"FROM cluster_purity WHERE k = {k}").to_pylist()
    assert [row["cluster"] for row in found] == np.unique(truth.clusters[k]).tolist()
    slides, clusters, labels = truth.labelled(k)
    for row in found:
        own = truth.clusters[k] == row["cluster"]
        assert row["tiles"] == own.sum()
        assert row["slides"] == len(set(truth.slides[own]))
        names, counts = np.unique(labels[clusters == row["cluster"]], return_counts=True)
        n, most = int(counts.sum()), int(counts.max())
        assert (row["labelled_tiles"], row["label"]) == (n, names[counts.argmax()])
        assert row["labelled_slides"] == len(set(slides[clusters == row["cluster"]]))
        assert row["purity"] == pytest.approx(most / n)
        assert row["entropy"] == pytest.approx(entropy(counts))
        wilson = binomtest(most, n).proportion_ci(method="wilson")
        assert (row["purity_low"], row["purity_high"]) == pytest.approx((wilson.low, wilson.high))
        assert 0 <= row["bootstrap_low"] <= row["bootstrap_high"] <= 1


@pytest.mark.parametrize("k", COHORT_K)
def test_curve_goes_from_the_purest_cluster_of_each_label_on(cohort_store: Store, k: int) -> None:
    rows = run_sql(cohort_store, f"FROM cluster_purity({k})").to_pylist()
    rows.sort(key=lambda r: (r["label"], -r["purity"], -r["labelled_tiles"], r["cluster"]))
    total = sum(row["labelled_tiles"] for row in rows)
    expected = []
    for label, group in itertools.groupby(rows, key=lambda row: row["label"]):
        clusters = list(group)
        of_label, before = sum(row["labelled_tiles"] for row in clusters), 0
        for place, row in enumerate(clusters, 1):
            before += row["labelled_tiles"]
            expected.append(
                {
                    "label": label, "place": place, "cluster": row["cluster"],
                    "purity": row["purity"], "labelled_tiles": row["labelled_tiles"],
                    "share": pytest.approx(row["labelled_tiles"] / total),
                    "cumulative_share": pytest.approx(before / total),
                    "cumulative_share_of_label": pytest.approx(before / of_label),
                }
            )  # fmt: skip
    assert run_sql(cohort_store, f"FROM purity_curve({k})").to_pylist() == expected


@pytest.mark.parametrize("k", COHORT_K)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_coverage_is_the_share_of_tiles_in_pure_clusters(
    cohort_store: Store, truth: Truth, k: int, threshold: float
) -> None:
    _, clusters, labels = truth.labelled(k)
    covered = pure = 0
    for cluster in set(clusters.tolist()):
        [(_, most)] = Counter(labels[clusters == cluster].tolist()).most_common(1)
        size = int((clusters == cluster).sum())
        if most / size >= threshold:
            covered, pure = covered + size, pure + 1
    [row] = run_sql(cohort_store, f"FROM coverage_at({k}, {threshold})").to_pylist()
    assert (row["labelled_tiles"], row["covered_tiles"]) == (len(labels), covered)
    assert (row["coverage"], row["clusters"]) == (pytest.approx(covered / len(labels)), pure)
    assert 0 <= row["low"] <= row["high"] <= 1


def test_a_number_of_clusters_that_there_is_not_has_no_answer(cohort_store: Store) -> None:
    for macro in ("cluster_purity(5)", "purity_curve(5)", "coverage_at(5, 0.9)",
                  "coverage_null(5, 0.9)", "cluster_spread(5)", "slide_composition(5)",
                  "agreement(5)"):  # fmt: skip
        assert run_sql(cohort_store, f"FROM {macro}").num_rows == 0, macro


@pytest.mark.parametrize("k", COHORT_K)
def test_spread_is_that_of_counters(
    cohort_store: Store, truth: Truth, facts: dict[str, dict[str, str]], k: int
) -> None:
    def largest(counts: Counter[str]) -> tuple[str, float]:
        name = min(counts, key=lambda name: (-counts[name], name))
        return name, counts[name] / counts.total()

    whole = {
        fact: Counter(facts[slide][fact] for slide in truth.slides.tolist())
        for fact in ("site", "scanner")
    }
    for row in run_sql(cohort_store, f"FROM cluster_spread({k})").to_pylist():
        slides = truth.slides[truth.clusters[k] == row["cluster"]].tolist()
        name, share = largest(Counter(slides))
        assert (row["tiles"], row["slides"]) == (len(slides), len(set(slides)))
        assert (row["largest_slide"], row["largest_slide_share"]) == (name, pytest.approx(share))
        for fact, all_of in whole.items():
            counts = Counter(facts[slide][fact] for slide in slides)
            name, share = largest(counts)
            assert row[f"{fact}s"] == len(counts)
            assert row[f"largest_{fact}"] == name
            assert row[f"largest_{fact}_share"] == pytest.approx(share)
            assert row[f"{fact}_share_of_all"] == pytest.approx(all_of[name] / all_of.total())


@pytest.mark.parametrize("k", COHORT_K)
def test_composition_is_that_of_counters(
    cohort_store: Store, truth: Truth, facts: dict[str, dict[str, str]], k: int
) -> None:
    expected, wide = [], []
    for slide in sorted(set(truth.slides.tolist())):
        counts = Counter(truth.clusters[k][truth.slides == slide].tolist())
        shares = {cluster: n / counts.total() for cluster, n in sorted(counts.items())}
        expected += [(slide, c, counts[c], pytest.approx(s), True) for c, s in shares.items()]
        known = [facts[slide][name] for name in ("patient", "site", "scanner", "stain", "split")]
        wide.append((slide, *known, *(pytest.approx(shares.get(c, 0.0)) for c in range(k))))
    rows = run_sql(cohort_store, f"FROM slide_composition({k})").to_pylist()
    assert [tuple(row.values()) for row in rows] == expected
    query = f"SELECT * EXCLUDE (k) FROM slide_composition WHERE k = {k} ORDER BY slide, cluster"
    assert run_sql(cohort_store, query).to_pylist() == rows
    found = run_sql(cohort_store, f"FROM slide_composition_k{k}")
    assert found.column_names[6:] == [f"cluster_{cluster}" for cluster in range(k)]
    assert [tuple(row.values()) for row in found.to_pylist()] == wide


@pytest.mark.parametrize("k", COHORT_K)
def test_agreement_is_that_of_scikit_learn(cohort_store: Store, truth: Truth, k: int) -> None:
    _, clusters, labels = truth.labelled(k)
    [row] = run_sql(cohort_store, f"FROM agreement({k})").to_pylist()
    assert row == {
        "labelled_tiles": len(labels),
        "clusters": len(set(clusters)),
        "labels": len(set(labels)),
        "adjusted_rand_index": pytest.approx(adjusted_rand_score(labels, clusters)),
        "normalised_mutual_information": pytest.approx(
            normalized_mutual_info_score(labels, clusters)
        ),
    }


@pytest.mark.parametrize(
    ("clusters", "labels"),
    [
        ([0, 0, 0], "aaa"), ([0, 1, 2], "abc"), ([0, 0, 1], "aab"), ([0, 1, 0, 1], "aabb"),
        ([0, 0, 0], "abc"), ([0, 1, 2], "aaa"), ([0], "a"), ([0, 0, 1, 1, 2], "abbca"),
    ],
)  # fmt: skip
def test_agreement_of_few_tiles_is_that_of_scikit_learn(clusters: list[int], labels: str) -> None:
    with duckdb.connect() as connection:
        catalog.database.create(connection, [8])
        for cluster, label in zip(clusters, labels, strict=True):
            row = ["a", 8, cluster, label, 1]
            connection.execute("INSERT INTO cluster_counts VALUES (?, ?, ?, ?, ?)", row)
        [(*_, rand, information)] = connection.execute("FROM agreement(8)").fetchall()
    assert rand == pytest.approx(adjusted_rand_score(list(labels), clusters))
    assert information == pytest.approx(
        normalized_mutual_info_score(list(labels), clusters), abs=1e-12
    )


def test_tiles_tell_their_labels_and_clusters(cohort_store: Store, truth: Truth) -> None:
    columns = ", ".join(f"k{k}" for k in COHORT_K)
    rows = run_sql(cohort_store, f"SELECT slide, label, {columns} FROM tiles").to_pylist()
    found = Counter(tuple(row.values()) for row in rows)
    labels = [label or None for label in truth.labels.tolist()]
    numbers = [truth.clusters[k].tolist() for k in COHORT_K]
    assert found == Counter(zip(truth.slides.tolist(), labels, *numbers, strict=True))
    long = run_sql(cohort_store, "SELECT * FROM clusters WHERE k = 8 AND label IS NOT NULL")
    assert long.num_rows == (truth.labels != "").sum()
    assert set(long.column("current").to_pylist()) == {True}


def test_every_model_and_how_far_slides_lie_from_it(cohort_store: Store) -> None:
    model = current_model(cohort_store)
    assert model is not None
    [row] = run_sql(cohort_store, "SELECT version, current, n_clusters FROM models").to_pylist()
    assert row == {"version": model.version, "current": True, "n_clusters": list(COHORT_K)}
    import pyarrow.parquet as pq

    for row in run_sql(cohort_store, "FROM slide_distance").to_pylist():
        folder = cohort_store.slide(row["slide"])
        stamp = folder.stamp("clusters")
        assert stamp is not None
        distance = pq.read_table(folder.record("clusters")).column(f"distance={row['k']}")
        assert row["outside"] == stamp.result["outside"]
        assert row["median"] == pytest.approx(np.median(distance.to_numpy()))


# Refresh -----------------------------------------------------------------------------------------


@pytest.fixture
def copied(cohort_store: Store, tmp_path: Path) -> Store:
    """A copy of the cohort, its slides and annotations, with a catalog of its own."""
    shutil.copytree(cohort_store.root.parent / "slides", tmp_path / "slides")
    store = copy_of(cohort_store, tmp_path / "store")
    entries = json.loads(store.register_path.read_text())
    for entry in entries["slides"].values():
        entry["path"] = str(tmp_path / "slides" / entry["relative"])
    store.register_path.write_text(json.dumps(entries))
    refresh(store)
    return store


def refresh(store: Store, **asked) -> int:
    """Bring the catalog up to date, and tell how many slides were read."""
    return build_catalog(store, annotations=annotations_of(store), **asked).read


def annotations_of(store: Store) -> Path:
    return store.root.parent / "slides" / "annotations"


def rebuilt(store: Store, **asked) -> dict:
    """What a catalog that is written from scratch holds."""
    store.catalog_path.unlink()
    refresh(store, **asked)
    return tables_of(store)


def relabel(store: Store, slide_id: str) -> None:
    said = Annotations(store, annotations_of(store))
    source = tile_source(store, slide_id)
    assert source is not None
    label_annotated(store.slide(slide_id), source, said, LabelSettings())


def a_slide_comes(store: Store) -> None:
    shutil.move(store.root.parent / "away", store.slide("synthetic-03").path)


def labels_change(store: Store) -> None:
    path = annotations_of(store) / "synthetic-01.geojson"
    path.write_text(path.read_text().replace("tumour", "carcinoma"))
    relabel(store, "synthetic-01")


def an_annotation_changes(store: Store) -> None:
    path = annotations_of(store) / "synthetic-01.geojson"
    path.write_text(path.read_text().replace("tumour", "carcinoma"))


def an_annotation_goes(store: Store) -> None:
    (annotations_of(store) / "synthetic-01.geojson").unlink()


def a_slide_goes(store: Store) -> None:
    shutil.rmtree(store.slide("synthetic-02").path)
    entries = json.loads(store.register_path.read_text())
    del entries["slides"]["synthetic-02"]
    store.register_path.write_text(json.dumps(entries))


def results_go(store: Store) -> None:
    shutil.rmtree(store.slide("synthetic-02").path)


def facts_change(store: Store) -> None:
    slide_id = "synthetic-04"
    path = store.root.parent / "slides" / f"{slide_id}.tiff"
    row = SheetRow(None, {"site": "elsewhere", "patient": "another"})
    describe_slide(store.slide(slide_id), FoundSlide(path, path.name), row)


def a_slide_is_scanned_again(store: Store) -> None:
    os.utime(store.root.parent / "slides" / "synthetic-05.tiff")


def tiles_change(store: Store) -> None:
    cut_tiles(store.slide("synthetic-06"), TilingSettings(tile_px=300, overlap=0))


def something_fails(store: Store) -> None:
    store.slide("synthetic-06").record_failure("features", RuntimeError("no memory"))


def a_file_is_damaged(store: Store) -> None:
    path = store.slide("synthetic-06").record("clusters")
    path.write_bytes(bytes(100) + path.read_bytes()[100:])


def clusters_are_named(store: Store) -> None:
    model = current_model(store)
    assert model is not None
    rows = [NamedCluster(c, "tumour", "tumour", 1.0, 5, 9, 2) for c in range(16)]
    write_derived(store, model.version, 16, rows)


def nothing_happens(store: Store) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (nothing_happens, 0), (a_slide_comes, 1), (labels_change, 1), (an_annotation_changes, 1),
        (an_annotation_goes, 1), (a_slide_goes, 0), (results_go, 1), (facts_change, 1),
        (a_slide_is_scanned_again, 1), (tiles_change, 1), (something_fails, 1),
        (a_file_is_damaged, 1), (clusters_are_named, 0),
    ],
)  # fmt: skip
def test_a_refresh_reads_what_changed_and_gives_what_a_rebuild_gives(
    copied: Store, change: Callable[[Store], None], read: int
) -> None:
    if change is a_slide_comes:
        shutil.move(copied.slide("synthetic-03").path, copied.root.parent / "away")
        refresh(copied)
    before = tables_of(copied)
    change(copied)
    assert refresh(copied) == read
    after = tables_of(copied)
    assert (after == before) == (change is nothing_happens)
    assert after == rebuilt(copied)


def test_a_refresh_after_other_settings_and_a_refit_reads_all(copied: Store) -> None:
    asked = {"tiling": TilingSettings(tile_px=300, overlap=0)}
    assert refresh(copied, **asked) == 6
    states = "SELECT DISTINCT stage, state FROM completeness WHERE state = 'stale' ORDER BY ALL"
    stale = run_sql(copied, states).column("stage").to_pylist()
    assert stale == ["clusters", "features", "labels", "tiles"]
    assert tables_of(copied) == rebuilt(copied, **asked)
    assert refresh(copied) == 6
    fitted, _ = ensure_model(copied, feature_files(copied), ClusterSettings(n_clusters=(4, 5)))
    assert refresh(copied) == 6
    assert run_sql(copied, "FROM cluster_purity").num_rows == 0
    assert run_sql(copied, "SELECT DISTINCT current FROM clusters").to_pylist() == [
        {"current": False}
    ]
    matches = run_sql(copied, "SELECT * EXCLUDE (model, previous) FROM cluster_matches")
    assert matches.num_rows == 4
    assert matches.to_pylist() == fitted.matches.to_pylist()
    for slide_id in ("synthetic-01", "synthetic-05"):
        assign_slide(copied.slide(slide_id), fitted)
    assert refresh(copied) == 2
    assert run_sql(copied, "SELECT DISTINCT k FROM cluster_purity ORDER BY k").to_pylist() == [
        {"k": 4}, {"k": 5},
    ]  # fmt: skip
    assert "k5" in run_sql(copied, "DESCRIBE tiles").column("column_name").to_pylist()
    assert run_sql(copied, "SELECT count(*) n, sum(current::INT) c FROM models").to_pylist() == [
        {"n": 2, "c": 1}
    ]
    assert tables_of(copied) == rebuilt(copied)


def test_tiles_cut_before_ink_was_looked_for_are_read(copied: Store) -> None:
    slide_id = next(s for s in copied.slide_ids() if copied.slide(s).stamp("tiles") is not None)
    path = copied.slide(slide_id).record("tiles")
    before = run_sql(copied, f"SELECT * FROM tiles WHERE slide = '{slide_id}'").to_pylist()
    assert all(row["ink"] == 0 and 0 < row["blur"] < 1 for row in before)
    new = ["ink", "blank", "blur"]
    pq.write_table(pq.read_table(path).drop_columns(new), path)
    assert refresh(copied) == 1
    after = run_sql(copied, f"SELECT * FROM tiles WHERE slide = '{slide_id}'").to_pylist()
    assert after == [{**row, **dict.fromkeys(new)} for row in before]


def test_a_refresh_with_nothing_new_writes_nothing(copied: Store) -> None:
    before = copied.catalog_path.stat()
    refresh(copied)
    after = copied.catalog_path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_refresh_opens_no_file_of_another_slide(copied: Store, monkeypatch) -> None:
    labels_change(copied)
    others = [copied.slide(s).path for s in copied.slide_ids() if s != "synthetic-01"]
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    import pyarrow.parquet as pq

    real = pq.ParquetFile
    monkeypatch.setattr(
        pq, "ParquetFile", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k)
    )
    refresh(copied)
    seen = list(opened)
    assert any("synthetic-01" in path for path in seen)
    assert not [path for path in seen for other in others if path.startswith(f"{other}/")]


def test_an_open_reader_is_not_disturbed(copied: Store) -> None:
    count = "SELECT count(*) FROM tiles WHERE label = 'tumour'"
    with duckdb.connect(str(copied.catalog_path), read_only=True) as reader:
        before = reader.sql(count).fetchall()
        labels_change(copied)
        refresh(copied)
        assert reader.sql(count).fetchall() == before
    assert list(run_sql(copied, count).to_pydict().values()) != [[before[0][0]]]


KILLED = """
import os, sys
from pathlib import Path
from histoencoder_core.cohort import build_catalog, database
from histoencoder_core.store import Store
insert = database.insert_tiles
def die(*arguments):
    insert(*arguments)
    os._exit(9)
database.insert_tiles = die
build_catalog(Store(sys.argv[1]), annotations=Path(sys.argv[2]))
"""


def test_killed_half_way_leaves_the_old_catalog(copied: Store) -> None:
    labels_change(copied)
    before = copied.catalog_path.read_bytes()
    command = [sys.executable, "-c", KILLED, str(copied.root), str(annotations_of(copied))]
    assert subprocess.run(command, check=False).returncode == 9
    assert copied.catalog_path.read_bytes() == before
    [left] = [path for path in copied.cohort.glob(".catalog*") if path.suffix == ".tmp"]
    assert refresh(copied) == 1
    assert not left.exists()
    assert run_sql(copied, "SELECT 1 FROM tiles WHERE label = 'carcinoma'").num_rows > 0


@pytest.mark.parametrize(
    "damage", ["cut", "overwritten", "hurt", "garbage", "of an earlier release"]
)
def test_a_catalog_that_can_not_be_used_is_written_anew(copied: Store, damage: str) -> None:
    whole, path = tables_of(copied), copied.catalog_path
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "overwritten":
        path.write_bytes(content[:12288] + bytes(len(content) - 12288))
    elif damage == "hurt":  # where `cluster_purity` lies, among others
        with path.open("r+b") as file:
            file.seek(len(content) // 3)
            file.write(bytes(len(content) // 3))
    elif damage == "garbage":
        path.write_bytes(b"not a database")
    else:
        path.unlink()
        with duckdb.connect(str(path)) as connection:
            connection.execute("CREATE TABLE slides (slide VARCHAR PRIMARY KEY)")
    assert refresh(copied) == 6
    assert tables_of(copied) == whole
    assert refresh(copied) == 0


def test_a_file_that_has_grown_is_written_anew(copied: Store, monkeypatch) -> None:
    facts_change(copied)
    monkeypatch.setattr(catalog, "GROWN", 0)
    refresh(copied)
    found = tables_of(copied)
    assert refresh(copied) == 0
    assert found == rebuilt(copied)
    with duckdb.connect(str(copied.catalog_path), read_only=True) as connection:
        [(size,)] = connection.sql("SELECT bytes FROM internal.state").fetchall()
    assert size == copied.catalog_path.stat().st_size
    assert [p.name for p in copied.cohort.iterdir() if ".tmp" in p.name] == []


def test_images_of_tiles_are_watched_where_they_are_the_tiles(
    cohort_store: Store, tmp_path: Path
) -> None:
    from PIL import Image

    store = Store(tmp_path / "images")
    for slide in ("a", "b"):
        (store.root / slide).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(store.root / slide / f"{i}.png")
    tiles = "SELECT slide, count(*) AS n FROM tiles GROUP BY slide ORDER BY slide"
    assert build_catalog(store).read == 2
    assert build_catalog(store).read == 0
    (store.root / "a" / "0.png").unlink()
    assert build_catalog(store).read == 1
    assert run_sql(store, tiles).column("n").to_pylist() == [2, 3]
    store.tiles_csv.write_text("path,slide,label\nb/0.png,c,tumour\n")
    build_catalog(store)
    assert run_sql(store, tiles).to_pydict() == {"slide": ["a", "b", "c"], "n": [2, 2, 1]}


# From a folder of tiles to an answer -------------------------------------------------------------


def test_labelled_tiles_of_a_folder_to_coverage(program, data: Path) -> None:  # noqa: F811
    """The 24 real tiles, through the command line."""
    shutil.copytree(data / "tiles" / "kather2016_24", "kather")
    paths = sorted(p for p in Path("kather").rglob("*") if p.suffix in {".tif", ".png", ".jpg"})
    assert len(paths) == 24
    rows = [f"{p.relative_to('kather')},part-{i % 2},{p.parent.name}" for i, p in enumerate(paths)]
    Path("kather/tiles.csv").write_text("\n".join(["path,slide,label", *rows]))
    for command in (
        ("extract", "-i", "kather", "-m", UNTRAINED, "-s", "64"),
        ("cluster", "-i", "kather", "-n", "4", "-n", "8"),
        ("label", "-i", "kather"),
    ):
        code, out, error = program(*command)
        assert code == 0, error
    assert "at least 90% pure, of 8 clusters" in out
    code, out, error = program("sql", "-i", "kather", "-f", "json", "FROM coverage_at(8, 0.9)")
    assert code == 0, error
    [row] = json.loads(out)
    assert row["labelled_tiles"] == 24
    assert row["covered_tiles"] <= 24
    assert row["coverage"] == row["covered_tiles"] / 24
    code, out, _ = program("sql", "-i", "kather", "-f", "json", "FROM coverage_null(8, 0.5)")
    assert [row["replicates"] for row in json.loads(out)] == [200, 200]


# The benchmark -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cohort_with_everything_done(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "catalog.py"
    options = ["--slides", "12", "--tiles", "30", "--n-clusters", "4", "8", "--builds", "1"]
    command = [sys.executable, str(script), *options, "--repeats", "1", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = {line["measure"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert {"build", "refresh", "statistics", "size", "purity_curve(8)"} <= lines.keys()
    assert all(line["median"] > 0 and line["settings"]["slides"] == 12 for line in lines.values())
    store = Store(tmp_path / "store")
    assert run_sql(store, "SELECT DISTINCT stage, state FROM completeness ORDER BY ALL").to_pydict(
    ) == {
        "stage": ["annotations", "clusters", "features", "labels", "slides", "tiles"],
        "state": ["not due", "done", "done", "done", "done", "done"],
    }  # fmt: skip
    [row] = run_sql(store, "FROM coverage_at(8, 0.5)").to_pylist()
    assert row["labelled_tiles"] > lines["build"]["settings"]["tiles"]  # and of the slides added
    assert row["low"] <= row["coverage"]
