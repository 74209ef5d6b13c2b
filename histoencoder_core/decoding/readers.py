"""Slides and images that are decoded in a process of their own, which may be lost and replaced."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from histoencoder_core.decoding import wire
from histoencoder_core.decoding.facts import Region, SlideFacts
from histoencoder_core.decoding.images import MAX_PIXELS
from histoencoder_core.decoding.pool import (
    Limits,
    ProcessLostError,
    ReaderProcess,
    give_back,
    lease,
)
from histoencoder_core.errors import SlideError

MAX_LOST = 3
"""Processes that one slide may lose and go on."""

_REMEDIES = {
    "crash": "The file is damaged in a way that its decoder does not survive: copy it again, or "
    "export it as a tiled TIFF.",
    "time-limit": "If its file server is slow, raise HISTOENCODER_READER_SECONDS; else the file is "
    "damaged: copy it again.",
    "out-of-memory": "Run fewer things at once, raise HISTOENCODER_READER_MEMORY_GB, or export it "
    "as a tiled, pyramidal TIFF.",
}


class SlideLostError(SlideError):
    """A slide that cost too many processes: nothing more is read from it."""


class _Reading:
    """A process of one's own; `_ask` may be called from several threads.

    When the process is lost, whatever was asked at that time is asked once more in a new one, and
    from then on one thing at a time: so what is lost again is to blame for it, alone.
    """

    def __init__(self) -> None:
        self._process = lease()
        self._one_at_a_time = False
        self._turn = threading.Lock()
        self._losses = 0
        self._closed = False
        self._lost = ProcessLostError("never", kind="crash")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another slide have the process. No thread may still be reading."""
        if not self._closed:
            self._closed = True
            give_back(self._process)

    def _reopen(self, process: ReaderProcess) -> None:
        """Bring a new process to where the last one was. By default there is nothing to do."""

    def _ask(
        self,
        message: wire.Message,
        *,
        doing: str,
        shape: tuple[int, int] | None = None,
        max_pixels: int = 0,
    ) -> tuple[wire.Message, np.ndarray | None]:
        if self._closed:
            raise ValueError(f"{message['path']}: is closed")  # the process is another slide's now
        process = self._process  # looked up first: it must be the one of before the loss
        if not self._one_at_a_time:
            try:
                return process.ask(message, shape=shape, max_pixels=max_pixels)
            except ProcessLostError as lost:
                self._lost = lost
                if lost.own:
                    raise _blame(message["path"], doing, lost) from None
        with self._turn:
            self._one_at_a_time = True
            try:
                self._replace_lost(message["path"])
                return self._process.ask(message, shape=shape, max_pixels=max_pixels)
            except ProcessLostError as lost:
                self._lost = lost
                raise _blame(message["path"], doing, lost) from None

    def _replace_lost(self, path: str) -> None:
        if self._process.alive:
            return
        self._losses += 1
        if self._losses > MAX_LOST:
            raise SlideLostError(
                f"{path}: {MAX_LOST} processes were lost over it, the last {self._lost}. "
                f"{_REMEDIES[self._lost.kind]}",
                kind=self._lost.kind,
            )
        self._process.end()
        self._process = ReaderProcess(Limits.of_deployment())
        try:
            self._reopen(self._process)
        except BaseException:
            self._process.end()
            raise


def _blame(path: str, doing: str, lost: ProcessLostError) -> SlideError:
    return SlideError(
        f"{path}: the process that was {doing} {lost}. {_REMEDIES[lost.kind]}", kind=lost.kind
    )


class SlideReading(_Reading):
    """An open slide. Use it in a ``with`` block, or close it.

    Attributes:
        facts: What its decoder tells of it.
    """

    def __init__(self, path: Path) -> None:
        """Open a slide.

        Raises:
            SlideError: It can't be opened; of kind ``crash``, ``time-limit`` or ``out-of-memory``
                if that cost the process.
        """
        super().__init__()
        self._path = str(path.absolute())
        self._opening = {"do": "open", "path": self._path}
        self._opened = False
        try:
            told, _ = self._ask(self._opening, doing="opening it")
        except BaseException:
            self.close()
            raise
        self.facts = SlideFacts.from_json(told)
        self._opened = True

    def read(self, region: Region, level: int) -> np.ndarray:
        """Read a level-0 region at a level: uint8 (height, width, 3).

        Raises:
            SlideError: It can't be decoded. Other regions may still be.
            SlideLostError: No region will be any more.
        """
        asked = {"do": "read", "path": self._path, "region": region, "level": level}
        _, pixels = self._ask(
            asked, doing=f"reading region {region}", shape=self.facts.size_at(level, region)
        )
        assert pixels is not None
        return pixels

    def close(self) -> None:
        """Close it and let another slide have the process. No thread may still be reading."""
        process = self._process
        if process.reusable and not self._closed:
            try:
                process.ask({"do": "close", "path": self._path})
            except (ProcessLostError, SlideError):
                process.sound = False
        super().close()

    def _reopen(self, process: ReaderProcess) -> None:
        if not self._opened:
            return
        told, _ = process.ask(self._opening)
        if SlideFacts.from_json(told) != self.facts:
            raise SlideError(f"{self._path}: was changed while it was read.", kind="input-output")


class ImageReading(_Reading):
    """Images that are decoded one by one. Use it in a ``with`` block."""

    def read(self, path: Path) -> np.ndarray:
        """Decode an image: see `images.read_image`.

        Raises:
            SlideError: It can't be decoded. Others may still be.
            SlideLostError: No image will be any more.
        """
        asked = {"do": "image", "path": str(path.absolute())}
        _, pixels = self._ask(asked, doing="decoding it", max_pixels=MAX_PIXELS)
        assert pixels is not None
        return pixels
