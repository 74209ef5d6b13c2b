"""What comes from outside: slides and annotations are found, once, and none is lost."""

import json
import os

import dagster as dg
import pytest
from dagster import DagsterRunStatus
from PIL import Image

from histoencoder_core.errors import KINDS
from histoencoder_dagster.jobs import describe_slides
from histoencoder_dagster.partitions import RANGE_END, RANGE_START, SLIDES
from histoencoder_dagster.sensors.batches import contiguous_batches
from histoencoder_dagster.sensors.completeness import REFRESH_SECONDS

RETRY_SECONDS = 300


def asked(result):
    """The ranges of slides that a sensor's result asks for."""
    if isinstance(result, dg.SkipReason):
        return []
    return [(run.tags[RANGE_START], run.tags[RANGE_END]) for run in result.run_requests]


def scan(deployment):
    """Let new slides settle, and run what is asked for."""
    told = []
    for _ in range(2):
        result = deployment.tick("new_slides")
        deployment.run_requests(result, "describe_slides")
        told += asked(result)
    return told


def square(folder, slide_id, label, *, size=512):
    """Annotate all of a slide."""
    ring = [[0, 0], [size, 0], [size, size], [0, size], [0, 0]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": label}},
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{slide_id}.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return path


# New slides ---------------------------------------------------------------------------------------


def test_a_new_slide_becomes_a_partition_and_is_described_once(deployment):
    deployment.drop("a")
    assert asked(deployment.tick("new_slides")) == []
    result = deployment.tick("new_slides")
    assert asked(result) == [("a", "a")]
    assert [run.success for run in deployment.run_requests(result, "describe_slides")] == [True]
    assert deployment.recorded("slides") == {"a"}
    assert isinstance(deployment.tick("new_slides"), dg.SkipReason)
    cursor = json.loads(deployment.cursors["new_slides"])
    assert not any(cursor.values()), "the cursor must not grow for ever"


def test_a_growing_file_waits_until_it_stands_still(deployment):
    path = deployment.slides / "a.svs"
    path.write_bytes(b"1")
    deployment.tick("new_slides")
    path.write_bytes(b"12")
    assert asked(deployment.tick("new_slides")) == []
    path.write_bytes(b"123")
    assert asked(deployment.tick("new_slides")) == []
    assert asked(deployment.tick("new_slides")) == [("a", "a")]


def test_a_young_file_waits_out_the_settle_time(deployment, clock):
    deployment.change(settle_seconds=60)
    deployment.drop("a")
    for _ in range(3):
        assert asked(deployment.tick("new_slides")) == []
    clock(61)
    assert asked(deployment.tick("new_slides")) == [("a", "a")]


def test_a_file_from_a_scanner_whose_clock_is_ahead_is_not_left_waiting(deployment, clock):
    deployment.change(settle_seconds=60)
    path = deployment.drop("a")
    ahead = path.stat().st_mtime + 7200
    os.utime(path, (ahead, ahead))
    for _ in range(3):
        assert asked(deployment.tick("new_slides")) == [], "its time tells nothing of stillness"
    clock(61)
    assert asked(deployment.tick("new_slides")) == [("a", "a")]


def test_slides_are_described_in_batches_of_one_run(deployment):
    for number in range(60):
        (deployment.slides / f"s{number:02d}.svs").write_bytes(b"x")
    deployment.tick("new_slides")
    result = deployment.tick("new_slides")
    assert asked(result) == [("s00", "s24"), ("s25", "s49"), ("s50", "s59")]
    assert len(result.dynamic_partitions_requests[0].partition_keys) == 60
    assert len(result.cursor) < 60 * 50, "it is kept with every tick, of 10,000 new slides too"


def test_batches_are_ranges_that_hold_no_other_slide():
    order = ["zebra", "apple", "mango", "kiwi", "fig"]
    batches = contiguous_batches({"fig", "apple", "mango", "zebra"}, order, size=2)
    assert batches == [["zebra", "apple"], ["mango"], ["fig"]]


def test_slides_under_way_are_not_asked_for_again(deployment):
    deployment.drop("a", "b")
    deployment.tick("new_slides")
    result = deployment.tick("new_slides")
    deployment.instance.add_dynamic_partitions(SLIDES, ["a", "b"])
    run = deployment.instance.create_run_for_job(
        deployment.defs.resolve_job_def(describe_slides.name),
        status=DagsterRunStatus.STARTED,
        tags=result.run_requests[0].tags,
    )
    for _ in range(3):
        assert asked(deployment.tick("new_slides")) == []
    deployment.cursors.clear()
    deployment.tick("new_slides")
    assert asked(deployment.tick("new_slides")) == [], "not with a lost cursor either"
    assert run.tags[RANGE_END] == "b"


def test_a_crash_between_adding_partitions_and_creating_runs_loses_no_slide(deployment):
    deployment.drop("a", "b")
    deployment.tick("new_slides")
    before = deployment.cursors["new_slides"]
    result = deployment.tick("new_slides")
    # Dagster adds the partitions first; then the daemon dies, and neither run nor cursor is kept.
    deployment.instance.add_dynamic_partitions(
        SLIDES, list(result.dynamic_partitions_requests[0].partition_keys)
    )
    deployment.cursors["new_slides"] = before
    again = deployment.tick("new_slides")
    assert asked(again) == [("a", "b")]
    assert not again.dynamic_partitions_requests


def test_a_slide_whose_run_was_killed_is_asked_for_again_later_and_alone(deployment, clock):
    deployment.drop("a", "b")
    deployment.tick("new_slides")
    result = deployment.tick("new_slides")
    deployment.instance.add_dynamic_partitions(SLIDES, ["a", "b"])
    for _ in range(3):
        assert asked(deployment.tick("new_slides")) == [], "a retry by Dagster itself comes first"
    clock(RETRY_SECONDS)
    again = deployment.tick("new_slides")
    assert asked(again) == [("a", "a"), ("b", "b")]
    assert asked(result) == [("a", "b")]
    clock(RETRY_SECONDS)
    assert asked(deployment.tick("new_slides")) == [], (
        "what kills every run is asked for ever rarer"
    )
    clock(3 * RETRY_SECONDS)
    assert asked(deployment.tick("new_slides")) == [("a", "a"), ("b", "b")]


def test_a_clock_that_was_set_back_puts_no_slide_off(deployment, clock):
    deployment.drop("a")
    deployment.tick("new_slides")
    assert asked(deployment.tick("new_slides")) == [("a", "a")]  # whose run is then killed
    deployment.instance.add_dynamic_partitions(SLIDES, ["a"])
    clock(-365 * 86400, steady=0)
    assert asked(deployment.tick("new_slides")) == [("a", "a")]
    assert asked(deployment.tick("new_slides")) == []


def test_a_slide_described_by_a_run_that_was_killed_before_it_told_is_not_lost(deployment, clock):
    deployment.drop("a")
    deployment.tick("new_slides")
    deployment.tick("new_slides")
    other = dg.DagsterInstance.ephemeral()
    deployment.instance.add_dynamic_partitions(SLIDES, ["a"])
    other.add_dynamic_partitions(SLIDES, ["a"])
    # The store has the description, but this instance never heard of it.
    deployment.instance, kept = other, deployment.instance
    assert deployment.run("slides").success
    deployment.instance = kept
    clock(RETRY_SECONDS)
    assert asked(deployment.tick("new_slides")) == [("a", "a")]


def test_a_slide_scanned_again_that_a_killed_run_described_is_not_lost(deployment):
    deployment.drop("a")
    scan(deployment)
    deployment.run("tiles")
    deployment.drop("a", seed=1)
    deployment.tick("new_slides")
    assert asked(deployment.tick("new_slides")) == [("a", "a")]
    other = dg.DagsterInstance.ephemeral()
    other.add_dynamic_partitions(SLIDES, ["a"])
    deployment.instance, kept = other, deployment.instance
    assert deployment.run("slides").success
    deployment.instance = kept
    assert deployment.folder("a").stamp("tiles") is None
    result = deployment.tick("new_slides")
    assert asked(result) == [("a", "a")]
    deployment.run_requests(result, "describe_slides")
    assert asked(deployment.tick("new_slides")) == []
    assert deployment.due_stages()["tiles"] == {"a"}


def test_a_failure_of_before_does_not_hide_that_a_new_try_was_killed(deployment, clock):
    path = deployment.drop_broken("a.svs")
    scan(deployment)
    assert not KINDS[deployment.folder("a").failures()["slides"]["kind"]].transient
    deployment.drop("whole").replace(path)
    deployment.tick("new_slides")
    assert asked(deployment.tick("new_slides")) == [("a", "a")]  # whose run is then killed
    assert asked(deployment.tick("new_slides")) == []
    clock(RETRY_SECONDS)
    assert asked(deployment.tick("new_slides")) == [("a", "a")]


def test_a_store_that_is_not_mounted_is_not_begun_anew(deployment):
    deployment.drop("a")
    scan(deployment)
    deployment.settings.store.rename(deployment.settings.store.with_name("unmounted"))
    assert "is it mounted?" in deployment.tick("new_slides").skip_message
    assert not deployment.settings.store.exists()


def test_a_lost_cursor_asks_for_nothing(deployment):
    deployment.drop("a", "b")
    assert scan(deployment) == [("a", "b")]
    deployment.cursors.clear()
    assert scan(deployment) == []


def test_a_lost_dagster_home_records_the_archive_and_computes_nothing(deployment):
    deployment.drop("a", "b")
    scan(deployment)
    made = {s: deployment.folder(s).record("slides").stat().st_mtime_ns for s in "ab"}
    deployment.cursors.clear()
    with dg.DagsterInstance.ephemeral() as deployment.instance:
        assert scan(deployment) == [("a", "b")]
        assert deployment.recorded("slides") == {"a", "b"}
        assert not deployment.metadata("slides", "a")["recomputed"]
    assert made == {s: deployment.folder(s).record("slides").stat().st_mtime_ns for s in "ab"}


def test_a_slide_scanned_again_is_described_again(deployment):
    path = deployment.drop("a")
    scan(deployment)
    deployment.drop("a", size=768)
    assert scan(deployment) == [("a", "a")]
    assert deployment.metadata("slides", "a")["width"] == 768
    os.utime(path, (1_000_000_000, 1_000_000_000))
    assert scan(deployment) == [("a", "a")], "touched: looked at again"
    assert scan(deployment) == []


def test_a_broken_slide_is_asked_for_once_and_again_when_it_is_replaced(deployment, clock):
    deployment.drop_broken("bad.svs")
    assert scan(deployment) == [("bad", "bad")]
    clock(30 * RETRY_SECONDS)
    assert scan(deployment) == []
    assert deployment.recorded("slides") == set()
    deployment.drop_broken("bad.svs").write_bytes(b"broken in another way")
    assert scan(deployment) == [("bad", "bad")]
    assert scan(deployment) == []


def test_a_good_slide_replaced_by_a_broken_one_is_asked_for_once(deployment, clock):
    path = deployment.drop("a")
    good = path.read_bytes(), path.stat().st_mtime
    scan(deployment)
    path.write_bytes(b"cut short")
    assert scan(deployment) == [("a", "a")]
    clock(30 * RETRY_SECONDS)
    assert scan(deployment) == []
    # The very file that was described first comes back, its time kept.
    path.write_bytes(good[0])
    os.utime(path, (good[1], good[1]))
    assert scan(deployment) == [("a", "a")]
    assert deployment.folder("a").failures() == {}


def test_odd_names_and_equal_names_get_ids_of_their_own(deployment):
    deployment.drop("x/same.tiff", "y/same.tiff", "test-3 (387) ü.tiff", "a..b.tiff")
    (deployment.slides / ".hidden.tiff").write_bytes(b"x")
    (deployment.slides / "notes.txt").write_bytes(b"x")
    scan(deployment)
    ids = deployment.partitions()
    assert len(ids) == 4
    assert deployment.recorded("slides") == set(ids)
    assert {"a.b", "test-3_387", "same"} < set(ids)
    assert {deployment.metadata("slides", s)["file"] for s in ids} == {
        "x/same.tiff",
        "y/same.tiff",
        "test-3 (387) ü.tiff",
        "a..b.tiff",
    }


def test_a_missing_folder_of_slides_is_said_and_forgets_nothing(deployment):
    deployment.drop("a")
    scan(deployment)
    moved = deployment.slides.rename(deployment.slides.with_name("unmounted"))
    result = deployment.tick("new_slides")
    assert isinstance(result, dg.SkipReason)
    assert str(deployment.slides) in result.skip_message
    moved.rename(deployment.slides)
    assert scan(deployment) == []
    assert deployment.partitions() == ["a"]


def test_a_faulty_sheet_holds_slides_back_until_it_is_mended(deployment):
    deployment.drop("a", mpp=None)
    sheet = deployment.slides / "slides.csv"
    sheet.write_text("slide;mpp\na;0.5\n")
    assert scan(deployment) == []
    assert "slides.csv" in deployment.tick("new_slides").skip_message
    sheet.write_text("slide,mpp\na,0.5\n")
    assert scan(deployment) == [("a", "a")]
    assert deployment.metadata("slides", "a")["mpp"] == 0.5


def test_a_faulty_table_of_tiles_does_not_hold_scanned_slides_back(deployment):
    deployment.drop("a")
    deployment.settings.store.mkdir()
    deployment.store.tiles_csv.write_text("slide,x\n")
    assert scan(deployment) == [("a", "a")]


def test_tiles_made_by_another_program_become_a_slide_once_all_are_there(deployment):
    folder = deployment.settings.store / "foreign"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 64)).save(folder / f"x{number * 64}_y0_w64_h64.jpeg")
        assert asked(deployment.tick("new_slides")) == []
    deployment.run_requests(deployment.tick("new_slides"), "describe_slides")
    assert deployment.metadata("slides", "foreign")["tiles"] == 3
    assert scan(deployment) == []


def test_a_renamed_slide_keeps_its_partition_and_the_new_ones_goes(deployment):
    path = deployment.drop("a")
    scan(deployment)
    path.rename(deployment.slides / "renamed.tiff")
    scan(deployment)
    deployment.run_requests(deployment.tick("new_slides"), "describe_slides")
    assert deployment.recorded("slides") == {"a"}
    assert deployment.metadata("slides", "a")["file"] == "renamed.tiff"
    result = deployment.tick("new_slides")
    for change in getattr(result, "dynamic_partitions_requests", None) or []:
        deployment.instance.delete_dynamic_partition(SLIDES, *change.partition_keys)
    assert deployment.partitions() == ["a"]
    assert scan(deployment) == []


def test_a_copy_is_a_partition_of_which_nothing_is_recorded_nor_asked_for_again(deployment, clock):
    path = deployment.drop("a")
    scan(deployment)
    (deployment.slides / "b.tiff").write_bytes(path.read_bytes())
    assert scan(deployment) == [("b", "b")]
    assert deployment.recorded("slides") == {"a"}
    clock(10**6)
    assert scan(deployment) == []
    assert deployment.folder("b").duplicate()["of"] == "a"


def test_slides_of_several_folders_are_found(deployment, tmp_path):
    other = tmp_path / "other"
    deployment.change(slides=(deployment.slides, other))
    path = deployment.drop("a", "b")
    other.mkdir()
    path.rename(other / "b.tiff")
    assert scan(deployment) == [("b", "a")] or deployment.recorded("slides") == {"a", "b"}
    other.rename(tmp_path / "away")
    assert str(other) in deployment.tick("new_slides").skip_message


def test_slides_in_a_bucket_are_worked_on_while_only_their_copies_are_here(deployment, tmp_path):
    path = deployment.drop("a")
    bucket = path.parent.rename(tmp_path / "bucket")
    deployment.change(
        slides=(f"file://{bucket}",), bucket_copies=tmp_path / "buckets", bucket_copies_gb=1
    )
    assert scan(deployment) == [("a", "a")]
    [copy] = (tmp_path / "buckets").glob("*/copies/*/a.tiff")
    assert copy.read_bytes() == (bucket / "a.tiff").read_bytes()
    deployment.run_all()
    assert deployment.recorded("clusters") == {"a"}
    bucket.rename(tmp_path / "gone")
    assert "can't be listed" in deployment.tick("new_slides").skip_message
    assert deployment.platform.arrivals.look(deployment.platform.sheet()).absent == []


def test_no_more_runs_than_may_be_in_flight_are_asked_for(deployment):
    deployment.change(slides_per_run=10, runs_in_flight=2)
    for number in range(45):
        (deployment.slides / f"s{number:02d}.svs").write_bytes(b"x")
    deployment.tick("new_slides")
    result = deployment.tick("new_slides")
    assert asked(result) == [("s00", "s09"), ("s10", "s19")]
    job = deployment.defs.resolve_job_def(describe_slides.name)
    keys = list(result.dynamic_partitions_requests[0].partition_keys)
    deployment.instance.add_dynamic_partitions(SLIDES, keys)
    for run in result.run_requests:
        deployment.instance.create_run_for_job(job, status=DagsterRunStatus.STARTED, tags=run.tags)
    assert len(keys) == 20
    assert asked(deployment.tick("new_slides")) == []


def test_a_failure_refreshes_the_catalog_although_nothing_was_made(deployment):
    deployment.drop_broken("bad.svs")
    scan(deployment)
    deployment.tick("new_slides")
    [run] = deployment.run_requests(deployment.tick("new_troubles"), "refresh_catalog")
    assert run.success
    assert deployment.metadata("completeness")["slides_failed"] == 1
    assert isinstance(deployment.tick("new_troubles"), dg.SkipReason)
    deployment.add("good")
    deployment.drop_broken("worse.svs")
    scan(deployment)
    deployment.tick("new_slides")
    assert deployment.recorded("slides") == {"good"}
    assert isinstance(deployment.tick("new_troubles"), dg.SkipReason), "the catalog is due anyway"
    deployment.run("catalog", "completeness")
    [run] = deployment.run_requests(deployment.tick("new_troubles"), "refresh_catalog")
    assert run.success, "whether it knew of all that failed can't be told"
    assert deployment.metadata("completeness")["slides_failed"] == 2
    assert isinstance(deployment.tick("new_troubles"), dg.SkipReason)


def test_a_refresh_that_was_due_and_did_not_come_is_asked_for(deployment, clock):
    deployment.add("good")
    deployment.drop_broken("bad.svs")
    scan(deployment)
    deployment.tick("new_slides")
    assert isinstance(deployment.tick("new_troubles"), dg.SkipReason), "the catalog is due anyway"
    clock(REFRESH_SECONDS + 1)
    [run] = deployment.run_requests(deployment.tick("new_troubles"), "refresh_catalog")
    assert run.success
    assert deployment.metadata("completeness")["slides_failed"] == 1


# New annotations ----------------------------------------------------------------------------------


@pytest.fixture
def tiled(deployment):
    deployment.add("a", "b", "c")
    deployment.run("slides")
    deployment.run("tiles")
    return deployment


def annotate(deployment, slide_id, label):
    return square(deployment.settings.annotations_folder, slide_id, label)


def test_an_annotation_dropped_later_labels_its_slide_only(tiled):
    assert asked(tiled.tick("new_annotations")) == []
    annotate(tiled, "b", "tumour")
    result = tiled.tick("new_annotations")
    assert asked(result) == [("b", "b")]
    tiled.run_requests(result, "label_slides")
    assert tiled.recorded("labels") == {"b"}
    assert tiled.metadata("labels", "b")["labels"] == {
        "tumour": tiled.metadata("tiles", "b")["tiles"]
    }
    assert asked(tiled.tick("new_annotations")) == []


def test_a_changed_annotation_and_changed_tiles_label_again(tiled):
    annotate(tiled, "b", "tumour")
    tiled.run_requests(tiled.tick("new_annotations"), "label_slides")
    annotate(tiled, "b", "stroma")
    result = tiled.tick("new_annotations")
    tiled.run_requests(result, "label_slides")
    assert list(tiled.metadata("labels", "b")["labels"]) == ["stroma"]
    tiled.drop("b.tiff", size=640)
    tiled.run("slides", slides=["b"])
    tiled.run("tiles", slides=["b"])
    assert asked(tiled.tick("new_annotations")) == [("b", "b")]


def test_an_annotation_that_comes_before_its_slide_waits_for_the_tiles(deployment):
    annotate(deployment, "a", "tumour")
    deployment.add("a")
    deployment.run("slides")
    assert asked(deployment.tick("new_annotations")) == []
    deployment.run("tiles")
    assert asked(deployment.tick("new_annotations")) == [("a", "a")]


def test_a_table_of_labels_is_an_annotation_and_a_faulty_one_is_named(tiled):
    folder = tiled.settings.annotations_folder
    folder.mkdir()
    (folder / "labels.csv").write_text("slide,x,y,label\na,128,128,tumour\nc,128,128,stroma\n")
    result = tiled.tick("new_annotations")
    assert asked(result) == [("a", "a"), ("c", "c")]
    assert all(run.success for run in tiled.run_requests(result, "label_slides"))
    (folder / "labels.csv").write_text("slide,x,y\na,128,128\n")
    result = tiled.tick("new_annotations")
    assert asked(result) == [("a", "a"), ("c", "c")], "their labels came from this table"
    assert not any(run.success for run in tiled.run_requests(result, "label_slides"))
    assert "labels.csv: needs the columns" in tiled.folder("a").failures()["labels"]["reason"]
    assert "labels.csv" in tiled.tick("new_annotations").skip_message


def test_a_table_that_changes_for_one_slide_labels_that_slide_only(tiled):
    folder = tiled.settings.annotations_folder
    folder.mkdir()
    table = folder / "labels.csv"
    table.write_text("slide,x,y,label\na,128,128,tumour\nb,128,128,tumour\nc,128,128,stroma\n")
    tiled.run_requests(tiled.tick("new_annotations"), "label_slides")
    before = {s: tiled.folder(s).record("labels").stat().st_mtime_ns for s in "abc"}
    table.write_text("slide,x,y,label\nc,128,128,stroma\na,128,128,tumour\nb,128,128,stroma\n")
    result = tiled.tick("new_annotations")
    assert asked(result) == [("b", "b")]
    tiled.run_requests(result, "label_slides")
    after = {s: tiled.folder(s).record("labels").stat().st_mtime_ns for s in "abc"}
    assert {s for s in "abc" if after[s] != before[s]} == {"b"}
    assert tiled.metadata("labels", "b")["labels"] == {"stroma": 1}
    table.write_text(table.read_text().replace("a,128,128", "a,128.5,128"))
    result = tiled.tick("new_annotations")
    assert asked(result) == [("a", "a")]
    [run] = tiled.run_requests(result, "label_slides")
    assert not run.success
    assert "line 3: x and y must be" in tiled.folder("a").failures()["labels"]["reason"]
    assert asked(tiled.tick("new_annotations")) == []


def test_the_meaning_of_masks_labels_again_where_it_changed(tiled):
    folder = tiled.settings.annotations_folder
    folder.mkdir()
    for slide_id in "ab":
        Image.new("L", (64, 64), 1).save(folder / f"{slide_id}.png")
    rules = folder / "masks.yaml"
    rules.write_text("- {slides: a, labels: {1: tumour}}\n- labels: {1: stroma}\n")
    result = tiled.tick("new_annotations")
    assert asked(result) == [("a", "b")]
    tiled.run_requests(result, "label_slides")
    assert list(tiled.metadata("labels", "a")["labels"]) == ["tumour"]
    assert tiled.metadata("labels", "a")["thumbnail_labels"].startswith("![a](data:image/jpeg")
    rules.write_text("- {slides: a, labels: {1: cancer}}\n- labels: {1: stroma}\n")
    assert asked(tiled.tick("new_annotations")) == [("a", "a")]


def test_an_annotation_taken_away_takes_its_labels_along(tiled):
    path = annotate(tiled, "b", "tumour")
    annotate(tiled, "c", "tumour")
    tiled.run_requests(tiled.tick("new_annotations"), "label_slides")
    folder = tiled.settings.annotations_folder
    away = folder.rename(folder.with_name("unmounted"))
    result = tiled.tick("new_annotations")
    assert isinstance(result, dg.SkipReason), "a share that is not mounted takes nothing away"
    assert str(folder) in result.skip_message
    away.rename(folder)
    assert asked(tiled.tick("new_annotations")) == []
    text = path.read_text()
    path.unlink()
    result = tiled.tick("new_annotations")
    assert asked(result) == [("b", "b")]
    assert all(run.success for run in tiled.run_requests(result, "label_slides"))
    assert not tiled.folder("b").record("labels").exists()
    assert tiled.folder("c").record("labels").exists()
    assert tiled.metadata("labels", "b")["labelled"] == 0
    assert asked(tiled.tick("new_annotations")) == []
    path.write_text(text)
    result = tiled.tick("new_annotations")
    assert asked(result) == [("b", "b")]
    tiled.run_requests(result, "label_slides")
    assert not tiled.metadata("labels", "b")["recomputed"], "it was kept as a version"


# First cluster model ------------------------------------------------------------------------------


def test_the_first_model_is_fitted_once_enough_slides_have_features_and_never_again(deployment):
    deployment.add("a", "b")
    for stage in ("slides", "tiles", "features"):
        deployment.run(stage)
    assert isinstance(deployment.tick("first_cluster_model"), dg.SkipReason)
    deployment.add("a", "b", "c")
    for stage in ("slides", "tiles", "features"):
        deployment.run(stage, slides=["c"])
    result = deployment.tick("first_cluster_model")
    assert len(result.run_requests) == 1
    deployment.add("a", "b", "c", "e")
    for stage in ("slides", "tiles", "features"):
        deployment.run(stage, slides=["e"])
    assert isinstance(deployment.tick("first_cluster_model"), dg.SkipReason), "it is on its way"
    assert all(run.success for run in deployment.run_requests(result, "fit_clusters"))
    deployment.add("a", "b", "c", "d")
    for stage in ("slides", "tiles", "features"):
        deployment.run(stage, slides=["d"])
    assert isinstance(deployment.tick("first_cluster_model"), dg.SkipReason)


def test_a_first_fit_that_was_killed_is_asked_for_again_but_not_while_it_runs(deployment, clock):
    deployment.add("a", "b", "c")
    for stage in ("slides", "tiles", "features"):
        deployment.run(stage)
    assert deployment.tick("first_cluster_model").run_requests
    run = deployment.instance.create_run_for_job(
        deployment.defs.resolve_job_def("fit_clusters"), status=DagsterRunStatus.STARTED
    )
    clock(RETRY_SECONDS)
    assert "being fitted" in deployment.tick("first_cluster_model").skip_message
    deployment.instance.report_run_failed(run)
    result = deployment.tick("first_cluster_model")
    assert len(result.run_requests) == 1
    assert isinstance(deployment.tick("first_cluster_model"), dg.SkipReason)


def test_a_model_fitted_without_dagster_is_taken_as_it_is(deployment):
    deployment.add("a", "b", "c")
    deployment.run_all()
    version = deployment.metadata("cluster_model")["version"]
    with dg.DagsterInstance.ephemeral() as deployment.instance:
        deployment.add("a", "b", "c", "d")
        for stage in ("slides", "tiles", "features"):
            deployment.run(stage)
        result = deployment.tick("first_cluster_model")
        assert not result.run_requests, "a fit would renumber the clusters of a, b and c"
        assert [event.asset_key.path[-1] for event in result.asset_events] == ["cluster_model"]
        assert result.asset_events[0].metadata["version"].value == version
