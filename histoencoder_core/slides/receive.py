"""Taking up a slide file: whose content it is, and then what it is.

::

    file ──▶ its content ──┬─ nobody's, or its own ──▶ described under its id
                           ├─ of a slide whose file is gone: it was moved ──▶ that slide's id
                           └─ of a slide that is still there ──▶ a duplicate: told, never computed
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoencoder_core.errors import SlideError
from histoencoder_core.slides.content import (
    Content,
    content_fingerprint,
    signature,
    whole_hash,
)
from histoencoder_core.slides.contents import Contents
from histoencoder_core.slides.describe import (
    Description,
    already_described,
    content_of,
    describe_slide,
    describing,
    read_description,
    write_description,
)
from histoencoder_core.slides.find import FoundSlide
from histoencoder_core.slides.reader import open_slide
from histoencoder_core.slides.register import Register
from histoencoder_core.slides.sheet import Sheet
from histoencoder_core.store import SlideFolder, Stamp, Store, files, layout

_OF_NO_FILE = (-1, -1)
"""Size and time that no file has: what was set aside for it is looked at again."""


@dataclass(frozen=True)
class Received:
    """What became of a slide file.

    Attributes:
        slide: The id of the slide that it is, which a file that was moved had before.
        stamp: The stamp of that slide's description; None of a duplicate.
        duplicate_of: The slide that has the same content and is still there.
    """

    slide: str
    stamp: Stamp | None = None
    duplicate_of: str | None = None


def receive_slide(store: Store, slide_id: str, found: FoundSlide, sheet: Sheet) -> Received:
    """Find out whether a file is a new slide, and describe it.

    Args:
        store: The store.
        slide_id: The id that the file is registered under.
        found: The file.
        sheet: What is known of slides beyond their pixels.

    Returns:
        What became of it.

    Raises:
        SlideError: The slide can't be opened or read. The failure is recorded under `slide_id`.
        StoreError: Another program's files stand in the way.
    """
    folder, row = store.slide(slide_id), sheet.row(slide_id, relative=found.relative)
    contents = Contents(store)
    with folder.locked(), describing(folder, found, row) as inputs:
        stamp = already_described(folder, inputs)
        if stamp is not None:
            return Received(slide_id, stamp)
        with open_slide(found.path) as slide:
            content = content_of(folder, slide, inputs)
            with contents.locked():
                other, content = _other_owner(contents, slide_id, slide.copy, content)
                if other is None:
                    _hand_over(contents, folder, slide_id, content)
                elif _is_gone(store, other):
                    _take_away(folder)  # first: nobody would look into it any more
                    Register(store).moved(slide_id, other, found)
                else:
                    _set_aside(
                        folder, other, inputs, of_signature=_described_as_it_is(store, other)
                    )
                    return Received(slide_id, duplicate_of=other)
            if other is None:
                # Before it is described: a process that is killed in between must not leave a
                # slide that is told to be a copy.
                files.remove(folder.file(layout.DUPLICATE))
                return Received(slide_id, write_description(folder, slide, row, inputs, content))
    row = sheet.row(other, relative=found.relative)
    return Received(other, describe_slide(store.slide(other), found, row))


def _other_owner(
    contents: Contents, slide_id: str, path: Path, content: Content
) -> tuple[str | None, Content]:
    """Another slide that has this content, None if there is none; and what the content is then.

    Of two files that are both there, a sample does not tell that they are the same: one may have
    been damaged on its way, and sent again under another name.
    """
    owner = contents.owner(content.sample)
    if owner is None or owner == slide_id:
        return None, content
    described = read_description(contents.store.slide(owner))
    if described is None:
        # It is being described right now, or its run was killed and it is still owed.
        entry = Register(contents.store).entries().get(owner)
        is_there = entry is not None and Path(entry.path).exists()
        return (owner if is_there else None), content
    theirs = described.identity.whole or _whole_hash_of(described)
    if theirs is None:  # its file is gone, or changes: the sample is all that there is
        return owner, content
    whole = content.whole or whole_hash(path)
    return (owner, content) if whole == theirs else (None, Content(content.sample, whole, whole))


def _whole_hash_of(described: Description) -> str | None:
    """Hash all bytes of a slide's file; None if that is not the one that was described."""
    path = Path(described.path)
    try:
        if signature(path) != (described.size, described.mtime_ns):
            return None
        with open_slide(path) as slide:
            return whole_hash(slide.copy)
    except (OSError, SlideError):
        return None


def _is_gone(store: Store, slide_id: str) -> bool:
    """Whether the file of a described slide is not there any more, or is another by now.

    A share that is not mounted, or a file that is just being written, tells neither.
    """
    described = read_description(store.slide(slide_id))
    if described is None:
        return False
    path = Path(described.path)
    try:
        if signature(path) == (described.size, described.mtime_ns):
            return False
        with open_slide(path) as slide:
            quickhash = slide.properties.get("quickhash")
            return content_fingerprint(slide.copy, quickhash=quickhash) != described.sample
    except FileNotFoundError:
        root = Path(described.path.removesuffix(described.relative_path))
        return root.is_dir() and any(root.iterdir())
    except (OSError, SlideError):
        return False


def _described_as_it_is(store: Store, slide_id: str) -> tuple[int, int]:
    """The size and time of a slide's file if its description is of it, else of no file.

    Until the slide is described, or described anew, nobody knows whether another is a copy of it.
    """
    described = read_description(store.slide(slide_id))
    if described is None:
        return _OF_NO_FILE
    try:
        now = signature(Path(described.path))
    except OSError:
        return _OF_NO_FILE
    return now if now == (described.size, described.mtime_ns) else _OF_NO_FILE


def _hand_over(contents: Contents, folder: SlideFolder, slide_id: str, content: Content) -> None:
    before = read_description(folder)
    if before is not None and before.sample != content.sample:
        contents.release(before.sample, slide_id)
    contents.claim(content.sample, slide_id)


def _set_aside(
    folder: SlideFolder, other: str, inputs: dict[str, Any], *, of_signature: tuple[int, int]
) -> None:
    """Tell of a duplicate, and take away what was made of the file's former content."""
    _take_away(folder)
    told = {"of": other, "of_signature": of_signature, **inputs}
    files.write_json(folder.file(layout.DUPLICATE), told)


def _take_away(folder: SlideFolder) -> None:
    for stage in reversed(layout.STAGES):
        folder.withdraw(stage)
    files.remove(folder.file(layout.DUPLICATE))
