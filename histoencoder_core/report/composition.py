"""What slides are made of: the share of each cluster, as stacked bars."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import PercentFormatter

from histoencoder_core.report.facts import NO_CLUSTERS, counted, read_facts, rows_of
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
from histoencoder_core.report.legends import (
    ROW_INCHES,
    draw_key,
    groups_of,
    key_rows,
    plate,
    read_clusters,
)
from histoencoder_core.store import Store

NAME = "composition"
TITLE = "What are the slides made of?"

MOST_BARS = 60
"""More bars, and the names under them, can't be read."""

MOST_NUMBERED = 44
"""More bars are too narrow for the clusters' numbers."""

_LEAST_NUMBERED = 0.035
"""Share from which a part of a bar carries its cluster's number."""

_MARKERS = "osD^vP*X"
"""A shape for each site: all colours are taken by clusters."""

Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Bars:
    """What is drawn.

    Attributes:
        names: Under each bar.
        sites: Of each bar's slide, where known.
        clusters: Numbers, in the order in which they are stacked from below.
        shares: Array of shape (bars, clusters).
    """

    names: list[str]
    sites: list[str | None]
    clusters: list[int]
    shares: Shares


def composition(store: Store, k: int | None = None) -> Figure:
    """Draw each slide's shares of clusters.

    Args:
        store: The store, with a catalog.
        k: Number of clusters; the model's largest that can be read if not given.

    Returns:
        The figure. Of more than 60 slides a sample is drawn.

    Raises:
        SettingsError: The model has no such number of clusters.
        StoreError: There is no catalog, or another program's file stands in the way.
    """
    facts = read_facts(store)
    if not facts.ks:
        return Figure(NAME, TITLE, missing=NO_CLUSTERS)
    k = facts.k(k, readable=True)
    clusters = read_clusters(store, k)
    bars, total = _read_bars(store, k, [cluster.number for cluster in clusters])
    order = by_similarity(bars.shares)
    bars = _Bars(
        [bars.names[i] for i in order], [bars.sites[i] for i in order], bars.clusters,
        bars.shares[order],
    )  # fmt: skip
    sampled = (
        f"{len(bars.names)} of {total} slides, drawn evenly; the catalog's slide_composition({k}) "
        "has all."
        if len(bars.names) < total
        else ""
    )
    subtitle = (
        f"Each bar is a slide, its parts the shares of its tiles in {k} clusters. Slides that are "
        f"alike stand side by side. {sampled}"
    ).strip()
    largest = bars.shares.max(axis=1)
    figure = Figure(
        name=f"{NAME}_k{k}",
        title=TITLE,
        caption=(
            "Parts are stacked by the clusters' most frequent label, so that a tissue keeps its "
            "height in the bar; the key on the right has the same order. A bar of one colour is a "
            "slide that looks the same all over, or one that was stained or scanned unlike the "
            f"others: look whether such bars share a site. {sampled} {facts.left_out}"
        ).strip(),
        alt=f"Stacked bars of {counted(len(bars.names), 'slide')} by {k} clusters. {subtitle}",
        numbers={"k": k, "slides": total, "drawn": len(bars.names),
                 "median_largest_share": float(np.median(largest))},
        untrained=facts.untrained,
    )  # fmt: skip
    groups = groups_of(clusters)
    return save_figure(
        store,
        figure,
        subtitle=subtitle,
        source=facts.source(k),
        drawn=[bars.names, bars.sites, bars.clusters, bars.shares.round(6).tolist(), groups],
        draw=lambda: _draw(bars, groups),
    )


def by_similarity(shares: Shares) -> list[int]:
    """An order in which rows that are alike stand side by side.

    Average linkage over Hellinger's distance, and the order of the leaves with the least distance
    between neighbours: Bar-Joseph et al., "Fast optimal leaf ordering for hierarchical clustering"
    (2001), https://doi.org/10.1093/bioinformatics/17.suppl_1.S22.

    Args:
        shares: Array of shape (rows, parts); each row sums to 1.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage  # takes half a second to import

    if len(shares) < 3:
        return list(range(len(shares)))
    tree = linkage(np.sqrt(shares), method="average", optimal_ordering=True)
    order: list[int] = leaves_list(tree).tolist()
    # The tree can be read from either side: begin with the row that has more of the first part.
    return order[::-1] if tuple(shares[order[0]]) < tuple(shares[order[-1]]) else order


def _read_bars(store: Store, k: int, clusters: list[int]) -> tuple[_Bars, int]:
    """The slides to draw, in the order of their names, and how many there are."""
    slides = rows_of(
        store,
        f"FROM slides SEMI JOIN slide_composition({k}) USING (slide) SELECT slide, site "
        "ORDER BY slide",
    )
    total = len(slides)
    if total > MOST_BARS:
        slides = [slides[i] for i in np.linspace(0, total - 1, MOST_BARS).round().astype(int)]
    names = [row["slide"] for row in slides]
    quoted = ", ".join(f"'{name}'" for name in names)  # ids hold no quotes
    rows = rows_of(
        store,
        f"FROM slide_composition({k}) SELECT slide, cluster, share WHERE slide IN ({quoted})",
    )
    place = {name: i for i, name in enumerate(names)}
    column = {cluster: i for i, cluster in enumerate(clusters)}
    shares = np.zeros((len(names), len(clusters)))
    for row in rows:
        shares[place[row["slide"]], column[row["cluster"]]] = row["share"]
    return _Bars(names, [row["site"] for row in slides], clusters, shares), total


def _draw(bars: _Bars, groups: list[tuple[str, list[int]]]) -> Drawing:
    sites = sorted({site for site in bars.sites if site})
    markers = dict(zip(sites, _MARKERS, strict=False)) if len(sites) <= len(_MARKERS) else {}
    rows = key_rows(groups) + (1.5 + len(markers) if markers else 0)
    height = max(4.6, ROW_INCHES * rows + 0.8)
    width = min(9.4, max(3.0, 0.6 * len(bars.names)))
    drawing = Drawing(figsize=(width + 2.6, height), layout="constrained")
    left, key = drawing.subplots(1, 2, width_ratios=[width, 2.2])
    _draw_bars(left, bars)
    for x, site in enumerate(bars.sites):
        if site in markers:
            left.plot(x, 1.03, markers[site], color=INK, ms=5, clip_on=False)
    draw_key(key, groups, rows=height / ROW_INCHES)
    y = key_rows(groups) + 1.0
    if markers:
        key.text(0, y, "Site (above the bars)", size=8, color=PALE, va="center")
    for i, (site, marker) in enumerate(markers.items(), 1):
        key.plot(0.3, y + i, marker, color=INK, ms=5)
        key.text(0.8, y + i, short(site, 26), size=8, va="center")
    return drawing


def _draw_bars(axes: Axes, bars: _Bars) -> None:
    count = len(bars.names)
    below = np.zeros(count)
    for cluster, shares in zip(bars.clusters, bars.shares.T, strict=True):
        axes.bar(
            range(count), shares, 0.9, bottom=below, color=colour_of(cluster),
            hatch=hatch_of(cluster), edgecolor="#ffffff", linewidth=0.4,
        )  # fmt: skip
        if count <= MOST_NUMBERED:
            for x in np.flatnonzero(shares >= _LEAST_NUMBERED).tolist():
                axes.text(
                    x, below[x] + shares[x] / 2, str(cluster), size=6.5 if count <= 30 else 5.5,
                    ha="center", va="center", color=ink_on(colour_of(cluster)), bbox=plate(cluster),
                )  # fmt: skip
        below += shares
    axes.set(xlim=(-0.6, count - 0.4), ylim=(0, 1), ylabel="Share of the slide's tiles")
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    names = [short(name, 26) for name in bars.names]
    axes.set_xticks(range(count), names, rotation=90, size=8 if count <= 30 else 6.5)
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)
