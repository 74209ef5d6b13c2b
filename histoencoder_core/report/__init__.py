"""Figures of the cohort, and the page that joins them.

Flow: `facts` reads from the catalog what all figures need, each figure's module reads its own
numbers and draws them, `figure` dresses, stamps and saves a drawing, and `page` joins figures,
numbers and warnings in one HTML file. A figure that is up to date is not drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from histoencoder_core.report import (
    composition,
    heat_map,
    montages,
    overlays,
    purity_curve,
    umap_map,
)
from histoencoder_core.report.figure import Figure
from histoencoder_core.report.page import write_page
from histoencoder_core.store import Store

FIGURES: dict[str, Callable[..., Figure]] = {
    "purity_curve": purity_curve.purity_curve,
    "heat_map": heat_map.heat_map,
    "montages": montages.montages,
    "overlays": overlays.overlays,
    "composition": composition.composition,
    "umap_by_label": umap_map.umap_by_label,
    "umap_by_cluster": umap_map.umap_by_cluster,
    "umap_by_slide": umap_map.umap_by_slide,
}
"""All figures in the order of the report: each takes a store and, if it is not to choose, K."""


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
    return [draw(store, k) for draw in FIGURES.values()]


def write_report(store: Store, k: int | None = None) -> Path:
    """Draw what is not up to date, and write the page of all; see `draw_figures`, `page`."""
    return write_page(store, draw_figures(store, k), k)


__all__ = ["FIGURES", "Figure", "draw_figures", "write_page", "write_report"]
