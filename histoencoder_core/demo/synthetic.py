"""A cohort of drawn slides with known tissue classes: H&E-like, but of nobody.

Every pixel follows from the seed, so the slides, their annotations and their sheet can be made
anywhere, shared freely and compared byte by byte. The textures imitate what tells tissues apart at
0.5 µm/px (the size, shape and packing of nuclei, glands, fibres and bubbles); they are no model of
any disease.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import cv2
import numpy as np
import tifffile
from shapely import MultiPolygon, Polygon, make_valid, set_precision, union_all
from shapely.geometry import mapping

from histoencoder_core.store.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt
    from shapely.geometry.base import BaseGeometry

    Floats = npt.NDArray[np.float32]
    Bytes = npt.NDArray[np.uint8]

CLASSES: Final[dict[str, tuple[int, int, int]]] = {
    "epithelium": (46, 160, 67),
    "stroma": (214, 96, 160),
    "lymphocytes": (63, 81, 181),
    "adipose": (240, 196, 25),
    "mucus": (64, 196, 212),
    "tumour": (200, 30, 30),
}
"""The tissue classes and the colour (RGB) of each in the annotations."""

WIDTH_PX: Final = 2560
HEIGHT_PX: Final = 2048
MPP: Final = 0.5
"""Resolution of level 0 in µm/px."""
LEVELS: Final = 3
TILE_PX: Final = 512
"""Width and height in pixels of the tiles that `labels.csv` labels."""
STRIDE_PX: Final = 256

_MAP_SCALE = 4
"""Level-0 pixels per pixel of the map of classes."""
_LEAST_AREA = 1e4
"""Area in square level-0 pixels below which a piece of tissue is not worth an outline."""
_STORED_TILE_PX = 256
_PIXELS_PER_CM = 20000

# Every class is on three slides or more, so that no class stands for one slide's stain. The third
# and sixth slide, which are the test split, have all six classes between them.
_PLANS: Final[tuple[tuple[str, ...], ...]] = (
    ("tumour", "stroma", "lymphocytes"),
    ("epithelium", "stroma", "mucus", "adipose"),
    ("mucus", "tumour", "lymphocytes"),
    ("stroma", "adipose", "epithelium", "tumour"),
    ("tumour", "mucus", "lymphocytes", "epithelium"),
    ("epithelium", "adipose", "stroma", "lymphocytes"),
)


@dataclass(frozen=True)
class Stain:
    """How one slide was stained and scanned.

    Attributes:
        vectors: Optical density in R, G and B of one unit of haematoxylin, eosin and mucin;
            float32, 3 x 3.
        amounts: Factor on the amount of each; float32, 3.
        white: Colour of bare glass in [0, 255]; float32, 3.
        blur: Standard deviation in pixels of the optics' blur.
        noise: Standard deviation of the camera's noise in grey values.
    """

    vectors: Floats
    amounts: Floats
    white: Floats
    blur: float
    noise: float


def make_synthetic_cohort(folder: Path, *, slides: int = 6, seed: int = 0) -> list[Path]:
    """Draw a cohort of labelled slides.

    Writes into `folder`:

    - ``synthetic-01.tiff`` and so on: tiled pyramids, 2560 x 2048 px RGB at 0.5 µm/px, three
      levels;
    - ``slides.csv``: ``slide,mpp,patient,site,scanner,stain,split``, with ``mpp`` left empty;
    - ``annotations/<slide>.geojson``: outlines of the classes in level-0 pixels, as QuPath writes
      them. The last slide but one has none, as a slide nobody has looked at yet;
    - ``annotations/labels.csv``: ``slide,x,y,label`` for the last slide but two instead, one row
      per 512 px tile, 256 px apart, that is at least half tissue; ``x`` and ``y`` are the tile's
      top left corner in level-0 pixels, the label is the class with the largest share.

    The same seed gives the same bytes with the same versions of NumPy, OpenCV and zlib. A slide
    does not depend on how many there are.

    Args:
        folder: Where to write; made if it is not there. Files of these names are replaced.
        slides: Number of slides, at least 1. Six or more show every class at least three times.
        seed: Seed of everything drawn, 0 or more.

    Returns:
        Paths of the slides, in order.

    Raises:
        ValueError: `slides` is less than 1, or `seed` is negative.
    """
    if slides < 1 or seed < 0:
        raise ValueError(f"slides must be 1 or more and seed 0 or more, not {slides} and {seed}")
    annotations = folder / "annotations"
    annotations.mkdir(parents=True, exist_ok=True)
    names = [f"synthetic-{index + 1:02d}" for index in range(slides)]
    # A slide is written last: whoever watches the folder for slides finds all about it.
    _write_csv(folder / "slides.csv", _sheet(names))
    paths = []
    for index, name in enumerate(names):
        rng = np.random.default_rng([seed, index])
        classes = _PLANS[index % len(_PLANS)]
        class_map = _draw_class_map(rng, len(classes))
        if slides >= 3 and index == slides - 3:
            _write_csv(annotations / "labels.csv", _tile_labels(name, class_map, classes))
        elif slides < 2 or index != slides - 2:
            collection = _annotate(class_map, classes)
            _write_text(annotations / f"{name}.geojson", json.dumps(collection) + "\n")
        image = _draw_slide(rng, class_map, classes, _draw_stain(rng, scanner=_scanner(index)))
        paths.append(folder / f"{name}.tiff")
        _write_pyramid(paths[-1], image)
    return paths


def _sheet(names: Sequence[str]) -> Iterator[Sequence[str]]:
    yield ("slide", "mpp", "patient", "site", "scanner", "stain", "split")
    for index, name in enumerate(names):
        # Sites and scanners cross, so that the effect of one can be told from the other's.
        site = f"synthetic-site-{'AB'[index // 3 % 2]}"
        scanner = f"synthetic-scanner-{_scanner(index) + 1}"
        split = "test" if index % 3 == 2 else "train"
        yield (name, "", f"synthetic-p{index + 1}", site, scanner, "H&E", split)


def _scanner(index: int) -> int:
    return index // 2 % 2


# Where the tissue is -----------------------------------------------------------------------------


def _draw_class_map(rng: np.random.Generator, n_classes: int) -> Bytes:
    """Lay the classes out over one slide.

    Args:
        rng: Source of randomness.
        n_classes: Number of classes on the slide.

    Returns:
        0 for glass and 1 + the number of the class for tissue; uint8, one pixel for 4 x 4 level-0
        pixels.
    """
    shape = (HEIGHT_PX // _MAP_SCALE, WIDTH_PX // _MAP_SCALE)
    y, x = np.indices(shape, dtype=np.float32)
    # Straight borders between regions are bent by moving every pixel before it is looked up.
    y += 11 * _noise(rng, shape, 60) + 4 * _noise(rng, shape, 14)
    x += 11 * _noise(rng, shape, 60) + 4 * _noise(rng, shape, 14)
    y /= np.float32(shape[0])
    x /= np.float32(shape[1])
    tissue = _tissue_outline(rng, y, x)
    owner = _regions(rng, y, x, n_classes)
    return np.where(tissue, owner + 1, 0).astype(np.uint8)


def _tissue_outline(rng: np.random.Generator, y: Floats, x: Floats) -> npt.NDArray[np.bool_]:
    # A superellipse fills the slide better than an ellipse and still has no corners.
    centre = 0.5 + rng.uniform(-0.02, 0.02, 2)
    body = np.abs((x - centre[0]) / 0.415) ** 3.2 + np.abs((y - centre[1]) / 0.405) ** 3.2 < 1
    tear = rng.uniform(0.3, 0.7, 2)
    hole = ((x - tear[0]) / 0.035) ** 2 + ((y - tear[1]) / 0.045) ** 2 < 1
    return np.asarray(body & ~hole)


def _regions(
    rng: np.random.Generator, y: Floats, x: Floats, n_classes: int
) -> npt.NDArray[np.intp]:
    sites = _region_sites(rng, n_classes)
    distances = [(1.25 * (x - site[0])) ** 2 + (y - site[1]) ** 2 for site in sites]
    nearest: npt.NDArray[np.intp] = np.argmin(np.stack(distances), axis=0)
    return nearest % n_classes


def _region_sites(rng: np.random.Generator, n_classes: int) -> npt.NDArray[np.float64]:
    """Place one region per class and a second one of the first class."""
    grids = {
        3: [(0.2, 0.25), (0.5, 0.8), (0.8, 0.25), (0.85, 0.85)],
        4: [(0.22, 0.25), (0.72, 0.22), (0.25, 0.78), (0.6, 0.78), (0.95, 0.85)],
    }
    sites = np.array(grids[n_classes])
    sites += rng.uniform(-0.05, 0.05, sites.shape)
    for axis in range(2):
        if rng.random() < 0.5:
            sites[:, axis] = 1 - sites[:, axis]
    return sites


# What is known about it --------------------------------------------------------------------------


def _annotate(class_map: Bytes, classes: Sequence[str]) -> dict[str, Any]:
    """Outline the classes of one slide as QuPath would.

    Args:
        class_map: The slide's map of classes; uint8, one pixel for 4 x 4 level-0 pixels.
        classes: The names of its classes.

    Returns:
        A GeoJSON FeatureCollection of one feature per class, in level-0 pixels.
    """
    features = []
    for number, name in enumerate(classes, start=1):
        outline = _outline((class_map == number).astype(np.uint8))
        properties = {
            "objectType": "annotation",
            "classification": {"name": name, "color": list(CLASSES[name])},
        }
        features.append({"type": "Feature", "geometry": mapping(outline), "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def _outline(mask: Bytes) -> Polygon | MultiPolygon:
    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    shells: list[BaseGeometry] = []
    holes: list[BaseGeometry] = []
    for contour, (_, _, _, parent) in zip(contours, tree[0], strict=True):
        ring = (contour[:, 0] + 0.5) * _MAP_SCALE
        if len(ring) >= 4:
            # A contour goes along a neck one pixel wide there and back, which no polygon may.
            (shells if parent < 0 else holes).append(make_valid(Polygon(ring)))
    # Nobody draws to the pixel, and neighbours that share a border to the pixel would overlap.
    drawn = set_precision(union_all(shells).difference(union_all(holes)).buffer(-4).simplify(3), 1)
    parts = [part for part in getattr(drawn, "geoms", [drawn]) if part.area > _LEAST_AREA]
    return parts[0] if len(parts) == 1 else MultiPolygon(parts)


def _tile_labels(name: str, class_map: Bytes, classes: Sequence[str]) -> Iterator[Sequence[str]]:
    yield ("slide", "x", "y", "label")
    side = TILE_PX // _MAP_SCALE
    for y in range(0, HEIGHT_PX - TILE_PX + 1, STRIDE_PX):
        for x in range(0, WIDTH_PX - TILE_PX + 1, STRIDE_PX):
            row, column = y // _MAP_SCALE, x // _MAP_SCALE
            tile = class_map[row : row + side, column : column + side]
            counts = np.bincount(tile.ravel(), minlength=len(classes) + 1)
            if counts[0] <= tile.size / 2:
                yield (name, str(x), str(y), classes[int(np.argmax(counts[1:]))])


# How it looks ------------------------------------------------------------------------------------


def _draw_stain(rng: np.random.Generator, *, scanner: int) -> Stain:
    vectors = np.array(
        [[0.60, 0.72, 0.38], [0.20, 0.83, 0.50], [0.62, 0.42, 0.18]], dtype=np.float32
    )
    # Slides of one laboratory differ a little; the two scanners differ more.
    vectors += rng.normal(0, 0.015, vectors.shape).astype(np.float32)
    amounts = rng.normal(1, 0.04, 3)
    if scanner:
        vectors += np.array([[0.05, -0.02, -0.05]], dtype=np.float32)
        amounts *= (1.08, 0.94, 1.05)
    white = (244, 243, 240) if scanner else (246, 246, 247)
    return Stain(
        vectors=vectors,
        amounts=amounts.astype(np.float32),
        white=np.array(white, dtype=np.float32),
        blur=0.9 if scanner else 0.6,
        noise=1.2 if scanner else 0.8,
    )


def _draw_slide(
    rng: np.random.Generator, class_map: Bytes, classes: Sequence[str], stain: Stain
) -> Bytes:
    """Draw one slide's level 0.

    Args:
        rng: Source of randomness.
        class_map: The slide's map of classes; uint8, one pixel for 4 x 4 level-0 pixels.
        classes: The names of its classes.
        stain: How it was stained and scanned.

    Returns:
        The image; RGB, uint8, height x width x 3.
    """
    dyes = np.zeros((HEIGHT_PX, WIDTH_PX, 3), dtype=np.float32)
    for number, name in enumerate(classes, start=1):
        box = _bounding_box(class_map == number)
        low = (class_map[box] == number).astype(np.float32)
        rows, columns = (slice(s.start * _MAP_SCALE, s.stop * _MAP_SCALE) for s in box)
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        mask = cv2.GaussianBlur(
            cv2.resize(low, shape[::-1], interpolation=cv2.INTER_LINEAR), (0, 0), 2
        )
        for dye, amount in enumerate(_PAINTERS[name](rng, shape)):
            amount *= mask
            dyes[rows, columns, dye] += amount
    return _develop(rng, dyes, stain)


def _develop(rng: np.random.Generator, dyes: Floats, stain: Stain) -> Bytes:
    # All in place: at this size, fresh memory costs more time than the arithmetic.
    dyes = np.asarray(cv2.GaussianBlur(dyes, (0, 0), stain.blur), dtype=np.float32)
    # Sections are never even: thickness varies over a millimetre or so.
    dyes *= (1 + 0.05 * _noise(rng, dyes.shape[:2], 500))[..., None]
    cv2.transform(dyes, -(stain.vectors * stain.amounts[:, None]).T, dst=dyes)
    cv2.exp(dyes, dst=dyes)
    dyes *= stain.white
    grain = rng.standard_normal(dyes.shape[:2], dtype=np.float32)
    grain *= stain.noise
    dyes += grain[..., None]
    return np.asarray(cv2.convertScaleAbs(dyes), dtype=np.uint8)


def _bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _epithelium(rng: np.random.Generator, shape: tuple[int, int]) -> list[Floats]:
    """Round glands with a lumen and one ring of nuclei, in thin stroma."""
    h, e, m = _stroma(rng, shape, nuclei_spacing=48)
    nuclei = np.zeros(shape, dtype=np.uint8)
    cytoplasm = np.zeros(shape, dtype=np.uint8)
    lumen = np.zeros(shape, dtype=np.uint8)
    for centre in _scatter(rng, shape, 150, 0.14):
        radius = rng.uniform(52, 68)
        gland = _closed_curve(rng, radius, 0.05)
        cv2.fillPoly(cytoplasm, [_points(centre, gland)], 255)
        cv2.fillPoly(lumen, [_points(centre, gland * rng.uniform(0.28, 0.45))], 255)
        _ring_of_nuclei(rng, nuclei, centre, gland * 0.80, size=(7.5, 4.2), value=(80, 115))
    return _with_glands(rng, (h, e, m), (cytoplasm, lumen, nuclei), (0.12, 0.42))


def _tumour(rng: np.random.Generator, shape: tuple[int, int]) -> list[Floats]:
    """Crowded irregular glands with large uneven nuclei in several layers."""
    h, e, m = _stroma(rng, shape, nuclei_spacing=36)
    nuclei = np.zeros(shape, dtype=np.uint8)
    cytoplasm = np.zeros(shape, dtype=np.uint8)
    lumen = np.zeros(shape, dtype=np.uint8)
    for centre in _scatter(rng, shape, 118, 0.28):
        gland = _closed_curve(rng, rng.uniform(50, 74), 0.16)
        cv2.fillPoly(cytoplasm, [_points(centre, gland)], 255)
        if rng.random() < 0.6:
            hollow = _closed_curve(rng, rng.uniform(10, 22), 0.3)
            cv2.fillPoly(lumen, [_points(centre, hollow)], 255)
        for depth in (0.86, 0.58):
            _ring_of_nuclei(
                rng, nuclei, centre, gland * depth, size=(9.5, 6.8), value=(70, 125), spread=0.28
            )
    return _with_glands(rng, (h, e, m), (cytoplasm, lumen, nuclei), (0.26, 0.42))


def _with_glands(
    rng: np.random.Generator,
    around: tuple[Floats, Floats, Floats],
    drawn: tuple[Bytes, Bytes, Bytes],
    tint: tuple[float, float],
) -> list[Floats]:
    """Put glands on top of stroma.

    Args:
        rng: Source of randomness.
        around: Haematoxylin, eosin and mucin of the stroma; float32, changed in place.
        drawn: Where cytoplasm (255) and lumen (255) are, and the nuclei's haematoxylin in
            hundredths; uint8.
        tint: Haematoxylin and eosin of the cytoplasm.

    Returns:
        `around`.
    """
    h, e, m = around
    cytoplasm, lumen = _soft(drawn[0]) / 255, _soft(drawn[1]) / 255
    grain = _noise(rng, h.shape, 5)
    h += cytoplasm * (tint[0] * (1 + 0.2 * grain) - h)
    e += cytoplasm * (tint[1] * (1 + 0.15 * grain) - e)
    for dye in (h, e):
        dye *= 1 - 0.9 * lumen
    # Glands hide what lies under them, so their nuclei come last.
    _lay_nuclei(rng, h, e, drawn[2])
    return [h, e, m]


def _stroma(
    rng: np.random.Generator, shape: tuple[int, int], *, nuclei_spacing: float = 44
) -> list[Floats]:
    """Wavy pink fibres with spindle-shaped nuclei."""
    fibres, across = _fibres(rng, shape, width=5, length=150)
    fine, _ = _fibres(rng, shape, width=3, length=60)
    e = 0.56 + 0.10 * fibres + 0.05 * fine
    np.clip(e, 0.08, None, out=e)
    h = np.full(shape, 0.05, dtype=np.float32)
    nuclei = np.zeros(shape, dtype=np.uint8)
    for centre in _scatter(rng, shape, nuclei_spacing, 0.4):
        angle = _direction(across, centre) + rng.normal(0, 8)
        axes = (rng.uniform(8, 13), rng.uniform(2.2, 3.6))
        _nucleus(nuclei, centre, axes, angle, rng.uniform(80, 115))
    _lay_nuclei(rng, h, e, nuclei)
    return [h, e, np.zeros(shape, dtype=np.float32)]


def _lymphocytes(rng: np.random.Generator, shape: tuple[int, int]) -> list[Floats]:
    """Dark round nuclei, side by side."""
    h = 0.14 + 0.03 * _noise(rng, shape, 20)
    e = 0.20 + 0.05 * _noise(rng, shape, 12)
    nuclei = np.zeros(shape, dtype=np.uint8)
    for centre in _scatter(rng, shape, 16, 0.38):
        radius = rng.uniform(5.4, 7.4)
        axes = (radius, radius * rng.uniform(0.86, 1))
        _nucleus(nuclei, centre, axes, rng.uniform(0, 180), rng.uniform(95, 140))
    _lay_nuclei(rng, h, e, nuclei)
    return [h, e, np.zeros(shape, dtype=np.float32)]


def _adipose(rng: np.random.Generator, shape: tuple[int, int]) -> list[Floats]:
    """Pale bubbles between thin pink walls."""
    centres = _scatter(rng, shape, 84, 0.32)
    wall = _cell_borders(shape, centres, 3.0)
    # Rounding the bubbles' corners thickens the walls where three of them meet.
    wall = np.clip(2.2 * (cv2.GaussianBlur(wall, (0, 0), 5) - 0.28), 0, 1)
    haze = 0.285 + 0.025 * _noise(rng, shape, 40)
    e = haze + 0.38 * wall * (1 + 0.25 * _noise(rng, shape, 8))
    h = 0.02 + 0.05 * wall
    nuclei = np.zeros(shape, dtype=np.uint8)
    for centre in centres[rng.random(len(centres)) < 0.5]:
        radius, angle = rng.uniform(30, 38), rng.uniform(0, 2 * np.pi)
        place = centre + radius * np.array([np.cos(angle), np.sin(angle)])
        _nucleus(nuclei, place, (7.5, 2.6), np.degrees(angle) + 90, rng.uniform(80, 110))
    _lay_nuclei(rng, h, e, nuclei)
    return [h, e, np.zeros(shape, dtype=np.float32)]


def _mucus(rng: np.random.Generator, shape: tuple[int, int]) -> list[Floats]:
    """Smooth pale blue streaks with a stray cell here and there."""
    streaks, _ = _fibres(rng, shape, width=14, length=420)
    m = np.clip(0.42 + 0.055 * streaks + 0.05 * _noise(rng, shape, 160), 0.12, None)
    h = 0.03 + 0.02 * np.clip(streaks, 0, None)
    e = 0.10 + 0.03 * np.clip(_noise(rng, shape, 90), 0, None)
    nuclei = np.zeros(shape, dtype=np.uint8)
    for centre in _scatter(rng, shape, 150, 0.45):
        radius = rng.uniform(4.5, 7)
        _nucleus(nuclei, centre, (radius, radius), 0, rng.uniform(60, 95))
    _lay_nuclei(rng, h, e, nuclei)
    return [h, e, m]


_PAINTERS: Final[dict[str, Callable[[np.random.Generator, tuple[int, int]], list[Floats]]]] = {
    "epithelium": _epithelium,
    "stroma": _stroma,
    "lymphocytes": _lymphocytes,
    "adipose": _adipose,
    "mucus": _mucus,
    "tumour": _tumour,
}
"""How to draw each class: the amounts of haematoxylin, eosin and mucin over a box, float32."""


# What it is drawn with ---------------------------------------------------------------------------


def _noise(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> Floats:
    """Draw smooth noise of mean 0 and standard deviation of about 1.

    Args:
        rng: Source of randomness.
        shape: Height and width in pixels.
        size: Typical size in pixels of a bump.

    Returns:
        The noise; float32 of `shape`.
    """
    coarse = (int(shape[0] / size) + 4, int(shape[1] / size) + 4)
    grid = rng.standard_normal(coarse, dtype=np.float32)
    big = (int(coarse[1] * size), int(coarse[0] * size))
    smooth = cv2.resize(grid, big, interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(1.2 * smooth[: shape[0], : shape[1]], dtype=np.float32)


def _fibres(
    rng: np.random.Generator, shape: tuple[int, int], *, width: float, length: float
) -> tuple[Floats, Floats]:
    """Draw wavy stripes.

    Args:
        rng: Source of randomness.
        shape: Height and width in pixels.
        width: Typical width of a stripe in pixels.
        length: Pixels over which a stripe changes along itself.

    Returns:
        The stripes, of mean 0 and standard deviation of about 1, and each pixel's place across
        them, which does not change along a stripe; both float32 of `shape`.
    """
    # Wide enough that no wave reaches past the edge, where stripes would meet in a seam.
    side = int(np.hypot(*shape)) + 800
    coarse = (int(side / width), max(4, int(side / length)))
    grid = rng.standard_normal(coarse, dtype=np.float32)
    straight = 1.2 * cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
    angle = rng.uniform(0, np.pi)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    rows, columns = np.indices(shape, dtype=np.float32)
    rows -= shape[0] / 2
    columns -= shape[1] / 2
    along = cosine * columns + sine * rows + side / 2
    across = cosine * rows - sine * columns + side / 2
    across += 70 * _noise(rng, shape, 260) + 9 * _noise(rng, shape, 60)
    stripes = cv2.remap(straight, along, across, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(stripes, dtype=np.float32), np.asarray(across, dtype=np.float32)


def _scatter(
    rng: np.random.Generator, shape: tuple[int, int], spacing: float, jitter: float
) -> npt.NDArray[np.float64]:
    """Place points about `spacing` pixels apart, on a shaken hexagonal lattice.

    Returns:
        The points as (x, y); float64, n x 2.
    """
    ys = np.arange(-spacing, shape[0] + spacing, spacing * 0.866)
    xs = np.arange(-spacing, shape[1] + spacing, float(spacing))
    x, y = np.meshgrid(xs, ys)
    x[1::2] += spacing / 2
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    return points + rng.normal(0, spacing * jitter / 1.5, points.shape)


def _closed_curve(
    rng: np.random.Generator, radius: float, roughness: float
) -> npt.NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    r = np.full_like(angle, radius)
    for wave in range(2, 6):
        phase = rng.uniform(0, 2 * np.pi)
        r += radius * roughness * rng.normal() / (wave - 1) * np.cos(wave * angle + phase)
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1)


def _points(
    centre: npt.NDArray[np.float64], curve: npt.NDArray[np.float64]
) -> npt.NDArray[np.int32]:
    return np.rint(centre + curve).astype(np.int32)


def _ring_of_nuclei(
    rng: np.random.Generator,
    canvas: Bytes,
    centre: npt.NDArray[np.float64],
    curve: npt.NDArray[np.float64],
    *,
    size: tuple[float, float],
    value: tuple[float, float],
    spread: float = 0.10,
) -> None:
    steps = np.linalg.norm(np.diff(curve, axis=0, append=curve[:1]), axis=1)
    length = np.concatenate([[0], np.cumsum(steps)])
    places = np.arange(0, length[-1] - size[1], 2.4 * size[1])
    closed = np.concatenate([curve, curve[:1]])
    xs = np.interp(places, length, closed[:, 0])
    ys = np.interp(places, length, closed[:, 1])
    for x, y in zip(xs, ys, strict=True):
        scale = rng.normal(1, spread, 3)
        axes = (size[0] * scale[0], size[1] * scale[1])
        angle = np.degrees(np.arctan2(y, x)) + rng.normal(0, 100 * spread)
        place = centre + np.array([x, y]) * (1 + 0.25 * (scale[2] - 1))
        _nucleus(canvas, place, axes, angle, rng.uniform(*value))


def _nucleus(
    canvas: Bytes,
    centre: Iterable[float],
    axes: tuple[float, float],
    angle: float,
    value: float,
) -> None:
    """Draw one ellipse, to a 16th of a pixel: small nuclei would look cut from squares.

    Args:
        canvas: What to draw on; uint8.
        centre: Its x and y in pixels.
        axes: Its half axes in pixels.
        angle: Direction of the first axis in degrees.
        value: Its haematoxylin in hundredths.
    """
    x, y = (round(16 * part) for part in centre)
    half = tuple(max(16, round(16 * axis)) for axis in axes)
    cv2.ellipse(canvas, (x, y), half, float(angle), 0, 360, float(value), -1, cv2.LINE_8, 4)


def _lay_nuclei(rng: np.random.Generator, h: Floats, e: Floats, canvas: Bytes) -> None:
    """Add nuclei to the dyes, in place, with clumped chromatin.

    Args:
        rng: Source of randomness.
        h: Amount of haematoxylin; float32.
        e: Amount of eosin; float32.
        canvas: The nuclei's haematoxylin in hundredths; uint8, same shape.
    """
    nuclei = _soft(canvas) / 100
    chromatin = 1 + 0.22 * _noise(rng, h.shape, 3)
    np.maximum(h, nuclei * chromatin, out=h)
    e *= 1 - 0.5 * np.minimum(nuclei, 1)


def _soft(canvas: Bytes) -> Floats:
    soft = cv2.GaussianBlur(canvas.astype(np.float32), (0, 0), 0.9)
    return np.asarray(soft, dtype=np.float32)


def _direction(across: Floats, centre: npt.NDArray[np.float64]) -> float:
    """Tell in degrees which way stripes run at a point, or at the nearest pixel that has a next."""
    column, row = (int(c) for c in np.clip(centre, 0, np.array(across.shape)[::-1] - 2))
    slope_x = across[row, column + 1] - across[row, column]
    slope_y = across[row + 1, column] - across[row, column]
    return math.degrees(math.atan2(-slope_x, slope_y))


def _cell_borders(
    shape: tuple[int, int], centres: npt.NDArray[np.float64], half_width: float
) -> Floats:
    """Draw the borders between the cells that are nearest to each centre."""
    seeds = np.full(shape, 255, dtype=np.uint8)
    inside = np.rint(centres).astype(int)
    inside = inside[((inside >= 0) & (inside < shape[::-1])).all(axis=1)]
    seeds[inside[:, 1], inside[:, 0]] = 0
    _, cells = cv2.distanceTransformWithLabels(
        seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    border = np.zeros(shape, dtype=np.uint8)
    border[:, 1:] |= cells[:, 1:] != cells[:, :-1]
    border[1:] |= cells[1:] != cells[:-1]
    away = cv2.distanceTransform(1 - border, cv2.DIST_L2, 3)
    return np.asarray(np.clip(half_width + 1 - away, 0, 1), dtype=np.float32)


# How it is written -------------------------------------------------------------------------------


def _write_pyramid(path: Path, image: Bytes) -> None:
    with atomic_path(path) as part, tifffile.TiffWriter(part) as tiff:
        pixels = image
        for level in range(LEVELS):
            tiff.write(
                pixels,
                photometric="rgb",
                tile=(_STORED_TILE_PX, _STORED_TILE_PX),
                compression="zlib",
                compressionargs={"level": 2},
                predictor=True,
                resolution=(_PIXELS_PER_CM / 2**level, _PIXELS_PER_CM / 2**level),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
                software="histoencoder synthetic",
                metadata=None,
            )
            half = cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            pixels = np.asarray(half, dtype=np.uint8)


def _write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    with atomic_path(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
