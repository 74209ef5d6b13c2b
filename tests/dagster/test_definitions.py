"""What Dagster is told: assets, engines' tags, and the files a deployment is started with."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from dagster_k8s.job import get_user_defined_k8s_config

from histoencoder_core.settings import (
    ClusterSettings,
    EncoderSettings,
    LabelSettings,
    TilingSettings,
)

REPOSITORY = Path(__file__).parents[2]

FIGURES = (
    "purity_curve",
    "heat_map",
    "montages",
    "overlays",
    "composition",
    "umap_by_label",
    "umap_by_cluster",
    "umap_by_slide",
)

# By name: what it depends on, its group, its pool, whether it is partitioned.
ASSETS = {
    "slides": ([], "slide", None, True),
    "tiles": (["slides"], "slide", None, True),
    "features": (["tiles"], "slide", "gpu", True),
    "cluster_model": (["features"], "cohort", "cohort", False),
    "clusters": (["cluster_model", "features"], "slide", None, True),
    "labels": (["tiles"], "slide", None, True),
    "catalog": (
        ["clusters", "features", "labels", "slides", "tiles"],
        "cohort",
        "cohort",
        False,
    ),
    "completeness": (["catalog"], "cohort", "cohort", False),
    "cluster_statistics": (["catalog"], "cohort", "cohort", False),
    "cluster_purity": (["catalog", "cluster_statistics"], "cohort", None, False),
    "cluster_labels": (["catalog"], "cohort", "cohort", False),
    "annotation_accuracy": (["catalog"], "cohort", "cohort", False),
    "annotations": (["cluster_labels", "clusters"], "slide", None, True),
    **{name: (["cluster_purity"], "report", None, False) for name in FIGURES},
    "cohort_report": (["annotation_accuracy", "cluster_purity"], "report", "cohort", False),
}
"""Of each asset: what it is made from, its group, its pool, and whether slides are partitions."""

CHECKS = {
    "tissue_found": "tiles",
    "features_finite": "features",
    "feature_rows_equal_tile_rows": "features",
    "clusters_cover_every_tile": "clusters",
    "slides_are_like_the_training_slides": "clusters",
}

SENSORS = {
    "new_slides",
    "new_annotations",
    "first_cluster_model",
    "edited_cluster_labels",
    "next_stages",
    "new_troubles",
    "cohort_follows_slides",
    "report_follows_cohort",
}


def specs(deployment):
    graph = deployment.defs.resolve_asset_graph()
    return {key.path[-1]: graph.get(key) for key in graph.get_all_asset_keys()}


def test_the_assets_are_these(deployment):
    assert {
        name: (
            sorted(parent.path[-1] for parent in node.parent_keys),
            node.group_name,
            next(iter(node.pools or []), None),
            node.partitions_def is not None,
        )
        for name, node in specs(deployment).items()
    } == ASSETS
    assert {
        node.partitions_def.name for node in specs(deployment).values() if node.partitions_def
    } == {"slides"}


def test_checks_sensors_and_jobs_are_these(deployment):
    keys = [key for check in deployment.defs.asset_checks for key in check.check_keys]
    assert {key.name: key.asset_key.path[-1] for key in keys} == CHECKS
    sensors = deployment.defs.sensors
    assert {sensor.name for sensor in sensors} == SENSORS
    assert all(sensor.default_status is dg.DefaultSensorStatus.RUNNING for sensor in sensors)
    assert {job.name for job in deployment.defs.jobs} == {
        "describe_slides",
        "work_up_slides",
        "label_slides",
        "fit_clusters",
        "refresh_catalog",
        "name_clusters",
        "make_report",
    }


def test_batches_and_ticks_are_as_long_as_the_deployment_says(deployment):
    deployment.change(slides_per_run=7, tick_seconds=40)
    for name, node in specs(deployment).items():
        if ASSETS[name][-1]:
            policy = node.backfill_policy
            assert (name, policy.max_partitions_per_run) == (name, 7)
    ticks = {sensor.name: sensor.minimum_interval_seconds for sensor in deployment.defs.sensors}
    rarely = ("cohort_follows_slides", "report_follows_cohort", "new_troubles")
    assert {ticks.pop(name) for name in rarely} == {160}
    assert set(ticks.values()) == {40}


def test_runs_are_one_process_unless_a_deployment_chooses_otherwise(deployment):
    assert deployment.defs.executor is dg.in_process_executor


def test_features_ask_every_engine_for_one_gpu(deployment):
    (features,) = [a for a in deployment.defs.assets if a.key == dg.AssetKey("features")]
    tags = features.op.tags
    config = get_user_defined_k8s_config(tags)  # refuses a key that Kubernetes does not know
    assert config.container_config["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert config.pod_spec_config["tolerations"][0]["key"] == "nvidia.com/gpu"
    shared = [mount["name"] for mount in config.container_config["volume_mounts"]]
    assert shared == [volume["name"] for volume in config.pod_spec_config["volumes"]]
    assert tags["dagster-celery/queue"] == "gpu"
    assert '"num_gpus": 1' in tags["dagster-ray/config"]
    for asset in deployment.defs.assets:
        assert asset is features or not any("config" in tag for tag in asset.op.tags)


def test_each_setting_changes_the_code_version_of_the_stage_it_bears_on(deployment):
    def versions():
        return {name: node.code_version for name, node in specs(deployment).items()}

    before = versions()
    for setting, value, asset in (
        ("tiling", TilingSettings(mpp=1.0), "tiles"),
        ("encoder", EncoderSettings(), "features"),
        ("clusters", ClusterSettings(), "cluster_model"),
        ("labels", LabelSettings(min_share=0.7), "labels"),
    ):
        original = getattr(deployment.settings, setting)
        deployment.change(**{setting: value})
        after = versions()
        assert {name for name in after if after[name] != before[name]} == {asset}
        deployment.change(**{setting: original})
    deployment.change(slides_per_run=3, device="cpu", batch_size=99, tick_seconds=2)
    assert versions() == before


def test_the_instance_config_makes_an_instance(tmp_path):
    (tmp_path / "dagster.yaml").write_text((REPOSITORY / "deploy" / "dagster.yaml").read_text())
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
        assert instance.run_monitoring_enabled
        assert instance.run_monitoring_max_runtime_seconds > 0
        concurrency = instance.get_concurrency_config()
        pools = concurrency.pool_config
        assert (pools.default_pool_limit, pools.pool_granularity.value) == (1, "op")
        # Else a run that begins with a pool's step is not begun while others wait for the pool.
        most_runs = concurrency.run_queue_config.max_concurrent_runs
        assert pools.op_granularity_run_buffer >= most_runs
        assert instance.run_retries_enabled
        assert not instance.run_retries_retry_on_asset_or_op_failure
        assert "QueuedRunCoordinator" in type(instance.run_coordinator).__name__


@pytest.mark.slow
def test_the_command_line_tools_of_dagster_accept_the_project():
    for command in (
        ["dg", "check", "defs"],
        ["dagster", "definitions", "validate", "-w", "workspace.yaml"],
    ):
        tool = Path(sys.executable).with_name(command[0])
        done = subprocess.run(
            [tool, *command[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_platforms_code_is_loaded_without_the_encoders_libraries():
    """Else code server and web server would hold them, and runs that are not forked wait."""
    told = subprocess.run(
        [sys.executable, "-c", "import sys, histoencoder_dagster.definitions; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {"torch", "timm", "sklearn", "histoprep", "matplotlib"}.isdisjoint(told.stdout.split())
