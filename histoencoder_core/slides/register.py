"""The register of slide ids, shared by the sensor and the command line.

An id is the name of a slide's folder and of its partition. Two files never share one, and an id
never changes when other slides come or go: it is decided once and written down.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from histoencoder_core.errors import SlideError
from histoencoder_core.slides.content import content_fingerprint, signature
from histoencoder_core.slides.find import FoundSlide
from histoencoder_core.slides.reader import open_slide
from histoencoder_core.store import Store, files, layout

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


class Register:
    """Slide ids and the files they stand for.

    Attributes:
        store: The store whose slides are registered.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def entries(self) -> dict[str, Entry]:
        """All registered slides by id, in the order they were registered."""
        try:
            content = files.read_json(self.store.register_path)
            return {slide_id: Entry(**entry) for slide_id, entry in content["slides"].items()}
        except FileNotFoundError:
            return self._rebuilt()
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s is damaged; rebuilding it", self.store.register_path)
            return self._rebuilt()

    def assign(self, slides: Iterable[FoundSlide]) -> dict[str, FoundSlide]:
        """Register slides that are new, and tell all their ids.

        The first slide of a name keeps its stem. A later one that would clash gets
        ``<stem>-<8 hexadecimal digits of a hash of its relative path>``.

        Args:
            slides: Files found.

        Returns:
            The slides by id, in the order given.
        """
        found = list(slides)
        self.store.cohort.mkdir(parents=True, exist_ok=True)
        with FileLock(self.store.register_path.with_suffix(".lock")):
            entries = self.entries()
            known = {entry.path: slide_id for slide_id, entry in entries.items()}
            taken = {slide_id.casefold() for slide_id in entries} | self._folders_in_use()
            assigned, changed = {}, not self.store.register_path.exists()
            for slide in found:
                slide_id = known.get(str(slide.path)) or self._moved(slide, entries)
                if slide_id is None:
                    slide_id = new_id(slide, taken)
                    taken.add(slide_id.casefold())
                entry = Entry(str(slide.path), slide.relative)
                if entries.get(slide_id, entry).path != entry.path or slide_id not in entries:
                    entries[slide_id] = entry
                    changed = True
                assigned[slide_id] = slide
            if changed:
                content = {slide_id: asdict(entry) for slide_id, entry in entries.items()}
                files.write_json(self.store.register_path, {"version": 1, "slides": content})
        return assigned

    def _moved(self, slide: FoundSlide, entries: dict[str, Entry]) -> str | None:
        """A slide whose whole folder is now mounted elsewhere keeps its id.

        The same relative path is not enough: while one share is away, another may hold a slide of
        that name. Its content tells.
        """
        for slide_id, entry in entries.items():
            if entry.relative == slide.relative and not Path(entry.path).exists():
                folder = self.store.slide(slide_id)
                if folder.stamp("slides") is None:
                    return slide_id  # it was never opened, so there is nothing to mix up
                told = files.read_json(folder.record("slides"))
                if told["size"] == signature(slide.path)[0] and told["content"] == _content(slide):
                    return slide_id
        return None

    def _rebuilt(self) -> dict[str, Entry]:
        """Read the entries back from what each slide's folder says of its file."""
        entries = {}
        for slide_id in self.store.slide_ids():
            folder = self.store.slide(slide_id)
            if folder.stamp("slides") is not None:
                source = files.read_json(folder.record("slides"))
            else:
                source = folder.failures().get("slides", {}).get("inputs") or {}
            if "path" in source and "relative_path" in source:
                entries[slide_id] = Entry(source["path"], source["relative_path"])
        return entries

    def _folders_in_use(self) -> set[str]:
        """Names of folders that hold results or another program's files."""
        return {
            slide_id.casefold()
            for slide_id in self.store.slide_ids()
            if any(
                entry.name != layout.FAILURES and not entry.name.startswith(".")
                for entry in self.store.slide(slide_id).path.iterdir()
            )
        }


def _content(slide: FoundSlide) -> str | None:
    """Fingerprint of a slide's content; None if it can't be opened."""
    try:
        with open_slide(slide.path) as opened:
            return content_fingerprint(slide.path, quickhash=opened.properties.get("quickhash"))
    except SlideError:
        return None


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
    digest = hashlib.sha256(slide.relative.encode()).hexdigest()
    for length in range(_HASH_LENGTH, len(digest) + 1):
        slide_id = f"{stem[: _ID_LENGTH - length - 1]}-{digest[:length]}"
        if slide_id.casefold() not in taken:
            return slide_id
    raise AssertionError("one relative path was registered twice")
