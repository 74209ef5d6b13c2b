"""Bringing back copies of the store and of DAGSTER_HOME, as docs/operations.md tells."""

import shutil

import dagster as dg
import pytest

STAGES = ("slides", "tiles", "features", "clusters")


def restored(deployment, home, backup, *, without=()):
    """The deployment after a disk was lost and the copies were put in its place."""
    store = deployment.settings.store
    for path in (store, home):
        shutil.rmtree(path)
        shutil.copytree(backup / path.name, path)
    for slide_id in without:
        shutil.rmtree(store / slide_id)
    deployment.instance = dg.DagsterInstance.from_config(str(home))
    deployment.cursors.clear()  # at worst the sensors begin anew
    return deployment


@pytest.fixture
def backed_up(kept_deployment, home, tmp_path):
    """A platform with three slides done, of which copies were taken, the home's first."""
    kept_deployment.add("a", "b", "c")
    kept_deployment.run_all()
    for path in (home, kept_deployment.settings.store):
        shutil.copytree(path, tmp_path / "backup" / path.name)
    return kept_deployment


def asked_for(deployment):
    """Which slides any sensor asks for, over more ticks than there are stages."""
    asked = {}
    for _ in range(len(STAGES) + 2):
        result = deployment.tick("new_slides")
        if isinstance(result, dg.SensorResult) and result.run_requests:
            asked["slides"] = len(result.run_requests)
            deployment.run_requests(result, "describe_slides")
        due = deployment.due_stages()
        asked |= due
        deployment.run_due(due)
    return asked


def test_nothing_is_computed_anew_from_a_backup(backed_up, home, tmp_path):
    before = {asset: backed_up.recorded(asset) for asset in STAGES}
    deployment = restored(backed_up, home, tmp_path / "backup")
    with deployment.instance:
        assert {asset: deployment.recorded(asset) for asset in STAGES} == before
        assert asked_for(deployment) == {}
        for stage in STAGES:  # also not if somebody asks for it
            assert deployment.run(stage).success
            for slide_id in ("a", "b", "c"):
                assert deployment.metadata(stage, slide_id)["recomputed"] is False
        model = deployment.metadata("cluster_model")["version"]
        assert deployment.run("cluster_model").success
        assert deployment.metadata("cluster_model")["version"] == model
        assert deployment.run("catalog", "completeness").success
        assert deployment.metadata("completeness")["clusters_done"] == 3


def test_a_slide_that_came_after_the_backup_of_the_store_is_computed(backed_up, home, tmp_path):
    """Dagster's records are newer than the store: what it takes for done is not there."""
    deployment = restored(backed_up, home, tmp_path / "backup", without=["b"])
    with deployment.instance:
        assert deployment.recorded("clusters") == {"a", "b", "c"}
        asked = asked_for(deployment)
        assert asked["slides"] == 1
        assert {stage: asked[stage] for stage in STAGES[1:]} == {s: {"b"} for s in STAGES[1:]}
        assert deployment.folder("b").stamp("clusters") is not None


def test_without_a_backup_of_the_home_nothing_is_computed_either(backed_up, home, tmp_path):
    deployment = restored(backed_up, home, tmp_path / "backup")
    deployment.instance.dispose()
    for path in home.iterdir():
        if path.name != "dagster.yaml":
            shutil.rmtree(path)
    with dg.DagsterInstance.from_config(str(home)) as deployment.instance:
        asked_for(deployment)
        for stage in ("slides", "tiles"):
            assert deployment.recorded(stage) == {"a", "b", "c"}
            assert deployment.metadata(stage, "a")["recomputed"] is False
