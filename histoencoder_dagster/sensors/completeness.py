"""Watching for what no asset tells of: slides that failed, wait, or are gone."""

import dagster as dg

from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.slides.arrivals import read_arrivals
from histoencoder_dagster.jobs import refresh_catalog
from histoencoder_dagster.partitions import SLIDES
from histoencoder_dagster.resources import Platform
from histoencoder_dagster.sensors.batches import InFlight


def new_troubles(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Refresh the catalog when slides failed, arrived or went away, and nothing else was made.

    A failure is no event of an asset, so the catalog would tell of it with the next slide only.
    """
    told = read_arrivals(platform.store)
    for it in told["waiting"]:
        it.pop("reason")  # it changes with each look at a file that grows
    sign = fingerprint(told)
    if sign == context.cursor:
        return dg.SkipReason("no slide failed, arrived or went away since the last refresh")
    order = context.instance.get_dynamic_partitions(SLIDES)
    if InFlight.of(context.instance, refresh_catalog.name, order).runs:
        return dg.SkipReason("the catalog is being refreshed")
    return dg.SensorResult(run_requests=[dg.RunRequest()], cursor=sign)
