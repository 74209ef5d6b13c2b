"""Slides: find, identify, open and describe them.

Flow: `find` lists slide files, `register` gives each an id for ever, `reader` opens one
(HistoPrep's `SlideReader` with the backends of this project), `describe` writes
``properties.json`` and ``thumbnail.jpeg``. Later stages ask `describe.read_description` where a
slide is and how fine.
"""

from histoencoder_core.slides.describe import Description, describe_slide, read_description
from histoencoder_core.slides.find import FoundSlide, find_slides
from histoencoder_core.slides.reader import Slide, open_slide
from histoencoder_core.slides.register import Register
from histoencoder_core.slides.sheet import Sheet

__all__ = [
    "Description",
    "FoundSlide",
    "Register",
    "Sheet",
    "Slide",
    "describe_slide",
    "find_slides",
    "open_slide",
    "read_description",
]
