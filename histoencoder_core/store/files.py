"""Writing so that a file under its final name is always whole, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

TELL_SECONDS = 30.0
"""A process that waits for a lock says so after so long."""

# A database keeps its log, and what does not fit into memory, under its own name with a suffix.
_TEMPORARY = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp(\..+)?")


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary name in the target's folder; on success flush it and rename it.

    Args:
        target: The final name. Its folder is made if need be.

    Yields:
        The name to write to. Whatever was written is removed if the block raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(target)
        flush(target.parent)
    except BaseException:
        remove(temporary)
        raise


def temporary_name(target: Path) -> Path:
    """A fresh hidden name beside the target that no other process uses."""
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def locked(path: Path, *, given_up: Callable[[], bool] | None = None) -> Iterator[bool]:
    """Hold a lock that one process, and one thread of it, has at a time; wait for it if need be.

    The operating system drops the lock with the process, however that ends. The file stays. The
    block may be entered by one thread and left by another. It can't be entered twice.

    Args:
        path: The lock's file. Its folder is made if need be.
        given_up: Asked again and again while waiting.

    Yields:
        Whether the lock is held. On a read-only file system it is not: nobody can write there, and
        what is done is to be found done.

    Raises:
        filelock.Timeout: Waiting was given up.
        OSError: The file can't be written.
    """
    # Not by thread: features are locked by the thread that reads and released by the one that
    # writes.
    lock = FileLock(path, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=TELL_SECONDS, cancel_check=given_up)
        except Timeout:
            if given_up is not None and given_up():
                raise
            log.warning("%s: is held by another process; waiting for it to end its work", path)
            lock.acquire(cancel_check=given_up)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def locked_to_write(*targets: Path) -> Iterator[None]:
    """Hold the lock ``.<name>.lock`` beside what several processes may write.

    What a killed process left of writing it is removed, and what the block leaves if it raises,
    such as a database's log on a full disk.

    Args:
        targets: What is to be written, in one folder: files, or a folder with all files in it. The
            lock is named after the first.
    """
    first = targets[0]
    with locked(first.with_name(f".{first.stem}.lock")) as held:
        try:
            if held:
                _sweep_all(targets)
            yield
        except BaseException:
            if held:
                _sweep_all(targets)
            raise


def _sweep_all(targets: Iterable[Path]) -> None:
    for target in targets:
        sweep(target.parent, of=target.name)
        if target.is_dir():
            sweep(target)


def sweep(folder: Path, *, of: str | None = None) -> None:
    """Remove temporary files and folders: who holds the lock knows that nobody is writing them.

    Args:
        folder: Where they lie.
        of: Only those that were to become the file of this name.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(".")]
    for name in names:
        found = _TEMPORARY.fullmatch(name)
        if found is not None and of in (None, found[1]):
            log.info("%s: removed what a killed process left", folder / name)
            remove(folder / name)


def flush(path: Path) -> None:
    """Ask the operating system to put a file's or a folder's contents on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems can't flush a folder
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write JSON atomically, readable by people unless `indent` is None."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    if not is_text(text):
        text = json.dumps(content, indent=indent)
    with atomic_path(path) as temporary:
        temporary.write_text(f"{text}\n", "utf-8")


def is_text(name: str) -> bool:
    r"""Whether a file's name is text: on Linux it may be any bytes, and Python keeps them apart.

    Example:
        >>> is_text("ä.svs"), is_text(os.fsdecode(b"\xe4.svs"))
        (True, False)
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not JSON.
    """
    return json.loads(path.read_text("utf-8"))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove(target)
    try:
        os.link(source, target)
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copy2(source, temporary)
