"""Masks: images whose pixels say what is where on a slide, at any scale."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import openslide
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from histoencoder_core.decoding.images import read_header, read_values
from histoencoder_core.errors import LabelError, SlideError

RULES = "masks.yaml"
"""The file in the folder of annotations that tells what the values of masks mean."""

OUTSIDE = -1
"""What `MaskReader.read` gives for points outside of the mask."""

_TOLERANCE = 0.01
"""Relative difference of a mask's aspect from its slide's that rounding may make."""

_PIECE = 2**24
"""Most pixels of a pyramid that are read at once."""

_EXAMPLE = """
- slides: "*"
  labels: {1: benign, 2: cancer}
  unlabelled: [0]
"""

Values = npt.NDArray[np.int64]


class MaskValues(BaseModel):
    """What the values of a mask's pixels mean.

    Attributes:
        labels: Classes by value.
        background: Values of glass: what has them is no tissue, whatever else says so.
        unlabelled: Values that say nothing: tissue, or not, that nobody labelled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: dict[int, str]
    background: tuple[int, ...] = ()
    unlabelled: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _each_value_once(self) -> Self:
        if not self.labels or not all(label.strip() for label in self.labels.values()):
            raise ValueError("labels needs at least one value, and a name for each")
        values = [*self.labels, *self.background, *self.unlabelled]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"{', '.join(map(str, twice))}: a value can mean one thing only")
        return self


CONVENTIONS = {
    "panda-karolinska": MaskValues(labels={1: "benign", 2: "cancer"}, unlabelled=(0,)),
    "panda-radboud": MaskValues(
        labels={
            1: "stroma",
            2: "healthy epithelium",
            3: "Gleason 3",
            4: "Gleason 4",
            5: "Gleason 5",
        },
        unlabelled=(0,),
    ),
}
"""The two kinds of masks of the PANDA challenge (Bulten et al., Nature Medicine 2022). Their 0 is
background or unknown, so it says nothing, and where tissue is must be told otherwise."""


class MaskRule(BaseModel):
    """Which masks a meaning of values is for.

    Attributes:
        slides: Pattern with ``*`` and ``?`` that the slide's id must fit.
        site: What the slide's ``site`` in ``slides.csv`` must be; any if not given.
        convention: A meaning known by name, instead of `labels` and what goes with it.
        labels: As in `MaskValues`.
        background: As in `MaskValues`.
        unlabelled: As in `MaskValues`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slides: str = "*"
    site: str | None = None
    convention: Literal["panda-karolinska", "panda-radboud"] | None = None
    labels: dict[int, str] = {}
    background: tuple[int, ...] = ()
    unlabelled: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        if self.convention is None:
            _ = self.values
        elif self.labels or self.background or self.unlabelled:
            raise ValueError("give a convention or labels, not both")
        return self

    @property
    def values(self) -> MaskValues:
        """What the values mean."""
        if self.convention is not None:
            return CONVENTIONS[self.convention]
        return MaskValues(
            labels=self.labels, background=self.background, unlabelled=self.unlabelled
        )

    def fits(self, slide_id: str, site: str | None) -> bool:
        """Whether a slide's mask is meant."""
        named = fnmatch.fnmatchcase(slide_id, self.slides)
        return named and self.site in {None, site}


@dataclass(frozen=True)
class Mask:
    """A slide's mask.

    Attributes:
        path: The image.
        values: What its values mean.
    """

    path: Path
    values: MaskValues


def read_rules(path: Path) -> list[MaskRule]:
    """Read what the values of masks mean.

    Args:
        path: The ``masks.yaml``: a list of rules, of which the first that fits a slide counts.

    Raises:
        LabelError: It is missing, is no YAML, or a rule in it is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise LabelError(
            f"{path}: is not there, so what the values of masks mean is not known. Write into it, "
            f"for example:{_EXAMPLE}"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LabelError(f"{path}: can't be read as YAML ({error}).") from error
    try:
        return TypeAdapter(list[MaskRule]).validate_python(content)
    except ValidationError as error:
        problem = error.errors()[0]
        rule, *where = problem["loc"] or ("",)
        which = f"rule {int(rule) + 1}" if isinstance(rule, int) else "the file"
        inside = "".join(f", {part}" for part in where)
        said = problem["msg"].removeprefix("Value error, ")
        raise LabelError(
            f"{path}: {which}{inside}: {said}. It must be a list of rules, for example:{_EXAMPLE}"
        ) from error


class MaskReader(Protocol):
    """An open mask."""

    size: tuple[int, int]
    """Width and height in pixels."""

    def read(self, xs: npt.NDArray[np.float64], ys: npt.NDArray[np.float64]) -> Values:
        """Look up a grid of points.

        Args:
            xs: Places from left to right, 0 being the slide's left and 1 its right border; they
                rise in equal steps.
            ys: The same from top to bottom.

        Returns:
            int64 array of shape (ys, xs): the value at each point, or `OUTSIDE`.

        Raises:
            LabelError: The pixels can't be read, or are colours.
        """
        ...


@contextlib.contextmanager
def open_mask(path: Path, slide_size: tuple[int, int]) -> Iterator[MaskReader]:
    """Open a mask.

    A TIFF in tiles of 8-bit pixels is read in parts, from the coarsest level that has a pixel for
    each point asked for; any other is decoded whole.

    Args:
        path: A PNG or TIFF.
        slide_size: Width and height of the slide in level-0 pixels.

    Raises:
        LabelError: It can't be read, its compression changes values, or it is of another shape
            than the slide.
    """
    try:
        header = read_header(path)
        if header.lossy:
            raise LabelError(
                f"{path}: its compression changes pixels, and with them what they mean. Save the "
                "mask with a lossless one, such as LZW or deflate."
            )
        in_parts = header.tiled and header.mode in {"L", "RGB", "RGBA"}
        reader: _Pyramid | _Whole = _Pyramid(path) if in_parts else _Whole(path)
    except SlideError as error:
        raise LabelError(str(error)) from error
    except openslide.OpenSlideError as error:
        raise LabelError(f"{path}: can't be opened by OpenSlide ({error}).") from error
    with reader:
        width, height = reader.size
        fitting = slide_size[1] * width / slide_size[0]
        if abs(height - fitting) > max(1.0, _TOLERANCE * fitting):
            raise LabelError(
                f"{path}: is {width} × {height} pixels, which is no scale of the slide's "
                f"{slide_size[0]} × {slide_size[1]}: at that width it would be {fitting:.0f} high. "
                "A mask must cover the whole slide; it may be of another slide, or turned."
            )
        yield reader


class _Whole:
    """A mask that is decoded whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pixels = read_values(path)
        self.size = (self._pixels.shape[1], self._pixels.shape[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def read(self, xs: npt.NDArray[np.float64], ys: npt.NDArray[np.float64]) -> Values:
        """See `MaskReader`."""
        columns, rows = _indices(xs, self.size[0]), _indices(ys, self.size[1])
        found: Values = np.full((len(ys), len(xs)), OUTSIDE, np.int64)
        within_x, within_y = columns >= 0, rows >= 0
        pixels = self._pixels[np.ix_(rows[within_y], columns[within_x])]
        found[np.ix_(within_y, within_x)] = _values(pixels, self._path)
        return found


class _Pyramid:
    """A mask that OpenSlide reads in parts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(str(path))
        self.size: tuple[int, int] = self._slide.dimensions
        # At other scales OpenSlide blends neighbours, which makes other values of them.
        self._levels = [
            (level, self.size[0] // width, (width, height))
            for level, (width, height) in enumerate(self._slide.level_dimensions)
            if self.size[0] % width == 0
            and (width * (self.size[0] // width), height * (self.size[0] // width)) == self.size
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._slide.close()

    def read(self, xs: npt.NDArray[np.float64], ys: npt.NDArray[np.float64]) -> Values:
        """See `MaskReader`."""
        step_x, step_y = xs[1] - xs[0], ys[1] - ys[0]
        fine = [it for it in self._levels if min(step_x * it[2][0], step_y * it[2][1]) >= 1]
        level, scale, size = max(fine, default=self._levels[0])
        columns, rows = _indices(xs, size[0]), _indices(ys, size[1])
        found: Values = np.full((len(ys), len(xs)), OUTSIDE, np.int64)
        within_x, within_y = np.flatnonzero(columns >= 0), np.flatnonzero(rows >= 0)
        if not len(within_x) or not len(within_y):
            return found
        left, width = columns[within_x[0]], columns[within_x[-1]] - columns[within_x[0]] + 1
        lines = max(1, int(_PIECE / width / max(1.0, step_y * size[1])))
        for start in range(0, len(within_y), lines):
            part = within_y[start : start + lines]
            top, height = rows[part[0]], rows[part[-1]] - rows[part[0]] + 1
            region = self._read(level, (int(left * scale), int(top * scale)), (width, height))
            pixels = region[np.ix_(rows[part] - top, columns[within_x] - left)]
            found[np.ix_(part, within_x)] = _values(pixels[..., :3], self._path)
        return found

    def _read(
        self, level: int, corner: tuple[int, int], size: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        try:
            image = self._slide.read_region(corner, level, (int(size[0]), int(size[1])))
        except openslide.OpenSlideError as error:
            raise LabelError(
                f"{self._path}: can't be read at {corner} ({error}). The file is damaged; replace "
                "it."
            ) from error
        return np.asarray(image)


def _indices(places: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.int64]:
    """The pixels that points lie in; -1 for those outside."""
    indices = np.floor(places * size).astype(np.int64)
    return np.where((indices >= 0) & (indices < size), indices, -1)


def _values(pixels: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    """The values of pixels: of several channels, the first holds them, as in PANDA's masks."""
    if pixels.ndim == 2:
        return pixels
    first = pixels[..., 0]
    if pixels.shape[2] >= 3:
        others = pixels[..., 1:3]
        same = (others == first[..., None]).all(axis=2)
        if not (same | (others == 0).all(axis=2)).all():
            raise LabelError(
                f"{path}: holds colours, not values: the second and third channel must be 0 or as "
                "the first. Save the mask as grey values or palette indices, one a class."
            )
    return first
