"""One module a stage, named like the core's."""

from histoencoder_dagster.assets.clusters import cluster_model, clusters
from histoencoder_dagster.assets.cohort import catalog, cluster_purity
from histoencoder_dagster.assets.features import features
from histoencoder_dagster.assets.labels import labels
from histoencoder_dagster.assets.slides import slides
from histoencoder_dagster.assets.tiles import tiles

ALL_ASSETS = (slides, tiles, features, cluster_model, clusters, labels, catalog, cluster_purity)

__all__ = [
    "ALL_ASSETS",
    "catalog",
    "cluster_model",
    "cluster_purity",
    "clusters",
    "features",
    "labels",
    "slides",
    "tiles",
]
