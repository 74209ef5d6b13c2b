"""What the platform watches: for each subject a module.

``slides`` and ``annotations`` watch what comes from outside, ``stages`` lets each slide's stages
follow each other, ``completeness`` watches for what failed or is gone, ``clusters`` asks for the
first model. They ask for runs in batches as ``batches`` allows. The cohort's assets follow by
automation conditions.
"""

from typing import TypedDict

import dagster as dg

from histoencoder_core.settings import PlatformSettings
from histoencoder_dagster.jobs import (
    describe_slides,
    fit_clusters,
    label_slides,
    name_clusters,
    refresh_catalog,
    work_up_slides,
)
from histoencoder_dagster.sensors.annotations import edited_cluster_labels, new_annotations
from histoencoder_dagster.sensors.clusters import first_cluster_model
from histoencoder_dagster.sensors.completeness import new_troubles
from histoencoder_dagster.sensors.slides import new_slides
from histoencoder_dagster.sensors.stages import next_stages


class _Watching(TypedDict):
    minimum_interval_seconds: int
    default_status: dg.DefaultSensorStatus


def platform_sensors(settings: PlatformSettings) -> list[dg.SensorDefinition]:
    """The sensors of one deployment; all are on from the start."""
    watching: _Watching = {
        "minimum_interval_seconds": settings.tick_seconds,
        "default_status": dg.DefaultSensorStatus.RUNNING,
    }
    return [
        dg.sensor(job=describe_slides, **watching)(new_slides),
        dg.sensor(job=work_up_slides, **watching)(next_stages),
        dg.sensor(job=label_slides, **watching)(new_annotations),
        dg.sensor(job=fit_clusters, **watching)(first_cluster_model),
        dg.sensor(job=name_clusters, **watching)(edited_cluster_labels),
        dg.sensor(
            job=refresh_catalog,
            minimum_interval_seconds=4 * settings.tick_seconds,
            default_status=dg.DefaultSensorStatus.RUNNING,
        )(new_troubles),
        # Each refresh is a process and a pass over all slides, so there are fewer of them.
        dg.AutomationConditionSensorDefinition(
            "cohort_follows_slides",
            target=dg.AssetSelection.groups("cohort").without_checks()
            | dg.AssetSelection.all_asset_checks(),
            description="Refreshes catalog, purity and checks after any slide's stage.",
            minimum_interval_seconds=4 * settings.tick_seconds,
            default_status=dg.DefaultSensorStatus.RUNNING,
        ),
        # A figure that can't be drawn must not hold back the catalog.
        dg.AutomationConditionSensorDefinition(
            "report_follows_cohort",
            target=dg.AssetSelection.groups("report").without_checks(),
            description="Draws the report once as soon as it can be, then at night if need be.",
            minimum_interval_seconds=4 * settings.tick_seconds,
            default_status=dg.DefaultSensorStatus.RUNNING,
        ),
    ]
