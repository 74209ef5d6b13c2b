"""What is due when, as the automation sensors see it, tick by tick."""

from datetime import UTC, datetime

import dagster as dg
import pytest
from dagster import DagsterRunStatus
from dagster._core.storage.tags import WILL_RETRY_TAG

from histoencoder_core import features as core_features
from histoencoder_core.errors import WeightsError
from histoencoder_core.settings import AnnotationSettings, TilingSettings
from histoencoder_dagster.sensors.batches import RANGE_END, RANGE_START

STAGES = ("slides", "tiles", "features", "clusters", "labels", "annotations")
ALL_MEANT = AnnotationSettings(n_clusters=2, min_purity=0.5, min_labelled=1)
"""With a few labels every cluster means something."""

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


def requested(deployment):
    """Tick the sensor of stages once: the stages and the ends of the range of each request."""
    return told_of(deployment.tick("next_stages").run_requests)


def told_of(requests):
    return [
        ([key.path[-1] for key in r.asset_selection], (r.tags[RANGE_START], r.tags[RANGE_END]))
        for r in requests
    ]


def test_a_batch_goes_through_all_stages_that_there_are_in_one_run(watched):
    watched.change(annotate=ALL_MEANT)
    watched.add("a", "b")
    watched.run("slides")
    chain = ["tiles", "features", "clusters", "annotations"]
    assert requested(watched) == [(chain[:2], ("a", "b"))], "there is no model yet"
    watched.run(*chain[:2])
    assert watched.recorded("features") == {"a", "b"}
    watched.run("cluster_model")
    assert requested(watched) == [(["clusters"], ("a", "b"))], "they mean nothing yet"
    watched.run("clusters")
    watched.settings.annotations_folder.mkdir()
    (watched.settings.annotations_folder / "labels.csv").write_text("slide,label\na,tumour\n")
    watched.run("labels", slides=["a"])
    watched.run(*COHORT)
    assert requested(watched) == [(["annotations"], ("a", "b"))]
    watched.run("annotations")
    watched.drop("c", seed=2)
    watched.register()
    watched.run("slides", slides=["c"])
    assert requested(watched) == [(chain, ("c", "c"))]
    assert watched.run(*chain, slides=["c"]).success
    assert watched.recorded("annotations") == {"a", "b", "c"}
    assert watched.due_stages() == {}
    watched.run("cluster_model")
    assert requested(watched) == [(["clusters"], ("a", "c"))], "the new ones mean nothing yet"


def test_slides_are_not_annotated_by_what_clusters_of_an_older_model_meant(watched):
    watched.change(annotate=ALL_MEANT)
    with_model(watched, "a", "b", "c")
    watched.settings.annotations_folder.mkdir()
    (watched.settings.annotations_folder / "labels.csv").write_text("slide,label\na,tumour\n")
    watched.run("labels", slides=["a"])
    watched.follow()
    watched.change(clusters=watched.settings.clusters.model_copy(update={"seed": 1}))
    watched.run("cluster_model")
    told = [due for due in (stages(due) for due in watched.follow()) if due]
    assert told == [{"clusters": {"a", "b", "c"}}, {"annotations": {"a", "b", "c"}}]


def test_a_slide_that_fails_ends_its_run_and_the_others_go_on_at_once(watched, clock):
    watched.drop("a", "c")
    watched.drop("b", mpp=None)
    assert watched.register() == ["a", "b", "c"]
    watched.run("slides")
    both = ["tiles", "features"]
    assert requested(watched) == [(both, ("a", "c"))]
    assert not watched.run(*both).success
    assert (watched.recorded("tiles"), watched.recorded("features")) == ({"a", "c"}, set())
    assert requested(watched) == [(["features"], ("a", "a")), (["features"], ("c", "c"))]
    watched.run("features", slides=["a"])
    assert watched.due_stages() == {}, "the run of c may be about to begin"
    clock(301)
    assert requested(watched) == [(["features"], ("c", "c"))]


def test_what_waits_for_its_first_stage_does_not_hold_up_what_is_further_on(watched):
    """As in an archive of thousands, one of whose first slides is bad."""
    watched.change(slides_per_run=2, runs_in_flight=1)
    watched.drop("b", "d", "e", "f")
    watched.drop("a", mpp=None)
    assert watched.register() == [*"abdef"]
    watched.run("slides")
    both = ["tiles", "features"]
    assert requested(watched) == [(both, ("a", "b"))]
    watched.run(*both, slides=["a", "b"])
    assert watched.recorded("tiles") == {"b"}
    requests = watched.tick("next_stages").run_requests
    assert told_of(requests) == [(both, ("d", "e")), (["features"], ("b", "b"))]
    job = watched.defs.resolve_job_def("work_up_slides")
    runs = [
        watched.instance.create_run_for_job(
            job.get_subset(asset_selection=set(r.asset_selection)),
            status=DagsterRunStatus.STARTED,
            tags=r.tags,
        )
        for r in requests
    ]
    assert watched.due_stages() == {}, "one run of each stage is in flight"
    watched.instance.delete_run(runs[0].run_id)
    assert requested(watched) == [(both, ("f", "f"))]


def test_what_dagster_is_about_to_try_again_is_not_asked_for(watched, clock):
    watched.add("a", "b")
    watched.run("slides")
    [request] = watched.tick("next_stages").run_requests
    job = watched.defs.resolve_job_def("work_up_slides")
    watched.run("tiles")
    watched.instance.create_run_for_job(
        job.get_subset(asset_selection=set(request.asset_selection)),
        status=DagsterRunStatus.FAILURE,
        tags={**request.tags, WILL_RETRY_TAG: "true"},
    )
    assert watched.due_stages() == {}
    clock(601)
    assert watched.due_stages() == {"features": {"a", "b"}}, "it was not tried again"


def test_what_failed_late_in_a_run_is_not_asked_for_at_once(watched, clock, monkeypatch):
    def no_weights(*_, **__):
        raise WeightsError("small.pth: is not there")

    watched.add("a", "b")
    watched.run("slides")
    [(both, _)] = requested(watched)
    with monkeypatch.context() as patched:
        patched.setattr(core_features, "load_encoder", no_weights)
        watched.run(*both)
    assert watched.recorded("tiles") == {"a", "b"}
    assert watched.due_stages() == {}
    watched.run("tiles", slides=["a"])
    assert watched.due_stages() == {"features": {"a"}}, "its tiles are of another make"
    watched.run("features", slides=["a"])
    clock(301)
    assert watched.due_stages() == {"features": {"b"}}


def test_a_model_fitted_while_a_batch_is_under_way_assigns_it_anew(watched):
    with_model(watched, "a", "b", "c")
    watched.drop("d", seed=3)
    watched.register()
    watched.run("slides", slides=["d"])
    [(chain, _)] = requested(watched)
    assert chain == ["tiles", "features", "clusters"]
    watched.run("tiles", "features", slides=["d"])
    watched.run("cluster_model")
    watched.run("clusters", slides=["d"])  # as if it had begun before the new model
    assert watched.due_stages() == {"clusters": {"a", "b", "c", "d"}}


def test_tiles_made_anew_while_a_run_encodes_those_of_before_are_encoded_too(watched, clock):
    watched.add("a", "b")
    watched.run("slides")
    [(both, _)] = requested(watched)
    assert watched.run(*both).success
    watched.change(tiling=TilingSettings(tile_px=128, overlap=0.5))
    watched.run("tiles", slides=["a"])
    # The run that was encoding them all the while ends after that.
    watched.instance.report_runless_asset_event(dg.AssetMaterialization("features", partition="a"))
    assert watched.due_stages() == {"features": {"a"}}
    assert watched.due_stages() == {}, "it was asked for just now"
    clock(301)
    assert watched.due_stages() == {"features": {"a"}}, "its run was killed"
    watched.run("features", slides=["a"])
    assert watched.metadata("features", "a")["recomputed"]
    assert watched.due_stages() == {}


def test_what_was_made_from_tiles_of_before_is_found_without_a_cursor(watched):
    watched.add("a", "b")
    watched.run("slides")
    watched.run("tiles", "features")
    watched.change(tiling=TilingSettings(tile_px=128, overlap=0.5))
    watched.run("tiles", slides=["a"])
    watched.instance.report_runless_asset_event(dg.AssetMaterialization("features", partition="a"))
    watched.cursors.clear()
    assert watched.due_stages() == {"features": {"a"}}


def test_a_batch_is_not_asked_for_again_while_any_of_its_stages_is_under_way(watched):
    watched.add("a", "b")
    watched.run("slides")
    [request] = watched.tick("next_stages").run_requests
    job = watched.defs.resolve_job_def("work_up_slides")
    run = watched.instance.create_run_for_job(
        job.get_subset(asset_selection=set(request.asset_selection)),
        status=DagsterRunStatus.STARTED,
        tags=request.tags,
    )
    watched.run("tiles")
    assert watched.due_stages() == {}
    watched.instance.delete_run(run.run_id)
    assert watched.due_stages() == {"features": {"a", "b"}}


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
    assert [due for due in told if due] == [{"tiles": {"b"}, "features": {"b"}}]


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
    job = watched.defs.resolve_job_def("work_up_slides")
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
    both = ["tiles", "features"]
    assert requested(watched) == [(both, ("e", "f"))], "a and b may have killed their run"


def test_the_newest_slides_go_first_if_asked(watched):
    watched.change(slides_per_run=2, runs_in_flight=1, newest_first=True)
    watched.add(*"abcde")
    watched.run("slides")
    assert watched.due_stages() == {"tiles": {"e"}, "features": {"e"}}


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
    assert stages(told[0]) == {s: {"d"} for s in ("tiles", "features", "clusters")}
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
    assert [due for due in told if due] == [{s: {"b"} for s in ("tiles", "features", "clusters")}]
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
    watched.change(annotate=ALL_MEANT)
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
    assert stages(deployment.due()) == {"tiles": {"a", "b"}, "features": {"a", "b"}}


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
