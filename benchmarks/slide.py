"""Make the slide that the benchmarks read: flipped copies of one region, some of them blank.

A grid of 10 × 8 copies of CMU-1-Small-Region (22,200 × 23,736 px, 0.499 µm/px), each flipped at
random, 35 % of the cells blank glass, in JPEG tiles of quality 80 with a pyramid. The same region
and seed give the same pixels.

Usage: python benchmarks/slide.py CMU-1-Small-Region.svs OUTPUT.tiff [--columns 10] [--rows 8]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import tifffile

from histoencoder_core.slides import open_slide
from histoencoder_core.store.files import atomic_path

MPP = 0.499
BLANK_SHARE = 0.35
GLASS = 243
JPEG_QUALITY = 80
STORED_TILE_PX = 256
SMALLEST_LEVEL_PX = 1024


def make_slide(region: Path, output: Path, *, columns: int = 10, rows: int = 8) -> None:
    """Write the benchmark slide.

    Args:
        region: The slide that is copied; its whole level 0 is one cell.
        output: The TIFF to write.
        columns: Cells in a row.
        rows: Rows of cells.
    """
    with open_slide(region) as slide:
        cell = slide.read((0, 0, slide.width, slide.height))
    rng = np.random.default_rng(0)
    blank = np.zeros(columns * rows, bool)
    blank[: round(BLANK_SHARE * len(blank))] = True
    rng.shuffle(blank)
    height, width = cell.shape[:2]
    pixels = np.full((rows * height, columns * width, 3), GLASS, np.uint8)
    for index in np.flatnonzero(~blank):
        row, column = divmod(int(index), columns)
        copy = cell[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
        pixels[row * height :, column * width :][:height, :width] = copy
    # A whole pyramid of this size is past what a classic TIFF's offsets are meant for.
    with atomic_path(output) as part, tifffile.TiffWriter(part, bigtiff=True) as file:
        level = 0
        while level == 0 or max(pixels.shape) >= SMALLEST_LEVEL_PX:
            file.write(
                pixels,
                photometric="rgb",
                subsampling=(2, 2),
                tile=(STORED_TILE_PX, STORED_TILE_PX),
                compression="jpeg",
                compressionargs={"level": JPEG_QUALITY},
                resolution=(1e4 / MPP / 2**level, 1e4 / MPP / 2**level),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
                metadata=None,
            )
            pixels = cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            level += 1


def main() -> None:
    """Read the command line and write the slide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("region", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8)
    arguments = parser.parse_args()
    make_slide(arguments.region, arguments.output, columns=arguments.columns, rows=arguments.rows)


if __name__ == "__main__":
    main()
