"""Where clusters lie on slides: thumbnails beside the same with the clusters' colours."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure as Drawing

from histoencoder_core.decoding.images import read_image
from histoencoder_core.errors import SlideError
from histoencoder_core.report.facts import NO_CLUSTERS, counted, read_facts, rows_of
from histoencoder_core.report.figure import INK, Figure, save_figure, short
from histoencoder_core.report.legends import (
    ROW_INCHES,
    draw_key,
    groups_of,
    key_rows,
    read_clusters,
)
from histoencoder_core.store import Store, layout

log = logging.getLogger(__name__)

NAME = "overlays"
TITLE = "Where do the clusters lie on the slides?"

MOST_SLIDES = 12

_BOX = 340
"""Largest width and height of a picture in pixels."""

_GAP, _HEAD = 12, 26
"""Pixels between pictures, and above them for the slide's name."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Pair:
    """A slide and its clusters, as small pictures of one size.

    Attributes:
        slide: The slide's id.
        bare: uint8 array of shape (height, width, 3).
        coloured: The same with the clusters' colours.
    """

    slide: str
    bare: Pixels
    coloured: Pixels


def overlays(store: Store, k: int | None = None) -> Figure:
    """Draw slides beside their clusters.

    Args:
        store: The store, with a catalog.
        k: Not used but checked: the pictures were drawn when the slides were assigned, for the
            model's largest K that can be read.

    Returns:
        The figure, of at most 12 slides taken evenly; none if no tile's place is known.

    Raises:
        SettingsError: The model has no such number of clusters.
        StoreError: There is no catalog, or another program's file stands in the way.
    """
    facts = read_facts(store)
    if not facts.ks:
        return Figure(NAME, TITLE, missing=NO_CLUSTERS)
    asked, k = facts.k(k, readable=True), facts.k(None, readable=True)
    name = f"{NAME}_k{k}"
    current = rows_of(store, "SELECT DISTINCT slide FROM cluster_counts ORDER BY slide")
    names = [
        row["slide"]
        for row in current
        if store.slide(row["slide"]).file(layout.THUMBNAIL_CLUSTERS).exists()
    ]
    if not names:
        missing = "No slide has a picture of its clusters: the places of its tiles are not known."
        return Figure(name, TITLE, missing=missing, untrained=facts.untrained)
    rows = np.linspace(0, len(names) - 1, min(len(names), MOST_SLIDES)).round().astype(int)
    shown = [names[row] for row in rows]
    part = (
        f" Shown are {len(shown)} of {counted(len(names), 'slide')}."
        if len(shown) < len(names)
        else ""
    )
    other = f" These pictures are always of {k} clusters." if asked != k else ""
    subtitle = f"Each slide's thumbnail, and beside it the same with its {k} clusters.{part}{other}"
    figure = Figure(
        name=name,
        title=TITLE,
        caption=(
            "Clusters are made without any knowledge of a tile's place. Where their colours follow "
            "the borders of tissues all the same, they show structure; where they make a chequered "
            "pattern, the encoder does not tell these tissues apart. Colours are laid over the "
            f"slide at half strength, so that they look duller than in the key.{part}{other} The "
            f"full picture of each slide is {layout.THUMBNAIL_CLUSTERS} in its folder. "
            f"{facts.left_out}"
        ).strip(),
        alt=f"Thumbnails of {counted(len(shown), 'slide')} beside their clusters. {subtitle}",
        numbers={"k": k, "slides": len(names), "drawn": len(shown)},
        untrained=facts.untrained,
        photographic=True,
    )
    groups = groups_of(read_clusters(store, k))
    return save_figure(
        store,
        figure,
        subtitle=subtitle,
        source=facts.source(k),
        drawn=[groups, [_content(store, slide) for slide in shown]],
        draw=lambda: _draw(store, shown, groups),
    )


def _content(store: Store, slide: str) -> list[str | None]:
    folder = store.slide(slide)
    stamps = (folder.stamp("slides"), folder.stamp("clusters"))
    return [slide, *(None if stamp is None else stamp.fingerprint for stamp in stamps)]


def _draw(store: Store, slides: list[str], groups: list[tuple[str, list[int]]]) -> Drawing:
    pairs = [pair for slide in slides if (pair := _pair(store, slide)) is not None]
    a_row = 3 if len(pairs) > 4 else 2
    columns = min(a_row, max(1, len(pairs)))
    pitch = 2 * _BOX + 3 * _GAP
    rows = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    heights = [_HEAD + max(pair.bare.shape[0] for pair in row) + _GAP for row in rows]
    canvas = np.full((max(1, sum(heights)), columns * pitch, 3), 255, np.uint8)
    width = 9.4 * columns / a_row
    height = width * canvas.shape[0] / canvas.shape[1]
    total = max(height, ROW_INCHES * key_rows(groups))
    drawing = Drawing(figsize=(max(width + 2.4, 7), total), layout="constrained")
    axes, key = drawing.subplots(1, 2, width_ratios=[width, 2.2])
    top = 0
    for row, tall in zip(rows, heights, strict=True):
        for i, pair in enumerate(row):
            left = i * pitch + _GAP
            high, wide = pair.bare.shape[:2]
            for x, pixels in ((left, pair.bare), (left + wide + _GAP // 2, pair.coloured)):
                canvas[top + _HEAD : top + _HEAD + high, x : x + wide] = pixels
            axes.text(
                left, top + _HEAD * 0.55, short(pair.slide, 40), size=7.5, va="center", color=INK
            )
        top += tall
    axes.imshow(canvas)
    axes.set_anchor("NW")
    axes.axis("off")
    draw_key(key, groups, rows=total / ROW_INCHES)
    return drawing


def _pair(store: Store, slide: str) -> _Pair | None:
    """A slide's two pictures; None if they can't be read."""
    folder = store.slide(slide)
    try:
        coloured = _small(read_image(folder.file(layout.THUMBNAIL_CLUSTERS)))
        bare = folder.file(layout.THUMBNAIL)
        # A folder of tiles has no thumbnail: its clusters are drawn on white.
        blank = np.full(coloured.shape, 255, np.uint8)
        pixels = _small(read_image(bare)) if bare.exists() else blank
    except SlideError as error:
        log.warning("%s: left out of the overlays: %s", slide, error)
        return None
    size = (coloured.shape[1], coloured.shape[0])
    return _Pair(slide, np.asarray(cv2.resize(pixels, size), np.uint8), coloured)


def _small(pixels: Pixels) -> Pixels:
    scale = min(1.0, _BOX / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
