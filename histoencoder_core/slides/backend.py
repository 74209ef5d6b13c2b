"""HistoPrep's view of a slide that another process decodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from histoprep._backend import SlideReaderBackend

from histoencoder_core.decoding.facts import Region
from histoencoder_core.decoding.readers import SlideReading


class ProcessBackend(SlideReaderBackend):  # type: ignore[misc]  # HistoPrep has no types
    """A slide that another process decodes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reading = SlideReading(path)
        self.facts = self.reading.facts
        self.BACKEND_NAME = self.facts.backend

    @property
    def reader(self) -> SlideReading:
        """What reads it."""
        return self.reading

    @property
    def data_bounds(self) -> Region:
        """The whole slide, ``x, y, w, h`` in level-0 pixels."""
        height, width = self.dimensions
        return (0, 0, width, height)

    @property
    def dimensions(self) -> tuple[int, int]:
        """(height, width) at level 0."""
        return self.facts.sizes[0]

    @property
    def level_count(self) -> int:
        """Number of levels."""
        return len(self.facts.sizes)

    @property
    def level_dimensions(self) -> dict[int, tuple[int, int]]:
        """(height, width) of each level."""
        return dict(enumerate(self.facts.sizes))

    @property
    def level_downsamples(self) -> dict[int, tuple[float, float]]:
        """Downsample of (height, width) of each level."""
        return dict(enumerate(self.facts.downsamples))

    def read_level(self, level: int) -> np.ndarray:
        """Read a whole level: uint8 (height, width, 3)."""
        return self.read_region(self.data_bounds, level)

    def read_region(self, xywh: Region, level: int = 0) -> np.ndarray:
        """Read a level-0 region at a level: uint8 (height, width, 3)."""
        return self.reading.read(xywh, level)
