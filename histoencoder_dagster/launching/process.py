"""Which process a run is: told so that no other is ever taken for it."""

from __future__ import annotations

import os
import socket
from dataclasses import astuple, dataclass
from pathlib import Path

import dagster as dg

PROCESS = "histoencoder/process"
"""Tag of a run: its id, and the process that executes it. A run that is tried again has the tags of
the one before."""

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process of some machine. Only of Linux: what is told comes from ``/proc``.

    Attributes:
        host: Name of the machine, or of the container.
        boot: Id of the machine's last start: ids of processes begin anew with it.
        started: When the process was started, in clock ticks since then: its id is given to another
            one day.
        pid: The process's id.
    """

    host: str
    boot: str
    started: int
    pid: int

    @classmethod
    def this(cls) -> Process:
        """The process that asks."""
        pid = os.getpid()
        _, started = _state_of(pid)
        return cls(socket.gethostname(), _boot(), started, pid)

    @classmethod
    def parse(cls, text: str) -> Process:
        """The process that `str` told.

        Raises:
            ValueError: It is none.

        Example:
            >>> process = Process("node-1", "0b3f", 4711, 12)
            >>> str(process)
            'node-1 0b3f 4711 12'
            >>> Process.parse("node-1 0b3f 4711 12") == process
            True
        """
        host, boot, started, pid = text.split(" ")
        return cls(host, boot, int(started), int(pid))

    def __str__(self) -> str:
        return " ".join(map(str, astuple(self)))

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether it, a process of this machine, goes on.

        Raises:
            OSError: That can't be told.
        """
        if self.boot != _boot():
            return False
        try:
            state, started = _state_of(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return False
        # Where nobody waits for it, a process that has ended stays as a zombie.
        return started == self.started and state not in "ZX"


def tags_of(run_id: str, process: Process) -> dict[str, str]:
    """The tags by which a run tells its process."""
    return {PROCESS: f"{run_id} {process}"}


def process_of(run: dg.DagsterRun) -> Process | None:
    """The process that executes a run; None if it was not forked, or is not at work yet."""
    run_id, _, told = run.tags.get(PROCESS, "").partition(" ")
    return Process.parse(told) if run_id == run.run_id else None


def _boot() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def _state_of(pid: int) -> tuple[str, int]:
    """The state of a process, and when it was started."""
    # The second value is the name of the program in brackets, which may hold anything.
    values = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return values[0], int(values[19])
