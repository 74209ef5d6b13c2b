"""Clusters: a model fitted over the cohort, and each slide's assignment to it.

Flow: `inputs` tells which slides' features can be compared, `fit` streams them through k-means
and gives a `ClusterModel`, which `model` saves as a version and makes current, `assign` writes one
slide's ``clusters.parquet``. A new slide is assigned with the current model; a refit is asked for.
"""

from histoencoder_core.clusters.assign import assign_slide, clusters_stamp
from histoencoder_core.clusters.fit import ensure_model, fit_clusters
from histoencoder_core.clusters.inputs import FeatureFile, feature_file, feature_files
from histoencoder_core.clusters.model import (
    ClusterModel,
    current_model,
    load_model,
    model_versions,
    save_model,
)

__all__ = [
    "ClusterModel",
    "FeatureFile",
    "assign_slide",
    "clusters_stamp",
    "current_model",
    "ensure_model",
    "feature_file",
    "feature_files",
    "fit_clusters",
    "load_model",
    "model_versions",
    "save_model",
]
