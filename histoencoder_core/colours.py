"""Colours of clusters: told apart by colour-blind people, the same in every picture."""

from __future__ import annotations

import colorsys

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
