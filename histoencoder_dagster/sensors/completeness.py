"""Watching for what no asset tells of: slides that failed, wait, or are gone."""

import time

import dagster as dg

from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.slides.arrivals import read_arrivals
from histoencoder_dagster.assets import catalog
from histoencoder_dagster.jobs import refresh_catalog
from histoencoder_dagster.resources import Platform
from histoencoder_dagster.sensors.batches import is_under_way

REFRESH_SECONDS = 900.0
"""Longer than a refresh that follows what was made takes, with the wait for it."""


def new_troubles(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Refresh the catalog when slides failed, arrived or went away, and nothing was made since.

    A failure is no event of an asset, so the catalog would tell of it with the next slide only.
    """
    told = read_arrivals(platform.store)
    for it in told["waiting"]:
        it.pop("reason")  # it changes with each look at a file that grows
    sign = fingerprint(told)
    if sign == context.cursor:
        return dg.SkipReason("no slide failed, arrived or went away since the last refresh")
    if is_under_way(context.instance, refresh_catalog.name):
        return dg.SkipReason("the catalog is being refreshed")
    if _is_due_by_itself(context.instance):
        return dg.SkipReason("the catalog is about to be refreshed: something was made since")
    return dg.SensorResult(run_requests=[dg.RunRequest()], cursor=sign)


def _is_due_by_itself(instance: dg.DagsterInstance) -> bool:
    """Whether something that the catalog is made from was recorded after it, and not long ago."""
    made_from = [dep.asset_key for spec in catalog.specs for dep in spec.deps]
    records = instance.get_asset_records([catalog.key, *made_from])
    last = {
        record.asset_entry.asset_key: materialization
        for record in records
        if (materialization := record.asset_entry.last_materialization_record) is not None
    }
    own = last.pop(catalog.key, None)
    after = [it for it in last.values() if own is None or it.storage_id > own.storage_id]
    # If that is long ago, the refresh failed, or its sensor is stopped.
    return any(time.time() - it.timestamp < REFRESH_SECONDS for it in after)
