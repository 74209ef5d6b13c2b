"""Pictures made small for pages and logs."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
from PIL import Image

from histoencoder_core.decoding.images import read_image

_QUALITY = 75


def small_jpeg(path: Path, longest: int) -> bytes | None:
    """A picture, shrunk.

    Args:
        path: A JPEG or PNG.
        longest: Largest width and height in pixels of the result.

    Returns:
        The bytes of a JPEG; None if there is no such picture.

    Raises:
        SlideError: The picture is damaged.
    """
    if not path.exists():
        return None
    pixels = read_image(path)
    scale = min(1.0, longest / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    buffer = io.BytesIO()
    Image.fromarray(small).save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.getvalue()
