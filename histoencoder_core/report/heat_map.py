"""The heat map of labels and clusters: what each cluster is made of."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure as Drawing
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from histoencoder_core.report.facts import NO_CLUSTERS, NO_LABELS, percent, read_facts, rows_of
from histoencoder_core.report.figure import (
    INK,
    PALE,
    Figure,
    colour_of,
    hatch_of,
    ink_on,
    save_figure,
    short,
)
from histoencoder_core.report.legends import Cluster, plate, read_clusters
from histoencoder_core.store import Store

NAME = "heat_map"
TITLE = "What is each cluster made of?"

MOST_COLUMNS = 43
"""Clusters a row of heat maps: their numbers can still be read."""

_MAP: Colormap = LinearSegmentedColormap.from_list(
    "shares", ["#ffffff", "#c6dbef", "#6baed6", "#2171b5", "#08306b"]
)
"""One hue, from light to dark: read alike by all eyes, and in grey."""

Shares = dict[int, dict[str, float]]
"""By cluster and label, the share of the cluster's labelled tiles that carry the label."""


def heat_map(store: Store, k: int | None = None) -> Figure:
    """Draw labels against clusters.

    Args:
        store: The store, with a catalog.
        k: Number of clusters; the model's largest if not given.

    Returns:
        The figure. Its numbers are how many clusters have each majority label.

    Raises:
        SettingsError: The model has no such number of clusters.
        StoreError: There is no catalog, or another program's file stands in the way.
    """
    facts = read_facts(store)
    if not facts.ks:
        return Figure(NAME, TITLE, missing=NO_CLUSTERS)
    k = facts.k(k, readable=False)
    if not facts.labelled_tiles:
        return Figure(f"{NAME}_k{k}", TITLE, missing=NO_LABELS, untrained=facts.untrained)
    all_clusters = read_clusters(store, k)
    clusters = [cluster for cluster in all_clusters if cluster.labelled_tiles]
    shares = read_shares(store, k)
    counts: dict[str, int] = defaultdict(int)
    for cluster in clusters:
        counts[cluster.label or ""] += 1
    silent = len(all_clusters) - len(clusters)
    without = f" {silent} clusters without labelled tiles are left out." if silent else ""
    subtitle = (
        "Each column is a cluster, each row a label; a column adds up to 100 %. Above: labelled "
        f"tiles a cluster.{without}"
    )
    mean = sum(c.labelled_tiles * (c.purity or 0) for c in clusters) / facts.labelled_tiles
    figure = Figure(
        name=f"{NAME}_k{k}",
        title=TITLE,
        caption=(
            "Clusters are grouped by their most frequent label, the purest first. One dark field "
            "in an otherwise white column is a cluster of one tissue. Two fields of middle tone "
            "are two tissues that the encoder does not tell apart, or that the annotations do not. "
            f"On average a tile's cluster is {percent(mean)} pure. {facts.left_out}"
        ).strip(),
        alt=f"Heat map of {len(counts)} labels against {len(clusters)} clusters. {subtitle}",
        numbers={"k": k, "mean_purity": mean, **{f"clusters {n}": c for n, c in counts.items()}},
        untrained=facts.untrained,
    )
    return save_figure(
        store,
        figure,
        subtitle=subtitle,
        source=facts.source(k),
        drawn=[[asdict(cluster) for cluster in clusters], sorted(shares.items())],
        draw=lambda: _draw(clusters, shares),
    )


def read_shares(store: Store, k: int) -> Shares:
    """The share of each label among each cluster's labelled tiles."""
    rows = rows_of(
        store,
        "FROM cluster_counts SELECT cluster, label, sum(tiles)::BIGINT AS tiles "
        f"WHERE k = {k} AND label IS NOT NULL GROUP BY ALL ORDER BY ALL",
    )
    totals: dict[int, int] = defaultdict(int)
    for row in rows:
        totals[row["cluster"]] += row["tiles"]
    shares: Shares = defaultdict(dict)
    for row in rows:
        shares[row["cluster"]][row["label"]] = row["tiles"] / totals[row["cluster"]]
    return dict(shares)


def _draw(clusters: list[Cluster], shares: Shares) -> Drawing:
    bands = -(-len(clusters) // MOST_COLUMNS)
    columns = -(-len(clusters) // bands)
    # Majority labels in the clusters' order, then those that are nowhere in the majority.
    labels = list(dict.fromkeys(c.label for c in clusters if c.label is not None))
    labels += sorted({label for of in shares.values() for label in of} - {*labels})
    cell = 0.26
    heights = [0.7, cell * len(labels), cell] * bands
    narrow = ConstrainedLayoutEngine(h_pad=0.01, hspace=0.0)
    drawing = Drawing(figsize=(11, sum(heights) + 0.35 * bands), layout=narrow)
    grid = drawing.subplots(3 * bands, 1, height_ratios=heights, squeeze=False)[:, 0]
    most = max(cluster.labelled_tiles for cluster in clusters)
    for band in range(bands):
        sizes, heat, numbers = grid[3 * band : 3 * band + 3]
        part = clusters[band * columns : (band + 1) * columns]
        _draw_band(heat, part, labels, shares, columns)
        _draw_sizes(sizes, part, columns, most)
        _draw_numbers(numbers, part, columns)
    bar = drawing.colorbar(
        ScalarMappable(Normalize(0, 1), _MAP), ax=list(grid), shrink=min(1.0, 2.6 / sum(heights)),
        aspect=14, pad=0.01, anchor=(0, 1),
    )  # fmt: skip
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    bar.set_label("share of the cluster's labelled tiles", size=8)
    bar.outline.set_edgecolor(PALE)
    return drawing


def _draw_band(
    axes: Axes, clusters: list[Cluster], labels: list[str], shares: Shares, columns: int
) -> None:
    matrix = np.array([[shares[c.number].get(label, 0.0) for c in clusters] for label in labels])
    rows, width = matrix.shape
    axes.pcolormesh(
        np.arange(width + 1) - 0.5, np.arange(rows + 1) - 0.5, matrix, cmap=_MAP, vmin=0, vmax=1,
        edgecolor="#e4e8ee", linewidth=0.4,
    )  # fmt: skip
    if columns <= 26:  # room for digits
        for y, x in zip(*np.nonzero(matrix >= 0.005), strict=True):
            axes.text(
                x, y, f"{100 * matrix[y, x]:.0f}", size=6.5, ha="center", va="center",
                color=ink_on(_MAP(matrix[y, x])[:3]),
            )  # fmt: skip
    for x in range(1, width):
        if clusters[x].label != clusters[x - 1].label:
            axes.axvline(x - 0.5, color=INK, linewidth=1)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(rows), [short(label, 24) for label in labels])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_sizes(axes: Axes, clusters: list[Cluster], columns: int, most: int) -> None:
    axes.bar(range(len(clusters)), [c.labelled_tiles for c in clusters], width=0.8, color="#8a94a3")
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(0, most * 1.05), xticks=[])
    axes.set_yticks([0, most], ["0", f"{most:,}"], size=7)
    axes.spines["bottom"].set_visible(False)


def _draw_numbers(axes: Axes, clusters: list[Cluster], columns: int) -> None:
    """Each cluster's number in its colour."""
    for x, cluster in enumerate(clusters):
        number = cluster.number
        axes.add_patch(
            Rectangle(
                (x - 0.46, 0.1), 0.92, 0.9, facecolor=colour_of(number), hatch=hatch_of(number),
                edgecolor="#ffffff", linewidth=0,
            )
        )  # fmt: skip
        axes.text(
            x, 0.55, str(number), size=7 if columns <= 32 else 6, ha="center", va="center",
            color=ink_on(colour_of(number)), bbox=plate(number),
        )  # fmt: skip
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(1, 0), xticks=[])
    axes.set_yticks([0.55], ["cluster"])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
