"""Clusters: a model over the cohort, then each slide assigned to it."""

from collections.abc import Iterator

import dagster as dg

from histoencoder_core.clusters import assign_slide, current_model, feature_files
from histoencoder_core.errors import ClusterError
from histoencoder_core.store import layout
from histoencoder_dagster.assets.features import features
from histoencoder_dagster.batches import Metadata, each_slide
from histoencoder_dagster.metadata import result_metadata
from histoencoder_dagster.partitions import slide_partitions
from histoencoder_dagster.resources import Platform


@dg.asset(deps=[features], group_name="cohort", kinds={"pytorch"}, pool="cohort")
def cluster_model(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> dg.MaterializeResult[None]:
    """k-means centroids over the features of all slides, a new version each time it is fitted.

    It is fitted when somebody asks for it, and once by itself when enough slides have features. A
    new slide never makes it due: it would renumber everybody's clusters.
    """
    from histoencoder_core.clusters.fit import ensure_model  # torch takes seconds to import

    store, settings = platform.store, platform.settings
    inputs = feature_files(store, encoder=settings.encoder)
    model, fitted = ensure_model(
        store,
        inputs,
        settings.clusters,
        memory_gb=settings.cluster_memory_gb,
        device=settings.device,
    )
    result = model.stamp.result
    left_out = sorted(set(settings.clusters.n_clusters) - set(result["n_clusters"]))
    if left_out:
        context.log.warning(f"left out K = {left_out}: there are only {result['tiles']} tiles")
    return dg.MaterializeResult(
        metadata={
            "version": model.version,
            "recomputed": fitted,
            "encoder": result["encoder"],
            "untrained": model.untrained,
            "slides": result["slides"],
            "tiles": result["tiles"],
            "n_clusters": dg.MetadataValue.json(result["n_clusters"]),
            "left_out": dg.MetadataValue.json(left_out),
            "seconds": result["seconds"],
            **{f"inertia_k{k}": value for k, value in model.inertia.items()},
        },
        data_version=dg.DataVersion(model.version),
    )


@dg.asset(
    partitions_def=slide_partitions,
    deps=[features, cluster_model],
    group_name="slide",
    kinds={"parquet"},
)
def clusters(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.MaterializeResult[None]]:
    """The cluster of each of the slide's tiles, by the cohort's current model."""
    store = platform.store
    model = current_model(store)
    if model is None:
        raise ClusterError(f"{store.root}: has no cluster model; run the asset 'cluster_model'.")

    def assign(slide_id: str) -> Metadata:
        folder = store.slide(slide_id)
        stamp = assign_slide(folder, model)
        return result_metadata(folder, stamp, layout.THUMBNAIL_CLUSTERS)

    yield from each_slide(context, assign)
