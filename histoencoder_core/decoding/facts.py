"""What a decoder tells of a slide when it opens it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

Region = tuple[int, int, int, int]
"""``x, y, w, h`` in level-0 pixels."""


@dataclass(frozen=True)
class SlideFacts:
    """An open slide, apart from its pixels.

    Attributes:
        backend: Name of the decoder.
        sizes: (height, width) in pixels of each level, finest first.
        mpp: Stated resolution (x, y) in µm/px at level 0, plausible or not; None if not stated.
        properties: The vendor properties on the allow-list.
        exact_levels: Whether lower levels are read from the file, not scaled for each region.
    """

    backend: str
    sizes: tuple[tuple[int, int], ...]
    mpp: tuple[float, float] | None
    properties: dict[str, str]
    exact_levels: bool

    @property
    def downsamples(self) -> list[tuple[float, float]]:
        """Downsample of (height, width) of each level."""
        height, width = self.sizes[0]
        return [(height / h, width / w) for h, w in self.sizes]

    def size_at(self, level: int, region: Region) -> tuple[int, int]:
        """(height, width) in pixels that a level-0 region has at a level.

        Example:
            >>> sizes = ((400, 600), (200, 300))
            >>> facts = SlideFacts("X", sizes, None, {}, exact_levels=True)
            >>> facts.size_at(1, (0, 0, 64, 32))
            (16, 32)
        """
        down_h, down_w = self.downsamples[level]
        return max(1, round(region[3] / down_h)), max(1, round(region[2] / down_w))

    def as_json(self) -> dict[str, Any]:
        """A JSON-like form for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Self:
        """What `as_json` gave, after JSON made lists of its tuples."""
        mpp = told["mpp"]
        return cls(
            backend=told["backend"],
            sizes=tuple((height, width) for height, width in told["sizes"]),
            mpp=None if mpp is None else (mpp[0], mpp[1]),
            properties=told["properties"],
            exact_levels=told["exact_levels"],
        )
