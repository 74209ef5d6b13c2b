"""Which slide has which content, so that a file under a new name is recognised.

``<store>/_cohort/contents/<2 digits>/<content>`` holds the id of the slide that has this content,
one small file each: of 50,000 slides, none needs the others read or written. Slides' own files hold
the truth: an entry counts only as long as its slide still has the content, and the folder can be
deleted: it is made again from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from histoencoder_core.slides.describe import read_description
from histoencoder_core.store import Store, files


class Contents:
    """The contents of a store's slides.

    Attributes:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._folder = store.contents

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from claiming contents."""
        with files.locked(self.store.cohort / ".contents.lock"):
            if not self._folder.is_dir():
                self._make_again()
            yield

    def owner(self, sample: str) -> str | None:
        """The slide that last claimed a content.

        Args:
            sample: The content's sample, see `content.Content`.
        """
        try:
            return self._path(sample).read_text("utf-8").strip() or None
        except FileNotFoundError:
            return None

    def claim(self, sample: str, slide_id: str) -> None:
        """Write down that a slide has a content. The lock must be held."""
        if self.owner(sample) == slide_id:
            return
        path = self._path(sample)
        if path.parent.is_dir():
            files.sweep(path.parent)
        with files.atomic_path(path) as temporary:
            temporary.write_text(f"{slide_id}\n", "utf-8")

    def release(self, sample: str, slide_id: str) -> None:
        """A slide does not have a content any more. The lock must be held."""
        if self.owner(sample) == slide_id:
            files.remove(self._path(sample))

    def _path(self, sample: str) -> Path:
        return self._folder / sample[:2] / sample

    def _make_again(self) -> None:
        for slide_id in self.store.slide_ids():
            description = read_description(self.store.slide(slide_id))
            if description is not None:
                self.claim(description.sample, slide_id)
        self._folder.mkdir(exist_ok=True)
