"""Leases on GPUs: one process a GPU, whatever started the processes.

A lease is a lock on a file that all processes of this machine can see. The operating system drops
the lock with the process that holds it, however that ended, so a dead process leaves none behind.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from histoencoder_core.errors import SettingsError

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
TELL_SECONDS = 60.0

_held: dict[str, FileLock] = {}
_leasing = threading.Lock()


def lease_folder() -> Path:
    """The folder of lock files, one for all users of this machine.

    TMPDIR does not move it: processes that differ in it would lease the same GPU.
    """
    shared = "/tmp" if os.name == "posix" else tempfile.gettempdir()  # noqa: S108
    return Path(shared) / "histoencoder-gpus"


def lease_gpu(indices: Sequence[int] | None = None) -> int:
    """Lease a free GPU until this process ends or releases it, and wait while there is none.

    Asking again gives the same GPU: the weights are there already.

    Args:
        indices: The GPUs to choose from, as PyTorch numbers them; all if not given.

    Returns:
        The GPU's index.

    Raises:
        SettingsError: The lock files can't be used.
    """
    names = {index: _name(index) for index in indices or range(torch.cuda.device_count())}
    with _leasing:
        return _lease(names)


def release_gpus() -> None:
    """Give the leased GPUs to other processes; nothing of this one may lie on them any more."""
    with _leasing:
        while _held:
            _, lock = _held.popitem()
            lock.release()


def _lease(names: dict[int, str]) -> int:
    for index, name in names.items():
        if name in _held:
            return index
    folder = lease_folder()
    _open_to_all(folder)
    told = float("-inf")
    while True:
        for index, name in names.items():
            path = folder / f"{name}.lock"
            lock = FileLock(path, mode=0o666, thread_local=False)  # whatever the umask says
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            except OSError as error:
                raise _unusable(path, error) from error
            _held[name] = lock
            return index
        if time.monotonic() - told >= TELL_SECONDS:
            log.warning("waiting for a GPU: all of %s are leased by other processes", [*names])
            told = time.monotonic()
        time.sleep(POLL_SECONDS)


def _open_to_all(folder: Path) -> None:
    """Make the folder. It is not sticky: in sticky ones `filelock` refuses other users' files."""
    try:
        folder.mkdir(exist_ok=True)
        if os.name == "posix" and folder.stat().st_uid == os.geteuid():
            folder.chmod(0o777)
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(path: Path, error: OSError) -> SettingsError:
    folder = lease_folder()
    return SettingsError(
        f"{path}: can't be used to lease a GPU ({error.strerror or error}). All users share the "
        f"folder {folder}: its owner should run `chmod 0777 {folder}; chmod a+rw {folder}/*`, or "
        "delete it while no program of HistoEncoder runs."
    )


def _name(index: int) -> str:
    # CUDA_VISIBLE_DEVICES renumbers GPUs; their ids stay.
    return str(torch.cuda.get_device_properties(index).uuid)
