"""Forgetting a slide in Dagster's records, in a home of its own with all that a platform leaves."""

import json
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.remote_origin import (
    InProcessCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    SensorInstigatorData,
    TickData,
    TickStatus,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._daemon.asset_daemon import asset_daemon_cursor_to_instigator_serialized_cursor
from searching import found_in

from histoencoder_core.errors import HistoEncoderError
from histoencoder_dagster.forget import forget_in_dagster, found_in_dagster
from histoencoder_dagster.partitions import PARTITION, RANGE_END, RANGE_START, SLIDES

GONE = "tiles"
"""Also the name of an asset, a step and a folder: only the slide of that name must go."""


@pytest.fixture
def platform(kept_deployment):
    """Three slides and a broken one through every stage, in batches, and one alone."""
    deployment = kept_deployment
    deployment.drop("zz-one", GONE, "zz-two")
    deployment.drop_broken("zz-broken.tiff")
    deployment.register()
    deployment.run_all()
    deployment.run("slides", slides=[GONE])
    run_loudly(deployment, "slides", partition_key=GONE)
    leave_sensor_state(deployment)
    return deployment


def run_loudly(deployment, asset, **how):
    """Run an asset with the log lines that `deployment.run` keeps away."""
    deployment.defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=deployment.instance,
        asset_selection=[dg.AssetKey(asset)],
        raise_on_error=False,
        **how,
    )


def leave_sensor_state(deployment, slide_id=GONE):
    """What the daemon keeps: cursors, ticks and a backfill."""
    instance = deployment.instance
    result = dg.evaluate_automation_conditions(defs=deployment.defs, instance=instance)
    cursors = {
        "automation": asset_daemon_cursor_to_instigator_serialized_cursor(result.cursor),
        "new_slides": json.dumps({slide_id: ["abc", 1, 0], "zz-one": ["abc", 1, 0]}),
    }
    location = InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="platform"))
    for name, cursor in cursors.items():
        origin = RemoteInstigatorOrigin(RemoteRepositoryOrigin(location, "__repository__"), name)
        state = InstigatorState(
            origin,
            InstigatorType.SENSOR,
            InstigatorStatus.RUNNING,
            SensorInstigatorData(cursor=cursor),
        )
        instance.add_instigator_state(state)
        instance.create_tick(
            TickData(
                instigator_origin_id=origin.get_id(),
                instigator_name=name,
                instigator_type=InstigatorType.SENSOR,
                status=TickStatus.SUCCESS,
                run_ids=[],
                timestamp=1.0,
                cursor=cursor,
                selector_id=origin.get_selector().get_id(),
            )
        )
    backfill = PartitionBackfill(
        "b" * 8,
        status=BulkActionStatus.COMPLETED_SUCCESS,
        from_failure=False,
        tags={},
        backfill_timestamp=1.0,
        asset_selection=[dg.AssetKey("tiles")],
        partition_names=[slide_id, "zz-one"],
    )
    instance.add_backfill(backfill)


def cursors(instance):
    states = instance.all_instigator_state()
    return {s.instigator_name: s.instigator_data.cursor for s in states}


def test_the_platform_goes_on_without_the_slide(platform):
    instance = platform.instance
    before = {
        asset: platform.recorded(asset) for asset in ("slides", "tiles", "features", "clusters")
    }
    assert before["tiles"] == {"zz-one", GONE, "zz-two"}
    slide = [GONE], [str(platform.settings.slides[0] / f"{GONE}.tiff"), f"{GONE}.tiff"]
    assert found_in_dagster(instance, *slide)["partitions"] == 1
    told = forget_in_dagster(instance, *slide)
    assert {what for what, count in told.items() if count} >= {
        "runs", "events", "partitions", "ticks and cursors",
    }  # fmt: skip
    # The asset of that name is still known, and so are its other partitions.
    for asset, slides in before.items():
        assert platform.recorded(asset) == slides - {GONE}
    assert GONE not in platform.partitions()
    assert not any(forget_in_dagster(instance, *slide).values())
    # Runs are read back by Dagster, and begin with a slide that is still there.
    for run in instance.get_runs():
        assert GONE not in run.tags.values()
        assert run.tags.get(RANGE_START, "zz-broken") == "zz-broken"
        assert instance.all_logs(run.run_id)
    kept = cursors(instance)
    assert json.loads(kept["new_slides"]) == {"zz-one": ["abc", 1, 0]}
    # The platform goes on from there, and asks for nothing that is done.
    assert platform.run("tiles").success is False  # the broken slide
    assert platform.recorded("tiles") == {"zz-one", "zz-two"}


def test_no_byte_of_the_home_holds_the_slide(kept_deployment, home):
    """With a name that means nothing else, so that every byte can be searched."""
    name, deployment = "zz-secret", kept_deployment
    deployment.drop("zz-one", "zz-two")
    broken = deployment.drop_broken(f"{name}.tiff")
    order = deployment.register()
    run_loudly(deployment, "slides", tags={RANGE_START: order[0], RANGE_END: order[-1]})
    run_loudly(deployment, "catalog")
    leave_sensor_state(deployment, name)
    places = found_in(home, [name])
    assert {Path(place).suffix for place in places} == {".db", ".err"}
    assert len(places) > 4
    forget_in_dagster(deployment.instance, [name], [str(broken)])
    assert found_in(home, [name]) == {}
    assert found_in(home, ["zz-one"])


@pytest.mark.parametrize("tags", [{PARTITION: "b"}, {RANGE_START: "a", RANGE_END: "c"}, {}])
def test_a_slide_at_work_is_not_forgotten(home, tags):
    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.add_dynamic_partitions(SLIDES, ["a", "b", "c", "d"])
        run = instance.create_run_for_job(
            dg.job(name="j")(lambda: None), tags=tags, status=dg.DagsterRunStatus.STARTED
        )
        with pytest.raises(HistoEncoderError, match=run.run_id):
            forget_in_dagster(instance, ["b"])
        assert instance.get_dynamic_partitions(SLIDES) == ["a", "b", "c", "d"]
        if tags:  # a run of others is no obstacle
            assert forget_in_dagster(instance, ["d"])["partitions"] == 1
