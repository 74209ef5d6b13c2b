"""Reader processes: started, limited, asked, and used again for the next slide."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histoencoder_core.decoding import wire
from histoencoder_core.errors import SlideError
from histoencoder_core.settings import PlatformSettings

MAX_IDLE = 2
"""Processes that wait for the next slide: as many slides as a run has open at once."""

MAX_SERVED = 256
"""Slides that a process serves before it is replaced: decoders lose memory."""

_CHILD = "histoencoder_core.decoding.process"
_ROOT = Path(__file__).parents[2]
_START_SECONDS = 60
_END_SECONDS = 5
_NO_MEMORY = (b"failed to allocate", b"bad_alloc", b"MemoryError", b"start new thread")
"""How libraries say on standard error that they give up for want of memory."""


@dataclass(frozen=True)
class Limits:
    """What a reader process may take.

    Attributes:
        seconds: Time for one answer.
        memory_gb: Memory in GB (10⁹ bytes) beyond that of the process when it starts.
    """

    seconds: float
    memory_gb: float

    @classmethod
    def of_deployment(cls) -> Limits:
        """Those that the environment sets, or the defaults."""
        settings = PlatformSettings()
        return cls(settings.reader_seconds, settings.reader_memory_gb)


class ProcessLostError(Exception):
    """The process ended, or was ended, before it answered.

    Attributes:
        kind: ``crash``, ``out-of-memory`` or ``time-limit``.
        own: Whether it was this question that took too long. Otherwise another one, asked at the
            same time, may be to blame.
    """

    def __init__(self, reason: str, *, kind: str, own: bool = False) -> None:
        super().__init__(reason)
        self.kind = kind
        self.own = own


class ReaderProcess:
    """The program's side of a reader process. `ask` may be called from several threads.

    Attributes:
        limits: What it may take.
        sound: Whether it met nothing that may have harmed it. One that met a damaged file may be
            damaged itself, and is not used again.
        served: How often it was given back.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sound = True
        self.served = 0
        self._connected = 0
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        self._lost: tuple[str, str] | None = None
        self._errors = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by `end`
        self._control, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(  # noqa: S603 - this package's own program
                # Nothing is imported from the working directory, which may be a folder of slides.
                [sys.executable, "-P", "-m", _CHILD, str(theirs.fileno()), str(self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                env=_environment(),
            )
        _limit_waiting(self._control, _START_SECONDS)
        try:
            if not self._control.recv(1):
                raise OSError
        except OSError as error:
            told = self._said()[-500:].decode(errors="replace").strip().splitlines()
            self.end()
            raise SlideError(
                f"The process that reads slides did not start ({told[-1] if told else 'no reason'}"
                f"). Try: {sys.executable} -m {_CHILD}",
                kind="unexpected",
            ) from error

    @property
    def _memory(self) -> int:
        return round(self.limits.memory_gb * 1e9)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._child.poll() is None

    @property
    def reusable(self) -> bool:
        """Whether it may serve another slide: it is well, not old, and owes no answer."""
        quiet = len(self._idle) == self._connected
        return self.alive and self.sound and quiet and self.served < MAX_SERVED

    def ask(
        self,
        message: wire.Message,
        *,
        shape: tuple[int, int] | None = None,
        max_pixels: int = 0,
    ) -> tuple[wire.Message, np.ndarray | None]:
        """Ask for something and wait for the answer.

        Args:
            message: What `process.Desk` understands.
            shape: (height, width) that the answer's pixels must have.
            max_pixels: Most pixels of an answer whose shape isn't known before.

        Returns:
            The answer and its pixels, uint8 (height, width, 3), if it has any.

        Raises:
            SlideError: It was answered that it can't be done.
            ProcessLostError: There will be no answer.
        """
        connection = self._connection()
        try:
            wire.send(connection, message)
            answer, pixels = wire.receive(connection, shape=shape, max_pixels=max_pixels)
        except TimeoutError:
            connection.close()
            reason = f"took longer than {self.limits.seconds:g} s"
            with self._lock:
                self._lost = self._lost or (reason, "time-limit")
            self._child.kill()
            raise ProcessLostError(reason, kind="time-limit", own=True) from None
        except wire.BrokenWireError:
            connection.close()
            raise self._why_lost() from None
        except BaseException:  # such as an interrupt: nobody would take the answer
            connection.close()
            self._child.kill()
            raise
        self._idle.append(connection)
        if "error" in answer:
            self.sound = False
            raise SlideError(answer["error"], kind=answer["kind"])
        return answer, pixels

    def end(self) -> None:
        """Kill it and free what it held."""
        self._child.kill()
        with self._lock:
            self._lost = self._lost or ("was ended", "crash")
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in a read of a file server
            self._child.wait(_END_SECONDS)
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._errors.close()
        for connection in (self._control, *self._idle):
            connection.close()

    def _connection(self) -> socket.socket:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            ours, theirs = socket.socketpair()
            self._connected += 1
            with theirs, contextlib.suppress(BrokenPipeError):  # the question will find it closed
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        _limit_waiting(ours, self.limits.seconds)
        return ours

    def _why_lost(self) -> ProcessLostError:
        with self._lock:
            self._lost = self._lost or self._post_mortem()
            reason, kind = self._lost
        return ProcessLostError(reason, kind=kind)

    def _post_mortem(self) -> tuple[str, str]:
        try:
            code = self._child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return "stopped answering", "crash"
        if any(words in self._said() for words in _NO_MEMORY):
            return f"asked for more than {self.limits.memory_gb:g} GB of memory", "out-of-memory"
        if code == -signal.SIGKILL:
            return "was killed, as if memory ran out", "out-of-memory"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"crashed ({name})", "crash"

    def _said(self) -> bytes:
        """What was written on standard error, which goes nowhere else: it may name a person."""
        return os.pread(self._errors.fileno(), 2**20, 0)


_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # nobody needs these threads, and starting them takes time
    # glibc would hand each tile's memory back and have it cleared again: 145 page faults a tile.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**27),
}


_INHERITED = re.compile(
    r"PATH|HOME|TMPDIR|LANG|LC_\w+|LD_\w+|PYTHON\w*|OMP_\w+|MALLOC_\w+|OPENSLIDE_\w+|VIRTUAL_ENV"
    r"|COVERAGE_\w+|HISTOENCODER_READER_\w+"
)


def _environment() -> dict[str, str]:
    """What a process needs to run and to find this package, and no secret of the program's."""
    inherited = {name: v for name, v in os.environ.items() if _INHERITED.fullmatch(name)}
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}


def _limit_waiting(connection: socket.socket, seconds: float) -> None:
    """Bound each wait in the kernel: Python's own time limits cost a second call for each read."""
    whole, rest = divmod(round(seconds * 1e6), 1_000_000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", whole, rest))


_idle: list[ReaderProcess] = []
_lock = threading.Lock()


def lease() -> ReaderProcess:
    """Get a process for oneself: one that waits, or a new one."""
    limits = Limits.of_deployment()
    while True:
        with _lock:
            process = _idle.pop() if _idle else None
        if process is None:
            return ReaderProcess(limits)
        if process.reusable and process.limits == limits:
            return process
        process.end()


def give_back(process: ReaderProcess) -> None:
    """Let the next slide have a process, or end it if it is not fit for that."""
    process.served += 1
    if process.reusable:
        with _lock:
            if len(_idle) < MAX_IDLE:
                _idle.append(process)
                return
    process.end()


def end_idle() -> None:
    """End the processes that wait."""
    with _lock:
        waiting = [*_idle]
        _idle.clear()
    for process in waiting:
        process.end()


def _forget() -> None:
    """In a copy of the program, as `os.fork` makes it: its processes are the original's."""
    global _lock
    _lock = threading.Lock()  # the original may hold it
    _idle.clear()


atexit.register(end_idle)
os.register_at_fork(after_in_child=_forget)
