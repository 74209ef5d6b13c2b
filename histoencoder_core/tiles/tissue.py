"""Finding tissue on an overview of a slide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from histoencoder_core.errors import SlideError
from histoencoder_core.settings import TilingSettings
from histoencoder_core.tiles.ink import Ink, find_ink

DARK_GREY = 32
"""A slide of which more than half is darker than this grey value has a dark background."""

MIN_CONTRAST = 10.0
"""Grey values that the sides of Otsu's threshold must differ by; less is noise of empty glass."""

GLASS_GREY = 200
"""Mean grey value from which the lighter side may be glass, which no factor may make tissue of."""


@dataclass(frozen=True)
class Tissue:
    """Where tissue is.

    Attributes:
        mask: uint8 array of shape (height, width), 1 for tissue, 0 for background.
        threshold: The grey value in [0, 255] that parts them; None if there is no tissue to part.
        ink: Where ink is; None on a dark background, where none is looked for.
    """

    mask: np.ndarray
    threshold: int | None
    ink: Ink | None


def find_tissue(overview: np.ndarray, settings: TilingSettings, *, path: Path) -> Tissue:
    """Find tissue by HistoPrep's method: blur, Otsu's threshold times a factor.

    Otsu's method parts any image in two, even empty glass; parts that hardly differ are no tissue.
    Ink is no tissue either, and has no say in the threshold: black ink would move it so far that
    pale tissue is lost. Where nothing but specks is darker than glass, as on a slide that bears
    only ink, the factor would take the glass for tissue, and is left out.

    Args:
        overview: uint8 array of shape (height, width, 3).
        settings: ``tissue``, ``threshold``, ``multiplier``, ``sigma`` and ``background`` are used.
        path: The slide's file, for messages.

    Returns:
        The mask and its threshold, and where ink is.

    Raises:
        SlideError: The background is dark where a bright one was expected, or the other way round.
    """
    grey = cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY)
    dark = float(np.median(grey)) < DARK_GREY
    if dark and settings.background == "bright":
        raise SlideError(
            f"{path}: its background is dark (half of it is darker than grey value {DARK_GREY}), "
            "as in fluorescence; finding tissue as on a brightfield slide would take background "
            "for tissue. If that is what the slide is, ask for it with background = dark.",
            kind="dark-background",
        )
    if settings.background == "dark":
        if not dark:
            raise SlideError(
                f"{path}: its background is bright, but dark was asked for. Leave out background = "
                "dark for this slide.",
                kind="dark-background",
            )
        grey = 255 - grey
    ink = find_ink(overview) if settings.background == "bright" else None
    without_ink = ink is not None and settings.tissue == "without-ink"
    known = 1 - ink.mask if ink is not None and without_ink else np.ones_like(grey)
    grey[known == 0] = 255  # HistoPrep's Otsu leaves out black and white
    multiplier = settings.multiplier
    if settings.threshold is None:
        otsu, lighter, darker = _sides(grey, known, settings.sigma)
        if lighter - darker < MIN_CONTRAST:
            return Tissue(np.zeros_like(grey), None, ink)
        if without_ink and otsu * multiplier >= lighter >= GLASS_GREY:
            multiplier = 1.0
    threshold, mask = _otsu(
        grey, threshold=settings.threshold, multiplier=multiplier, sigma=settings.sigma
    )
    return Tissue(mask & known, threshold, ink)


def _sides(grey: np.ndarray, known: np.ndarray, sigma: float) -> tuple[int, float, float]:
    """Otsu's own threshold, and the mean grey values of what it parts; the same if it does not."""
    if not ((grey > 0) & (grey < 255)).any():
        return 0, 0.0, 0.0
    otsu, mask = _otsu(grey, multiplier=1.0, sigma=sigma)
    lighter, darker = known & (1 - mask), known & mask
    if not lighter.any() or not darker.any():
        return otsu, 0.0, 0.0
    return otsu, cv2.mean(grey, lighter)[0], cv2.mean(grey, darker)[0]


def _otsu(
    grey: np.ndarray, *, multiplier: float, sigma: float, threshold: int | None = None
) -> tuple[int, np.ndarray]:
    """HistoPrep's threshold and mask."""
    from histoencoder_core.tiles.histoprep_functions import (
        get_tissue_mask,
    )  # takes seconds to import

    threshold, mask = get_tissue_mask(
        image=grey, threshold=threshold, multiplier=multiplier, sigma=sigma
    )
    return threshold, mask
