"""Colours of clusters and labels: told apart by colour-blind people, the same in every picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

_COLOURS = (
    # Okabe and Ito, "Color universal design" (2008), without black, which marks nothing.
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
    (0, 114, 178), (213, 94, 0), (204, 121, 167), (110, 110, 110),
    # Each the farthest from all before it and from white, by the smallest of three distances in
    # CIELAB: as people see who lack red or green cones (Machado, Oliveira and Fernandes, "A
    # physiologically-based model for simulation of color vision deficiency", 2009), and half of
    # that for all others. No two of the 32 come nearer than 12.
    (8, 8, 184), (96, 0, 16), (80, 0, 96), (72, 248, 128),
    (136, 120, 248), (104, 72, 0), (144, 168, 80), (176, 248, 192),
    (56, 224, 232), (176, 0, 152), (64, 40, 72), (0, 80, 56),
    (176, 88, 64), (176, 0, 72), (0, 48, 160), (208, 168, 160),
    (152, 216, 80), (144, 72, 248), (144, 48, 112), (192, 192, 144),
    (120, 160, 248), (48, 152, 24), (160, 208, 200), (48, 96, 192),
)  # fmt: skip

N_COLOURS = len(_COLOURS)
"""Colours that can be told apart."""

_FIRST = 8
"""The colours that labels take while there are few."""


def cluster_colour(cluster: int) -> tuple[int, int, int]:
    """The RGB colour of a cluster; colours repeat after 32 clusters.

    Example:
        >>> cluster_colour(0), cluster_colour(32)
        ((230, 159, 0), (230, 159, 0))
    """
    return _COLOURS[cluster % N_COLOURS]


def label_colours(labels: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """The RGB colours of labels, by label in alphabetical order.

    A label's colour follows from its name, so that it is the same on every slide. Only where two
    labels of one picture would share a colour does the second take the next one.

    Example:
        >>> colours = label_colours(["tumour", "stroma"])
        >>> list(colours), colours["stroma"] == label_colours(["stroma"])["stroma"]
        (['stroma', 'tumour'], True)
    """
    colours: dict[str, tuple[int, int, int]] = {}
    taken: set[int] = set()
    for label in sorted(set(labels)):
        place = hashlib.sha256(label.encode()).digest()[0] % _FIRST
        while place in taken and len(taken) < N_COLOURS:
            place = (place + 1) % N_COLOURS
        taken.add(place)
        colours[label] = cluster_colour(place)
    return colours
