"""Watching folders and buckets of slides: what arrived, what is still being written, what is gone.

::

    folders ──▶ files there ──┬─ changed since the last look, or young ──▶ waiting
                              ├─ a part is not there yet ────────────────▶ waiting
                              ├─ taken up as it is now ──────────────────▶ nothing to do
                              └─ else ───────────────────────────────────▶ ready
    register ──▶ slides whose file is not among them ────────────────────▶ absent

What is owed follows from the files and from the store, never from what was asked for before: a
crash loses nothing, and nothing is computed twice. How long files have stood still is kept in the
store, as Dagster's daemon may start the process that looks anew each minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from histoencoder_core.buckets import Bucket, BucketAwayError
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.slides.content import signature
from histoencoder_core.slides.describe import was_tried
from histoencoder_core.slides.find import FoundSlide, find_slides, missing_part
from histoencoder_core.slides.register import Entry, Register, as_registered
from histoencoder_core.slides.sheet import Sheet
from histoencoder_core.store import Store, files
from histoencoder_core.store.failures import due_again

NEVER_SETTLES = 3600.0
"""Seconds after which a file that is still not whole is worth a warning."""

LISTING_SECONDS = 1.0
"""Time that a look waits for the list of a bucket, and takes to write down what is new in it."""

_AT_LEAST = 100
"""Slides' folders that each look reads if need be."""

Signature = tuple[int, int]
"""Size in bytes and modification time in nanoseconds."""

Source = Path | Bucket
"""Where slides are looked for."""


@dataclass(frozen=True)
class Ready:
    """A slide to take up.

    Attributes:
        found: Its file.
        signature: The file's size and time.
        slide: Its id, if it has one.
    """

    found: FoundSlide
    signature: Signature
    slide: str | None


@dataclass(frozen=True)
class Waiting:
    """A file that is not whole yet.

    Attributes:
        path: Its absolute path.
        relative: Its path relative to its folder of slides.
        since: When it was first seen like that, in seconds since 1970.
        reason: What it waits for.
    """

    path: str
    relative: str
    since: float
    reason: str


@dataclass(frozen=True)
class Look:
    """What one look has found.

    Attributes:
        ready: Slides to take up, the oldest file first.
        registered: Ids of all slides that are registered.
        aliases: Ids of files that turned out to be slides known by another id.
        described: Slides that are described as they are now.
        waiting: Files that are not whole yet.
        absent: Slides whose file is gone.
        away: Folders of slides that are not there, and why: of their slides nothing is known.
        unlooked: Number of slides that there was no time to look into; they come next.
        troubles: Fingerprint of all failures and duplicates; None if not all were looked into.
    """

    ready: list[Ready]
    registered: list[str]
    aliases: list[str]
    described: list[str]
    waiting: list[Waiting]
    absent: list[str]
    away: dict[Path, str]
    unlooked: int
    troubles: str | None


@dataclass(frozen=True)
class _Stillness:
    """How long a file has been the same, by a clock that nobody sets."""

    signature: Signature
    first_seen: float
    still_since: float
    looks: int


@dataclass(frozen=True)
class _Folder:
    """What a slide's folder said when it was last read.

    Attributes:
        changed: When the folder last changed: while that stands, it says the same.
        asked: The file and the row of ``slides.csv`` that it was asked about.
        tried: Whether those were taken up, or failed to be.
        original: Of a duplicate, the slide that it repeats and that one's size and time.
        failures: See `SlideFolder.failures`.
    """

    changed: int
    asked: tuple[Any, ...]
    tried: bool
    original: tuple[str, Signature] | None
    failures: Mapping[str, Mapping[str, Any]]


@dataclass
class _Reading:
    """How long slides' folders may be read."""

    end: float
    read: int = 0

    def may_go_on(self) -> bool:
        self.read += 1
        return self.read <= _AT_LEAST or time.monotonic() < self.end


class Arrivals:
    """The folders and buckets of slides, from one look to the next.

    Attributes:
        store: The store that slides are taken up into.
        sources: The folders and buckets.
        settle_seconds: A file must have been left alone for so long.
    """

    def __init__(self, store: Store, sources: Sequence[Source], *, settle_seconds: float) -> None:
        self.store, self.sources, self.settle_seconds = store, sources, settle_seconds
        self._stillness: dict[str, _Stillness] | None = None
        self._told: dict[str, list[Any]] | None = None
        self._folders: dict[str, _Folder] = {}

    def look(self, sheet: Sheet, *, seconds: float = float("inf")) -> Look:
        """Look at all files.

        Args:
            sheet: The table of slides: a slide whose row has changed is taken up again.
            seconds: Time to read slides' folders in; the rest comes next time. A few are always
                read, so that looks come to an end on the slowest machine.

        Returns:
            What was found.
        """
        now = time.time()
        registered = Register(self.store).read()
        entries = registered.slides
        by_path = {entry.path: slide_id for slide_id, entry in entries.items()}
        here, away = find_in(self.sources)
        here = [as_registered(found, by_path) for found in here]
        signs = _signatures(here)
        reading = _Reading(time.monotonic() + seconds)
        by_id = {by_path[path]: sign for path, sign in signs.items() if path in by_path}
        self._folders = {s: folder for s, folder in self._folders.items() if s in entries}
        beyond_reach = _below(entries, away)
        ready: list[Ready] = []
        described: list[str] = []
        waiting: list[Waiting] = []
        stillness: dict[str, _Stillness] = {}
        unlooked = 0
        for found in here:
            path = str(found.path)
            sign, slide_id = signs.get(path), by_path.get(path)
            if sign is None:
                continue
            if slide_id is not None:
                folder = self._look_into(slide_id, found, sign, sheet, reading)
                unlooked += folder is None
                if folder is None:
                    continue
                if _is_done(folder, by_id, beyond_reach, now):
                    if "slides" not in folder.failures and folder.original is None:
                        described.append(slide_id)
                    continue
            stillness[path] = seen = self._seen(path, sign, now)
            reason = self._why_wait(found.path, seen)
            if reason is None:
                ready.append(Ready(found, sign, slide_id))
            else:
                waiting.append(Waiting(path, found.relative, seen.first_seen, reason))
        self._keep(stillness)
        return Look(
            ready=sorted(ready, key=lambda it: (it.signature[1], it.found.relative)),
            registered=list(entries),
            aliases=list(registered.aliases),
            described=described,
            waiting=waiting,
            absent=sorted(entries.keys() - by_id.keys() - beyond_reach),
            away=away,
            unlooked=unlooked,
            troubles=None if unlooked else self._troubles(),
        )

    def _troubles(self) -> str:
        return fingerprint(
            [
                [slide_id, folder.failures, folder.original]
                for slide_id, folder in sorted(self._folders.items())
                if folder.failures or folder.original is not None
            ]
        )

    def _look_into(
        self, slide_id: str, found: FoundSlide, sign: Signature, sheet: Sheet, reading: _Reading
    ) -> _Folder | None:
        """What a slide's folder says of its file; None if there is no time to read it."""
        row = sheet.row(slide_id, relative=found.relative)
        asked = (str(found.path), sign, row)
        changed = _changed(f"{self.store.root}{os.sep}{slide_id}")
        known = self._folders.get(slide_id)
        if known is not None and (known.changed, known.asked) == (changed, asked):
            return known
        if not reading.may_go_on():
            return None
        folder = self.store.slide(slide_id)
        duplicate = folder.duplicate()
        self._folders[slide_id] = known = _Folder(
            changed,
            asked,
            tried=was_tried(folder, found.path, sign, row),
            original=None if duplicate is None else _original(duplicate),
            failures=folder.failures(),
        )
        return known

    def _seen(self, path: str, sign: Signature, now: float) -> _Stillness:
        if self._stillness is None:
            self._stillness = self._kept()
        last, steady = self._stillness.get(path), time.monotonic()
        if last is None or last.signature != sign:
            return _Stillness(sign, last.first_seen if last else now, steady, 1)
        return _Stillness(sign, last.first_seen, last.still_since, last.looks + 1)

    def _keep(self, stillness: dict[str, _Stillness]) -> None:
        """Remember how long files have stood still, for the next look and for another process.

        No clock is written down but the time that a file is told to wait since: a process that
        comes later goes on counting from where this one was.
        """
        self._stillness = stillness
        steady = time.monotonic()
        told = {
            path: [
                *seen.signature,
                seen.first_seen,
                round(min(steady - seen.still_since, self.settle_seconds), 1),
                min(seen.looks, 2),
            ]
            for path, seen in stillness.items()
        }
        path = self.store.stillness_path
        if told != self._told and (told or path.exists()):
            with files.locked_to_write(path):
                files.write_json(path, told, indent=None)
        self._told = told

    def _kept(self) -> dict[str, _Stillness]:
        """What another process remembered last."""
        steady = time.monotonic()
        try:
            told = files.read_json(self.store.stillness_path)
            return {
                path: _Stillness((size, mtime_ns), first_seen, steady - still, looks)
                for path, (size, mtime_ns, first_seen, still, looks) in told.items()
            }
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return {}

    def _why_wait(self, path: Path, seen: _Stillness) -> str | None:
        if seen.signature[0] == 0:
            return "is empty so far"
        if seen.looks < 2:
            return "was just seen, or has just changed"
        part = missing_part(path)
        if part is not None:
            return f"its part {part} is not there yet"
        # Not by the file's own time: it may be of another clock, or be kept by a copy.
        if time.monotonic() - seen.still_since < self.settle_seconds:
            return f"has not stood still for {self.settle_seconds:g} s"
        return None


def find_in(
    sources: Iterable[Source], *, seconds: float = LISTING_SECONDS
) -> tuple[list[FoundSlide], dict[Path, str]]:
    """Find the slides in several folders and buckets.

    Args:
        sources: The folders and buckets.
        seconds: Time to wait for the list of a bucket, and to write down what is new in it.

    Returns:
        The slides, each once even if one folder lies in another; the folders that are not there,
        can't be read, or stand for a bucket that can't be listed, and why.
    """
    found: dict[Path, FoundSlide] = {}
    away: dict[Path, str] = {}

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # else it was taken away just now
            away[Path(error.filename)] = f"{error.filename}: can't be read ({error.strerror})"

    for source in sources:
        folder = source.listed if isinstance(source, Bucket) else source
        try:
            if isinstance(source, Bucket):
                source.list_anew(seconds=seconds)
        except BucketAwayError as error:
            away[folder] = str(error)
            continue
        if folder.is_dir():
            for slide in find_slides(folder, unreadable=unreadable):
                found.setdefault(slide.path, slide)
        else:
            away[folder] = f"{folder}: the folder of slides is not there"
    return list(found.values()), away


def write_arrivals(store: Store, look: Look) -> None:
    """Write down what is waiting, new, absent and away, for ``status`` and the catalog.

    Args:
        store: The store.
        look: What was found last.
    """
    before = read_arrivals(store)
    now = round(time.time(), 3)
    content = {
        "waiting": [asdict(it) for it in look.waiting],
        "new": [
            {"path": str(it.found.path), "relative": it.found.relative}
            for it in look.ready
            if it.slide is None
        ],
        "absent": {slide_id: before["absent"].get(slide_id, now) for slide_id in look.absent},
        "away": list(look.away.values()),
        "troubles": look.troubles or before["troubles"],
    }
    if content != before:
        with files.locked_to_write(store.arrivals_path):
            files.write_json(store.arrivals_path, content)


def read_arrivals(store: Store) -> dict[str, Any]:
    """What `write_arrivals` wrote last: ``waiting, new, absent, away, troubles``."""
    nothing: dict[str, Any] = {
        "waiting": [],
        "new": [],
        "absent": {},
        "away": [],
        "troubles": None,
    }
    try:
        return {**nothing, **files.read_json(store.arrivals_path)}
    except (FileNotFoundError, ValueError, TypeError):
        return nothing


def _signatures(found: Iterable[FoundSlide]) -> dict[str, Signature]:
    signs = {}
    for slide in found:
        try:
            signs[str(slide.path)] = signature(slide.path)
        except OSError:  # taken away in between
            continue
    return signs


def _is_done(
    folder: _Folder, there: Mapping[str, Signature], beyond_reach: Collection[str], now: float
) -> bool:
    """Whether nothing is owed of a slide's file as it is now."""
    if not folder.tried:
        return False
    if "slides" in folder.failures:
        return not due_again(folder.failures["slides"], now)
    if folder.original is not None:  # a duplicate, as long as the original is there
        slide_id, sign = folder.original
        return there.get(slide_id) == sign or slide_id in beyond_reach
    return True


def _below(entries: Mapping[str, Entry], away: Iterable[Path]) -> set[str]:
    """Slides whose file lies in a folder that is not there."""
    roots = tuple(f"{os.path.abspath(folder)}{os.sep}" for folder in away)  # noqa: PTH100
    return {s for s, entry in entries.items() if roots and entry.path.startswith(roots)}


def _original(duplicate: Mapping[str, Any]) -> tuple[str, Signature]:
    size, mtime_ns = duplicate.get("of_signature", (-1, -1))
    return duplicate.get("of", ""), (size, mtime_ns)


def _changed(folder: str) -> int:
    """When something was last put into a folder, or taken away; 0 if there is none."""
    try:
        return os.stat(folder).st_mtime_ns  # noqa: PTH116 - for every slide of an archive
    except OSError:
        return 0
