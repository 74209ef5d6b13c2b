"""What a cluster's colour means: keys beside figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from histoencoder_core.report.facts import rows_of
from histoencoder_core.report.figure import PALE, colour_of, hatch_of, ink_on, short
from histoencoder_core.store import Store

PER_ROW = 6
ROW_INCHES = 0.27
"""Height of a row of a key."""

UNLABELLED = "no labelled tiles"


@dataclass(frozen=True)
class Cluster:
    """A cluster and what it is made of.

    Attributes:
        number: The cluster's number.
        tiles: Number of its tiles.
        labelled_tiles: How many of them have a label.
        label: Their most frequent label; None without labelled tiles.
        purity: Share of the labelled tiles with that label.
    """

    number: int
    tiles: int
    labelled_tiles: int
    label: str | None
    purity: float | None


def read_clusters(store: Store, k: int) -> list[Cluster]:
    """The clusters of a K, grouped by their label, the purest of each label first."""
    rows = rows_of(
        store,
        f"FROM cluster_purity({k}) "
        "SELECT cluster AS number, tiles, labelled_tiles, label, purity "
        "ORDER BY label NULLS LAST, purity DESC, labelled_tiles DESC, cluster",
    )
    return [Cluster(**row) for row in rows]


def groups_of(clusters: Sequence[Cluster]) -> list[tuple[str, list[int]]]:
    """Headings and the numbers of the clusters under each, in the order given.

    Without any label there is one heading for all.
    """
    if all(cluster.label is None for cluster in clusters):
        return [("Clusters", sorted(cluster.number for cluster in clusters))]
    groups: dict[str, list[int]] = {}
    for cluster in clusters:
        groups.setdefault(cluster.label or UNLABELLED, []).append(cluster.number)
    return list(groups.items())


def plate(cluster: int) -> dict[str, object] | None:
    """What a cluster's number is written on: nothing, unless a hatch would run through it."""
    if not hatch_of(cluster):
        return None
    return {"facecolor": colour_of(cluster), "edgecolor": "none", "pad": 0.8}


def key_rows(groups: Sequence[tuple[str, Sequence[int]]], per_row: int = PER_ROW) -> int:
    """Number of rows that a key takes."""
    return sum(1 + -(-len(numbers) // per_row) for _, numbers in groups)


def draw_key(
    axes: Axes, groups: Sequence[tuple[str, Sequence[int]]], *, rows: float, per_row: int = PER_ROW
) -> None:
    """Draw a square with its number for each cluster, under headings, from the top.

    Args:
        axes: Where; its own axes are hidden.
        groups: Headings, and the clusters under each.
        rows: Height of the axes in rows.
        per_row: Clusters a row.
    """
    axes.set(xlim=(0, per_row), ylim=(rows, 0))
    axes.axis("off")
    y = 0.0
    for heading, numbers in groups:
        axes.text(0, y + 0.62, short(heading, 28), size=8, color=PALE, va="center")
        y += 1
        for i, number in enumerate(numbers):
            corner = (i % per_row + 0.04, y + i // per_row + 0.06)
            axes.add_patch(
                Rectangle(
                    corner, 0.92, 0.88, facecolor=colour_of(number), hatch=hatch_of(number),
                    edgecolor="#ffffff", linewidth=0,
                )
            )  # fmt: skip
            axes.text(
                corner[0] + 0.46, corner[1] + 0.46, str(number), size=7.5, ha="center", va="center",
                color=ink_on(colour_of(number)), bbox=plate(number),
            )  # fmt: skip
        y += -(-len(numbers) // per_row)
