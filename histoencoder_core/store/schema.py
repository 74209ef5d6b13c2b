"""The store's schema version, and how an older store becomes a newer one.

``<store>/_cohort/store.json`` holds the version. It covers what is not made anew by itself: names
of files, and the form of those that nothing else can tell the form of. Tables of tiles carry
stamps, and the catalog the fingerprint of its own form, by which it is written anew.

A store is looked at once a process, when it is first opened. An older one is brought up to date
then, step by step under a lock. Each step may be repeated, so one that was killed does no harm. A
store of a newer version is refused before anything is read or written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from histoencoder_core import __version__
from histoencoder_core.errors import KINDS, StoreError
from histoencoder_core.store import files, layout

log = logging.getLogger(__name__)

_checked: set[Path] = set()
"""Stores that this process has looked at."""


def ensure_schema(root: Path) -> None:
    """Make sure that a store's schema is the one of this program.

    A store that can't be written to is left as it is: what reads it copes with older forms.

    Args:
        root: The store's folder. One without files of a cohort is no store yet.

    Raises:
        StoreError: The store is of a newer version, or its record of it is damaged.
    """
    if root in _checked:
        return
    version = read_version(root)
    if version is None:
        return
    if version < VERSION:
        try:
            _bring_up_to_date(root)
        except OSError as error:
            log.warning("%s: its schema version can't be brought up to date: %s", root, error)
    _checked.add(root)


def begin_store(root: Path) -> None:
    """Write the schema version of a store that is just being made; others are left as they are.

    Args:
        root: The store's folder, which need not exist yet.
    """
    if read_version(root) is not None:
        return
    with files.locked_to_write(_record(root)):
        if not _record(root).exists():
            files.write_json(_record(root), {"version": VERSION, "software": __version__})
    _checked.add(root)


def _bring_up_to_date(root: Path) -> None:
    with files.locked_to_write(_record(root)):
        version = read_version(root)  # another process may have done it meanwhile
        while version is not None and version < VERSION:
            _MIGRATIONS[version](root)
            version += 1
            files.write_json(_record(root), {"version": version, "software": __version__})


def read_version(root: Path) -> int | None:
    """The schema version of a store; None if it holds no files of a cohort yet.

    Raises:
        StoreError: It is newer than this program, or can't be read.
    """
    record = _record(root)
    try:
        version = files.read_json(record)["version"]
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"version is {version!r}")
    except (FileNotFoundError, NotADirectoryError):
        return 1 if record.parent.is_dir() else None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{record}: tells no schema version ({error}). Bring it back from a backup, or remove "
            "it: the store is then taken for one of version 1 and looked through once."
        ) from error
    if version > VERSION:
        raise StoreError(
            f"{root}: is a store of schema version {version}, which this program ({__version__}) "
            f"does not know; it knows up to {VERSION}. Install a newer one. Nothing was changed."
        )
    return version


def _record(root: Path) -> Path:
    return root / layout.COHORT / layout.SCHEMA


_KINDS_OF_ERRORS = {
    "SettingsError": "settings",
    "StoreError": "store",
    "WeightsError": "weights-missing",
    "LabelError": "labels",
    "ClusterError": "clusters",
    "HistoEncoderError": "encoder",
    "MemoryError": "out-of-memory",
    "OutOfMemoryError": "out-of-memory",
    "TimeoutError": "time-limit",
    "OSError": "input-output",
}


def _kinds_of_failures(root: Path) -> None:
    """From 1 to 2: a failure's kind was an error's name; it has a class, a count and a time now."""
    with os.scandir(root) as entries:
        folders = [Path(e.path) for e in entries if layout.is_slide_id(e.name) and e.is_dir()]
    for path in (folder / layout.FAILURES for folder in folders):
        try:
            failures, at = files.read_json(path), path.stat().st_mtime
        except (FileNotFoundError, ValueError):
            continue
        if not isinstance(failures, dict):
            continue
        told = {
            stage: {
                "attempts": 1,
                "at": round(at, 3),
                **failure,
                "kind": failure["kind"]
                if failure["kind"] in KINDS
                else _KINDS_OF_ERRORS.get(failure["kind"], "unexpected"),
            }
            for stage, failure in failures.items()
        }
        if told != failures:
            files.write_json(path, told)


_MIGRATIONS: dict[int, Callable[[Path], None]] = {1: _kinds_of_failures}
"""By version, what makes a store of it one of the next."""

VERSION = max(_MIGRATIONS) + 1
"""The version that this program writes."""
