"""Nearest tiles over the cohort: by looking at each, and through an index."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from histoencoder_core.cli import main
from histoencoder_core.clusters import feature_files
from histoencoder_core.cohort import run_sql
from histoencoder_core.errors import ClusterError, SettingsError, StoreError
from histoencoder_core.similar import find_tile, index, prototypes, similar_tiles
from histoencoder_core.similar.exact import search, unit
from histoencoder_core.store import Stamp, Store
from histoencoder_core.store.stamp import read_stamp
from histoencoder_core.store.tables import (
    feature_list,
    key_table,
    read_features,
    read_table,
    tile_name,
)

SIDE, STEP, COLUMNS = 256, 128, 20
LENGTH = 24

Floats = npt.NDArray[np.float32]


def places(count: int) -> list[tuple[int, int, int, int]]:
    """Tiles that overlap by half, row by row."""
    return [(1000 + STEP * (i % COLUMNS), STEP * (i // COLUMNS), SIDE, SIDE) for i in range(count)]


def vectors(count: int, *, seed: int) -> Floats:
    """Features in loose groups, of any length."""
    rng = np.random.default_rng(seed)
    kinds = np.random.default_rng(99).normal(0, 1, (12, LENGTH))
    scale = rng.uniform(0.1, 20, (count, 1))
    return (
        scale * (kinds[rng.integers(12, size=count)] + rng.normal(0, 0.5, (count, LENGTH)))
    ).astype(np.float32)


def write_features(
    store: Store,
    slide: str,
    features: Floats,
    *,
    dtype: str = "float32",
    space: str = "toy",
    unreadable: Iterable[int] = (),
) -> None:
    """Write a slide's features as the stage before does."""
    made_from = {
        "content": hashlib.sha256(features.tobytes()).hexdigest(),
        "encoder": {"name": space},
    }
    stamp = Stamp.of("features", algorithm=2, made_from=made_from)
    bad = np.isin(np.arange(len(features)), list(unreadable))
    column = feature_list(features, dtype)
    column = pa.FixedSizeListArray.from_arrays(column.values, LENGTH, mask=pa.array(bad))
    table = key_table([tile_name(*p) for p in places(len(features))], places(len(features)))
    table = table.append_column("features", column)
    reasons = pa.array(["a hole" if b else None for b in bad], pa.string())
    with store.slide(slide).writing("features") as writer:
        writer.table(
            table.append_column("unreadable", reasons),
            stamp.with_result(space=space, encoder=space),
        )


def write_foreign(store: Store, slide: str, features: Floats) -> None:
    """Write a slide's features as HistoEncoder does: wide, without a stamp."""
    table = {f"feat{i + 1}": column for i, column in enumerate(features.T)}
    names = [f"/else/where/{tile_name(*place)}.jpeg" for place in places(len(features))]
    path = store.slide(slide).record("features")
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({**table, "path": names}), path)


def by_hand(
    store: Store, slide: str, tile: str, count: int, *, but: str | None = None
) -> list[tuple[str, str, float]]:
    """The nearest tiles, from all features at once and in double precision."""
    matrices = {s: read_features(store.slide(s).record("features")) for s in store.slide_ids()}
    keys, features = matrices[slide]
    query = features[keys.column("tile").to_pylist().index(tile)].astype(np.float64)
    found: list[tuple[str, str, float]] = []
    for other, (keys, features) in matrices.items():
        lengths = np.linalg.norm(features.astype(np.float64), axis=1)
        with np.errstate(invalid="ignore"):
            distances = 1 - features @ query / lengths / np.linalg.norm(query)
        rows = zip(keys.column("tile").to_pylist(), distances.tolist(), strict=True)
        found += [(other, name, d) for name, d in rows if np.isfinite(d) and other != but]
    found.sort(key=lambda row: row[2])
    return [row for row in found if row[:2] != (slide, tile)][:count]


def told(table: pa.Table) -> list[tuple[str, str, float]]:
    columns = [table.column(name).to_pylist() for name in ("slide", "tile", "distance")]
    return list(zip(*columns, strict=True))


def check(found: list[tuple[str, str, float]], expected: list[tuple[str, str, float]]) -> None:
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([r[2] for r in found], [r[2] for r in expected], atol=2e-6)


@pytest.fixture
def cohort(store: Store) -> Store:
    """Slides of many sizes; tiles that can't be read, and some without a direction."""
    for i, count in enumerate((300, 1500, 40, 1, 700)):
        features = vectors(count, seed=i)
        features[5::90] = 0
        write_features(store, f"slide-{i}", features, unreadable=range(7, count, 50))
    for slide in ("empty", "slide-0-empty"):
        write_features(store, slide, np.empty((0, LENGTH), np.float32))
    return store


# Looking at each ---------------------------------------------------------------------------------


def test_the_nearest_are_those_found_by_hand(cohort: Store) -> None:
    for slide, row, count in (("slide-0", 0, 24), ("slide-1", 1400, 100), ("slide-3", 0, 3)):
        tile = tile_name(*places(row + 1)[row])
        query = find_tile(cohort, slide, tile)
        found = similar_tiles(cohort, query, count=count)
        check(told(found), by_hand(cohort, slide, tile, count))
        assert found.column("rank").to_pylist() == [*range(1, count + 1)]
        assert [
            tile_name(*p) for p in zip(*(found[n].to_pylist() for n in "xywh"), strict=True)
        ] == (found.column("tile").to_pylist())
        others = similar_tiles(cohort, query, count=count, other_slides=True)
        check(told(others), by_hand(cohort, slide, tile, count, but=slide))


def test_all_there_are_is_enough(cohort: Store) -> None:
    query = find_tile(cohort, "slide-2", (1000, 0))
    found = told(similar_tiles(cohort, query, count=10_000))
    tile = tile_name(*places(1)[0])
    assert len(found) == len(by_hand(cohort, "slide-2", tile, 10_000)) < 300 + 1500 + 40 + 1 + 700


def test_twins_are_at_no_distance(store: Store) -> None:
    features = vectors(50, seed=0)
    write_features(store, "a", features)
    write_features(store, "b", 3 * features[::-1])
    found = told(similar_tiles(store, find_tile(store, "a", (1000, 0)), count=1))
    assert found[0][:2] == ("b", tile_name(*places(50)[49]))
    assert 0 <= found[0][2] < 1e-6


def test_features_of_half_precision(store: Store) -> None:
    for i in range(2):
        write_features(store, f"slide-{i}", 100 * vectors(200, seed=i), dtype="float16")
    tile = tile_name(*places(1)[0])
    found = similar_tiles(store, find_tile(store, "slide-0", tile))
    check(told(found), by_hand(store, "slide-0", tile, 24))


def test_histoencoders_own_files(store: Store) -> None:
    for i in range(2):
        write_foreign(store, f"slide-{i}", vectors(200, seed=i))
    query = find_tile(store, "slide-1", (1000 + STEP, 1))
    assert query.tile in {tile_name(*place) for place in places(2)}
    check(told(similar_tiles(store, query)), by_hand(store, "slide-1", query.tile, 24))


def test_labels_and_clusters_are_told(cohort_store: Store) -> None:
    slide = next(s for s in cohort_store.slide_ids() if cohort_store.slide(s).stamp("labels"))
    first = read_table(cohort_store.slide(slide).record("features")).column("tile")[0].as_py()
    found = similar_tiles(cohort_store, find_tile(cohort_store, slide, first), count=60)
    assert found.column_names[-2:] == ["label", "n_clusters=16"]
    rows = found.to_pylist()
    assert len({row["slide"] for row in rows}) > 1
    for row in rows:
        folder = cohort_store.slide(row["slide"])
        labels, clusters = folder.record("labels"), read_table(folder.record("clusters"))
        if labels.exists():
            named = read_table(labels, ["tile", "label"]).to_pylist()
            assert {"tile": row["tile"], "label": row["label"]} in named
        else:
            assert row["label"] is None
        at = clusters.column("tile").to_pylist().index(row["tile"])
        assert row["n_clusters=16"] == clusters.column("n_clusters=16")[at].as_py()
    assert {row["label"] for row in rows} > {None}


# The query ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixel", "column", "row"),
    [
        ((1000, 0), 0, 0),
        ((1000 + 127, 0), 0, 0),  # in one tile only
        ((1000 + 191, 64), 0, 0),  # in two, nearer to the first one's centre
        ((1000 + 193, 64), 1, 0),
        ((1000 + 300, 200), 1, 1),  # of four, 1000+128 has its centre at 1256, 1000+256 at 1384
    ],
)
def test_of_overlapping_tiles_the_one_with_the_nearest_centre(
    cohort: Store, pixel: tuple[int, int], column: int, row: int
) -> None:
    assert find_tile(cohort, "slide-0", pixel).tile == tile_name(
        1000 + STEP * column, STEP * row, SIDE, SIDE
    )


@pytest.mark.parametrize(
    ("slide", "at", "message"),
    [
        ("slide-0", (999, 0), r"no tile contains .*\(999, 0\).* x 1000 to 3688 and y 0 to 2048;"),
        ("slide-0", (4000, 9), "the nearest to that pixel is x3432_y0_w256_h256"),
        ("slide-0", (1000, -1), "no tile contains"),
        ("slide-0", (1000 + 7 * STEP + 128, 0), r"could not be read \(a hole\)"),
        ("slide-0", (1000 + 5 * STEP + 128, 0), "all zero"),
        ("slide-0", "x0", "300 tiles have names such as x1000_y0_w256_h256"),
        ("empty", (1000, 0), "has no tiles"),
    ],
)  # fmt: skip
def test_a_query_that_can_not_be(
    cohort: Store, slide: str, at: tuple[int, int] | str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        find_tile(cohort, slide, at)


def test_slides_without_features_or_places(store: Store) -> None:
    with pytest.raises(StoreError, match=r"no slide 'a'. Slides: none"):
        find_tile(store, "a", (0, 0))
    write_features(store, "c", vectors(5, seed=0))
    with pytest.raises(StoreError, match=r"no slide '../a'. Slides: c\."):
        find_tile(store, "../a", (0, 0))
    (store.root / "a").mkdir()
    with pytest.raises(StoreError, match="histoencoder extract"):
        find_tile(store, "a", (0, 0))
    table = pa.table(
        {"tile": ["one", "two"], "features": feature_list(vectors(2, seed=0), "float32")}
    )
    (store.root / "b").mkdir()
    pq.write_table(table, store.slide("b").record("features"))
    with pytest.raises(SettingsError, match="Name one, such as one"):
        find_tile(store, "b", (0, 0))
    assert find_tile(store, "b", "two").row == 1


def test_features_of_two_spaces_are_not_compared(cohort: Store) -> None:
    query = find_tile(cohort, "slide-0", (1000, 0))
    write_features(cohort, "other", vectors(5, seed=0), space="another")
    with pytest.raises(ClusterError, match=r"can't be compared.*another"):
        similar_tiles(cohort, query)
    with pytest.raises(ClusterError, match=r"can't be compared.*another"):
        similar_tiles(cohort, query, exact_tiles=0)


# The index ---------------------------------------------------------------------------------------


@pytest.fixture
def made() -> list[str]:
    """What was told of making the index."""
    return []


def through_index(
    store: Store, slide: str, row: int, made: list[str], **options: bool
) -> list[tuple[str, str, float]]:
    query = find_tile(store, slide, tile_name(*places(row + 1)[row]))
    return told(similar_tiles(store, query, exact_tiles=0, tell=made.append, **options))


def test_the_index_finds_nearly_all(
    cohort: Store, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PROBES", 16)  # of 50 lists
    hits = []
    for slide, row in [("slide-1", i) for i in range(0, 1500, 121)] + [("slide-4", 3)]:
        if row % 50 == 7 or row % 90 == 5:
            continue
        tile = tile_name(*places(row + 1)[row])
        for options, but in (({}, None), ({"other_slides": True}, slide)):
            expected = by_hand(cohort, slide, tile, 24, but=but)
            found = through_index(cohort, slide, row, made, **options)
            assert len(found) == 24
            assert found == sorted(found, key=lambda row: row[2])
            exact = {row[:2]: row[2] for row in by_hand(cohort, slide, tile, 2541)}
            for name, other, distance in found:  # never the query, and at its exact distance
                assert distance == pytest.approx(exact[name, other], abs=2e-6)
                assert name != but
            hits.append(len({r[:2] for r in found} & {r[:2] for r in expected}) / 24)
    assert np.mean(hits) > 0.97
    assert len(made) == 2
    assert made[0].startswith("Making the index of 2,541 tiles")
    [record] = (cohort.cohort / "index").glob("*.parquet")
    stamp = read_stamp(record)
    assert stamp is not None
    assert stamp.result["lists"] == 50


def test_slides_that_come_change_and_go_are_followed(cohort: Store, made: list[str]) -> None:
    through_index(cohort, "slide-0", 0, made)
    twin = vectors(300, seed=0)[:1]
    write_features(cohort, "new", 2 * twin)
    nearest = through_index(cohort, "slide-0", 0, made)[0]
    assert nearest[:2] == ("new", tile_name(*places(1)[0]))
    assert made[2:] == ["Slides added to the index of tiles: 1."]
    # The same slide with other tiles, and one that is gone.
    write_features(cohort, "new", np.concatenate([-twin, twin]))
    shutil.rmtree(cohort.slide("slide-2").path)
    found = through_index(cohort, "slide-0", 0, made)
    assert found[0][:2] == ("new", tile_name(*places(2)[1]))
    assert made[3:] == ["Slides added to the index of tiles: 1."]
    check(found, by_hand(cohort, "slide-0", tile_name(*places(1)[0]), 24))
    assert len([*(cohort.cohort / "index").glob("*.faiss")]) == 1
    # Much more than it was learnt from.
    write_features(cohort, "large", vectors(4000, seed=8))
    check(
        through_index(cohort, "slide-0", 0, made),
        by_hand(cohort, "slide-0", tile_name(*places(1)[0]), 24),
    )
    assert made[4].startswith("Making the index of 6,503 tiles")


def test_other_features_or_a_damaged_file_make_a_new_index(cohort: Store, made: list[str]) -> None:
    through_index(cohort, "slide-0", 0, made)
    through_index(cohort, "slide-0", 0, made)
    assert len(made) == 2
    [path] = (cohort.cohort / "index").glob("*.faiss")
    path.write_bytes(path.read_bytes()[:1000])
    expected = by_hand(cohort, "slide-0", tile_name(*places(1)[0]), 24)
    check(through_index(cohort, "slide-0", 0, made), expected)
    assert made[2].startswith("Making")
    for i, count in enumerate((300, 1500, 40, 1, 700)):
        write_features(cohort, f"slide-{i}", vectors(count, seed=i), space="another")
    for slide in ("empty", "slide-0-empty"):
        shutil.rmtree(cohort.slide(slide).path)
    through_index(cohort, "slide-0", 0, made)
    assert made[4].startswith("Making")


def test_two_that_ask_at_once_make_one_index(cohort: Store, made: list[str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: through_index(cohort, "slide-0", 0, made), range(2))
    assert one == other
    assert len(made) == 2


def test_without_the_index_library(cohort: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    query = find_tile(cohort, "slide-0", (1000, 0))
    assert similar_tiles(cohort, query).num_rows == 24
    with pytest.raises(SettingsError, match=r"2,541 tiles .* pip install 'histoencoder-pl.*index"):
        similar_tiles(cohort, query, exact_tiles=2540)


def test_the_sample_is_drawn_evenly_over_slides(store: Store) -> None:
    for i, count in enumerate((2000, 30, 10)):
        features = np.zeros((count, LENGTH), np.float32)
        features[:, i] = 1
        write_features(store, f"slide-{i}", features)
    sample = index._sample(feature_files(store), 120)
    assert (sample > 0).sum(axis=0)[:3].tolist() == [80, 30, 10]


def test_many_queries_at_once(cohort: Store) -> None:
    rows = [0, 1, 100]
    _, features = read_features(cohort.slide("slide-0").record("features"))
    files = feature_files(cohort)
    found = search(files, np.stack([unit(features[row]) for row in rows]), 25)
    for row, neighbours in zip(rows, found, strict=True):
        tile = tile_name(*places(row + 1)[row])
        expected = by_hand(cohort, "slide-0", tile, 24)
        np.testing.assert_allclose(neighbours.distance[1:], [r[2] for r in expected], atol=2e-6)
        assert [files[i].slide for i in neighbours.file[1:]] == [r[0] for r in expected]


# The tiles that show a cluster best --------------------------------------------------------------


def write_clusters(
    store: Store, slide: str, clusters: list[int], distances: list[float], *, model: str = "m1"
) -> None:
    """Write a slide's clusters as the stage does, here 3 of them."""
    table = key_table([tile_name(*p) for p in places(len(clusters))], places(len(clusters)))
    missing = pa.array(np.isnan(distances))
    table = table.append_column("n_clusters=3", pa.array(clusters, pa.int32()))
    column = pa.array(np.array(distances, np.float32), mask=np.asarray(missing))
    table = table.append_column("distance=3", column)
    stamp = Stamp.of("clusters", algorithm=1, made_from={"model": model, "is": slide})
    with store.slide(slide).writing("clusters") as writer:
        writer.table(table, stamp)


def test_prototypes_are_nearest_and_from_several_slides(store: Store) -> None:
    rng = np.random.default_rng(0)
    told = {}
    for i, closeness in enumerate((0.1, 1, 1, 1)):
        clusters = rng.integers(0, 2, 80).tolist()
        distances = (closeness * rng.uniform(1, 2, 80)).tolist()
        distances[0] = float("nan")
        told[f"slide-{i}"] = (clusters, distances)
        write_clusters(store, f"slide-{i}", clusters, distances)
    write_clusters(store, "older", [0] * 9, [0.0] * 9, model="m0")
    found = prototypes(store, "m1", 3, count=8)
    assert found.keys() == {0, 1, 2}
    assert found[2] == []
    for cluster in (0, 1):
        tiles = found[cluster]
        assert [t.distance for t in tiles] == sorted(t.distance for t in tiles)
        assert [t.slide for t in tiles].count("slide-0") == 2  # though all its tiles are nearer
        for slide, (clusters, distances) in told.items():
            own = sorted(
                d for c, d in zip(clusters, distances, strict=True) if c == cluster and d == d
            )
            shown = [t.distance for t in tiles if t.slide == slide]
            assert shown == pytest.approx(own[: len(shown)])
    # Where others have none, all are of one slide.
    alone = prototypes(
        store, "m1", 3, clusters=[1], count=8, slides=["slide-0", "slide-1"], max_files=1
    )
    assert [t.slide for t in alone[1]] == ["slide-0"] * 8


def test_no_prototypes_without_distances(store: Store) -> None:
    write_clusters(store, "a", [0, 1], [0.0, 1.0], model="m0")
    path = store.slide("b").record("clusters")
    path.parent.mkdir()
    names = pa.array(["x0_y0_w1_h1"])
    pq.write_table(pa.table({"path": names, "n_clusters=3": [1]}), path)
    with pytest.raises(ClusterError, match="histoencoder cluster"):
        prototypes(store, "m1", 3)


# The command line --------------------------------------------------------------------------------


@pytest.fixture
def program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bare_environment: None
) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process; it gives exit code, output and error output."""

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


@pytest.fixture
def copied(cohort_store: Store, tmp_path: Path) -> Store:
    """A cohort that may be written to."""
    shutil.copytree(cohort_store.root, tmp_path / "copied")
    return Store(tmp_path / "copied")


def test_similar_prints_a_table_and_draws_it(
    program: Callable[..., tuple[int, str, str]], copied: Store, tmp_path: Path
) -> None:
    slide = copied.slide_ids()[0]
    [place] = read_table(copied.slide(slide).record("features")).slice(3, 1).to_pylist()
    at = (place["x"] + place["w"] // 2, place["y"] + place["h"] // 2)
    code, out, error = program("similar", slide, *at, "-i", copied.root, "-n", 15)
    assert code == 0, error
    assert "untrained" in error
    assert f"Tiles like {place['tile']} of {slide}:" in out
    expected = similar_tiles(copied, find_tile(copied, slide, at), count=15).to_pylist()
    lines = out.splitlines()[2:]
    for row, line in zip(expected, lines, strict=False):
        assert line.split()[:3] == [str(row["rank"]), row["slide"], row["tile"]]
    picture = copied.figures / f"similar_{slide}_{place['tile']}.jpeg"
    assert out.splitlines()[-1] == f"Picture: {picture}"
    with Image.open(picture) as image:
        assert image.width > image.height > 200
        red, green, blue = image.convert("RGB").getpixel((5, 60))
        assert red > 180 > 120 > green > blue
    # By name, elsewhere, in another form.
    code, out, _ = program(
        "similar", slide, "--tile", place["tile"], "-i", copied.root, "--other-slides",
        "-o", tmp_path / "here" / "b.png",
    )  # fmt: skip
    assert code == 0
    assert f" {slide} " not in "".join(out.splitlines()[1:])
    with Image.open(tmp_path / "here" / "b.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{slide}"], "Say which tile"),
        (["{slide}", 1], "Say which tile"),
        (["{slide}", 1, 2, "--tile", "a"], "Say which tile"),
        (["nobody", 1, 2], "holds no slide 'nobody'"),
        (["{slide}", 99999999, 2], "no tile contains"),
        (["{slide}", "--tile", "{tile}", "-o", "a.gif"], "ends in .jpeg or .png"),
    ],
)
def test_similar_says_what_is_wrong(
    program: Callable[..., tuple[int, str, str]],
    cohort_store: Store,
    words: list[object],
    message: str,
) -> None:
    slide = cohort_store.slide_ids()[0]
    tile = read_table(cohort_store.slide(slide).record("features")).column("tile")[0].as_py()
    asked = [w.format(slide=slide, tile=tile) if isinstance(w, str) else w for w in words]
    code, _, error = program("similar", *asked, "-i", cohort_store.root)
    assert code == 1
    assert message in error


def test_show_cluster(program: Callable[..., tuple[int, str, str]], copied: Store) -> None:
    rows = run_sql(copied, "FROM cluster_purity WHERE k = 8 ORDER BY tiles DESC").to_pylist()
    row = rows[0]
    code, out, error = program("show", "cluster", 8, row["cluster"], "-i", copied.root, "-n", 10)
    assert code == 0, error
    lines = [line.split() for line in out.splitlines()]
    assert ["tiles", str(row["tiles"])] in lines
    assert ["label", str(row["label"])] in lines
    counts: dict[str, int] = {}
    totals: dict[str, int] = {}
    for slide in copied.slide_ids():
        clusters = read_table(copied.slide(slide).record("clusters")).column("n_clusters=8")
        number = clusters.to_pylist().count(row["cluster"])
        if number:
            counts[slide], totals[slide] = number, len(clusters)
    assert sum(counts.values()) == row["tiles"]
    for slide, number in counts.items():
        [line] = [line for line in lines if line[:1] == [slide]]
        assert int(line[1]) == number
        assert float(line[2]) == pytest.approx(number / row["tiles"], rel=1e-3)
        assert float(line[3]) == pytest.approx(number / totals[slide], rel=1e-3)
    assert lines[-1] == ["Picture:", str(copied.figures / f"cluster_8_{row['cluster']}.jpeg")]
    with Image.open(lines[-1][1]) as image:
        assert image.size[0] > 900


def test_show_cluster_says_which_there_are(
    program: Callable[..., tuple[int, str, str]], cohort_store: Store, store: Store
) -> None:
    code, _, error = program("show", "cluster", 9, 0, "-i", cohort_store.root)
    assert (code, "the numbers of clusters are 4, 8, 16" in error) == (1, True)
    code, _, error = program("show", "cluster", 4, 4, "-i", cohort_store.root)
    assert (code, "they are 0 to 3" in error) == (1, True)
    code, _, error = program("show", "cluster", 4, 0, "-i", store.root)
    assert (code, "there is no catalog yet" in error) == (1, True)
