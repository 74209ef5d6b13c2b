"""What a person or a sensor may ask for by name."""

import dagster as dg

from histoencoder_dagster.assets import (
    annotation_accuracy,
    annotations,
    catalog,
    cluster_labels,
    cluster_model,
    cluster_purity,
    cluster_statistics,
    clusters,
    completeness,
    features,
    labels,
    slides,
    tiles,
)

WORK = "histoencoder/work"
"""Tag by which `deploy/dagster.yaml` bounds how many runs of a kind are executed at once."""

describe_slides = dg.define_asset_job(
    "describe_slides",
    selection=dg.AssetSelection.assets(slides).without_checks(),
    description="Open newly scanned slides. The stages after it follow by themselves.",
    tags={WORK: "new"},
)

label_slides = dg.define_asset_job(
    "label_slides",
    selection=dg.AssetSelection.assets(labels).without_checks(),
    description="Turn new annotations into labels of tiles.",
)

work_up_slides = dg.define_asset_job(
    "work_up_slides",
    selection=dg.AssetSelection.assets(tiles, features, clusters, annotations).without_checks(),
    description="Take described slides through the stages that follow. Before there is a cluster "
    "model, with labels, choose fewer.",
    tags={WORK: "slides"},
)

fit_clusters = dg.define_asset_job(
    "fit_clusters",
    selection=dg.AssetSelection.assets(cluster_model).without_checks(),
    description="Fit a new cluster model over all slides. Their clusters are assigned anew.",
    tags={WORK: "cohort"},
)

refresh_catalog = dg.define_asset_job(
    "refresh_catalog",
    selection=dg.AssetSelection.assets(
        catalog, completeness, cluster_statistics, cluster_purity
    ).without_checks(),
    description="Bring the DuckDB catalog and its statistics up to date now.",
    tags={WORK: "cohort"},
)

name_clusters = dg.define_asset_job(
    "name_clusters",
    selection=dg.AssetSelection.assets(cluster_labels, annotation_accuracy).without_checks(),
    description="Look again at what clusters mean. Slides are annotated anew if that has changed.",
    tags={WORK: "cohort"},
)

make_report = dg.define_asset_job(
    "make_report",
    selection=dg.AssetSelection.groups("report").without_checks(),
    description="Draw all figures of the cohort and write the report now, not at night.",
)

ALL_JOBS = (
    describe_slides,
    work_up_slides,
    label_slides,
    fit_clusters,
    refresh_catalog,
    name_clusters,
    make_report,
)
