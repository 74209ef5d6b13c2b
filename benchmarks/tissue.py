"""Measure how much ink passes for tissue and how much tissue is lost, beside Otsu alone.

    python benchmarks/tissue.py

``HISTOENCODER_TEST_DATA`` names the folder of public slides. Prints a JSON line for each measure:

- ``pen``: pictures that bear ink, with a mask of it. ``ink_as_tissue`` is the share of the ink's
  pixels that the method takes for tissue; ``tissue_lost`` the share of Otsu's tissue outside of the
  mask that it does not, and ``tissue_lost_beyond_rim`` the same without a rim of 1 % of the
  picture's size around the mask, since masks end where ink can still be seen; ``glass_as_tissue``
  the share of the rest, which is not Otsu's tissue, that it takes for tissue.
- ``no_pen``: the share of Otsu's tissue that is lost where there is no pen.
- ``drawn``: strokes drawn on slides, whose place is known: the share of ink taken for tissue, over
  tissue and on glass, and the share of tissue lost elsewhere, of that found without the stroke.
- ``other_stain``: the slides in colours of other stains: the share of tissue taken for ink.
- ``speed``: seconds for an overview of the largest size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from about import about

from histoencoder_core.demo.synthetic import make_synthetic_cohort
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import open_slide
from histoencoder_core.tiles.tissue import Tissue, find_tissue

METHODS = ("otsu", "without-ink")

OUTLINES = {
    "histoqc_pen_green.png": [[
        (172, 448), (188, 440), (206, 448), (208, 466), (192, 480), (174, 472),
    ]],
    "histoprep_slide_with_ink.jpeg": [[
        (3640, 905), (3655, 875), (3700, 865), (3728, 805), (3775, 775), (3798, 765), (3800, 715),
        (3830, 700), (3872, 700), (3900, 722), (3932, 745), (3938, 800), (3962, 850), (3985, 890),
        (4025, 898), (4028, 958), (3648, 912),
    ]],
}  # fmt: skip
"""Ink that no mask tells of, in pixels: drawn by hand around what is blue to the eye."""

WITHOUT_PEN = (
    "slides/CMU-1-Small-Region.svs",  # bears green dye on its margins
    "slides/histoprep_slide.jpeg",
    "slides/histoprep_tma_spots.jpeg",
    "slides/rationai_CMU-1-small.tiff",
)

PENS = {
    "green": (1.6, 0.55, 0.65),  # as on histoqc_pen_green.png
    "blue": (1.9, 1.4, 0.5),  # as on histoprep_slide_with_ink.jpeg
    "black": (2.3, 2.5, 2.8),  # as on histoqc_pen_black.png
    "red": (0.06, 1.5, 1.3),  # a guess, as is violet
    "violet": (1.2, 1.5, 0.35),
}
"""Absorbance of ink in red, green and blue, as natural logarithm."""

HAEMATOXYLIN, EOSIN, DAB = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78)
"""Ruifrok & Johnston's vectors."""

STAINS = {
    "haematoxylin, DAB": (HAEMATOXYLIN, DAB),
    "blue haematoxylin, DAB": ((0.75, 0.60, 0.27), DAB),
    "blue haematoxylin alone": ((0.75, 0.60, 0.27), (0.75, 0.60, 0.27)),
    "haematoxylin, AEC": (HAEMATOXYLIN, (0.27, 0.68, 0.68)),
    "haematoxylin, saffron": (HAEMATOXYLIN, (0.10, 0.60, 0.75)),
    "haematoxylin, aniline blue": (HAEMATOXYLIN, (0.79, 0.59, 0.18)),
    "azure, eosin": ((0.83, 0.51, 0.20), EOSIN),
}
"""What takes the places of haematoxylin and eosin."""

DRAWN_PX = 1600
"""Largest width or height of the pictures that are drawn on and stained anew."""


def load(path: Path) -> np.ndarray:
    """A picture or a slide's overview, uint8 RGB."""
    if path.suffix in {".png", ".tif"}:
        return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    with open_slide(path) as slide:
        return slide.overview(TilingSettings().max_dimension)


def shrunk(pixels: np.ndarray) -> np.ndarray:
    """A picture no larger than `DRAWN_PX`."""
    scale = min(1.0, DRAWN_PX / max(pixels.shape[:2]))
    return cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def tissue_of(pixels: np.ndarray, method: str) -> Tissue:
    """What a method finds."""
    return find_tissue(pixels, TilingSettings(tissue=method), path=Path("picture"))


def share(part: np.ndarray, whole: np.ndarray) -> float | None:
    """The share of `whole` that `part` is."""
    count = np.count_nonzero(whole)
    return round(np.count_nonzero(part & whole) / count, 5) if count else None


def known_ink(folder: Path, path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Where ink is, by the picture's mask and by outline."""
    ink = np.zeros(shape, np.uint8)
    mask = folder / "ink" / f"{path.stem}_mask.png"
    if mask.exists():
        ink = (cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE) > 127).astype(np.uint8)
    for outline in OUTLINES.get(path.name, []):
        cv2.fillPoly(ink, [np.array(outline, np.int32)], 1)
    return ink == 1


def measure_pens(folder: Path, say: Callable[..., None]) -> None:
    """Pictures that bear ink."""
    names = ("ink/histoqc_pen_black.png", "ink/histoqc_pen_green.png")
    for name in (*names, "slides/histoprep_slide_with_ink.jpeg"):
        pixels = load(folder / name)
        ink = known_ink(folder, folder / name, pixels.shape[:2])
        rim = round(max(ink.shape) / 100)
        brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * rim + 1, 2 * rim + 1))
        with_rim = cv2.dilate(ink.astype(np.uint8), brush) == 1
        otsu = tissue_of(pixels, "otsu").mask == 1
        for method in METHODS:
            found = tissue_of(pixels, method).mask == 1
            say(
                "pen",
                picture=name,
                method=method,
                ink_as_tissue=share(found, ink),
                tissue_lost=share(~found, otsu & ~ink),
                tissue_lost_beyond_rim=share(~found, otsu & ~with_rim),
                glass_as_tissue=share(found, ~otsu & ~ink),
            )


def measure_without_pen(folder: Path, say: Callable[..., None]) -> None:
    """Pictures that bear none."""
    sets = {name: [folder / name] for name in WITHOUT_PEN}
    # Empty tiles are apart: to Otsu's threshold, their glass can be tissue.
    for classes in ("0[1-7]*", "08_EMPTY"):
        paths = sorted((folder / "tiles" / "kather2016_24").glob(f"{classes}/*.tif"))
        sets[f"tiles/kather2016_24/{classes}"] = paths
    with tempfile.TemporaryDirectory() as synthetic:
        sets["the demo's synthetic cohort"] = make_synthetic_cohort(Path(synthetic))
        for name, paths in sets.items():
            lost = total = 0
            for path in paths:
                pixels = load(path)
                otsu, found = (tissue_of(pixels, method).mask == 1 for method in METHODS)
                lost += np.count_nonzero(otsu & ~found)
                total += np.count_nonzero(otsu)
            say("no_pen", pictures=name, count=len(paths), tissue_lost=round(lost / total, 5))


def stroke(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """How thick the ink of a bent stroke lies, about 1 on average; float32 of a picture's shape."""
    height, width = shape
    wide = max(12, max(shape) // 40)
    corners = rng.uniform((0.1 * width, 0.1 * height), (0.9 * width, 0.9 * height), (4, 2))
    t = np.linspace(0, 1, 60)[:, None]
    weights = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
    line = sum(weight * corner for weight, corner in zip(weights, corners, strict=True))
    drawn = np.zeros(shape, np.uint8)
    cv2.polylines(drawn, [np.rint(line).astype(np.int32)], isClosed=False, color=1, thickness=wide)
    # Pens are out of focus, and their ink is uneven.
    soft = cv2.GaussianBlur(drawn.astype(np.float32), (0, 0), wide / 10)
    uneven = rng.uniform(0.6, 1.2, (8, 8)).astype(np.float32)
    return soft * cv2.resize(uneven, (width, height), interpolation=cv2.INTER_CUBIC)


def measure_drawn(pictures: list[np.ndarray], seeds: int, say: Callable[..., None]) -> None:
    """Strokes drawn on slides."""
    clean = [{m: tissue_of(pixels, m).mask == 1 for m in METHODS} for pixels in pictures]
    for pen, method in itertools.product(PENS, METHODS):
        told: dict[str, list[float]] = {"over_tissue": [], "on_glass": [], "tissue_lost": []}
        for pixels, before in zip(pictures, clean, strict=True):
            for seed in range(seeds):
                thick = stroke(pixels.shape[:2], np.random.default_rng(seed))[..., None]
                inked = pixels * np.exp(-thick * np.array(PENS[pen], np.float32))
                ink = thick[..., 0] >= 0.3
                found = tissue_of(inked.astype(np.uint8), method).mask == 1
                shares = {
                    "over_tissue": share(found, ink & before["otsu"]),
                    "on_glass": share(found, ink & ~before["otsu"]),
                    "tissue_lost": share(~found, before[method] & ~ink),
                }
                for name, value in shares.items():
                    if value is not None:
                        told[name].append(value)
        mean = {name: round(float(np.mean(values)), 4) for name, values in told.items()}
        worst = {f"{name}_worst": max(values) for name, values in told.items()}
        say("drawn", pen=pen, method=method, count=len(pictures) * seeds, **mean, **worst)


def stained(pixels: np.ndarray, first: tuple[float, ...], second: tuple[float, ...]) -> np.ndarray:
    """A slide with other stains in the places of haematoxylin and eosin."""

    def unit(*vectors: tuple[float, ...]) -> np.ndarray:
        return np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)

    absorbed = -np.log((pixels.astype(np.float32) + 1) / 256)
    amounts = np.clip(absorbed @ np.linalg.inv(unit(HAEMATOXYLIN, EOSIN, DAB)), 0, None)
    return (255 * np.exp(-amounts[..., :2] @ unit(first, second))).astype(np.uint8)


def measure_stains(pictures: list[np.ndarray], say: Callable[..., None]) -> None:
    """Slides in the colours of other stains."""
    for stain, vectors in STAINS.items():
        shares, coloured = [], 0
        for pixels in pictures:
            tissue = tissue_of(stained(pixels, *vectors), "otsu")
            assert tissue.ink is not None
            shares.append(share(tissue.ink.mask == 1, tissue.mask == 1) or 0.0)
            coloured += tissue.ink.coloured
        told = {"mean": round(float(np.mean(shares)), 4), "worst": max(shares)}
        say("other_stain", stain=stain, tissue_as_ink=told, coloured=coloured, count=len(pictures))


def measure_speed(pixels: np.ndarray, say: Callable[..., None]) -> None:
    """An overview of the largest size."""
    size = TilingSettings().max_dimension
    large = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)
    for method in METHODS:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            tissue_of(large, method)
            seconds.append(time.perf_counter() - started)
        say("speed", method=method, size=size, seconds=round(min(seconds), 3))


def measures(folder: Path, seeds: int) -> Iterator[Callable[[Callable[..., None]], None]]:
    """All that is measured, in the order of the documentation."""
    yield lambda say: measure_pens(folder, say)
    yield lambda say: measure_without_pen(folder, say)
    pictures = [shrunk(load(folder / name)) for name in WITHOUT_PEN]
    yield lambda say: measure_drawn(pictures, seeds, say)
    yield lambda say: measure_stains(pictures, say)
    yield lambda say: measure_speed(pictures[1], say)


def main() -> None:
    """Read the command line, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="Strokes a pen and slide.")
    asked = parser.parse_args()
    folder = os.environ.get("HISTOENCODER_TEST_DATA")
    if not folder:
        sys.exit("HISTOENCODER_TEST_DATA must name the folder of public slides.")
    measured_on = about(opencv="opencv-python-headless", histoprep="histoprep")

    def say(name: str, **told: Any) -> None:
        print(json.dumps({"measure": name, **told, **measured_on}), flush=True)

    for measure in measures(Path(folder), asked.seeds):
        measure(say)


if __name__ == "__main__":
    main()
