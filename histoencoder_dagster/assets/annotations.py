"""Annotations: what clusters mean, written onto slides for QuPath."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pyarrow as pa

from histoencoder_core.annotate import (
    annotate_slide,
    derive_labels,
    ensure_evaluation,
    read_evaluation,
)
from histoencoder_core.clusters import current_model
from histoencoder_core.clusters.naming import ClusterLabels, current_cluster_labels
from histoencoder_core.errors import ClusterError
from histoencoder_core.store import layout
from histoencoder_dagster.assets.clusters import clusters
from histoencoder_dagster.assets.cohort import catalog
from histoencoder_dagster.automation import WITH_ITS_INPUTS
from histoencoder_dagster.batches import Metadata, each_slide
from histoencoder_dagster.metadata import result_metadata, table_metadata
from histoencoder_dagster.partitions import slide_partitions
from histoencoder_dagster.resources import Platform


@dg.asset(
    deps=[catalog],
    group_name="cohort",
    kinds={"csv"},
    automation_condition=WITH_ITS_INPUTS,
    output_required=False,
    pool="cohort",
)
def cluster_labels(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.MaterializeResult[None]]:
    """What each cluster means: the label of its labelled tiles, if they are pure enough.

    A pathologist's ``cluster_labels.csv`` in the store wins. It is derived whenever the catalog is
    new, but is itself new only if a cluster means something else than before: then all slides are
    annotated anew.
    """
    store, settings = platform.store, platform.settings.annotate
    if current_model(store) is None:
        context.log.info("there is no cluster model yet")
        return
    derived = derive_labels(store, settings)
    labels = current_cluster_labels(store, settings)
    if labels is None or not labels.names:
        context.log.info("no cluster has a label yet, so no slide can be annotated")
        return
    if labels.fingerprint == _fingerprint_before(context):
        context.log.info("clusters mean what they meant before")
        return
    named = [label for label in labels.labels.values() if label is not None]
    yield dg.MaterializeResult(
        metadata={
            "model": labels.model,
            "k": labels.k,
            "source": labels.source,
            "clusters_with_a_label": len(named),
            "clusters_that_abstain": labels.k - len(named),
            "clusters": table_metadata(pa.Table.from_pylist([vars(row) for row in derived])),
            "fingerprint": labels.fingerprint,
        },
        data_version=dg.DataVersion(labels.fingerprint),
    )


@dg.asset(
    deps=[catalog],
    group_name="cohort",
    kinds={"pytorch"},
    automation_condition=WITH_ITS_INPUTS,
    output_required=False,
    pool="cohort",
)
def annotation_accuracy(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.MaterializeResult[None]]:
    """How often annotation by cluster is right, on slides that neither made nor named the clusters.

    Measured anew if labels changed, or the features that the current cluster model saw.
    """
    settings = platform.settings
    if current_model(platform.store) is None:
        context.log.info("there is no cluster model yet")
        return
    evaluation, measured_now = ensure_evaluation(
        platform.store,
        settings.annotate,
        memory_gb=settings.cluster_memory_gb,
        device=settings.device,
    )
    yield dg.MaterializeResult(
        metadata={
            "model": evaluation["model"],
            "k": evaluation["k"],
            "untrained": evaluation["untrained"],
            "recomputed": measured_now,
            "split_by": evaluation["split_by"],
            **_measured(evaluation),
            "classes": _classes(evaluation),
        }
    )


@dg.asset(
    partitions_def=slide_partitions,
    deps=[clusters, cluster_labels],
    group_name="slide",
    kinds={"geojson"},
)
def annotations(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.MaterializeResult[None]]:
    """The slide's tissue by what its clusters mean, as GeoJSON that QuPath opens.

    Tiles whose cluster abstains are left out. ``accuracy_held_out`` and the numbers beside it tell
    how often such annotations are right over the cohort; see the asset ``annotation_accuracy``.
    """
    store = platform.store
    labels = current_cluster_labels(store, platform.settings.annotate)
    if labels is None:
        raise ClusterError(
            f"{store.root}: what clusters mean is not known yet; run the asset 'cluster_labels'."
        )
    of_cohort = _of_cohort(read_evaluation(store), labels)

    def annotate(slide_id: str) -> Metadata:
        folder = store.slide(slide_id)
        stamp = annotate_slide(folder, labels)
        path = folder.file(layout.ANNOTATIONS_GEOJSON)
        return {
            **result_metadata(folder, stamp, layout.THUMBNAIL_ANNOTATIONS),
            "geojson": dg.MetadataValue.path(str(path)),
            "labels": dg.MetadataValue.json(stamp.result["labels"]),
            **of_cohort,
        }

    yield from each_slide(context, annotate)


def _fingerprint_before(context: dg.AssetExecutionContext) -> str | None:
    """What the clusters meant when they were last told of."""
    event = context.instance.get_latest_materialization_event(context.asset_key)
    found = event.asset_materialization if event is not None else None
    return None if found is None else str(found.metadata["fingerprint"].value)


_NUMBERS = {
    "accuracy_held_out": "accuracy",
    "coverage_held_out": "coverage",
    "macro_f1_held_out": "macro_f1",
    "majority_accuracy": "majority_accuracy",
    "held_out_slides": "held_out_slides",
}
"""Metadata, and the numbers of the evaluation that they show."""


def _measured(evaluation: dict[str, Any]) -> dict[str, Any]:
    if not evaluation["measured"]:
        return {"not_measured": evaluation["reason"]}
    return {name: evaluation[key] for name, key in _NUMBERS.items() if evaluation[key] is not None}


def _classes(evaluation: dict[str, Any]) -> dg.TableMetadataValue:
    rows = [{"label": label, **told} for label, told in evaluation.get("classes", {}).items()]
    return table_metadata(pa.Table.from_pylist(rows))


def _of_cohort(evaluation: dict[str, Any] | None, labels: ClusterLabels) -> Metadata:
    """How good annotations of this model and K are over the cohort, as far as it is known."""
    if evaluation is None or (evaluation["model"], evaluation["k"]) != (labels.model, labels.k):
        return {"not_measured": "the accuracy of these cluster labels is not measured yet"}
    told = {**_measured(evaluation), "classes_held_out": _classes(evaluation)}
    if labels.source == "edited":
        told["accuracy_is_of"] = "labels derived from labelled slides, not of the edited table"
    return told
