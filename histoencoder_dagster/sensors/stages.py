"""Stages that follow each other: each slide's next stage, once the one before is new.

Dagster's automation conditions are not used between the stages of a slide. They ask for all slides
at once, as a backfill, however many that are; they forget an update that comes while their target
runs, and they know of no second try. Here a stage is owed for as long as one that it is made from
was recorded after it, whatever was asked for in between.
"""

import json
import time
from collections.abc import Mapping

import dagster as dg
from dagster import DagsterEventType

from histoencoder_core.store.layout import Stage
from histoencoder_dagster.jobs import STAGE_JOBS
from histoencoder_dagster.partitions import SLIDES
from histoencoder_dagster.resources import Platform
from histoencoder_dagster.sensors.batches import (
    Attempts,
    InFlight,
    next_batches,
    read_cursor,
    request,
)

FOLLOWS: dict[Stage, tuple[Stage, str | None]] = {
    "tiles": ("slides", None),
    "features": ("tiles", None),
    "clusters": ("features", "cluster_model"),
    "annotations": ("clusters", "cluster_labels"),
}
"""The stage of the slide, and the asset of the cohort, that a stage is made from."""


def next_stages(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Run each stage on the slides whose stage before is new, in batches.

    A slide that failed is asked for again if its stage before is made anew, or after some time if
    what it failed for may pass by itself, such as a full disk.
    """
    settings, instance, store = platform.settings, context.instance, platform.store
    now = time.time()
    order = instance.get_dynamic_partitions(SLIDES)
    cursor = read_cursor(context.cursor)
    recorded = {stage: _recorded(instance, stage) for stage in ("slides", *FOLLOWS)}
    told: dict[str, object] = {}
    requests: list[dg.RunRequest] = []
    for stage, (before, of_cohort) in FOLLOWS.items():
        job = STAGE_JOBS[stage].name
        attempts = Attempts(cursor.get(stage, {}))
        in_flight = InFlight.of(instance, job, order)
        since = 0 if of_cohort is None else _newest(instance, of_cohort)
        owed: dict[str, str] = {}
        if since is not None:
            there = {s: recorded[before][s] for s in order if s in recorded[before]}
            owed = _owed(there, recorded[stage], attempts, since)
        batches = next_batches(
            owed,
            attempts,
            order=order,
            recorded=recorded[stage],
            in_flight=in_flight,
            failure=lambda slide_id, stage=stage: store.slide(slide_id).failures().get(stage),  # type: ignore[misc]
            most_runs=settings.runs_in_flight,
            size=settings.slides_per_run,
            now=now,
            newest_first=settings.newest_first,
        )
        attempts.keep({*owed, *in_flight.slides})
        told[stage] = attempts.told()
        requests += [request(batch, job_name=job) for batch in batches]
    if not requests:
        context.update_cursor(json.dumps(told))
        return dg.SkipReason("nothing is owed that is not under way or waiting for another try")
    return dg.SensorResult(run_requests=requests, cursor=json.dumps(told))


def _recorded(instance: dg.DagsterInstance, stage: str) -> Mapping[str, int]:
    """Number of each slide's last record of a stage; a later one is larger."""
    return instance.get_latest_storage_id_by_partition(
        dg.AssetKey(stage), DagsterEventType.ASSET_MATERIALIZATION
    )


def _newest(instance: dg.DagsterInstance, asset: str) -> int | None:
    """Number of the last record of an asset without partitions; None if there is none."""
    [*records] = instance.get_asset_records([dg.AssetKey(asset)])
    last = records[0].asset_entry.last_materialization_record if records else None
    return None if last is None else last.storage_id


def _owed(
    before: Mapping[str, int], made: Mapping[str, int], attempts: Attempts, since: int
) -> dict[str, str]:
    """Slides of which a stage is owed, with what it would be made from."""
    owed = {}
    for slide_id, record in before.items():
        source = max(record, since)
        if made.get(slide_id, 0) < source or attempts.is_outdated(slide_id, str(source)):
            owed[slide_id] = str(source)
    return owed
