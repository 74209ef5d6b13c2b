"""The command annotate: clusters to labels, onto slides, and how often that is right."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import pyarrow as pa
import typer

from histoencoder_core.annotate import annotate_slide, derive_labels, ensure_evaluation
from histoencoder_core.cli.cohort import expected
from histoencoder_core.cli.progress import each_slide, finish
from histoencoder_core.cli.stages import StoreFolder
from histoencoder_core.cli.tables import print_table
from histoencoder_core.clusters import current_model
from histoencoder_core.clusters.naming import ClusterLabels, NamedCluster, current_cluster_labels
from histoencoder_core.cohort import build_catalog
from histoencoder_core.errors import LabelError
from histoencoder_core.settings import AnnotationSettings, PlatformSettings
from histoencoder_core.store import Store


def annotate(
    input_dir: StoreFolder,
    num_clusters: Annotated[
        int | None,
        typer.Option(
            "--num-clusters", "-n", min=2, help="The K to use.  [default: the model's largest]"
        ),
    ] = None,
    min_purity: Annotated[
        float | None,
        typer.Option(max=1, help="A cluster less pure than this abstains.  [default: 0.7]"),
    ] = None,
    min_labelled: Annotated[
        int | None,
        typer.Option(min=1, help="So does one of fewer labelled tiles.  [default: 5]"),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(min=2, help="Parts, each held out once to measure accuracy.  [default: 5]"),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option(help="Measure accuracy on held-out slides; fits a model a fold.")
    ] = True,
) -> None:
    """Annotate all slides by cluster, as GeoJSON for QuPath, and measure how well that works.

    A cluster takes the label of its labelled tiles, or abstains if they differ too much. To say
    otherwise, copy the table from _cohort/cluster_labels to cluster_labels.csv and edit it.
    """
    asked = {
        "n_clusters": num_clusters,
        "min_purity": min_purity,
        "min_labelled": min_labelled,
        "folds": folds,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    deployment = PlatformSettings()
    settings = AnnotationSettings(
        **{**deployment.annotate.model_dump(exclude_defaults=True), **given}
    )
    store = Store(input_dir)
    build_catalog(store, **{**expected(deployment), "annotate": settings})
    named = derive_labels(store, settings)
    labels = current_cluster_labels(store, settings)
    assert labels is not None  # they were just derived
    _tell_labels(store, named, labels)
    counts = each_slide(
        "Annotating",
        [s for s in store.slide_ids() if store.slide(s).stamp("clusters") is not None],
        lambda slide_id: annotate_slide(store.slide(slide_id), labels),
        describe="annotated",
    )
    build_catalog(store, **{**expected(deployment), "annotate": settings})
    if evaluate:
        content, _ = ensure_evaluation(
            store,
            settings,
            memory_gb=deployment.cluster_memory_gb,
            device=deployment.device,
        )
        _tell_evaluation(store, content, labels)
    finish(counts)


def _tell_labels(store: Store, named: list[NamedCluster], labels: ClusterLabels) -> None:
    told = [{**asdict(row), "label": labels.labels[row.cluster]} for row in named]
    print_table(pa.Table.from_pylist(told))
    abstaining = sum(label is None for label in labels.labels.values())
    edited = ""
    if labels.source == "edited":
        differ = sum(labels.labels[row.cluster] != row.label for row in named)
        edited = f" {store.cluster_labels_csv.name} names {differ} otherwise than derived."
    elif not any(row.labelled_tiles for row in named):
        raise LabelError(
            f"{store.root}: no cluster can be named: no slide with clusters is labelled. Label "
            f"some with `histoencoder label`, or name the clusters in {store.cluster_labels_csv}, "
            f"a copy of the table in {store.cluster_labels}."
        )
    model = current_model(store)
    if model is not None and model.untrained:
        typer.secho("WARNING: the encoder is untrained: this means nothing.", fg="yellow", err=True)
    typer.echo(
        f"Cluster model {labels.model}, K = {labels.k}: {labels.k - abstaining} clusters named, "
        f"{abstaining} abstain.{edited}"
    )


def _tell_evaluation(store: Store, told: dict[str, Any], labels: ClusterLabels) -> None:
    if not told["measured"]:
        typer.echo(f"Accuracy is not measured. {told['reason']}")
        return
    typer.echo(
        f"On {told['held_out_slides']} held-out slides ({_split(told)}), {told['tiles']} labelled "
        f"tiles: coverage {_share(told['coverage'], told['coverage_interval'])}; of these tiles, "
        f"accuracy {_share(told['accuracy'], told['accuracy_interval'])}, where the most frequent "
        f"label alone has {_share(told['majority_accuracy'])}."
    )
    print_table(
        pa.Table.from_pylist([{"label": name, **row} for name, row in told["classes"].items()])
    )
    if labels.source == "edited":
        typer.echo(
            f"This is measured with labels derived anew in each fold, not with those of "
            f"{store.cluster_labels_csv.name}."
        )


def _split(told: dict[str, Any]) -> str:
    if told["split_by"] == "slides.csv":
        return "the test split of slides.csv"
    return f"{len(told['folds'])} folds by {told['split_by'].removesuffix('s')}"


def _share(value: float | None, interval: list[float] | None = None) -> str:
    if value is None:
        return "unknown"
    ends = "" if interval is None else f" (95 % interval {interval[0]:.2f} to {interval[1]:.2f})"
    return f"{value:.2f}{ends}"
