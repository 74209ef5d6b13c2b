"""Drawing all figures, and the page that joins them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from histoencoder_core.report.composition import composition
from histoencoder_core.report.figure import Figure
from histoencoder_core.report.heat_map import heat_map
from histoencoder_core.report.montages import montages
from histoencoder_core.report.overlays import overlays
from histoencoder_core.report.page import write_page
from histoencoder_core.report.purity_curve import purity_curve
from histoencoder_core.report.umap_map import umap_by_cluster, umap_by_label, umap_by_slide
from histoencoder_core.store import Store

DRAW: dict[str, Callable[..., Figure]] = {
    "purity_curve": purity_curve,
    "heat_map": heat_map,
    "montages": montages,
    "overlays": overlays,
    "composition": composition,
    "umap_by_label": umap_by_label,
    "umap_by_cluster": umap_by_cluster,
    "umap_by_slide": umap_by_slide,
}
"""What draws each of `report.FIGURES`: it takes a store and, if it is not to choose, K."""


def draw_figures(store: Store, k: int | None = None) -> list[Figure]:
    """Draw every figure that is not up to date.

    Args:
        store: The store, with a catalog.
        k: Number of clusters; if not given, each figure chooses: the model's largest for purity,
            the largest that people can tell apart for the others.

    Returns:
        The figures, in the order of the report; some may say why they are missing.

    Raises:
        SettingsError: The model has no such number of clusters.
        StoreError: There is no catalog, or another program's file stands in the way.
    """
    return [draw(store, k) for draw in DRAW.values()]


def write_report(store: Store, k: int | None = None) -> Path:
    """Draw what is not up to date, and write the page of all; see `draw_figures`, `page`."""
    return write_page(store, draw_figures(store, k), k)
