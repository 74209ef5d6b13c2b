"""Stages as assets: a bad slide fails alone, nothing is done twice, and people see what it is."""

import base64
import io
import shutil
import sys

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest
from PIL import Image

from histoencoder_core.features import encoders
from histoencoder_core.settings import ClusterSettings, EncoderSettings, TilingSettings
from histoencoder_core.tiles import cut_tiles
from histoencoder_dagster.partitions import RANGE_END, RANGE_START


def failure(run, step):
    """What a failed step says: ``{slide: reason}``."""
    (event,) = [e for e in run.all_events if e.is_step_failure and e.step_key == step]
    return event.step_failure_data.user_failure_data.metadata["failed"].value


def stale(deployment, asset, slide):
    graph = deployment.defs.resolve_asset_graph()
    context = LoadingContextForTest(deployment.instance)
    resolver = CachingStaleStatusResolver(deployment.instance, graph, context)
    return resolver.get_status(dg.AssetKey(asset), slide).value


def pictures(metadata):
    """The pictures among a slide's metadata, decoded, with the length of their text."""
    found = {}
    for name, value in metadata.items():
        if isinstance(value, str) and value.startswith("!["):
            kind, _, data = value.partition("](data:image/jpeg;base64,")[2].partition(")")
            assert not data
            found[name] = Image.open(io.BytesIO(base64.b64decode(kind))), len(value)
    return found


# A bad slide in a batch ---------------------------------------------------------------------------


def test_a_broken_slide_in_the_middle_of_a_batch_fails_alone(deployment):
    deployment.drop("a", "c")
    broken = deployment.drop_broken("b.tiff")
    assert deployment.register() == ["a", "b", "c"]
    run = deployment.run("slides")
    assert not run.success
    assert list(failure(run, "slides")) == ["b"]
    assert str(broken) in failure(run, "slides")["b"]
    assert deployment.recorded("slides") == {"a", "c"}
    assert deployment.metadata("slides", "a")["width"] == 512


def test_odd_files_fail_one_by_one_and_harm_no_other(deployment, test_data):
    odd = [p for p in (test_data / "odd").iterdir() if p.suffix in {".svs", ".tif", ".tiff"}]
    for path in odd:
        shutil.copy(path, deployment.slides)
    deployment.add("a_good", "z_good")
    reasons = failure(deployment.run("slides"), "slides")
    reasons |= failure(deployment.run("tiles"), "tiles")
    readable = {"a_good", "z_good", "openslide_small"}
    assert len(reasons) > 5
    assert reasons.keys() >= {path.stem for path in odd} - readable
    for slide_id, reason in reasons.items():
        assert slide_id in reason
        assert "Error:" not in reason, "an error that nobody foresaw"
    for stage in ("features", "cluster_model", "clusters"):
        deployment.run(stage)
    assert {"a_good", "z_good"} <= deployment.recorded("clusters") <= readable


def test_a_rerun_of_the_batch_computes_only_what_failed(deployment):
    deployment.drop("a", "c")
    deployment.drop_broken("b.tiff")
    deployment.register()
    deployment.run("slides")
    deployment.drop("b", seed=2)
    assert deployment.run("slides").success
    recomputed = {s: deployment.metadata("slides", s)["recomputed"] for s in "abc"}
    assert recomputed == {"a": False, "b": True, "c": False}
    assert len(deployment.events("slides", "b")) == 1


def test_each_stage_fails_alone_and_says_why(deployment):
    deployment.add("a", "c")
    deployment.drop("b", mpp=None)
    deployment.register()
    assert deployment.run("slides").success
    run = deployment.run("tiles")
    assert list(failure(run, "tiles")) == ["b"]
    assert "slides.csv" in failure(run, "tiles")["b"], "the remedy"
    run = deployment.run("features")
    assert list(failure(run, "features")) == ["b"]
    deployment.run("cluster_model")
    run = deployment.run("clusters")
    assert list(failure(run, "clusters")) == ["b"]
    assert deployment.recorded("clusters") == {"a", "c"}
    # The slide's resolution is made known: it alone is computed.
    (deployment.slides / "slides.csv").write_text("slide,mpp\nb,0.5\n")
    for stage in ("slides", "tiles", "features", "clusters"):
        assert deployment.run(stage).success
        recomputed = {s: deployment.metadata(stage, s)["recomputed"] for s in "abc"}
        assert recomputed == {"a": False, "b": True, "c": False}, stage


def test_an_unforeseen_error_fails_its_slide_alone(deployment, monkeypatch):
    deployment.add("a", "b", "c")
    deployment.run("slides")

    def cut(folder, settings):
        if folder.slide_id == "b":
            raise ZeroDivisionError("a bug")
        return cut_tiles(folder, settings)

    monkeypatch.setattr(sys.modules["histoencoder_dagster.assets.tiles"], "cut_tiles", cut)
    run = deployment.run("tiles")
    assert failure(run, "tiles") == {"b": "ZeroDivisionError: a bug"}
    assert deployment.recorded("tiles") == {"a", "c"}


def test_what_a_cancelled_run_had_done_is_recorded(deployment, monkeypatch):
    deployment.add("a", "b", "c")
    deployment.run("slides")

    def cut(folder, settings):
        if folder.slide_id == "c":
            raise KeyboardInterrupt
        return cut_tiles(folder, settings)

    monkeypatch.setattr(sys.modules["histoencoder_dagster.assets.tiles"], "cut_tiles", cut)
    assert not deployment.run("tiles").success
    assert deployment.recorded("tiles") == {"a", "b"}


def test_a_batch_loads_the_encoder_once(deployment, monkeypatch):
    ids = deployment.add("a", "b", "c", "d", "e")
    deployment.run("slides")
    deployment.run("tiles")
    loaded = []
    create = encoders._create
    monkeypatch.setattr(encoders, "_create", lambda *a, **k: loaded.append(a) or create(*a, **k))
    deployment.change(encoder=EncoderSettings(name="untrained:test_resnet", input_size=48))
    run = deployment.run("features")
    assert run.success
    assert deployment.recorded("features") == set(ids)
    assert sum(e.is_step_start and e.step_key == "features" for e in run.all_events) == 1
    assert len(loaded) == 1


def test_one_event_a_slide_and_run(deployment):
    deployment.add("a", "b")
    deployment.run("slides")
    assert len(deployment.events("slides")) == 2


# Clusters -----------------------------------------------------------------------------------------


def test_a_new_slide_is_assigned_without_a_refit_and_leaves_the_others_alone(deployment):
    deployment.add("a", "b", "c")
    deployment.run_all()
    before = {s: deployment.folder(s).record("clusters").read_bytes() for s in "abc"}
    model = deployment.metadata("cluster_model")["version"]
    deployment.add("a", "b", "c", "d")
    for stage in ("slides", "tiles", "features", "clusters"):
        assert deployment.run(stage).success
    assert {s: deployment.folder(s).record("clusters").read_bytes() for s in "abc"} == before
    assert deployment.metadata("clusters", "d")["model"] == model
    assert len(deployment.events("cluster_model")) == 1


def test_a_model_asked_for_without_new_features_is_not_fitted_again(deployment):
    deployment.add("a", "b", "c")
    deployment.run_all()
    before = deployment.metadata("cluster_model")
    file = deployment.store.cluster_models / f"{before['version']}.parquet"
    fitted = file.read_bytes()
    assert deployment.run("cluster_model").success
    after = deployment.metadata("cluster_model")
    assert (before["recomputed"], after["recomputed"]) == (True, False)
    assert after["version"] == before["version"]
    assert file.read_bytes() == fitted
    deployment.change(clusters=ClusterSettings(n_clusters=(2, 3), seed=1))
    deployment.run("cluster_model")
    assert deployment.metadata("cluster_model")["version"] != before["version"]


def test_clusters_without_a_model_say_what_to_run(deployment):
    deployment.add("a")
    for stage in ("slides", "tiles", "features"):
        deployment.run(stage)
    run = deployment.run("clusters")
    (event,) = [e for e in run.all_events if e.is_step_failure]
    assert "cluster_model" in str(event.step_failure_data.error)


# What a person sees -------------------------------------------------------------------------------


def test_every_slide_shows_small_pictures_and_plain_numbers(deployment, test_data):
    shutil.copy(test_data / "slides" / "CMU-1-Small-Region.svs", deployment.slides)
    deployment.change(
        tiling=TilingSettings(mpp=1.0, tile_px=256),
        encoder=EncoderSettings(name="untrained:test_resnet", input_size=64),
    )
    (slide,) = deployment.register()
    deployment.run_all()
    shown = {
        "slides": {"thumbnail"},
        "tiles": {"thumbnail_tiles", "thumbnail_tissue"},
        "features": set(),
        "clusters": {"thumbnail_clusters"},
    }
    for asset, names in shown.items():
        metadata = deployment.metadata(asset, slide)
        found = pictures(metadata)
        assert set(found) == names
        for name, (picture, length) in found.items():
            assert length < 100_000, name
            assert max(picture.size) == 400
        numbers = [v for v in metadata.values() if isinstance(v, (int, float))]
        assert len(numbers) >= 2, "the UI plots numbers"
    slides, tiles = (deployment.metadata(asset, slide) for asset in ("slides", "tiles"))
    assert (slides["width"], slides["height"]) == (2220, 2967)
    assert slides["mpp"] == pytest.approx(0.499)
    assert tiles["tiles"] > 20
    assert tiles["tiles"] == deployment.metadata("features", slide)["tiles"]


def test_features_show_what_made_them(deployment):
    deployment.add("a")
    for stage in ("slides", "tiles", "features"):
        deployment.run(stage)
    metadata = deployment.metadata("features", "a")
    told = {name: metadata[name] for name in ("device", "backend", "precision", "batch_size")}
    assert told == {
        "device": "cpu",
        "backend": "openvino",
        "precision": "float32",
        "batch_size": 16,
    }
    assert metadata["tiles_per_second"] > 0


def test_an_untrained_encoder_is_said_wherever_its_results_are_shown(deployment):
    deployment.add("a", "b")
    deployment.run_all()
    for asset in ("features", "clusters"):
        assert "mean nothing" in deployment.metadata(asset, "a")["untrained"]
    assert deployment.metadata("cluster_model")["untrained"] is True
    assert "untrained" not in deployment.metadata("tiles", "a")


def test_the_same_number_is_never_a_text(deployment):
    deployment.drop("a")
    deployment.drop("b", mpp=None)
    deployment.register()
    deployment.run("slides")
    assert deployment.metadata("slides", "a")["mpp"] == pytest.approx(0.5)
    assert "mpp" not in deployment.metadata("slides", "b"), "a text there would break its plot"
    assert "resolution" in deployment.metadata("slides", "b")["mpp_problem"]


def test_the_catalog_tells_of_all_slides_and_of_what_is_not_done(deployment):
    deployment.add("a", "c")
    deployment.drop_broken("b.tiff")
    deployment.register()
    deployment.run_all()
    assert deployment.metadata("catalog")["slides"] == 3
    metadata = deployment.metadata("completeness")
    assert (metadata["slides_failed"], metadata["clusters_done"]) == (1, 2)
    assert metadata["failures"] == {"truncated": 1}
    rows = [record.data for record in metadata["not_done"].records]
    assert ("b", "slides", "failed") in {(r["slide"], r["stage"], r["state"]) for r in rows}


def test_one_bad_annotation_file_does_not_hold_the_cohort_back(deployment):
    deployment.add("a", "b", "c")
    folder = deployment.settings.annotations_folder
    folder.mkdir()
    (folder / "labels.csv").write_text("slide;x;y;label\n")
    deployment.run_all()
    assert deployment.metadata("completeness")["clusters_done"] == 3


# Out of date --------------------------------------------------------------------------------------


def test_other_settings_show_their_stage_as_out_of_date_and_not_those_before(deployment):
    deployment.add("a")
    deployment.run_all()
    assert {stale(deployment, s, "a") for s in ("slides", "tiles", "features", "clusters")} == {
        "FRESH"
    }
    deployment.change(tiling=TilingSettings(tile_px=64, overlap=0))
    assert stale(deployment, "tiles", "a") == "STALE"
    assert stale(deployment, "slides", "a") == "FRESH"
    assert deployment.run("tiles").success
    assert stale(deployment, "tiles", "a") == "FRESH"
    assert stale(deployment, "features", "a") == "STALE"


def test_a_slide_whose_batch_partly_failed_is_shown_as_out_of_date_too(deployment):
    deployment.add("a")
    deployment.drop("b", mpp=None)
    deployment.register()
    deployment.run("slides")
    assert not deployment.run("tiles").success
    assert stale(deployment, "tiles", "a") == "FRESH"
    assert not deployment.run("features").success
    assert stale(deployment, "features", "a") == "FRESH"
    deployment.change(tiling=TilingSettings(tile_px=64, overlap=0))
    assert stale(deployment, "tiles", "a") == "STALE"
    deployment.run("tiles")
    assert stale(deployment, "tiles", "a") == "FRESH"
    assert stale(deployment, "features", "a") == "STALE"


# Other programs' files ----------------------------------------------------------------------------


def test_tiles_made_by_another_program_go_through_all_stages(deployment):
    deployment.add("a", "b")
    folder = deployment.settings.store / "foreign"
    folder.mkdir(parents=True)
    for number in range(4):
        colour = (200, 40 * number, 180)
        Image.new("RGB", (64, 64), colour).save(folder / f"x{number * 64}_y0_w64_h64.jpeg")
    deployment.instance.add_dynamic_partitions("slides", ["foreign"])
    deployment.run_all()
    assert deployment.recorded("clusters") == {"a", "b", "foreign"}
    assert deployment.metadata("clusters", "foreign")["tiles"] == 4
    assert deployment.metadata("catalog")["slides"] == 3


def test_a_range_of_one_slide_runs(deployment):
    deployment.add("a", "b")
    job = deployment.defs.resolve_job_def("describe_slides")
    assert deployment.execute(job, {RANGE_START: "b", RANGE_END: "b"}).success
    assert deployment.recorded("slides") == {"b"}


def test_what_a_run_asks_of_all_slides_does_not_grow_with_its_own(deployment, monkeypatch):
    asked = []
    real = dg.DagsterInstance.get_dynamic_partitions
    monkeypatch.setattr(
        dg.DagsterInstance,
        "get_dynamic_partitions",
        lambda self, partitions_def_name: asked.append(1) or real(self, partitions_def_name),
    )
    ids = deployment.add(*"abcdef")
    counts = []
    for slides in (ids[:2], ids[2:]):
        asked.clear()
        assert deployment.run("slides", slides=slides).success
        counts.append(len(asked))
    assert counts[0] == counts[1]
    assert deployment.metadata("slides", "e")["file"] == "e.tiff"
