"""Decoding images with Pillow, without letting it guess the format.

HistoPrep pins Pillow below 10, whose bundled libwebp has a remote-code hole (CVE-2023-4863) that is
reached when Pillow sniffs content. Every image is therefore decoded as one named format.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from histoencoder_core.decoding.truncation import is_endless_jpeg
from histoencoder_core.errors import SlideError, kind_of

IMAGE_FORMATS = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
"""Suffixes of images and the one format each is decoded as."""

MAX_PIXELS = 20_000 * 20_000
"""Largest image decoded whole, HistoPrep's own limit."""

Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # as HistoPrep sets it; Pillow's own is smaller

_DEEP_MODES = ("I", "F")
"""What Pillow's modes of more than 8 bits a channel begin with; it clips them to white."""

_TILE_WIDTH, _COMPRESSION = 322, 259
"""TIFF tags."""

_LOSSY = {6, 7, 33003, 33004, 33005, 34712, 50001}
"""TIFF compressions that change pixels, or may: JPEG, JPEG 2000, WebP."""

_DAMAGES = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for files that are damaged."""


def read_image(path: Path) -> np.ndarray:
    """Decode a JPEG, PNG or TIFF image as its suffix names it.

    Args:
        path: The image.

    Returns:
        uint8 array of shape (height, width, 3); transparent pixels are laid on white.

    Raises:
        SlideError: The suffix is none of those, the pixels have more than 8 bits, or the content
            is damaged, cut short or of another format.
    """
    image_format = _format_of(path)
    content = b""
    try:
        content = path.read_bytes()
        # From memory: decoding TIFF from file descriptors in several threads at once mixes them up,
        # which gives errors and, worse, another image's pixels.
        with Image.open(io.BytesIO(content), formats=[image_format]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(path, image)
            if image.mode.startswith(_DEEP_MODES):
                raise SlideError(
                    f"{path}: its pixels have more than 8 bits (mode {image.mode}), and which of "
                    "their values is white is not known; convert it to 8 bits a channel.",
                    kind="unsupported",
                )
            return as_rgb(image)
    except _DAMAGES as error:
        if image_format == "JPEG" and is_endless_jpeg(content):
            raise SlideError(
                f"{path}: is cut short: it is a JPEG without an end ({error}). Copy it again.",
                kind="truncated",
            ) from error
        raise _unreadable(path, image_format, error) from error


def read_values(path: Path) -> np.ndarray:
    """Decode an image whose pixels are numbers, such as those of classes, as they are stored.

    Args:
        path: A PNG or TIFF; of a palette, the indices are given.

    Returns:
        Integer array of shape (height, width) or (height, width, channels).

    Raises:
        SlideError: The suffix is none of those read here, the pixels are no integers or too many
            to be decoded whole, or the content is damaged or of another format.
    """
    image_format = _format_of(path)
    try:
        content = io.BytesIO(path.read_bytes())
        with Image.open(content, formats=[image_format]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(path, image)
            values = np.asarray(image)
    except _DAMAGES as error:
        raise _unreadable(path, image_format, error) from error
    if values.dtype == bool:
        return values.astype(np.uint8)
    if not np.issubdtype(values.dtype, np.integer):
        raise SlideError(
            f"{path}: its pixels are of type {values.dtype}, not whole numbers.", kind="unsupported"
        )
    return values


@dataclass(frozen=True)
class Header:
    """What an image's header tells.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        mode: Pillow's name of the pixels' form.
        tiled: Whether it is a TIFF in tiles, which can be read in parts.
        lossy: Whether its compression changes pixels, or may.
    """

    width: int
    height: int
    mode: str
    tiled: bool
    lossy: bool


def read_header(path: Path) -> Header:
    """Read an image's header, without decoding its pixels.

    Raises:
        SlideError: The suffix is none of those read here, or the header is damaged or of another
            format.
    """
    image_format = _format_of(path)
    try:
        with path.open("rb") as file, Image.open(file, formats=[image_format]) as image:
            tags = image.tag_v2 if image_format == "TIFF" else {}
            lossy = image_format == "JPEG" or tags.get(_COMPRESSION) in _LOSSY
            return Header(image.width, image.height, image.mode, _TILE_WIDTH in tags, lossy)
    except _DAMAGES as error:
        raise _unreadable(path, image_format, error) from error


def image_size(path: Path) -> tuple[int, int]:
    """Read an image's width and height from its header, without decoding it.

    Raises:
        SlideError: As for `read_header`.
    """
    header = read_header(path)
    return header.width, header.height


def _format_of(path: Path) -> str:
    image_format = IMAGE_FORMATS.get(path.suffix.lower())
    if image_format is None:
        raise SlideError(
            f"{path}: {path.suffix or 'no suffix'} is not an image format read here; "
            f"use one of {', '.join(sorted(IMAGE_FORMATS))}.",
            kind="unsupported",
        )
    return image_format


def _too_large(path: Path, image: Image.Image) -> SlideError:
    return SlideError(
        f"{path}: {image.width} × {image.height} pixels is more than is decoded whole; convert it "
        "to a tiled, pyramidal TIFF.",
        kind="unsupported",
    )


def _unreadable(path: Path, image_format: str, error: BaseException) -> SlideError:
    if isinstance(error, OSError) and error.errno is not None:
        return SlideError(f"{path}: can't be read ({error.strerror}).", kind=kind_of(error))
    # Pillow would name the object in memory that it was given.
    unknown = isinstance(error, UnidentifiedImageError)
    why = f"it does not begin as a {image_format} file" if unknown else error
    return SlideError(
        f"{path}: can't be decoded as {image_format} ({why}). The file is damaged, cut "
        "short, or of another format than its name says; replace it.",
        kind="unreadable",
    )


def as_rgb(image: Image.Image) -> np.ndarray:
    """Turn any Pillow image into uint8 (height, width, 3), transparency laid on white."""
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        return on_white(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Composite straight-alpha pixels on white.

    Args:
        rgba: uint8 array of shape (height, width, 4).

    Returns:
        uint8 array of shape (height, width, 3).

    Example:
        >>> on_white(np.zeros((1, 1, 4), np.uint8)).tolist()
        [[[255, 255, 255]]]
    """
    alpha = rgba[..., 3:]
    # Nearly all pixels of slides are opaque, and OpenCV tells and converts ten times faster.
    if cv2.extractChannel(rgba, 3).min(initial=255) == 255:
        return np.asarray(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB))
    weight = alpha.astype(np.uint16)
    return ((rgba[..., :3] * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


def pad_white(
    pixels: np.ndarray, size: tuple[int, int], *, at: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Lay pixels onto a white canvas.

    Args:
        pixels: uint8 array of shape (h, w, 3), no larger than the canvas.
        size: (height, width) of the canvas.
        at: (row, column) of the pixels' top-left corner.

    Returns:
        uint8 array of shape (height, width, 3).
    """
    if pixels.shape[:2] == size:
        return np.ascontiguousarray(pixels)
    canvas = np.full((*size, 3), 255, np.uint8)
    canvas[at[0] : at[0] + pixels.shape[0], at[1] : at[1] + pixels.shape[1]] = pixels
    return canvas
