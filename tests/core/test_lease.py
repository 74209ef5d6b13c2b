"""Leases on GPUs: one process a GPU, and none is lost with a process that dies."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from histoencoder_core.errors import SettingsError
from histoencoder_core.features import lease

PATIENCE = 30.0
"""Seconds after which a test that waits for another thread or process has failed."""

HOLDER = """
import importlib.util, sys, types
from pathlib import Path

module, folder, asked, *uuids = sys.argv[1:]
cuda = types.SimpleNamespace(
    device_count=lambda: len(uuids),
    get_device_properties=lambda index: types.SimpleNamespace(uuid=uuids[index]),
)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)  # the real one takes seconds
spec = importlib.util.spec_from_file_location("lease", module)
lease = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lease)
lease.lease_folder = lambda: Path(folder)
print(lease.lease_gpu([int(asked)] if asked else None), flush=True)
sys.stdin.read()
"""

lease_folder = lease.lease_folder
"""The real one, which no test below uses otherwise."""

Hold = Callable[..., "Holder"]


class Holder:
    """Another process with a lease, until it is told to end or is killed."""

    def __init__(self, folder: Path, uuids: Sequence[str], asked: int | None) -> None:
        words = [lease.__file__, str(folder), "" if asked is None else str(asked), *uuids]
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.index = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=PATIENCE)


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two GPUs that no other process of this machine knows of; leases end with the test."""
    uuids = ["gpu-a", "gpu-b"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: types.SimpleNamespace(uuid=uuids[index]),
    )
    held: dict[str, lease.FileLock] = {}
    monkeypatch.setattr(lease, "_held", held)
    monkeypatch.setattr(lease, "lease_folder", lambda: tmp_path / "gpus")
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.01)
    yield
    for lock in held.values():
        lock.release()


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    holders: list[Holder] = []

    def started(*, uuids: Sequence[str] = ("gpu-a", "gpu-b"), asked: int | None = None) -> Holder:
        holders.append(Holder(tmp_path / "gpus", uuids, asked))
        return holders[-1]

    yield started
    for holder in holders:
        holder.kill()


def test_a_process_takes_the_gpu_that_is_free(hold: Hold) -> None:
    assert hold().index == 0
    assert lease.lease_gpu() == 1
    assert lease.lease_gpu() == 1  # asking again gives the same


def test_two_processes_that_number_the_gpus_otherwise_do_not_share_one(hold: Hold) -> None:
    """As where each sees only some of them, in CUDA_VISIBLE_DEVICES."""
    assert hold(uuids=["gpu-b"]).index == 0  # which is this process's GPU 1
    assert lease.lease_gpu() == 0
    assert list(lease._held) == ["gpu-a"]


def test_the_lease_of_a_killed_process_is_free(hold: Hold) -> None:
    holder = hold()
    holder.kill()
    assert lease.lease_gpu() == 0


def test_a_released_gpu_is_free_for_others_and_can_be_leased_again(hold: Hold) -> None:
    assert lease.lease_gpu() == 0
    assert hold().index == 1
    lease.release_gpus()
    assert hold().index == 0
    lease.release_gpus()  # nothing is held
    with pytest.raises(lease.Timeout):
        lease.FileLock(lease.lease_folder() / "gpu-a.lock").acquire(blocking=False)


def test_one_of_the_gpus_can_be_asked_for(hold: Hold) -> None:
    assert lease.lease_gpu([1]) == 1
    assert lease.lease_gpu([1]) == lease.lease_gpu() == 1
    assert hold().index == 0


def test_a_process_waits_for_a_gpu_and_says_so(
    hold: Hold, caplog: pytest.LogCaptureFixture
) -> None:
    holders = [hold(), hold()]
    assert [holder.index for holder in holders] == [0, 1]
    got: list[int] = []
    told = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()

    listener = Listener()
    lease.log.addHandler(listener)
    try:
        with caplog.at_level(logging.WARNING, logger=lease.log.name):
            waiting = threading.Thread(target=lambda: got.append(lease.lease_gpu()))
            waiting.start()
            assert told.wait(PATIENCE)
            assert got == []
            holders[1].kill()
            waiting.join(PATIENCE)
    finally:
        lease.log.removeHandler(listener)
    assert got == [1]
    [message] = [record.getMessage() for record in caplog.records]  # not at every look
    assert message.startswith("waiting for a GPU")


def test_waiting_for_one_gpu_does_not_take_another(hold: Hold) -> None:
    holder = hold(asked=0)
    got: list[int] = []
    waiting = threading.Thread(target=lambda: got.append(lease.lease_gpu([0])))
    waiting.start()
    assert hold().index == 1
    holder.kill()
    waiting.join(PATIENCE)
    assert got == [0]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere folders have no sticky bit")
def test_the_folder_is_the_same_whatever_tmpdir_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert tempfile.gettempdir() == str(tmp_path)
    assert lease_folder() == Path("/tmp/histoencoder-gpus")


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "gpus").write_text("in the way")
    with pytest.raises(SettingsError, match=r"gpus: can't be used to lease a GPU .*delete it"):
        lease.lease_gpu()


def test_a_lock_file_that_can_not_be_opened(tmp_path: Path) -> None:
    (tmp_path / "gpus" / "gpu-a.lock").mkdir(parents=True)
    with pytest.raises(SettingsError, match=r"gpu-a\.lock: can't be used .*chmod a\+rw"):
        lease.lease_gpu()
    assert not lease._held


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away"
)
def test_a_lock_file_of_another_user_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "gpus"
    folder.mkdir()
    folder.chmod(0o1777)  # as an earlier version made it
    file = folder / "gpu-a.lock"
    file.touch()
    file.chmod(0o666)
    os.chown(file, 12345, 12345)
    assert lease.lease_gpu() == 0


def test_other_users_may_lease_too(tmp_path: Path, hold: Hold) -> None:
    mask = os.umask(0o077)
    try:
        assert lease.lease_gpu() == 0
    finally:
        os.umask(mask)
    folder = tmp_path / "gpus"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777
    assert [stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()] == [0o666]
