"""Finding ink of pens and of tissue-marking dye on an overview of a slide, by its colour.

Absorbances, unlike grey values, stay in proportion whatever the thickness (Beer and Lambert), and
those of a stain and of ink on top of it add up. Haematoxylin, eosin and their mixtures absorb
green light most: Ruifrok & Johnston (2001, Anal Quant Cytol Histol 23:291) measured how much, and
Schreiber et al. (2024, doi 10.1038/s41598-023-50183-4) part tissue from artefacts by it. Ink is
told by what it does instead:

- blue and green ink absorb red light most,
- black ink absorbs all alike,
- red ink absorbs blue and green alike, and hardly any red.

HistoQC and histolab look for pens by colour too, the former with a classifier trained on pictures
of pens, the latter with limits on RGB values of each pen.

Violet ink is haematoxylin's colour and can't be told. Nor can blue, green or red ink on a slide
that isn't stained with eosin: a blue counterstain, Alcian blue, or the collagen of a trichrome
look the same. There, only black ink is looked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

WORKING_SIZE = 2048
"""Largest width or height in pixels at which ink is looked for: a stroke of a pen, half a
millimetre wide, is still about twenty pixels on a slide of five centimetres."""

SEEN = 0.25
"""Absorbance (natural logarithm) in any channel from which a pixel is more than glass."""

STROKE = 11
"""Width in pixels at the working size that the core of ink must have, so that no nucleus, grain
of pigment or speck of dust is ink."""

REACH = 28
"""How many pixels at the working size ink fades out over: it is out of focus, and runs."""

RIM = 3
"""How many pixels at the working size around ink are too faint to be told, and go with it."""

MIN_EOSIN = 0.1
"""Share of pink in all that is not glass or black, below which the stain is not H&E: on H&E slides
it was 0.7 or more, also beside ink; on the same slides in the colours of DAB, none."""


@dataclass(frozen=True)
class Ink:
    """Where ink is.

    Attributes:
        mask: uint8 array of shape (height, width), 1 for ink.
        coloured: Whether ink of other colours than black could be told from the stain.
    """

    mask: np.ndarray
    coloured: bool


def find_ink(overview: np.ndarray) -> Ink:
    """Find ink on a brightfield slide.

    Ink has a core that is beyond doubt in colour, density and width. From there it reaches as far
    as that colour does, however narrow, and a little farther where it is faint.

    Args:
        overview: uint8 array of shape (height, width, 3).

    Returns:
        The ink, in the overview's size.
    """
    red, green, blue = _absorbances(overview)
    seen = np.maximum(np.maximum(red, green), blue) >= SEEN
    by_green = np.maximum(green, 1e-3)
    red_ratio, blue_ratio = red / by_green, blue / by_green

    black = (red_ratio >= 0.75) & (red_ratio < 1.2) & (blue_ratio >= 0.9)
    found = _reach(black & (green >= 1.2), black & seen)

    pink = (red_ratio <= 0.7) & (blue_ratio < 0.85) & (green >= SEEN)
    coloured = bool(pink.any() and pink.sum() >= MIN_EOSIN * (seen & ~found).sum())
    if coloured:
        # Mucin is as blue as ink, but paler. Over tissue, which absorbs green light too, ink is
        # less blue, but darker.
        blue_ink = (red_ratio >= 1.2) & (red >= 0.7) | (red_ratio >= 1.05) & (red >= 0.8)
        green_ink = (red_ratio >= 1.6) & (red >= 0.3)
        faint = (red_ratio >= 1.0) & seen | (red_ratio >= 0.9) & (red >= 0.6)
        found |= _reach(blue_ink | green_ink, faint)
        # Blood and dense eosin absorb more green than blue light.
        faint = (red_ratio <= 0.3) & (blue_ratio >= 0.8) & (blue_ratio <= 1.3) & (green >= 0.5)
        red_ink = (red_ratio <= 0.25) & (blue_ratio >= 0.83) & (green >= 1.0) & faint
        found |= _reach(red_ink, faint)
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * RIM + 1, 2 * RIM + 1))
    rimmed = cv2.dilate(found.astype(np.uint8), brush)
    size = (overview.shape[1], overview.shape[0])
    mask = cv2.resize(rimmed, size, interpolation=cv2.INTER_NEAREST)
    return Ink(mask, coloured)


def _absorbances(overview: np.ndarray) -> list[np.ndarray]:
    """float32 arrays of the working size for red, green and blue; 0 for white."""
    height, width = overview.shape[:2]
    scale = min(1.0, WORKING_SIZE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(overview, size, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), 1.0)  # JPEG's colours are coarser than its grey values
    of_value = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
    return [cv2.LUT(channel, of_value) for channel in cv2.split(small)]


def _reach(core: np.ndarray, faint: np.ndarray) -> np.ndarray:
    """Cores as wide as a stroke, and what is faint and hangs together with one nearby."""
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (STROKE, STROKE))
    wide = cv2.morphologyEx(core.astype(np.uint8), cv2.MORPH_OPEN, brush).astype(bool)
    far = cv2.distanceTransform(1 - wide.astype(np.uint8), cv2.DIST_L2, 3) > REACH
    around = (faint & ~far) | core
    count, parts = cv2.connectedComponents(around.astype(np.uint8), connectivity=8)
    kept = np.zeros(count, bool)
    kept[parts[wide]] = True
    found: np.ndarray = kept[parts]
    return found
