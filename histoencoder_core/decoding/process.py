"""The reader process: opens a slide at a time, and answers from several connections at once.

Started by `pool`, never by hand. It ends with the program that started it, at once and whatever its
threads are doing: its standard input never says anything, but when nobody holds the other end any
more, the kernel sends it SIGIO, which needs no thread of Python's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path

import cv2
import numpy as np

from histoencoder_core.decoding import wire
from histoencoder_core.decoding.decoders import Decoder, open_decoder
from histoencoder_core.decoding.images import read_image
from histoencoder_core.errors import SlideError, kind_of

READY = b"\1"
"""What is said once on the control connection, after all imports."""

_MAX_WRITTEN = 2**20
"""Bytes that may be written into any file: only standard error ever is."""


class Desk:
    """What is open, and the answers to what is asked of it."""

    def __init__(self) -> None:
        self._decoder: Decoder | None = None
        self._path = Path()

    def answer(self, asked: wire.Message) -> tuple[wire.Message, np.ndarray | None]:
        """Do what is asked.

        Raises:
            SlideError: It can't be done.
        """
        path = Path(asked["path"])
        try:
            match asked["do"]:
                case "open":
                    self._path, self._decoder = path, open_decoder(path)
                    return self._decoder.facts.as_json(), None
                case "read":
                    assert self._decoder is not None
                    assert self._path == path, "pixels of another slide would be worse than none"
                    return {}, self._decoder.read(tuple(asked["region"]), asked["level"])
                case "close":
                    assert self._decoder is not None
                    self._decoder.close()
                    self._decoder = None
                    return {}, None
                case "image":
                    return {}, read_image(path)
            raise AssertionError(f"nobody asks to {asked['do']}")
        except SlideError:
            raise
        except Exception as error:
            raise _as_slide_error(path, asked, error) from error


def _as_slide_error(path: Path, asked: wire.Message, error: Exception) -> SlideError:
    """Whatever a library raises over a file, it is the file's fault unless it names another."""
    what = (
        f"region {tuple(asked['region'])} can't be read" if "region" in asked else "can't be opened"
    )
    if isinstance(error, MemoryError) or getattr(error, "code", None) == cv2.Error.StsNoMem:
        return SlideError(
            f"{path}: {what}, as it takes more memory than a reader may have. Raise "
            "HISTOENCODER_READER_MEMORY_GB, or export it as a tiled, pyramidal TIFF.",
            kind="out-of-memory",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return SlideError(f"{path}: {what} ({error.strerror}).", kind=kind_of(error))
    why = str(error) or type(error).__name__
    if "region" in asked:
        remedy = "The file is damaged: copy it again from the scanner, or scan the slide again."
    else:
        remedy = (
            "The file is damaged or uses a feature that the reader lacks: copy it again, or export "
            "it as a tiled TIFF."
        )
    return SlideError(f"{path}: {what} ({why}). {remedy}", kind="unreadable")


def _serve(connection: socket.socket, desk: Desk) -> None:
    with connection, contextlib.suppress(wire.BrokenWireError):
        while True:
            asked, _ = wire.receive(connection)
            try:
                answer, pixels = desk.answer(asked)
            except SlideError as error:
                wire.send(connection, {"error": str(error), "kind": error.kind})
            else:
                wire.send(connection, answer, pixels)
                del pixels  # before the next is decoded


def _end_with_parent() -> None:
    stdin = sys.stdin.fileno()
    fcntl.fcntl(stdin, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(stdin, fcntl.F_SETFL, fcntl.fcntl(stdin, fcntl.F_GETFL) | os.O_ASYNC)
    # It lives as long as its parent, which is what is interrupted or told to end.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)


def _limit(memory: int) -> None:
    """Bound what may be allocated from now on, written, and left behind by a crash."""
    _set_limit(resource.RLIMIT_CORE, 0)  # it would hold a patient's pixels
    _set_limit(resource.RLIMIT_FSIZE, _MAX_WRITTEN)
    with contextlib.suppress(OSError):  # there is no /proc: nor does the limit count what it should
        status = Path("/proc/self/status").read_text()
        used = next(line for line in status.splitlines() if line.startswith("VmData:"))
        # Memory that can be written. Address space would count what allocators only reserve, which
        # is 64 MB a thread.
        _set_limit(resource.RLIMIT_DATA, int(used.split()[1]) * 1024 + memory)


def _set_limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (bounded, bounded))


def main() -> None:
    """Serve connections that the parent sends over the control connection until it is gone."""
    control, memory = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    _end_with_parent()
    _limit(memory)
    desk = Desk()
    control.sendall(READY)
    while True:
        said, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not said:
            os._exit(0)  # threads may be at work on what nobody waits for
        for descriptor in descriptors:
            connection = socket.socket(fileno=descriptor)
            threading.Thread(target=_serve, args=(connection, desk), daemon=True).start()


if __name__ == "__main__":
    main()
