"""Watching for enough slides to fit clusters on."""

import json
import time

import dagster as dg

from histoencoder_core.clusters import current_model
from histoencoder_core.store.failures import LONGEST_WAIT, wait_after
from histoencoder_dagster.assets import cluster_model
from histoencoder_dagster.jobs import fit_clusters
from histoencoder_dagster.resources import Platform
from histoencoder_dagster.sensors.batches import is_under_way


def first_cluster_model(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Fit the cohort's first cluster model once enough slides have features; never a later one.

    A model that was fitted without Dagster is taken as it is.
    """
    if context.instance.get_latest_materialization_event(cluster_model.key) is not None:
        return dg.SkipReason("there is a cluster model; refitting is asked for by hand")
    store, needed = platform.store, platform.settings.first_fit_slides
    model = current_model(store)
    if model is not None:
        found = dg.AssetMaterialization(
            cluster_model.key,
            description="Found in the store, fitted without Dagster.",
            metadata={"version": model.version, "untrained": model.untrained},
        )
        return dg.SensorResult(asset_events=[found])
    if is_under_way(context.instance, fit_clusters.name):
        return dg.SkipReason("a cluster model is being fitted")
    ready = sum(store.slide(s).record("features").exists() for s in store.slide_ids())
    if ready < needed:
        return dg.SkipReason(f"{ready} of {needed} slides have features")
    # A run that failed or was killed is tried again, ever more rarely.
    requests, not_before = json.loads(context.cursor) if context.cursor else (0, 0)
    now = time.time()
    if now < not_before <= now + LONGEST_WAIT:
        return dg.SkipReason("the last fit did not succeed; it is tried again later")
    cursor = json.dumps([requests + 1, int(now + wait_after(requests + 1))])
    return dg.SensorResult(run_requests=[dg.RunRequest()], cursor=cursor)
