"""What clusters look like: the tiles nearest to each centroid."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import Rectangle

from histoencoder_core.errors import ClusterError
from histoencoder_core.montage import GAP, Pixels, montage
from histoencoder_core.report.facts import NO_CLUSTERS, counted, percent, read_facts
from histoencoder_core.report.figure import (
    PALE,
    Figure,
    colour_of,
    hatch_of,
    ink_on,
    save_figure,
    short,
)
from histoencoder_core.report.legends import Cluster, plate, read_clusters
from histoencoder_core.similar import prototypes
from histoencoder_core.slides import read_description
from histoencoder_core.store import Store
from histoencoder_core.tiles import tile_source

NAME = "montages"
TITLE = "What does each cluster look like?"

MOST_CLUSTERS = 32
SIDE = 112
"""Width and height of a tile in pixels."""

_TILES = 6
"""Tiles a cluster; twice as many where clusters stand in one column."""

_ONE_COLUMN = 8
"""Clusters that stand in one column."""

_TEXT_CELLS = 2
"""Width of the text beside a strip, in tiles."""

_BEFORE, _BOX = 0.22 * SIDE, 0.4 * SIDE
"""Pixels left of a cluster's number, and width of the box it stands in."""


def montages(store: Store, k: int | None = None) -> Figure:
    """Draw the tiles nearest to each cluster's centroid.

    Args:
        store: The store, with a catalog.
        k: Number of clusters; the model's largest that can be read if not given. Of more than 32
            the 32 with the most tiles are shown.

    Returns:
        The figure; none if no slide's distances to centroids are known.

    Raises:
        SettingsError: The model has no such number of clusters.
        StoreError: There is no catalog, or another program's file stands in the way.
    """
    facts = read_facts(store)
    if not facts.ks or facts.model is None:
        return Figure(NAME, TITLE, missing=NO_CLUSTERS)
    k = facts.k(k, readable=True)
    name = f"{NAME}_k{k}"
    known = read_clusters(store, k)
    largest = sorted(known, key=lambda c: (-c.tiles, c.number))[:MOST_CLUSTERS]
    clusters = [cluster for cluster in known if cluster in largest]
    columns = 1 if len(clusters) <= _ONE_COLUMN else 2
    tiles = 2 * _TILES // columns
    numbers = [cluster.number for cluster in clusters]
    try:
        found = prototypes(store, facts.model, k, clusters=numbers, count=tiles)
    except ClusterError as error:
        return Figure(name, TITLE, missing=str(error), untrained=facts.untrained)
    chosen = [[(tile.slide, tile.tile) for tile in found[number]] for number in numbers]
    slides = sorted({slide for strip in chosen for slide, _ in strip})
    contents = [_content(store, slide) for slide in slides]
    if not any(readable for _, readable in contents):
        missing = "None of its tiles can be read: neither their images nor their slides are there."
        return Figure(name, TITLE, missing=missing, untrained=facts.untrained)
    part = (
        f" Shown are the {MOST_CLUSTERS} clusters of {k} that have the most tiles."
        if len(clusters) < len(known)
        else ""
    )
    subtitle = (
        "The tiles nearest to each cluster's centre: its most typical ones, not a random draw."
        f"{part}"
    )
    figure = Figure(
        name=name,
        title=TITLE,
        caption=(
            "Each strip is a cluster, with its number in the colour that it has in all figures, "
            "the most frequent label of its labelled tiles, the share of them that carry it, and "
            "its number of tiles. The tiles shown are those nearest to the cluster's centre, from "
            "several slides where there are some, so that they look more alike than the cluster is "
            f"as a whole.{part} A grey box with a cross is a tile whose slide can't be read. "
            f"{facts.left_out}"
        ).strip(),
        alt=f"Strips of {tiles} tiles for {len(clusters)} clusters. {subtitle}",
        numbers={"k": k, "clusters": len(clusters), "slides": len(slides)},
        untrained=facts.untrained,
        photographic=True,
    )
    return save_figure(
        store,
        figure,
        subtitle=subtitle,
        source=facts.source(k),
        drawn=[
            [asdict(cluster) for cluster in clusters],
            chosen,
            contents,
        ],
        draw=lambda: _draw(store, clusters, chosen, columns, tiles),
    )


def _content(store: Store, slide: str) -> tuple[str | None, bool]:
    """What a slide's tiles were when they were clustered, and whether they can be read now."""
    folder = store.slide(slide)
    stamp, description = folder.stamp("clusters"), read_description(folder)
    there = description is None or Path(description.path).exists()
    readable = there and tile_source(store, slide) is not None
    return None if stamp is None else stamp.fingerprint, readable


def _draw(
    store: Store,
    clusters: list[Cluster],
    chosen: list[list[tuple[str, str]]],
    columns: int,
    tiles: int,
) -> Drawing:
    rows = -(-len(clusters) // columns)
    cells: list[tuple[str, str] | None] = []
    for row in range(rows):
        for strip in chosen[row::rows]:  # from top to bottom, then the next column
            cells += [None] * _TEXT_CELLS + strip + [None] * (tiles - len(strip))
        cells += [None] * ((_TEXT_CELLS + tiles) * (columns - len(chosen[row::rows])))
    pixels: Pixels = montage(store, cells, columns=columns * (_TEXT_CELLS + tiles), side=SIDE)
    height, width = pixels.shape[:2]
    drawing = Drawing(figsize=(11.8, 11.6 * height / width + 0.1), layout="constrained")
    axes = drawing.subplots()
    axes.imshow(pixels)
    axes.axis("off")
    pitch = SIDE + GAP
    for i, cluster in enumerate(clusters):
        left = _BEFORE + i // rows * (_TEXT_CELLS + tiles) * pitch
        _tell(axes, cluster, left, GAP + i % rows * pitch)
    return drawing


def _tell(axes: Axes, cluster: Cluster, left: float, top: float) -> None:
    """Write what a cluster is beside its strip."""
    number = cluster.number
    axes.add_patch(
        Rectangle(
            (left, top), _BOX, SIDE - 1, facecolor=colour_of(number),
            hatch=hatch_of(number), edgecolor="#ffffff", linewidth=0,
        )
    )  # fmt: skip
    axes.text(
        left + _BOX / 2, top + SIDE / 2, str(number), size=12, weight="bold", ha="center",
        va="center", color=ink_on(colour_of(number)), bbox=plate(number),
    )  # fmt: skip
    x = left + _BOX + 0.1 * SIDE
    told = ["no label"] if cluster.label is None else [short(cluster.label, 15)]
    told += [] if cluster.purity is None else [f"{percent(cluster.purity)} pure"]
    told.append(counted(cluster.tiles, "tile"))
    for line, text in enumerate(told):
        style: dict[str, Any] = (
            {"weight": "bold"} if line == 0 else {"color": PALE} if text == told[-1] else {}
        )
        y = top + (0.5 + 0.26 * (line - (len(told) - 1) / 2)) * SIDE
        axes.text(x, y, text, size=7.5, va="center", **style)
