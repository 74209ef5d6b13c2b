"""Watching for enough slides to fit clusters on."""

import dagster as dg

from histoencoder_core.clusters import current_model
from histoencoder_dagster.assets import cluster_model
from histoencoder_dagster.resources import Platform


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
    ready = sum(store.slide(s).record("features").exists() for s in store.slide_ids())
    if ready < needed:
        return dg.SkipReason(f"{ready} of {needed} slides have features")
    # A run that failed is tried again when more slides have features.
    return dg.SensorResult(run_requests=[dg.RunRequest(run_key=f"first-model-{ready}")])
