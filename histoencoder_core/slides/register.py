"""The register of slide ids, shared by the sensor and the command line.

An id is the name of a slide's folder and of its partition. Two files never share one, and an id
never changes when other slides come or go: it is decided once and written down.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from histoencoder_core.slides.content import signature
from histoencoder_core.slides.find import FoundSlide, parts_of, suffix_of
from histoencoder_core.store import Store, files, layout
from histoencoder_core.store.schema import begin_store

log = logging.getLogger(__name__)

_ID_LENGTH = 200
_HASH_LENGTH = 8


@dataclass(frozen=True)
class Entry:
    """Where a registered slide is.

    Attributes:
        path: Absolute path of its file.
        relative: Path relative to the folder it was found in, with forward slashes.
    """

    path: str
    relative: str


@dataclass(frozen=True)
class Registered:
    """What the register holds.

    Attributes:
        slides: All registered slides by id, in the order they were registered.
        aliases: Ids that files had until it was found out which slide they are, with that slide's
            id.
        former: Where slides were before they were moved.
    """

    slides: dict[str, Entry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    former: dict[str, list[Entry]] = field(default_factory=dict)

    def place(self, slide_id: str, found: FoundSlide) -> None:
        """Note where a slide is now."""
        entry = Entry(str(found.path), found.relative)
        before = self.slides.get(slide_id)
        if before is not None and before != entry:
            self.former[slide_id] = [*self.former.get(slide_id, []), before]
        self.slides[slide_id] = entry


class Register:
    """Slide ids and the files they stand for.

    Attributes:
        store: The store whose slides are registered.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def entries(self) -> dict[str, Entry]:
        """All registered slides by id, in the order they were registered."""
        return self.read().slides

    def aliases(self) -> dict[str, str]:
        """Ids that files had until it was found out which slide they are, with that slide's id."""
        return self.read().aliases

    def assign(self, slides: Iterable[FoundSlide]) -> dict[str, FoundSlide]:
        """Register slides that are new, and tell all their ids.

        The first slide of a name keeps its stem. A later one that would clash gets
        ``<stem>-<8 hexadecimal digits of a hash of its relative path>``.

        Args:
            slides: Files found.

        Returns:
            The slides by id, in the order given.
        """
        with self._changing() as register:
            entries = register.slides
            known = {entry.path: slide_id for slide_id, entry in entries.items()}
            found = [as_registered(slide, known) for slide in slides]
            unknown = [slide for slide in found if str(slide.path) not in known]
            # Looking into all folders of the store takes seconds.
            taken = self._taken(entries, register.aliases) if unknown else set()
            places: dict[str, list[str]] = defaultdict(list)
            for slide_id, entry in entries.items() if unknown else ():
                places[entry.relative].append(slide_id)
            for slide in unknown:
                mounted = self._mounted_elsewhere(slide, places[slide.relative], entries)
                slide_id = mounted or new_id(slide, taken)
                if mounted is None:
                    taken.add(slide_id.casefold())
                    places[slide.relative].append(slide_id)
                register.place(slide_id, slide)
                known[str(slide.path)] = slide_id
        return {known[str(slide.path)]: slide for slide in found}

    def moved(self, alias: str, slide_id: str, found: FoundSlide) -> None:
        """A file that was taken for a new slide is one that was registered before.

        Args:
            alias: The id that the file was registered under; it is never given again.
            slide_id: The slide that it is.
            found: The file.
        """
        with self._changing() as register:
            register.slides.pop(alias, None)
            register.place(slide_id, found)
            register.aliases[alias] = slide_id

    def read(self) -> Registered:
        """Read the whole register; it must not be changed, as it is kept for the next who asks."""
        path = self.store.register_path
        try:
            stat = path.stat()
            return _read(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except FileNotFoundError:
            return Registered(self._rebuilt())
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s is damaged; rebuilding it", self.store.register_path)
            return Registered(self._rebuilt())

    @contextmanager
    def _changing(self) -> Iterator[Registered]:
        """Change the register, while no other process does."""
        begin_store(self.store.root)
        with files.locked_to_write(self.store.register_path):
            before = self.read()
            now = Registered(dict(before.slides), dict(before.aliases), dict(before.former))
            yield now
            if now != before or not self.store.register_path.exists():
                files.write_json(self.store.register_path, {"version": 1, **asdict(now)})

    def _mounted_elsewhere(
        self, slide: FoundSlide, candidates: list[str], entries: dict[str, Entry]
    ) -> str | None:
        """A slide whose whole folder is now mounted elsewhere keeps its id.

        The same relative path is not enough: while one share is away, another may hold a slide of
        that name. Nor is its content read here, where thousands may be registered at once: if size
        and time differ, it is registered as new, and recognised when it is taken up.
        """
        for slide_id in candidates:
            if Path(entries[slide_id].path).exists():
                continue
            folder = self.store.slide(slide_id)
            if folder.stamp("slides") is None:
                return slide_id  # it was never opened, so there is nothing to mix up
            told = files.read_json(folder.record("slides"))
            try:
                if (told["size"], told["mtime_ns"]) == signature(slide.path):
                    return slide_id
            except FileNotFoundError:  # taken away in between
                continue
        return None

    def _rebuilt(self) -> dict[str, Entry]:
        """Read the entries back from what each slide's folder says of its file."""
        entries = {}
        for slide_id in self.store.slide_ids():
            folder = self.store.slide(slide_id)
            if folder.stamp("slides") is not None:
                source = files.read_json(folder.record("slides"))
            else:
                failure = folder.failures().get("slides", {})
                source = folder.duplicate() or failure.get("inputs") or {}
            if "path" in source and "relative_path" in source:
                entries[slide_id] = Entry(source["path"], source["relative_path"])
        return entries

    def _taken(self, entries: Iterable[str], aliases: Iterable[str]) -> set[str]:
        """Ids that can't be given, case-folded: also folders of results, or of other programs."""
        registered = {slide_id.casefold() for slide_id in (*entries, *aliases)}
        others = [s for s in self.store.slide_ids() if s.casefold() not in registered]
        return registered | {
            slide_id.casefold()
            for slide_id in others
            if any(
                entry.name != layout.FAILURES and not entry.name.startswith(".")
                for entry in self.store.slide(slide_id).path.iterdir()
            )
        }


@functools.lru_cache(maxsize=2)
def _read(path: Path, _version: tuple[int, int, int]) -> Registered:
    """Read a register: of 50,000 slides, that takes a third of a second."""
    content = files.read_json(path)
    slides = {slide_id: Entry(**entry) for slide_id, entry in content["slides"].items()}
    former = {
        s: [Entry(**entry) for entry in told] for s, told in content.get("former", {}).items()
    }
    return Registered(slides, dict(content.get("aliases", {})), former)


def as_registered(slide: FoundSlide, known: Container[str]) -> FoundSlide:
    """A DICOM slide by the file that it was registered by.

    Which of a series' files stands for it is decided by their names: one that came later may come
    first.

    Args:
        slide: The slide as it was found.
        known: Paths of registered slides.
    """
    if suffix_of(slide.path) != ".dcm" or str(slide.path) in known:
        return slide
    for part in parts_of(slide.path):
        if str(part) in known:
            relative = slide.relative.removesuffix(slide.path.name) + part.name
            return FoundSlide(part, relative)
    return slide


def plain_id(path: Path) -> str:
    """The id of a slide whose name no other has.

    Example:
        >>> plain_id(Path("/scans/CMU (1).svs"))
        'CMU_1'
    """
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem)
    return re.sub(r"\.{2,}", ".", stem).strip("._-")[:_ID_LENGTH] or "slide"


def new_id(slide: FoundSlide, taken: set[str]) -> str:
    """Choose an id for a slide.

    Args:
        slide: The slide's file.
        taken: Ids in use, case-folded: some file systems do not tell `A` from `a`.

    Returns:
        An id that is not taken.

    Example:
        >>> slide = FoundSlide(Path("/scans/b/CMU (1).svs"), "b/CMU (1).svs")
        >>> new_id(slide, taken=set()), new_id(slide, taken={"cmu_1"})
        ('CMU_1', 'CMU_1-fbab44f4')
    """
    stem = plain_id(slide.path)
    if stem.casefold() not in taken:
        return stem
    digest = hashlib.sha256(os.fsencode(slide.relative)).hexdigest()
    for length in range(_HASH_LENGTH, len(digest) + 1):
        slide_id = f"{stem[: _ID_LENGTH - length - 1]}-{digest[:length]}"
        if slide_id.casefold() not in taken:
            return slide_id
    raise AssertionError("one relative path was registered twice")
