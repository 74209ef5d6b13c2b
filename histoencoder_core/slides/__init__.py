"""Slides: find, identify, open and describe them.

Flow: `arrivals` watches the folders that `find` lists slide files of, `register` gives each an id
for ever, `receive` tells a new slide from one that was moved or copied (by its `content`),
`describe` writes ``properties.json`` and ``thumbnail.jpeg``. `reader` opens a slide. Later stages
ask `describe.read_description` where a slide is and how fine.
"""

from histoencoder_core.slides.arrivals import Arrivals, find_in
from histoencoder_core.slides.describe import (
    Description,
    describe_slide,
    read_description,
    unchanged,
)
from histoencoder_core.slides.find import FoundSlide, find_slides
from histoencoder_core.slides.reader import Slide, open_slide
from histoencoder_core.slides.receive import Received, receive_slide
from histoencoder_core.slides.register import Register
from histoencoder_core.slides.sheet import Sheet

__all__ = [
    "Arrivals",
    "Description",
    "FoundSlide",
    "Received",
    "Register",
    "Sheet",
    "Slide",
    "describe_slide",
    "find_in",
    "find_slides",
    "open_slide",
    "read_description",
    "receive_slide",
    "unchanged",
]
