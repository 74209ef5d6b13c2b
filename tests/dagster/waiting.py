"""A job that waits, for runs that are to be stopped, killed, or left alone meanwhile."""

import time
from pathlib import Path

import dagster as dg


class Wait(dg.Config):
    folder: str


@dg.op
def wait(config: Wait) -> None:
    """Say so in the folder, and wait until it is told to go on."""
    folder = Path(config.folder)
    (folder / "waits").touch()
    while not (folder / "go on").exists():
        time.sleep(0.02)


@dg.job(executor_def=dg.in_process_executor)
def waiting():
    wait()
