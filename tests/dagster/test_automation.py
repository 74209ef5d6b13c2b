"""What is due when, as the automation sensors see it, tick by tick."""

from datetime import UTC, datetime

import dagster as dg
import pytest
from dagster import DagsterRunStatus

from histoencoder_core import features as core_features
from histoencoder_core.errors import WeightsError
from histoencoder_core.settings import AnnotationSettings, TilingSettings
from histoencoder_dagster.sensors.batches import RANGE_END, RANGE_START

STAGES = ("slides", "tiles", "features", "clusters", "labels", "annotations")
COHORT = {
    "catalog": {None},
    "completeness": {None},
    "cluster_statistics": {None},
    "cluster_purity": {None},
    "cluster_labels": {None},
    "annotation_accuracy": {None},
}


@pytest.fixture
def watched(deployment):
    """A deployment whose automation was on before the first slide."""
    assert deployment.due() == {}
    return deployment


def stages(due):
    return {name: slides for name, slides in due.items() if slides != {None}}


def with_model(deployment, *names):
    """Slides all of whose stages were done before the automation was on."""
    deployment.add(*names)
    deployment.run_all()
    deployment.cursors.clear()
    assert deployment.due() == {}, "nothing is missing, so nothing is due"


def test_each_stage_follows_the_one_before_in_a_run_of_its_own(watched):
    watched.add("a", "b")
    watched.run("slides")
    told = [stages(due) for due in watched.follow()]
    assert [due for due in told if due] == [{"tiles": {"a", "b"}}, {"features": {"a", "b"}}]


def test_a_broken_slide_in_the_middle_does_not_keep_the_others_from_any_stage(watched):
    """One slide fails in each stage; the good ones end in the catalog without any help."""
    watched.add("a", "c")
    watched.drop_broken("broken.tiff")
    watched.drop("coarse", mpp=None)
    ids = watched.register()
    assert ids.index("broken") not in (0, len(ids) - 1)
    watched.run("slides")
    watched.follow()
    assert watched.recorded("features") == {"a", "c"}
    watched.change(first_fit_slides=2)
    watched.run_requests(watched.tick("first_cluster_model"), "fit_clusters")
    told = watched.follow()
    assert stages(told[0]) == {"clusters": {"a", "c"}}
    assert watched.recorded("clusters") == {"a", "c"}
    told = watched.metadata("completeness")
    assert (told["clusters_done"], told["slides_with_failures"]) == (2, 2)
    assert watched.due() == {}, "what failed is not tried for ever"


def test_a_mended_slide_goes_on_alone(watched):
    watched.add("a", "c")
    watched.drop("b", mpp=None)
    watched.register()
    watched.run("slides")
    watched.follow()
    assert watched.recorded("features") == {"a", "c"}
    (watched.slides / "slides.csv").write_text("slide,mpp\nb,0.5\n")
    watched.run("slides", slides=["b"])
    told = [stages(due) for due in watched.follow()]
    assert [due for due in told if due] == [{"tiles": {"b"}}, {"features": {"b"}}]


def test_missing_weights_are_told_of_each_slide_and_tried_again(watched, clock, monkeypatch):
    def no_weights(*_, **__):
        raise WeightsError("small.pth: is not there")

    watched.add("a", "b")
    watched.run("slides")
    with monkeypatch.context() as patched:
        patched.setattr(core_features, "load_encoder", no_weights)
        watched.follow()
    assert {watched.folder(s).failures()["features"]["kind"] for s in "ab"} == {"weights-missing"}
    assert watched.due_stages() == {}
    clock(301)
    assert watched.due_stages() == {"features": {"a", "b"}}
    watched.run("features")
    assert watched.recorded("features") == {"a", "b"}
    assert watched.due_stages() == {}


def test_a_slide_that_can_not_succeed_is_not_tried_again(watched, clock):
    watched.add("a")
    watched.drop("b", mpp=None)
    watched.register()
    watched.run("slides")
    watched.follow()
    assert watched.folder("b").failures()["tiles"]["kind"] == "no-mpp"
    clock(10**6)
    assert "tiles" not in watched.due_stages()


def test_a_bounded_number_of_runs_is_in_flight_however_much_is_owed(watched):
    """As after a week in which the sensor was paused."""
    watched.change(slides_per_run=2, runs_in_flight=2)
    watched.add(*"abcdefgh")
    watched.run("slides")
    job = watched.defs.resolve_job_def("cut_tiles")
    result = watched.tick("next_stages")
    assert [(r.tags[RANGE_START], r.tags[RANGE_END]) for r in result.run_requests] == [
        ("a", "b"), ("c", "d"),
    ]  # fmt: skip
    runs = [
        watched.instance.create_run_for_job(job, status=DagsterRunStatus.STARTED, tags=r.tags)
        for r in result.run_requests
    ]
    assert watched.due_stages() == {}
    watched.instance.delete_run(runs[0].run_id)
    assert watched.due_stages() == {"tiles": {"e", "f"}}, "a and b may have killed their run"


def test_the_newest_slides_go_first_if_asked(watched):
    watched.change(slides_per_run=2, runs_in_flight=1, newest_first=True)
    watched.add(*"abcde")
    watched.run("slides")
    assert watched.due_stages() == {"tiles": {"e"}}


def test_clusters_are_not_due_until_there_is_a_model(watched):
    watched.add("a", "b")
    watched.run("slides")
    assert not any("clusters" in due for due in watched.follow())
    watched.run("cluster_model")
    assert stages(watched.due()) == {"clusters": {"a", "b"}}


def test_a_new_slide_is_assigned_and_no_other_and_nothing_is_refitted(watched):
    with_model(watched, "a", "b", "c")
    watched.add("a", "b", "c", "d")
    watched.run("slides", slides=["d"])
    told = watched.follow()
    assert {"clusters": {"d"}} in [stages(due) for due in told]
    assert not any("cluster_model" in due for due in told)
    assert {s for due in told for slides in stages(due).values() for s in slides} == {"d"}


def test_a_new_model_assigns_all_slides_anew(watched):
    with_model(watched, "a", "b", "c")
    watched.run("cluster_model")
    assert stages(watched.due()) == {"clusters": {"a", "b", "c"}}


def test_a_slide_scanned_again_goes_through_all_stages_again(watched):
    with_model(watched, "a", "b", "c")
    watched.drop("b.tiff", size=640)
    watched.run("slides", slides=["b"])
    told = [stages(due) for due in watched.follow()]
    assert [due for due in told if due] == [{s: {"b"}} for s in ("tiles", "features", "clusters")]
    assert watched.metadata("features", "b")["recomputed"]


def test_cohort_and_checks_are_refreshed_although_a_slide_failed_or_is_missing(watched):
    watched.add("a")
    watched.drop_broken("bad.tiff")
    watched.register()
    watched.run("slides")
    assert COHORT.items() <= watched.due().items()
    watched.run("tiles", slides=["a"])
    assert {*COHORT, "tissue_found"} <= watched.due().keys()
    watched.run("features", slides=["a"])
    due = watched.due()
    assert {*COHORT, "features_finite", "feature_rows_equal_tile_rows"} <= due.keys()
    assert "tissue_found" not in due
    watched.run("cluster_model")
    watched.run("clusters", slides=["a"])
    assert "clusters_cover_every_tile" in watched.due()


def test_labels_refresh_the_cohort(watched):
    with_model(watched, "a", "b", "c")
    folder = watched.settings.annotations_folder
    folder.mkdir()
    (folder / "labels.csv").write_text("slide,x,y,label\na,128,128,tumour\n")
    watched.run("labels", slides=["a"])
    assert watched.due() == COHORT


def annotated(due):
    return [slides["annotations"] for slides in due if "annotations" in slides]


def test_slides_are_annotated_when_clusters_mean_something_else_and_only_then(watched):
    watched.change(annotate=AnnotationSettings(n_clusters=2, min_purity=0.5, min_labelled=1))
    with_model(watched, "a", "b", "c")
    folder = watched.settings.annotations_folder
    folder.mkdir()
    table = folder / "labels.csv"
    table.write_text("slide,label\na,tumour\n")
    watched.run("labels", slides=["a"])
    assert annotated(watched.follow()) == [{"a", "b", "c"}]
    assert watched.metadata("cluster_labels")["clusters_with_a_label"] > 0
    assert "Needs labelled slides" in watched.metadata("annotations", "c")["not_measured"]
    made = len(watched.events("cluster_labels"))
    table.write_text("slide,label\na,tumour\nb,tumour\n")
    watched.run("labels", slides=["b"])
    assert annotated(watched.follow()) == [], "clusters mean what they meant"
    assert len(watched.events("cluster_labels")) == made
    watched.drop("d", seed=3)
    watched.register()
    watched.run("slides", slides=["d"])
    assert annotated(watched.follow()) == [{"d"}]
    told = watched.metadata("annotations", "d")
    assert (told["accuracy_held_out"], told["coverage_held_out"]) == (1.0, 1.0)
    table.write_text("slide,label\na,benign\nb,benign\n")
    watched.run("labels", slides=["a", "b"])
    assert annotated(watched.follow()) == [{"a", "b", "c", "d"}]


def test_a_pathologists_table_of_cluster_labels_annotates_all_slides(watched):
    with_model(watched, "a", "b", "c")
    model = watched.metadata("cluster_model")["version"]
    assert watched.run_requests(watched.tick("edited_cluster_labels"), "name_clusters") == []
    table = watched.store.cluster_labels_csv
    table.write_text(f"model,k,cluster,label\n{model},2,0,stroma\n{model},2,1,\n")
    [run] = watched.run_requests(watched.tick("edited_cluster_labels"), "name_clusters")
    assert run.success
    assert watched.run_requests(watched.tick("edited_cluster_labels"), "name_clusters") == []
    assert annotated(watched.follow()) == [{"a", "b", "c"}]
    told = watched.metadata("annotations", "a")
    assert told["source"] == "edited"
    assert "not_measured" in told, "nothing is labelled"
    table.write_text(f"model,k,cluster,label\n{model},2,7,stroma\n")
    [run] = watched.run_requests(watched.tick("edited_cluster_labels"), "name_clusters")
    assert not run.success, "there is no cluster 7"


def test_the_report_is_drawn_once_and_then_at_night(watched):
    def report(hour, *, day=1):
        moment = datetime(2026, 1, day, hour, 5, tzinfo=UTC)
        return "cohort_report" in watched.due(evaluation_time=moment)

    with_model(watched, "a", "b", "c")
    assert not report(9), "nothing is new"
    watched.run(*COHORT)
    assert report(10), "there is none yet"
    watched.run("cohort_report", "heat_map")
    assert "missing" in watched.metadata("heat_map"), "nothing is labelled"
    assert not report(11)
    watched.run(*COHORT)
    assert not report(12)
    watched.run("annotation_accuracy")
    assert not report(13)
    assert report(5, day=2)
    watched.run("cohort_report")
    assert not report(5, day=3), "a quiet day"
    watched.run(*COHORT)
    assert not report(9, day=3), "it is day"
    assert report(5, day=4)


def test_what_comes_while_the_catalog_is_built_is_not_lost(watched):
    """The catalog read the store before the second slide was there, and was recorded after it."""
    watched.add("a", "b")
    watched.run("slides")
    assert COHORT.items() <= watched.due().items()
    watched.run("tiles", slides=["a"])
    watched.run(*COHORT)
    assert COHORT.items() <= watched.due().items()
    watched.run("tiles", slides=["b"])
    assert COHORT.items() <= watched.due().items()


def test_what_comes_while_a_slide_is_encoded_is_not_lost(watched):
    watched.add("a")
    watched.run("slides")
    watched.due()
    watched.run("tiles")
    assert watched.due()["features"] == {"a"}
    # Scanned again before the features that were asked for are there.
    watched.drop("a.tiff", size=640)
    watched.run("slides")
    watched.run("tiles")
    watched.run("features")
    assert watched.due()["features"] == {"a"}


def test_the_purity_runs_with_its_catalog_and_not_once_more(watched):
    watched.add("a")
    watched.run("slides")
    due = watched.due()
    assert COHORT.items() <= due.items()
    watched.run(*COHORT)
    assert not COHORT.keys() & watched.due().keys()


def test_another_code_version_computes_nothing_by_itself(watched):
    with_model(watched, "a", "b", "c")
    watched.change(tiling=TilingSettings(tile_px=64, overlap=0))
    assert watched.due() == {}


def test_slides_that_wait_when_the_automation_is_first_turned_on_are_taken_up(deployment):
    deployment.add("a", "b")
    deployment.run("slides")
    assert stages(deployment.due()) == {"tiles": {"a", "b"}}


def test_the_cohorts_sensor_asks_for_no_stage_of_a_slide(deployment):
    """What one sensor asks for in a tick may become one backfill, in which a slide that failed
    would hold back the cohort."""
    graph = deployment.defs.resolve_asset_graph()
    sensor = deployment.defs.get_sensor_def("cohort_follows_slides")
    selected = {key.path[-1] for key in sensor.asset_selection.resolve(graph)}
    checks = {key.name for key in sensor.asset_selection.resolve_checks(graph)}
    assert selected == {*COHORT, "cluster_model"}
    assert checks == {
        "slides_are_like_the_training_slides",
        "tissue_found",
        "features_finite",
        "feature_rows_equal_tile_rows",
        "clusters_cover_every_tile",
    }
    stages = {key.path[-1] for key in graph.get_all_asset_keys()} & set(STAGES)
    assert all(graph.get(dg.AssetKey(s)).automation_condition is None for s in stages)
