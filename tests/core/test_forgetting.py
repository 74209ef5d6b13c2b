"""Forgetting a slide: nothing of it is left, and nothing else is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cohorts import copy_of, tables_of
from searching import found_in

from histoencoder_core.clusters import current_model, feature_files
from histoencoder_core.clusters.model import find_version, model_stamp
from histoencoder_core.cohort import judge_slides, publish_catalog
from histoencoder_core.errors import StoreError
from histoencoder_core.forgetting import still_known, traces
from histoencoder_core.report.composition import composition
from histoencoder_core.report.umap_map import fit_umap
from histoencoder_core.similar.index import tile_index
from histoencoder_core.slides import FoundSlide, Register
from histoencoder_core.slides.contents import Contents
from histoencoder_core.store import Store

GONE = "synthetic-02"


@pytest.fixture(scope="module")
def grown_once(cohort_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The cohort with all that is made of many slides, and what a killed refresh left."""
    store = copy_of(cohort_store, tmp_path_factory.mktemp("grown") / "store")
    model = current_model(store)
    assert model is not None
    fit_umap(store, store.slide_ids(), model)
    tile_index(store, feature_files(store))
    composition(store)
    judge_slides(store, "tissue", lambda _: "", rules=1)
    (store.cohort / "report.html").write_text(f"<p>{GONE}</p>")
    (store.cohort / "evaluation.json").write_text(json.dumps({"slides": [GONE]}))
    (store.cohort / ".catalog.duckdb.1-0123abcd.tmp").write_bytes(store.catalog_path.read_bytes())
    (store.slide(GONE).path / ".tiles.1-0123abcd.tmp").mkdir()
    return store


@pytest.fixture
def grown(grown_once: Store, tmp_path: Path) -> Store:
    return copy_of(grown_once, tmp_path / "store")


def rows_but_of(store: Store, slide_id: str) -> dict[str, list[object]]:
    """The catalog's rows of single slides, but those of one."""
    kept = {}
    for name, rows in tables_of(store).items():
        if any("synthetic" in repr(row[0]) for row in rows):
            kept[name] = [row for row in rows if slide_id not in row]
    return kept


def test_nothing_of_a_forgotten_slide_is_left_and_nothing_else_is_lost(grown: Store) -> None:
    assert len(found_in(grown.root, [GONE])) > 10
    others = {
        path: path.read_bytes()
        for slide_id in grown.slide_ids()
        if slide_id != GONE
        for path in grown.slide(slide_id).path.rglob("*")
        if path.is_file()
    }
    rows = rows_but_of(grown, GONE)
    assert {"main.slides", "main.tiles", "main.completeness"} <= rows.keys()
    for trace in traces(grown, [GONE]):
        trace.remove()
    assert found_in(grown.root, [GONE]) == {}
    assert traces(grown, [GONE]) == []
    assert {path: path.read_bytes() for path in others} == others
    assert rows_but_of(grown, GONE) == rows
    assert GONE not in Register(grown).entries()
    assert len(Register(grown).entries()) == 5
    publish_catalog(grown)
    assert found_in(grown.root, [GONE]) == {}


def test_each_step_can_be_the_last_before_a_kill(grown: Store) -> None:
    """What is left is found again, whatever was removed already."""
    for _ in range(20):
        found = traces(grown, [GONE])
        if not found:
            break
        found[0].remove()
    assert found_in(grown.root, [GONE]) == {}


def test_a_model_is_not_taken_for_one_fitted_without_the_slide(grown: Store) -> None:
    before = current_model(grown)
    assert before is not None
    for trace in traces(grown, [GONE]):
        trace.remove()
    model = current_model(grown)
    assert model is not None
    assert model.version == before.version
    assert all((model.centroids[k] == before.centroids[k]).all() for k in before.centroids)
    assert find_version(grown, model_stamp(feature_files(grown), model.settings)) is None


def test_what_is_known_of_moved_and_copied_files_goes_too(grown: Store) -> None:
    register, contents = Register(grown), Contents(grown)
    entry = register.entries()[GONE]
    moved = FoundSlide(Path(entry.path).with_name("now.tiff"), "now.tiff")
    register.moved("former-name", GONE, moved)
    assert register.read().former == {GONE: [entry]}
    with contents.locked():
        contents.claim("ab" * 32, GONE)
    copy = grown.slide("a-copy")
    copy.path.mkdir()
    told = {"of": GONE, "of_signature": [1, 1], "path": "/scans/a-copy.tiff"}
    copy.file("duplicate.json").write_text(json.dumps(told))
    (grown.cohort / "arrivals.json").write_text(json.dumps({"absent": {GONE: 1.0}}))
    (grown.cohort / "annotations_seen.json").write_text(json.dumps({GONE: "abc"}))
    for trace in traces(grown, [GONE, "former-name"]):
        trace.remove()
    assert found_in(grown.root, [GONE, "former-name"]) == {}
    assert copy.duplicate() is None
    assert (Register(grown).aliases(), Register(grown).read().former) == ({}, {})


def test_what_others_wrote_stays_and_is_told(grown: Store, tmp_path: Path) -> None:
    own = grown.slide(GONE).path / "remarks.txt"
    own.write_text("of a person")
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    (annotations / "labels.csv").write_text(f"slide,label\n{GONE},tumour\n")
    (annotations / f"{GONE}.geojson").write_text("{}")
    (annotations / "other.geojson").write_text("{}")
    grown.tiles_csv.write_text("path\nelsewhere.png\n")
    entries = Register(grown).entries()
    for trace in traces(grown, [GONE]):
        trace.remove()
    assert [path.name for path in grown.slide(GONE).path.iterdir()] == ["remarks.txt"]
    told = list(still_known(grown, [GONE], entries, [annotations]))
    assert [line for line in told if line.startswith(str(tmp_path))] == [
        f"{own}: was not written by this program.",
        f"{annotations / 'labels.csv'}: names it.",
        f"{annotations / f'{GONE}.geojson'}: names it.",
        next(line for line in told if line.startswith(f"{grown.cluster_models}: ")),
    ]
    assert f"{entries[GONE].path}: the slide itself" in told[0]


def test_a_damaged_catalog_is_removed(grown: Store) -> None:
    grown.catalog_path.write_bytes(b"no database " + GONE.encode())
    for trace in traces(grown, [GONE]):
        trace.remove()
    assert not grown.catalog_path.exists()


def test_a_name_that_leads_out_of_the_store_is_refused(grown: Store) -> None:
    with pytest.raises(StoreError, match="can't be a slide's id"):
        traces(grown, ["../slides"])


@pytest.mark.slow
def test_the_command_line(grown: Store) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HISTOENCODER_", "DAGSTER"))}
    program = "from histoencoder_core.cli import main; main()"

    def forget(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, "forget", "-i", str(grown.root), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    before = found_in(grown.root, [GONE])
    unknown = forget("synthetic-99", "--yes")
    assert unknown.returncode == 1
    assert "synthetic-99: not known" in unknown.stderr
    asked = forget(GONE)
    assert asked.returncode == 0
    assert "add --yes" in asked.stdout
    assert found_in(grown.root, [GONE]) == before
    done = forget(GONE, "--yes")
    assert done.returncode == 0, done.stderr
    assert "DAGSTER_HOME is not set" in done.stdout
    assert found_in(grown.root, [GONE]) == {}
