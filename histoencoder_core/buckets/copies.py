"""Copies of slides that lie in a bucket: fetched when they are read, dropped when room is needed.

A copy is in use while somebody holds its lock, shared with other readers. Whoever fetches or drops
it holds the lock alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from histoencoder_core.buckets.bucket import COPIES, Bucket
from histoencoder_core.errors import SlideError, kind_of
from histoencoder_core.store import files

log = logging.getLogger(__name__)

_CHUNK = 8 * 2**20


@contextmanager
def copied(parts: Sequence[Path]) -> Iterator[Path]:
    """Read a slide wherever it lies.

    Args:
        parts: All its files, its own first.

    Yields:
        The file to read: the slide's own, or its copy if it lies in a bucket. The copy stays as
        long as the block lasts.

    Raises:
        SlideError: It can't be fetched.
    """
    bucket = Bucket.of(parts[0])
    if bucket is None:
        yield parts[0]
        return
    place = _place(bucket, parts[0])
    with _opened_lock(place) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not _is_copy(place, parts):
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_copy(place, parts):
                _fetch(bucket, place, parts)
            fcntl.flock(lock, fcntl.LOCK_SH)  # which lets others in for a moment
        os.utime(place)  # used just now
        yield place / parts[0].name


def find_copy(path: Path) -> Path | None:
    """The folder of a slide's copy; None if there is none.

    Args:
        path: The slide's file.
    """
    bucket = Bucket.of(path)
    place = None if bucket is None else _place(bucket, path)
    return place if place is not None and place.exists() else None


def drop_copy(place: Path) -> None:
    """Remove a slide's copy, once nobody reads it any more.

    Args:
        place: From `find_copy`.
    """
    with _opened_lock(place) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files.remove(place)


def _place(bucket: Bucket, path: Path) -> Path:
    """The folder of a slide's copy."""
    relative = path.relative_to(bucket.listed).as_posix()
    return bucket.root / COPIES / hashlib.sha256(relative.encode()).hexdigest()[:32]


@contextmanager
def _opened_lock(place: Path) -> Iterator[IO[str]]:
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("a") as lock:
        yield lock


def _is_copy(place: Path, parts: Sequence[Path]) -> bool:
    """Whether there is a copy of what the bucket holds now."""
    try:
        return all(
            _signature(place / part.relative_to(parts[0].parent)) == _signature(part)
            for part in parts
        )
    except FileNotFoundError:
        return False


def _fetch(bucket: Bucket, place: Path, parts: Sequence[Path]) -> None:
    """Copy a slide from its bucket. Its lock must be held alone."""
    new = place.with_suffix(".new")
    for path in (new, place):  # what a killed process left, and a former version
        files.remove(path)
    try:
        wanted = {part: _signature(part) for part in parts}
        _reserve(
            bucket, new, {part.relative_to(parts[0].parent): wanted[part][0] for part in parts}
        )
        log.info("%s: fetching it", _address(bucket, parts[0]))
        for part in parts:
            _download(bucket, part, new / part.relative_to(parts[0].parent), wanted[part])
        new.rename(place)
    except BaseException:
        files.remove(new)
        raise


def _download(bucket: Bucket, part: Path, target: Path, wanted: tuple[int, int]) -> None:
    from pyarrow.fs import LocalFileSystem, copy_files

    address = _address(bucket, part)
    try:
        system, prefix = bucket.connect()
        source = f"{prefix}/{part.relative_to(bucket.listed).as_posix()}"
        copy_files(
            source,
            str(target),
            source_filesystem=system,
            destination_filesystem=LocalFileSystem(),
            chunk_size=_CHUNK,
        )
        after = system.get_file_info(source)
    except FileNotFoundError as error:
        raise SlideError(f"{address}: is not in its bucket any more.", kind="missing") from error
    except OSError as error:
        if kind_of(error) in {"out-of-disk", "read-only"}:
            raise
        raise SlideError(
            f"{address}: can't be fetched ({error}). It is tried again.", kind="input-output"
        ) from error
    # One object is read in several requests, which may be answered from several versions of it.
    if (after.size, after.mtime_ns or 0) != wanted or target.stat().st_size != wanted[0]:
        raise SlideError(
            f"{address}: has changed while it was fetched. It is taken up again once it stands "
            "still.",
            kind="changing",
        )
    os.utime(target, ns=(wanted[1], wanted[1]))
    files.flush(target)  # a power cut must not leave zeros of the right size


def _reserve(bucket: Bucket, new: Path, sizes: dict[Path, int]) -> None:
    """Make room for a copy, and take it, so that others do not."""
    folder, need = bucket.root.parent, sum(sizes.values())
    with files.locked(folder / ".room.lock"):
        places = sorted(
            (place for place in folder.glob(f"*/{COPIES}/*") if place.is_dir()),
            key=lambda place: place.stat().st_mtime_ns,
        )
        taken = {place: _bytes_below(place) for place in places}
        for place in places:
            if sum(taken.values()) + need <= bucket.max_bytes:
                break
            if _dropped(place):
                del taken[place]
        if sum(taken.values()) + need > bucket.max_bytes:
            raise SlideError(
                f"{bucket.url}: a slide of {need / 1e9:.1f} GB is to be fetched, and of "
                f"{bucket.max_bytes / 1e9:g} GB for copies, those in use take "
                f"{sum(taken.values()) / 1e9:.1f}. Raise HISTOENCODER_BUCKET_COPIES_GB, or run "
                "fewer things at once.",
                kind="out-of-disk",
            )
        for relative, size in sizes.items():
            target = new / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                file.truncate(size)


def _dropped(place: Path) -> bool:
    """Remove a copy unless somebody reads or fetches it."""
    with _opened_lock(place) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        log.info("%s: dropping it to make room", place)
        files.remove(place)
    return True


def _address(bucket: Bucket, part: Path) -> str:
    return f"{bucket.url.partition('?')[0]}/{part.relative_to(bucket.listed).as_posix()}"


def _signature(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
