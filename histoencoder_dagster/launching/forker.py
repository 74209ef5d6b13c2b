"""The process that runs are forked from; `launcher` starts it and talks to it.

It reads a line a run, what ``dagster api execute_run`` takes, and answers with the id of the
process that executes it. It ends when its input does, as then its launcher is gone.

Most of a run's first seconds went into imports, so they are done here, once. Nothing else is: no
store, database or GPU is opened, lest runs share it, and no setting is read, as Dagster gives a run
its environment only later. The only threads are those that OpenBLAS and Arrow's allocator start on
import, and both know of forks.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
import threading
import traceback
from typing import NoReturn

from histoencoder_core.imports import collector_off

IMPORTED = (
    "dagster._cli.api",
    "histoencoder_core.annotate",
    "histoencoder_core.clusters",
    "histoencoder_core.features",
    "histoencoder_core.slides",
    "histoencoder_core.tiles.histoprep_functions",
    "histoencoder_dagster.assets",
    "histoencoder_dagster.checks",
    "histoencoder_dagster.jobs",
    "histoencoder_dagster.sensors",
    "histoencoder_dagster.versions",
)
"""What runs that describe slides or work them up use."""


def main() -> None:
    """Execute the run of each line of the standard input in a process of its own.

    The only argument is the descriptor that answers are written to.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal; it is meant for the runs
    lines, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(int(sys.argv[1]), "wb")
    os.set_inheritable(answers.fileno(), False)  # noqa: FBT003 - it has no name
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with collector_off():
        for name in IMPORTED:
            importlib.import_module(name)
    gc.freeze()  # so that its memory stays shared with the runs: the collector writes into objects
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a run that has ended leaves no zombie
    while line := lines.readline():
        pid = os.fork()
        if pid == 0:
            lines.close()
            answers.close()
            try:
                execute(line.decode())
            except BaseException:  # noqa: BLE001 - the log tells, whatever it is
                traceback.print_exc()
            finally:
                end()
        answers.write(b"%d\n" % pid)
        answers.flush()


def end() -> NoReturn:
    """End this process as `multiprocessing` ends those that it forked.

    All that is to be done in the end is done; but the objects that it shares are not taken apart,
    which would copy them all, and have some libraries tell that they leak.
    """
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads, as Python does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def execute(arguments: str) -> None:
    """Execute a run in this process, once its tags tell that it does."""
    from dagster import DagsterInstance, DagsterRunStatus
    from dagster._cli.api import api_cli
    from dagster._grpc.types import ExecuteRunArgs
    from dagster._serdes import deserialize_value

    from histoencoder_dagster.launching.process import Process, tags_of

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # PostgreSQL is given the records of a batch of slides at once, not a connection for each.
    os.environ.setdefault("DAGSTER_EVENT_BATCH_SIZE", "100")
    told = deserialize_value(arguments, ExecuteRunArgs)
    assert told.instance_ref is not None
    with DagsterInstance.from_ref(told.instance_ref) as instance:
        run = instance.get_run_by_id(told.run_id)
        # Else it is executed already, and Dagster passes over this one.
        if run is not None and run.status == DagsterRunStatus.STARTING:
            # Not by the launcher: of two that change a run's tags at once, one is undone.
            instance.add_run_tags(told.run_id, tags_of(told.run_id, Process.this()))
    api_cli.main(["execute_run", arguments], standalone_mode=False)
