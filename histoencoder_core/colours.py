"""Colours of clusters and labels: told apart by colour-blind people, the same in every picture."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Iterable

# Okabe and Ito, "Color universal design" (2008), without black, which marks nothing.
_BASE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (110, 110, 110),
)
_LIGHTNESS = (1.0, 0.6, 1.35, 0.4)


def cluster_colour(cluster: int) -> tuple[int, int, int]:
    """The RGB colour of a cluster; the hues repeat in other shades after eight clusters.

    Example:
        >>> cluster_colour(0), cluster_colour(8)
        ((230, 159, 0), (138, 95, 0))
    """
    red, green, blue = _BASE[cluster % len(_BASE)]
    shade = _LIGHTNESS[cluster // len(_BASE) % len(_LIGHTNESS)]
    hue, light, saturation = colorsys.rgb_to_hls(red / 255, green / 255, blue / 255)
    shaded = colorsys.hls_to_rgb(hue, min(0.92, light * shade), saturation)
    return round(255 * shaded[0]), round(255 * shaded[1]), round(255 * shaded[2])


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
        place = hashlib.sha256(label.encode()).digest()[0] % len(_BASE)
        while place in taken and len(taken) < len(_BASE) * len(_LIGHTNESS):
            place = (place + 1) % (len(_BASE) * len(_LIGHTNESS))
        taken.add(place)
        colours[label] = cluster_colour(place)
    return colours
