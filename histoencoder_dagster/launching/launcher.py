"""Dagster's launcher of runs, in the words of ``dagster.yaml``."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import dagster as dg
from dagster._core.errors import DagsterLaunchFailedError
from dagster._core.launcher import (
    CheckRunHealthResult,
    DefaultRunLauncher,
    LaunchRunContext,
    WorkerStatus,
)
from dagster._core.origin import JobPythonOrigin
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import ConfigurableClassData, serialize_value

from histoencoder_dagster.launching.process import process_of

PATIENCE = 150.0
"""Seconds in which the forker must have imported all, on a busy machine with cold disks. Dagster
gives a run three minutes to start."""

_PACKAGES = Path(__file__).parents[2]


class ForkingRunLauncher(DefaultRunLauncher):
    """Forks runs from a process that has imported all they need; they outlive the daemon.

    Dagster's own launcher, which this is where it can't fork, has the code server start a new
    interpreter for each run: four to six seconds of processor time before its first step, for a
    batch whose work may take two. And it forgets its runs when the machine is started anew.

    It forks on Linux, runs of code that is installed where the daemon is.
    """

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(inst_data)
        self._forker: Forker | None = None
        self._forking = threading.Lock()

    def launch_run(self, context: LaunchRunContext) -> None:
        """Have the run executed by a process of its own.

        Raises:
            DagsterLaunchFailedError: The process can't be started.
        """
        run, origin = context.dagster_run, context.job_code_origin
        if origin is None or not _can_fork(run, origin):
            super().launch_run(context)
            return
        told = ExecuteRunArgs(origin, run.run_id, self._instance.get_ref())
        with self._forking:
            try:
                if self._forker is None or not self._forker.is_of_now:
                    self.dispose()
                    self._forker = Forker()
                self._forker.fork(serialize_value(told))
            except OSError as error:
                self.dispose()
                raise DagsterLaunchFailedError(  # type: ignore[no-untyped-call]
                    f"The process that runs are forked from is of no use: {error}. What it said "
                    "is in the daemon's log."
                ) from error

    def dispose(self) -> None:
        """End the process that runs are forked from; they go on."""
        if self._forker is not None:
            self._forker.end()
            self._forker = None

    def terminate(self, run_id: str) -> bool:
        """Ask a run to stop, as Dagster does: its step is interrupted, and it ends as canceled."""
        run = self._instance.get_run_by_id(run_id)
        process = None if run is None else process_of(run)
        if run is None or process is None:
            return bool(super().terminate(run_id))  # type: ignore[no-untyped-call]
        if run.is_finished:
            return False
        if not process.is_here:
            self._tell(run, f"It runs on {process.host}, and can be stopped from there only.")
            return False
        if not process.is_alive:
            self._tell(run, f"Its process {process.pid} is gone; it will soon be told as failed.")
            return False
        try:
            os.kill(process.pid, 0)
        except PermissionError:
            self._tell(run, f"Its process {process.pid} is another user's, who may stop it.")
            return False
        self._instance.report_run_canceling(run)
        os.kill(process.pid, signal.SIGINT)
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Dagster's monitoring may ask whether a run's process goes on."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Tell whether a run's process goes on; of another machine's there is no knowing."""
        process = process_of(run)
        if process is None or not process.is_here or process.is_alive:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(
            WorkerStatus.FAILED,
            f"its process {process.pid} is gone: it was killed, as when memory runs out, or the "
            "machine was started anew",
        )

    def _tell(self, run: dg.DagsterRun, message: str) -> None:
        self._instance.report_engine_event(message, dagster_run=run, cls=type(self))


class Forker:
    """The process that runs are forked from, as its owner sees it."""

    def __init__(self) -> None:
        self._code = _code()
        answers, answering = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - words of ours
                [sys.executable, "-m", __package__, str(answering)],
                stdin=subprocess.PIPE,
                pass_fds=[answering],
                bufsize=0,
            )
        finally:
            os.close(answering)
        self._answers = os.fdopen(answers, "rb")

    @property
    def is_of_now(self) -> bool:
        """Whether it goes on, with the platform's code as it is now."""
        return self._process.poll() is None and self._code == _code()

    def fork(self, arguments: str) -> int:
        """Have a run executed.

        Args:
            arguments: What ``dagster api execute_run`` takes, in one line.

        Returns:
            The id of the run's process.

        Raises:
            OSError: It ended, or was killed.
            TimeoutError: It does not answer.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(arguments.encode() + b"\n")
        ready, _, _ = select.select([self._answers], [], [], PATIENCE)
        if not ready:
            raise TimeoutError(f"it has not answered for {PATIENCE:.0f} s")
        answer = self._answers.readline()
        if not answer:
            raise BrokenPipeError(f"it ended with {self._process.wait()}")
        return int(answer)

    def end(self) -> None:
        """End it, and leave the runs alone."""
        self._process.kill()
        self._process.communicate()
        self._answers.close()


def _can_fork(run: dg.DagsterRun, origin: JobPythonOrigin) -> bool:
    """Whether a run's code is installed where the daemon is, and served on the same machine."""
    if sys.platform != "linux":
        return False
    served = run.remote_job_origin
    place = None if served is None else served.repository_origin.code_location_origin
    if isinstance(place, GrpcServerCodeLocationOrigin):
        here = ("localhost", "127.0.0.1", "::1", socket.gethostname())
        if place.socket is None and place.host not in here:
            return False
    ours, its = (
        Path(it).parent for it in (sys.executable, origin.repository_origin.executable_path)
    )
    return ours.resolve() == its.resolve()


def _code() -> tuple[int, int]:
    """What changes with any change to the platform's code, as while it is developed."""
    packages = (_PACKAGES / name for name in ("histoencoder_core", "histoencoder_dagster"))
    changed = [path.stat().st_mtime_ns for it in packages for path in it.rglob("*.py")]
    return max(changed), len(changed)
