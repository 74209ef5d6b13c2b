"""Clusters: a model fitted over the cohort, and each slide's assignment to it.

Flow: `inputs` tells which slides' features can be compared; `fit` streams them (`reading`) through
k-means (`kmeans` on a sample, `engine` for the arithmetic) and gives a `ClusterModel`, numbered
after the one before (`match`); `model` saves it as a version and makes it current; `assign` writes
one slide's ``clusters.parquet``. A new slide is assigned with the current model; a refit is asked
for. `per_slide` clusters one slide by itself.
"""

from histoencoder_core.clusters.assign import assign_slide, clusters_stamp
from histoencoder_core.clusters.inputs import FeatureFile, feature_file, feature_files
from histoencoder_core.clusters.model import (
    ClusterModel,
    current_model,
    load_model,
    model_versions,
    save_model,
)
from histoencoder_core.clusters.per_slide import cluster_slide, slide_clusters_stamp

__all__ = [
    "ClusterModel",
    "FeatureFile",
    "assign_slide",
    "cluster_slide",
    "clusters_stamp",
    "current_model",
    "feature_file",
    "feature_files",
    "load_model",
    "model_versions",
    "save_model",
    "slide_clusters_stamp",
]
