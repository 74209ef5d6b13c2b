"""Deriving what clusters mean from labelled slides."""

from __future__ import annotations

from histoencoder_core.clusters import current_model
from histoencoder_core.clusters.naming import NamedCluster, annotation_k, write_derived
from histoencoder_core.cohort import run_sql
from histoencoder_core.errors import ClusterError, StoreError
from histoencoder_core.settings import AnnotationSettings
from histoencoder_core.store import Store


def derive_labels(store: Store, settings: AnnotationSettings) -> list[NamedCluster]:
    """Name the current model's clusters after their labelled tiles, and write the table.

    Args:
        store: The store, whose catalog must be of the current model.
        settings: Which K, and when a cluster abstains.

    Returns:
        One row a cluster, in order; also those without tiles, which abstain.

    Raises:
        ClusterError: There is no model.
        SettingsError: The model has no such K.
        StoreError: The catalog is missing or of another model.
    """
    model = current_model(store)
    if model is None:
        raise ClusterError(
            f"{store.root}: has no cluster model yet; run `histoencoder cluster` first."
        )
    k = annotation_k(store, model, settings)
    told = run_sql(store, "SELECT version FROM model").column("version").to_pylist()
    if told != [model.version]:
        raise StoreError(
            f"{store.catalog_path}: is of cluster model {', '.join(told) or 'none'}, but the "
            f"current one is {model.version}. Refresh it: `histoencoder cluster`, or the asset "
            "'catalog'."
        )
    query = (
        "SELECT cluster, label AS majority, purity, labelled_tiles, tiles, slides "  # noqa: S608
        f"FROM cluster_purity WHERE k = {k}"  # a number
    )
    found = {row["cluster"]: row for row in run_sql(store, query).to_pylist()}
    empty = {"majority": None, "purity": None, "labelled_tiles": 0, "tiles": 0, "slides": 0}
    rows = []
    for cluster in range(k):
        row = {**empty, **found.get(cluster, {}), "cluster": cluster}
        label = label_for(
            row["majority"], purity=row["purity"], labelled=row["labelled_tiles"], settings=settings
        )
        rows.append(NamedCluster(label=label, **row))
    write_derived(store, model.version, k, rows)
    return rows


def label_for(
    majority: str | None, *, purity: float | None, labelled: int, settings: AnnotationSettings
) -> str | None:
    """The label of a cluster, or None if it abstains.

    Args:
        majority: The most frequent label of its labelled tiles.
        purity: The share of its labelled tiles that carry it.
        labelled: Number of its labelled tiles.
        settings: When it abstains.
    """
    if majority is None or purity is None or labelled < settings.min_labelled:
        return None
    return majority if purity >= settings.min_purity else None
