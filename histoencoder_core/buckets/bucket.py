"""A prefix of a bucket, and the folder that stands for it."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from histoencoder_core.errors import kind_of
from histoencoder_core.store import files

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

log = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file")
"""Kinds of buckets; ``file`` is a folder that is treated like one."""

LISTED = "listed"
COPIES = "copies"
_TOLD = "bucket.json"
_WHOLE = "whole"
"""A file that is there once all slides of the bucket have been listed."""


_READ_AT_ONCE = frozenset([".csv", ".geojson", ".ini", ".json", ".vms", ".vmu", ".yaml", ".yml"])
_ANNOTATIONS = "annotations"
_MOST_AT_ONCE = 64 * 2**20
_HEAD_BYTES = 2**16
_MOST_NAME_BYTES = 255

_MAY_BE_TOLD = {
    *("region", "scheme", "endpoint_override", "force_virtual_addressing", "project_id"),
    *("tls_ca_file_path", "tls_ca_dir_path", "tls_verify_certificates", "retry_limit_seconds"),
    *("enable_tls", "blob_storage_authority", "blob_storage_scheme"),
    *("dfs_storage_authority", "dfs_storage_scheme"),
}
"""What may follow the question mark: how a bucket is reached, never by whom."""

Signature = tuple[int, int]
"""Size in bytes and modification time in nanoseconds."""


class BucketAwayError(Exception):
    """A bucket that can't be listed."""


def as_bucket_url(value: str) -> str | None:
    """Tell the address of a bucket from a path.

    Returns:
        The address without a slash at its end; None if it is a path.

    Raises:
        ValueError: It is an address of another kind, or holds a password.

    Example:
        >>> as_bucket_url("s3://hospital/scans/"), as_bucket_url("/data/slides")
        ('s3://hospital/scans', None)
    """
    if "://" not in value:
        return None
    parts = urlsplit(value)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"{parts.scheme}:// is not read; {', '.join(SCHEMES)} are")
    azure = parts.scheme in {"abfs", "abfss"}  # container@account is no secret
    if parts.password is not None or ("@" in parts.netloc and not azure):
        raise ValueError(
            "a bucket's address must hold no key or password: give them as the provider's own "
            "variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if told := sorted(parse_qs(parts.query, keep_blank_values=True).keys() - _MAY_BE_TOLD):
        raise ValueError(
            f"a bucket's address must not tell {', '.join(told)}: keys and passwords are given as "
            "the provider's own variables"
        )
    return parts._replace(path=parts.path.rstrip("/")).geturl()


@dataclass(frozen=True)
class _Objects:
    """What a bucket holds below a prefix, by name relative to it, and how to read it."""

    system: FileSystem
    by_relative: dict[str, FileInfo]


class Bucket:
    """A prefix of a bucket, and the folder that stands for it on this machine.

    Attributes:
        url: Its address, such as ``s3://hospital/scans?region=eu-central-1``; what may follow the
            question mark is told by `pyarrow.fs.FileSystem.from_uri`.
        root: The folder that stands for it.
        max_bytes: What the copies of all slides of all buckets may take.
    """

    def __init__(self, url: str, *, folder: Path, max_bytes: int) -> None:
        """Nothing is written or asked for yet.

        Args:
            url: Its address.
            folder: Where the folders of all buckets are.
            max_bytes: What the copies of all slides of all buckets may take.
        """
        self.url, self.max_bytes = url, max_bytes
        self.root = folder / _folder_name(url)
        self._listing: Future[_Objects] | None = None

    @classmethod
    def of(cls, path: Path) -> Bucket | None:
        """The bucket that a file of a slide stands for an object of; None of any other file."""
        for parent in path.parents:
            told = parent.parent / _TOLD
            if parent.name == LISTED and told.is_file():
                content = files.read_json(told)
                folder = parent.parent.parent
                return cls(content["url"], folder=folder, max_bytes=content["max_bytes"])
        return None

    @property
    def listed(self) -> Path:
        """The folder of files that stand for objects."""
        return self.root / LISTED

    def connect(self) -> tuple[FileSystem, str]:
        """The bucket's file system, and the prefix in it."""
        from pyarrow.fs import FileSystem  # takes a moment, and most deployments need none

        system, prefix = FileSystem.from_uri(self.url)
        return system, prefix.rstrip("/")

    def list_anew(self, *, seconds: float) -> None:
        """Make the folder of files say what is in the bucket now.

        A bucket that is slow to list goes on being listed in the background, and what is new comes
        with a later call.

        Args:
            seconds: Time to wait for the list, and then to write what is new.

        Raises:
            BucketAwayError: The bucket can't be listed, or has not been yet; the folder stays as it
                was.
        """
        told = {"url": self.url, "max_bytes": self.max_bytes}
        path = self.root / _TOLD
        try:
            # Copies hold what scanners write into slides, such as labels with names.
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with files.locked_to_write(path):
                if not path.is_file() or files.read_json(path) != told:
                    files.write_json(path, told)
                found = self._list(seconds)
                if found is not None:
                    self.listed.mkdir(exist_ok=True)
                    self._bring_up_to_date(found, end=time.monotonic() + seconds)
                # What is not written yet would be taken for absent.
                if not (self.root / _WHOLE).exists():
                    raise BucketAwayError(f"{self.url}: is being listed for the first time")
        # Arrow raises the latter two for what an address asks for.
        except (OSError, ValueError, NotImplementedError) as error:
            raise BucketAwayError(f"{self.url}: can't be listed: {error}") from error

    def _list(self, seconds: float) -> _Objects | None:
        if self._listing is None:
            thread = ThreadPoolExecutor(1, thread_name_prefix="list-bucket")
            self._listing = thread.submit(self._ask)
            thread.shutdown(wait=False)
        if not wait([self._listing], timeout=seconds).done:
            log.info("%s: is still being listed", self.url)
            return None
        listing, self._listing = self._listing, None
        return listing.result()

    def _ask(self) -> _Objects:
        from pyarrow.fs import FileSelector, FileType

        system, prefix = self.connect()
        found = system.get_file_info(FileSelector(prefix, recursive=True))
        return _Objects(
            system,
            {
                relative: info
                for info in found
                if info.type == FileType.File
                and _can_be_a_path(relative := info.path.removeprefix(f"{prefix}/"))
            },
        )

    def _bring_up_to_date(self, found: _Objects, *, end: float) -> None:
        there = found.by_relative
        known = _signatures_below(self.listed)
        for relative in known.keys() - there.keys():
            self._remove(relative)
        new = [
            (_ANNOTATIONS in PurePosixPath(relative).parts[:-1], relative, info)
            for relative, info in there.items()
            if known.get(relative) != (info.size, info.mtime_ns or 0)
        ]
        # Slides first: next to nothing is read of them, so they are soon there.
        for is_annotation, relative, info in sorted(new, key=itemgetter(0)):
            if is_annotation:
                (self.root / _WHOLE).touch()
            if time.monotonic() > end:
                log.info("%s: more is new; it comes with the next look", self.url)
                return
            try:
                self._write(relative, info, found.system)
            except (IsADirectoryError, NotADirectoryError, FileExistsError):
                log.warning("%s/%s: is a file and a folder; it is left out", self.url, relative)
            except OSError as error:
                if kind_of(error) != "input-output":
                    raise  # this machine's disk, not the object
                log.warning("%s/%s: can't be read (%s); it is left out", self.url, relative, error)
        (self.root / _WHOLE).touch()

    def _write(self, relative: str, info: FileInfo, system: FileSystem) -> None:
        """Write the file that stands for an object."""
        target = self.listed / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.root / ".new"  # not in the folder, where it would pass for a slide's part
        with temporary.open("wb") as file:
            most = _bytes_at_once(PurePosixPath(relative), info.size)
            if most:
                with system.open_input_file(info.path) as source:
                    file.write(source.read(most))
            file.truncate(info.size)
        os.utime(temporary, ns=(time.time_ns(), info.mtime_ns or 0))
        temporary.replace(target)

    def _remove(self, relative: str) -> None:
        path = self.listed / relative
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self.listed or any(parent.iterdir()):
                break
            parent.rmdir()


def _folder_name(url: str) -> str:
    """A name that people recognise; what only tells how a bucket is reached does not change it."""
    parts = urlsplit(url)
    where = [parts.scheme, parts.netloc, parts.path]
    where += parse_qs(parts.query).get("endpoint_override", [])
    digest = hashlib.sha256("\n".join(where).encode()).hexdigest()
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", parts.netloc + parts.path).strip("._")
    return f"{plain[-100:]}-{digest[:8]}"


def _can_be_a_path(relative: str) -> bool:
    parts = relative.split("/")
    if any(
        part in {"", ".", ".."} or "\0" in part or len(part.encode()) > _MOST_NAME_BYTES
        for part in parts
    ):
        if not relative.endswith("/"):  # which is how some tools note an empty folder
            log.warning("%r: can't be the name of a file; it is left out", relative)
        return False
    return True


def _bytes_at_once(path: PurePosixPath, size: int) -> int:
    """How much of an object is read when it is found: what finding slides has to read of it."""
    suffix = path.suffix.lower()
    read = suffix in _READ_AT_ONCE or _ANNOTATIONS in path.parts[:-1]
    if read and size <= _MOST_AT_ONCE:
        return size
    return min(size, _HEAD_BYTES) if suffix == ".dcm" else 0


def _signatures_below(folder: Path) -> dict[str, Signature]:
    found: dict[str, Signature] = {}
    pending = [""]
    while pending:
        below = pending.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                relative = f"{below}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{relative}/")
                else:
                    stat = entry.stat(follow_symlinks=False)
                    found[relative] = stat.st_size, stat.st_mtime_ns
    return found
