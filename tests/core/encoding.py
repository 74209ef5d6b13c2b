"""Encoders and tiles, made small for the tests of the features stage."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from making import keys_of

from histoencoder_core.errors import SlideError
from histoencoder_core.features import Encoder, load_encoder
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.settings import EncoderSettings
from histoencoder_core.tiles import TileSource
from histoencoder_core.tiles.pixels import Tile


@functools.cache
def small_encoder(name: str = "test_resnet", *, input_size: int = 32, **settings: Any) -> Encoder:
    """An untrained encoder."""
    asked = EncoderSettings(name=f"untrained:{name}", input_size=input_size, **settings)
    return load_encoder(asked)


class Means(torch.nn.Module):
    """The mean of each channel, so that a feature tells its tile's colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def simple_encoder(module: torch.nn.Module | None = None, **settings: Any) -> Encoder:
    """An encoder of 16 px and three features that neither resizes nor normalises `colour_tile`."""
    return Encoder(
        settings=EncoderSettings(name="untrained:means", input_size=16, **settings),
        module=(module or Means()).eval(),
        input_size=16,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        weights_sha256="0" * 64,
        length=3,
        native_size=16,
    )


def colour_tile(row: int, *, slide: int = 0) -> np.ndarray:
    """A tile whose colour tells its row and its slide."""
    return np.full((16, 16, 3), (row % 256, row // 256, slide), np.uint8)


def colours_of(features: np.ndarray) -> list[tuple[int, int, int]]:
    """Row (two digits of base 256) and slide that `Means` saw."""
    return [tuple(colour) for colour in np.rint(features * 255).astype(int).tolist()]


class FakePixels:
    """A source of tiles that are in memory.

    Attributes:
        tiles: The tiles.
        blocks: Rows that are read together.
        before: Called before each read, with its rows.
        reads: How many tiles were read.
        reading: How many reads are going on.
        closed_too_early: Whether it was closed while a read was going on.
        opened: Set when it is opened.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        *,
        blocks: Sequence[Sequence[int]] | None = None,
        before: Callable[[Sequence[int]], object] = lambda rows: None,
        fails_to_open: Exception | None = None,
    ) -> None:
        self.tiles, self.before, self.fails_to_open = list(tiles), before, fails_to_open
        rows = range(len(tiles))
        self.blocks = blocks or [rows[start : start + 5] for start in range(0, len(rows), 5)]
        self.reads = self.reading = 0
        self.closed_too_early = False
        self.opened = threading.Event()
        self._counting = threading.Lock()

    def read(self, rows: Sequence[int]) -> list[Tile]:
        with self._counting:
            self.reads += len(rows)
            self.reading += 1
        try:
            self.before(rows)
            return [self.tiles[row] for row in rows]
        finally:
            with self._counting:
                self.reading -= 1

    @contextlib.contextmanager
    def open(self) -> Iterator[FakePixels]:
        if self.fails_to_open is not None:
            raise self.fails_to_open
        self.opened.set()
        try:
            yield self
        finally:
            self.closed_too_early |= self.reading > 0

    def source(self) -> TileSource:
        keys = keys_of(*((16 * row, 0, 16, 16) for row in range(len(self.tiles))))
        content = [str(t) if isinstance(t, SlideError) else t.tobytes().hex() for t in self.tiles]
        return TileSource(keys, lambda: fingerprint(content), self.open)


def colour_pixels(count: int, *, slide: int = 0, **how: Any) -> FakePixels:
    """A source of `colour_tile`."""
    return FakePixels([colour_tile(row, slide=slide) for row in range(count)], **how)
