"""One module a stage, named like the core's."""

from histoencoder_dagster.assets.annotations import (
    annotation_accuracy,
    annotations,
    cluster_labels,
)
from histoencoder_dagster.assets.clusters import cluster_model, clusters
from histoencoder_dagster.assets.cohort import (
    catalog,
    cluster_purity,
    cluster_statistics,
    completeness,
)
from histoencoder_dagster.assets.features import features
from histoencoder_dagster.assets.labels import labels
from histoencoder_dagster.assets.report import cohort_report, figures
from histoencoder_dagster.assets.slides import slides
from histoencoder_dagster.assets.tiles import tiles

ALL_ASSETS = (
    slides,
    tiles,
    features,
    cluster_model,
    clusters,
    labels,
    catalog,
    completeness,
    cluster_statistics,
    cluster_purity,
    cluster_labels,
    annotation_accuracy,
    annotations,
    *figures,
    cohort_report,
)

__all__ = [
    "ALL_ASSETS",
    "annotation_accuracy",
    "annotations",
    "catalog",
    "cluster_labels",
    "cluster_model",
    "cluster_purity",
    "cluster_statistics",
    "clusters",
    "cohort_report",
    "completeness",
    "features",
    "figures",
    "labels",
    "slides",
    "tiles",
]
