"""What is done, stale or failed, told by the command line over changes that people make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from making import tissue_pixels, write_tiff
from test_cli import UNTRAINED, program  # noqa: F401 - a fixture

from histoencoder_core.annotate import derive_labels
from histoencoder_core.cohort import build_catalog, run_sql, slide_states
from histoencoder_core.settings import AnnotationSettings, EncoderSettings
from histoencoder_core.slides import Register, find_slides
from histoencoder_core.slides.find import find_pattern
from histoencoder_core.store import Store

SQUARE = [[0, 0], [4096, 0], [4096, 4096], [0, 4096], [0, 0]]


def annotate(folder: Path, slide_id: str, label: str) -> None:
    folder.mkdir(exist_ok=True)
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [SQUARE]},
        "properties": {"objectType": "annotation", "classification": {"name": label}},
    }
    content = {"type": "FeatureCollection", "features": [feature]}
    (folder / f"{slide_id}.geojson").write_text(json.dumps(content))


def states(store: str = "store", annotations: str | None = None, **asked) -> dict[str, str]:
    folder = Path(annotations) if annotations else None
    return {s.stage: s.state for s in slide_states(Store(store), annotations=folder, **asked)}


@pytest.fixture
def done(program):  # noqa: F811
    """A slide with everything done; the program."""
    Path("slides").mkdir()
    write_tiff(Path("slides/a.tiff"), tissue_pixels(2048, 1536), mpp=0.5)
    annotate(Path("annotations"), "a", "tumour")
    program("tile", "-i", "slides", "-o", "store")
    program("extract", "-i", "store", "-m", UNTRAINED, "-s", "64")
    program("cluster", "-i", "store", "-n", "2")
    code, _, error = program("label", "-i", "store", "--annotations", "annotations")
    assert code == 0, error
    everything = dict.fromkeys(("slides", "tiles", "features", "clusters", "labels"), "done")
    assert states(annotations="annotations") == {**everything, "annotations": "not due"}
    return program


def test_where_nothing_is_labelled_no_annotation_is_missing(program) -> None:  # noqa: F811
    """After each catalog the platform asks what clusters mean, which is nothing until then."""
    Path("slides").mkdir()
    write_tiff(Path("slides/a.tiff"), tissue_pixels(2048, 1536), mpp=0.5)
    program("tile", "-i", "slides", "-o", "store")
    program("extract", "-i", "store", "-m", UNTRAINED, "-s", "64")
    program("cluster", "-i", "store", "-n", "2")
    settings = AnnotationSettings(n_clusters=2)
    build_catalog(Store("store"), annotate=settings)
    derive_labels(Store("store"), settings)
    assert states(annotate=settings)["annotations"] == "not due"
    code, told, error = program("status", "-i", "store")
    assert code == 0, told + error


def test_other_tiles_make_all_that_was_made_from_them_stale(done) -> None:
    done("tile", "-i", "slides", "-o", "store", "--overlap", "0")
    found = states()
    assert (found["slides"], found["tiles"]) == ("done", "done")
    assert [found[s] for s in ("features", "clusters", "labels")] == ["stale"] * 3
    # `sql` after any rebuild of the catalog: nothing of tiles that are no more.
    done("extract", "-i", "store", "-m", UNTRAINED, "-s", "64")
    done("cluster", "-i", "store")
    tiles = pq.read_metadata("store/a/metadata.parquet").num_rows
    sizes = "SELECT (SELECT count(*) FROM tiles) t, (SELECT sum(tiles) FROM cluster_purity) c"
    assert run_sql(Store("store"), sizes).to_pylist() == [{"t": tiles, "c": tiles}]
    assert run_sql(Store("store"), "SELECT count(*) n FROM labels").to_pylist() == [{"n": 0}]


def test_what_does_not_change_pixels_needs_no_new_features(done) -> None:
    code, out, _ = done("tile", "-i", "slides", "-o", "store", "--metrics")
    assert (code, "1 made" in out) == (0, True)
    assert states()["features"] == "done"
    assert "1 up to date" in done("extract", "-i", "store", "-m", UNTRAINED, "-s", "64")[1]


def test_a_changed_and_a_removed_annotation_make_labels_stale(done) -> None:
    annotate(Path("annotations"), "a", "benign")
    assert states(annotations="annotations")["labels"] == "stale"
    done("label", "-i", "store", "--annotations", "annotations")
    assert states(annotations="annotations")["labels"] == "done"
    Path("annotations/a.geojson").unlink()
    assert states(annotations="annotations")["labels"] == "stale"


def test_a_failure_is_told_although_a_former_result_is_kept(done) -> None:
    code, _, _ = done("tile", "-i", "slides", "-o", "store", "--mpp", "0.1")
    assert code == 1
    assert states()["tiles"] == "failed"
    assert Path("store/a/metadata.parquet").exists()
    code, out, _ = done("status", "-i", "store")
    assert code == 1
    assert "the former result is kept" in out
    done("tile", "-i", "slides", "-o", "store")
    assert states()["tiles"] == "done"


def test_a_slide_that_changed_is_stale_until_it_is_looked_at(done) -> None:
    write_tiff(Path("slides/a.tiff"), tissue_pixels(2048, 2048), mpp=0.5)
    assert states()["slides"] == "stale"
    Path("slides/a.tiff").write_bytes(b"damaged")
    assert done("tile", "-i", "slides", "-o", "store")[0] == 1
    assert states()["slides"] == "failed"
    Path("slides/a.tiff").unlink()  # a share that is away takes nothing with it
    assert Path("store/a/features.parquet").exists()


def test_features_are_those_that_are_asked_for(done) -> None:
    asked = EncoderSettings(name=UNTRAINED, input_size=64)
    assert states(encoder=asked)["features"] == "done"
    for other in ({"input_size": None}, {"seed": 1}, {"dtype": "float16"}):
        changed = EncoderSettings(**{**asked.model_dump(), **other})
        assert states(encoder=changed)["features"] == "stale", other


def test_a_folder_with_nothing_of_a_slide_is_not_expected(done) -> None:
    Path("store/notes").mkdir()
    assert {s.slide for s in slide_states(Store("store"))} == {"a"}


def test_an_unregistered_slide_is_missing(done, monkeypatch) -> None:
    monkeypatch.setenv("HISTOENCODER_SLIDES", "slides")
    assert done("status", "-i", "store")[0] == 0
    shutil.copy("slides/a.tiff", "slides/b.tiff")
    code, out, _ = done("status", "-i", "store")
    assert code == 1
    assert "missing: b.tiff" in out


def test_cluster_keeps_its_model_and_goes_back_to_an_old_one(done) -> None:
    model = json.loads(Path("store/_cohort/cluster_models/current.json").read_text())
    assert f"Using cluster model {model['version']}" in done("cluster", "-i", "store")[1]
    assert "Fitted" in done("cluster", "-i", "store", "-n", "3")[1]
    assert (
        f"Went back to cluster model {model['version']}"
        in (done("cluster", "-i", "store", "-n", "2")[1])
    )


def test_features_can_be_made_wide_later(done) -> None:
    before = pq.read_table("store/a/features.parquet").column("features").to_pylist()
    code, out, _ = done("extract", "-i", "store", "-m", UNTRAINED, "-s", "64", "--wide")
    assert (code, "1 made" in out) == (0, True)
    wide = pq.read_table("store/a/features.parquet")
    assert [wide.column(f"feat{i + 1}")[0].as_py() for i in range(3)] == before[0][:3]
    assert states()["features"] == "done"


def test_answers_are_valid_json_and_csv(done) -> None:
    query = "SELECT sum(tiles) s, 'NaN'::DOUBLE n, [1, 2] l FROM cluster_purity"
    [row] = json.loads(done("sql", "-i", "store", "-f", "json", query)[1])
    assert (type(row["s"]), row["n"], row["l"]) == (int, None, [1, 2])
    header, values = done("sql", "-i", "store", "-f", "csv", query)[1].splitlines()
    assert header == "s,n,l"
    assert values.endswith('"[1, 2]"')


def test_a_wrong_value_in_the_environment_is_told_in_one_line(program, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("HISTOENCODER_TILING__TILE_PX", "2")
    code, _, error = program("status", "-i", ".")
    assert code == 1
    assert "tile_px" in error.lower()
    assert len(error.strip().splitlines()) == 1


def test_while_a_share_is_away_another_slide_does_not_take_its_id(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        write_tiff(tmp_path / folder / "x.tiff", tissue_pixels(600 + 50 * number, 600), mpp=0.5)
    from histoencoder_core.slides import Sheet, describe_slide

    [(first, found)] = Register(store).assign(find_slides(tmp_path / "one")).items()
    describe_slide(store.slide(first), found, Sheet().row(first))
    (tmp_path / "one").rename(tmp_path / "away")
    [second] = Register(store).assign(find_pattern(str(tmp_path / "two" / "*.tiff")))
    assert second != first
    # Mounted elsewhere, the first is known again by its content.
    assert list(Register(store).assign(find_slides(tmp_path / "away"))) == [first]
