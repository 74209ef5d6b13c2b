"""The purity curve: which share of the tiles lies in how pure clusters.

HistoEncoder's figure, with a curve for each label. See Pohjonen et al., "HistoEncoder: a digital
pathology foundation model for prostate cancer" (2024), https://arxiv.org/abs/2411.11458.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import PercentFormatter

from histoencoder_core.colours import label_colours
from histoencoder_core.report.facts import (
    NO_CLUSTERS,
    NO_LABELS,
    PURE,
    percent,
    read_facts,
    rows_of,
)
from histoencoder_core.report.figure import (
    INK,
    LINE,
    PALE,
    Colour,
    Figure,
    as_colour,
    save_figure,
    short,
)
from histoencoder_core.store import Store

NAME = "purity_curve"
TITLE = "How pure are the clusters?"

MOST_CURVES = 12
"""More labels would hide each other; those with the most tiles in pure clusters are drawn."""

FEW_TILES = 10
"""Where a cluster typically has fewer labelled tiles, purity says little; the figure warns."""


@dataclass(frozen=True)
class Step:
    """A cluster on the curve.

    Attributes:
        cluster: Its number.
        label: The most frequent label of its labelled tiles.
        purity: The share of them that carry it.
        labelled_tiles: How many they are.
    """

    cluster: int
    label: str
    purity: float
    labelled_tiles: int


@dataclass(frozen=True)
class Coverage:
    """The share of labelled tiles in pure clusters, and what chance alone would give.

    Attributes:
        share: Of all labelled tiles.
        low: Lower end of the 95 % interval, from drawing slides anew; None if it is not known for
            the data at hand.
        high: Upper end.
        shuffled: The mean share with labels permuted over all labelled tiles.
        p_value: How often such labels do as well.
        shuffled_within: The mean share with labels permuted within each slide.
        p_value_within: How often such labels do as well.
    """

    share: float
    low: float | None
    high: float | None
    shuffled: float | None
    p_value: float | None
    shuffled_within: float | None
    p_value_within: float | None

    @property
    def interval(self) -> str:
        """The interval in words; empty if it is not known."""
        if self.low is None or self.high is None:
            return ""
        return f"95 % interval by slide: {percent(self.low)} to {percent(self.high)}"

    @property
    def chance(self) -> str:
        """The comparison with chance, in a sentence; empty if it was not made."""
        if self.shuffled is None or self.p_value is None:
            return ""
        told = (
            f"If labels were shuffled it would be {percent(self.shuffled)} "
            f"(p\u00a0=\u00a0{self.p_value:.2g})"
        )
        if self.shuffled_within is not None and self.p_value_within is not None:
            told += (
                f", shuffled within each slide {percent(self.shuffled_within)} "
                f"(p\u00a0=\u00a0{self.p_value_within:.2g})"
            )
        return f"{told}."


def purity_curve(store: Store, k: int | None = None) -> Figure:
    """Purity of the clusters by majority label, against the share of labelled tiles they hold.

    Args:
        store: The store, with a catalog.
        k: Number of clusters; the model's largest if not given.

    Returns:
        The figure. Its numbers are the share of labelled tiles in clusters at least 90 % pure, with
        its interval and p-values, and the part of each majority label.

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
    steps = [
        Step(**row)
        for row in rows_of(
            store,
            f"FROM purity_curve({k}) SELECT label, cluster, purity, labelled_tiles "
            "ORDER BY label, place",
        )
    ]
    coverage = read_coverage(store, k)
    shares = pure_shares(steps)
    typical = median(step.labelled_tiles for step in steps)
    few = (
        f" Half of the clusters have {typical:g} labelled tiles or fewer, and so few are often of "
        "one label by chance."
        if typical < FEW_TILES
        else ""
    )
    interval = f" ({coverage.interval})" if coverage.interval else ""
    headline = (
        f"{percent(coverage.share)} of the labelled tiles lie in clusters at least {percent(PURE)} "
        f"pure{interval}."
    )
    subtitle = f"{headline} {coverage.chance}{few}".strip()
    figure = Figure(
        name=f"{NAME}_k{k}",
        title=TITLE,
        caption=(
            f"Each of the {len(steps)} clusters with labelled tiles is one step, as wide as the "
            "share of labelled tiles it holds and as high as its purity: the share of them that "
            "carry its most frequent label. The purest clusters come first, so that a curve which "
            f"stays high far to the right is good. {headline} {coverage.chance} The black curve is "
            "of all clusters; a coloured one is of those with that majority label, and the parts "
            f"of all labels add up to the total.{few} Purity tells how well clusters follow the "
            f"labels, not whether the labels are right. {facts.left_out}"
        ).strip(),
        alt=f"Purity of {len(steps)} clusters against the cumulative share of tiles. {headline}",
        numbers={
            "k": k,
            "labelled_tiles": facts.labelled_tiles,
            **{f"coverage_{name}": value for name, value in asdict(coverage).items()},
            **{f"share {label}": share for label, share in shares.items()},
        },
        untrained=facts.untrained,
    )
    return save_figure(
        store,
        figure,
        subtitle=subtitle,
        source=facts.source(k),
        drawn=[asdict(coverage), [asdict(step) for step in steps]],
        draw=lambda: _draw(steps, coverage, shares),
    )


def read_coverage(store: Store, k: int) -> Coverage:
    """What the catalog says of the share of labelled tiles in pure clusters."""
    [at] = rows_of(store, f"FROM coverage_at({k}, {PURE})")
    null = {row["scheme"]: row for row in rows_of(store, f"FROM coverage_null({k}, {PURE})")}
    return Coverage(
        at["coverage"],
        at["low"],
        at["high"],
        null["all"]["null_mean"],
        null["all"]["p_value"],
        null["within_slides"]["null_mean"],
        null["within_slides"]["p_value"],
    )


def pure_shares(steps: Sequence[Step]) -> dict[str, float]:
    """The share of all labelled tiles in pure clusters of each majority label, largest first."""
    total = sum(step.labelled_tiles for step in steps)
    tiles: dict[str, int] = {}
    for step in steps:
        pure = step.labelled_tiles if step.purity >= PURE else 0
        tiles[step.label] = tiles.get(step.label, 0) + pure
    ordered = sorted(tiles.items(), key=lambda item: (-item[1], item[0]))
    return {label: count / total for label, count in ordered}


def _draw(steps: list[Step], coverage: Coverage, shares: dict[str, float]) -> Drawing:
    drawing = Drawing(figsize=(10.6, 5), layout="constrained")
    curves, table = drawing.subplots(1, 2, width_ratios=[2.35, 1])
    total = sum(step.labelled_tiles for step in steps)
    colours = {label: as_colour(rgb) for label, rgb in label_colours(shares).items()}
    curves.axhspan(PURE, 1, color="#eef1f5", zorder=0)
    curves.axhline(PURE, color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    width = 2.2 if len(shares) <= 4 else 1.4
    for label in list(shares)[:MOST_CURVES]:
        of_label = [step for step in steps if step.label == label]
        _steps(curves, of_label, total, colour=colours[label], width=width)
        if shares[label]:
            curves.plot(
                shares[label], PURE, "o", color=colours[label], mec=INK, mew=0.8, ms=6, zorder=5
            )
    _steps(curves, steps, total, colour=INK, width=2.2)
    if coverage.low is not None:
        curves.plot(
            [coverage.low, coverage.high], [PURE, PURE], color=INK, linewidth=6, alpha=0.3,
            solid_capstyle="butt", zorder=4,
        )  # fmt: skip
    for share, marker in ((coverage.shuffled, "D"), (coverage.shuffled_within, "s")):
        if share is not None:
            curves.plot(
                share,
                PURE,
                marker,
                color="#ffffff",
                mec=INK,
                mew=1.1,
                ms=6,
                zorder=5,
                clip_on=False,
            )
    curves.plot(coverage.share, PURE, "o", color=INK, ms=8, zorder=6)
    curves.set(
        xlim=(0, 1.005), ylim=(0, 1.02),
        xlabel="Share of all labelled tiles, those in the purest clusters first",
        ylabel="Purity of the cluster",
    )  # fmt: skip
    for axis in (curves.xaxis, curves.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    curves.set_xticks(np.linspace(0, 1, 11))
    curves.set_yticks([0, 0.25, 0.5, 0.75, PURE, 1])
    curves.grid(axis="x", color="#eceff3", linewidth=0.8)
    curves.set_axisbelow(True)
    _print_shares(table, steps, coverage, shares, colours)
    return drawing


def _steps(
    axes: Axes, steps: list[Step], total: int, *, colour: str | Colour, width: float
) -> None:
    """One curve: a step for each cluster, the purest first."""
    ordered = sorted(steps, key=lambda s: (-s.purity, -s.labelled_tiles, s.cluster))
    edges = np.cumsum([0, *(step.labelled_tiles for step in ordered)]) / total
    # A rim, without which the light colours would vanish on white, and black on dark ones.
    rim = Stroke(linewidth=width + 1.2, foreground="#ffffff" if colour == INK else INK)
    axes.stairs(
        [step.purity for step in ordered], edges, baseline=None, color=colour, linewidth=width,
        zorder=3, path_effects=[rim, Normal()],
    )  # fmt: skip


def _print_shares(
    axes: Axes,
    steps: list[Step],
    coverage: Coverage,
    shares: dict[str, float],
    colours: dict[str, Colour],
) -> None:
    """The shares at the line, as a table that is the key too."""
    total = sum(step.labelled_tiles for step in steps)
    own = dict.fromkeys(shares, 0.0)
    for step in steps:
        own[step.label] += step.labelled_tiles / total
    shown = list(shares)[:MOST_CURVES]
    rows: list[tuple[str | Colour, str, float, float]] = [
        (INK, "All clusters", coverage.share, 1.0)
    ]
    rows += [(colours[label], label, shares[label], own[label]) for label in shown]
    if rest := list(shares)[MOST_CURVES:]:
        pure, whole = (sum(part[label] for label in rest) for part in (shares, own))
        rows.append(("#ffffff", f"{len(rest)} other labels", pure, whole))
    axes.set(xlim=(0, 1), ylim=(max(len(rows) + 5.5, 15.5), 0))
    axes.axis("off")
    small: dict[str, Any] = {"size": 7.5, "color": PALE, "va": "bottom", "linespacing": 1.2}
    axes.text(0, 1.2, "Majority label", **small)
    axes.text(0.8, 1.2, f"tiles in clusters\n≥ {percent(PURE)} pure", ha="right", **small)
    axes.text(1, 1.2, "in all its\nclusters", ha="right", **small)
    axes.axhline(1.35, color=LINE, linewidth=0.8)
    for i, (colour, label, share, whole) in enumerate(rows):
        y = 1.95 + i
        weight = "bold" if i == 0 else "normal"
        axes.plot([0.0, 0.08], [y, y], color=INK, linewidth=4.2, solid_capstyle="butt")
        axes.plot([0.003, 0.077], [y, y], color=colour, linewidth=2.8, solid_capstyle="butt")
        axes.text(0.11, y, short(label, 18), va="center", weight=weight)
        axes.text(0.8, y, percent(share, 1), va="center", ha="right", weight=weight)
        axes.text(1, y, percent(whole), va="center", ha="right", color=PALE)
    y = 2.4 + len(rows)
    style: dict[str, Any] = {"color": "#ffffff", "mec": INK, "mew": 1.1, "ms": 6}
    for value, marker, text in (
        (coverage.low, "", "95 % interval, by slide"),
        (coverage.shuffled, "D", "labels shuffled over all slides"),
        (coverage.shuffled_within, "s", "labels shuffled within slides"),
    ):
        if value is None:
            continue
        if marker:
            axes.plot(0.04, y, marker, **style)
        else:
            axes.plot([0, 0.08], [y, y], color=INK, linewidth=6, alpha=0.3, solid_capstyle="butt")
        axes.text(0.11, y, text, size=7.5, color=PALE, va="center")
        y += 0.85
