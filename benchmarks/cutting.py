"""Cutting the slide that a benchmark reads."""

from __future__ import annotations

from pathlib import Path

from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import Register, describe_slide
from histoencoder_core.slides.find import find_pattern
from histoencoder_core.slides.sheet import SheetRow
from histoencoder_core.store import SlideFolder, Store
from histoencoder_core.tiles import cut_tiles


def cut_slide(slide: Path, store: Store, settings: TilingSettings) -> SlideFolder:
    """Describe a slide, lay tiles over it, and give its folder in the store."""
    [(slide_id, found)] = Register(store).assign(find_pattern(str(slide))).items()
    folder = store.slide(slide_id)
    describe_slide(folder, found, SheetRow())
    cut_tiles(folder, settings)
    return folder
