"""Figures of the cohort, and the page that joins them.

Flow: `facts` reads from the catalog what all figures need, each figure's module reads its own
numbers and draws them, `figure` dresses, stamps and saves a drawing, `page` joins figures, numbers
and warnings in one HTML file, and `draw` does it all. A figure that is up to date is not drawn
again.

This file imports none of them: every run of the platform knows the figures' names, and matplotlib
takes half a second.
"""

FIGURES = {
    "purity_curve": "Purity of the clusters by majority label, against the share of labelled tiles "
    "they hold.",
    "heat_map": "Labels against clusters.",
    "montages": "The tiles nearest to each cluster's centroid.",
    "overlays": "Slides beside their clusters.",
    "composition": "Each slide's shares of clusters.",
    "umap_by_label": "A map of the tiles by UMAP, coloured by label.",
    "umap_by_cluster": "A map of the tiles by UMAP, coloured by cluster.",
    "umap_by_slide": "A map of the tiles by UMAP, coloured by slide.",
}
"""All figures in the order of the report, with what each shows."""

FIGURE_ALGORITHM = 1
"""Version of what all figures look like."""

PAGE_ALGORITHM = 1
"""Version of the page."""
