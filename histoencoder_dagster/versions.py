"""Letting the UI show what is out of date: code versions that follow settings.

A change of settings, or of a stage's algorithm, changes the stage's code version, and Dagster shows
its partitions as stale. Nothing is computed by that alone: a deployment must not re-encode an
archive on its own.
"""

from collections.abc import Iterable

import dagster as dg

from histoencoder_core.annotate import evaluation as evaluation_stage
from histoencoder_core.clusters import assign as clusters_stage
from histoencoder_core.clusters import model as cluster_model_stage
from histoencoder_core.clusters import naming
from histoencoder_core.cohort import statistics as statistics_stage
from histoencoder_core.labels import assign as labels_stage
from histoencoder_core.report import FIGURE_ALGORITHM, FIGURES, PAGE_ALGORITHM
from histoencoder_core.settings import PlatformSettings
from histoencoder_core.slides import describe as slides_stage
from histoencoder_core.store import layout
from histoencoder_core.tiles import cut as tiles_stage


def code_versions(settings: PlatformSettings) -> dict[str, str]:
    """The code version of each asset: its algorithm, and the settings that bear on it."""
    return {
        "slides": f"{slides_stage.ALGORITHM}",
        "tiles": f"{tiles_stage.ALGORITHM}-{settings.tiling.fingerprint[:8]}",
        "features": f"{layout.FEATURES_ALGORITHM}-{settings.encoder.fingerprint[:8]}",
        "cluster_model": f"{cluster_model_stage.ALGORITHM}-{settings.clusters.fingerprint[:8]}",
        "clusters": f"{clusters_stage.ALGORITHM}",
        "labels": f"{labels_stage.ALGORITHM}-{settings.labels.fingerprint[:8]}",
        "catalog": "3",
        "completeness": "1",
        "cluster_statistics": f"{statistics_stage.ALGORITHM}",
        "cluster_purity": "2",
        "cluster_labels": f"1-{settings.annotate.fingerprint[:8]}",
        "annotation_accuracy": f"{evaluation_stage.ALGORITHM}-{settings.annotate.fingerprint[:8]}",
        "annotations": f"{naming.ANNOTATIONS_ALGORITHM}",
        **dict.fromkeys(FIGURES, f"{FIGURE_ALGORITHM}"),
        "cohort_report": f"{PAGE_ALGORITHM}",
    }


def with_settings(
    assets: Iterable[dg.AssetsDefinition], settings: PlatformSettings
) -> list[dg.AssetsDefinition]:
    """Give assets what depends on the deployment: code versions, and slides per run.

    Args:
        assets: The platform's assets.
        settings: The deployment's.

    Returns:
        The same assets, in the same order.
    """
    versions = code_versions(settings)
    batches = dg.BackfillPolicy.multi_run(max_partitions_per_run=settings.slides_per_run)
    configured: list[dg.AssetsDefinition] = []
    for asset in assets:
        if asset.partitions_def is not None:
            asset = asset.with_attributes(backfill_policy=batches)
        configured += dg.map_asset_specs(
            lambda spec: spec.replace_attributes(code_version=versions[spec.key.to_user_string()]),
            [asset],
        )
    return configured
