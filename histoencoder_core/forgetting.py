"""Forgetting slides: removing all that the store holds of them, and telling what it does not.

What was made of many slides, such as figures, is removed as a whole: it is made again without them.
Files of other programs and of people are left alone and told of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from histoencoder_core.annotate.evaluation import evaluation_path
from histoencoder_core.buckets import drop_copy, find_copy
from histoencoder_core.clusters.model import models_of, strike_slides
from histoencoder_core.cohort.catalog import forget_slides, slides_in_catalog
from histoencoder_core.similar.index import index_folder, slides_in_index
from histoencoder_core.slides import Register
from histoencoder_core.slides.contents import Contents
from histoencoder_core.slides.register import Entry
from histoencoder_core.store import SlideFolder, Store, files, layout

_TEXT = frozenset([".csv", ".geojson", ".json", ".yaml", ".yml"])
_MOST_BYTES = 64 * 2**20
"""Larger files of people's are not searched for a slide's name."""


@dataclass(frozen=True)
class Trace:
    """A place that holds something of the slides.

    Attributes:
        path: The file or folder.
        what: What becomes of it, for people.
        remove: Removes the slides from it.
    """

    path: Path
    what: str
    remove: Callable[[], None]


def traces(store: Store, slides: Sequence[str]) -> list[Trace]:
    """Find all places of the store that hold something of some slides.

    A slide that was known by other ids before, see `Register.aliases`, is to be named by all.

    Removed in the order given, an interruption loses nothing: what is left is found again.

    Args:
        store: The store.
        slides: Their ids.

    Returns:
        The places; none if the store does not know the slides.

    Raises:
        StoreError: An id can't be a slide's.
    """
    entries = Register(store).entries()
    own = [trace for slide_id in slides for trace in _own(store.slide(slide_id))]
    own += [
        Trace(copy, "is a copy, and is removed", partial(drop_copy, copy))
        for s in slides
        if s in entries and (copy := find_copy(Path(entries[s].path))) is not None
    ]
    named = [
        *_in_models(store, slides),
        *_in_contents(store, slides),
        *_in_duplicates(store, slides),
        *_in_register(store, slides),
        *_in_catalog(store, slides),
    ]
    if not own and not named:
        return []
    return [*_of_many(store), *own, *named]


def still_known(
    store: Store, slides: Sequence[str], entries: dict[str, Entry], inputs: Collection[Path]
) -> Iterator[str]:
    """Tell what still knows slides after they were forgotten, a line each.

    Args:
        store: The store.
        slides: Their ids.
        entries: The register, as it was before.
        inputs: What people wrote: files, and folders of files, that may name a slide.
    """
    for slide_id in slides:
        entry = entries.get(slide_id)
        if entry is not None and Path(entry.path).exists():
            yield f"{entry.path}: the slide itself. While it is there it comes back as a new slide."
        for path in _foreign(store.slide(slide_id)):
            yield f"{path}: was not written by this program."
    names = {name for s in slides for name in _names(s, entries.get(s))}
    for path in [store.tiles_csv, *inputs]:
        for found in [path] if path.is_file() else sorted(path.rglob("*")):
            if found.is_file() and _mentions(found, names):
                yield f"{found}: names it."
    if any(store.cluster_models.glob("*.parquet")):
        yield (
            f"{store.cluster_models}: centroids that its tiles may have moved; they tell nothing "
            "of one slide. `histoencoder cluster --refit` fits a model without it."
        )
    yield "Backups and copies of the store and of DAGSTER_HOME that were made before."
    yield "Reports, pictures and tables that were given away; logs of terminals and servers."


def _own(folder: SlideFolder) -> Iterator[Trace]:
    """The slide's own files, all in one; nothing if there are none."""
    if folder.path.is_symlink():
        yield Trace(folder.path, "is a link, which is removed", partial(files.remove, folder.path))
        return
    if not folder.path.is_dir():
        return
    foreign = set(_foreign(folder))

    def remove() -> None:
        with folder.locked():  # a stage that is at work on it ends first
            for path in list(folder.path.iterdir()):
                if path not in foreign:
                    files.remove(path)
            if not foreign:
                folder.path.rmdir()

    if not foreign or any(path not in foreign for path in folder.path.iterdir()):
        yield Trace(folder.path, "is removed", remove)


def _foreign(folder: SlideFolder) -> list[Path]:
    """What other programs wrote into a slide's folder."""
    if not folder.path.is_dir():
        return []
    outputs = {*layout.RECORD.values(), *(n for names in layout.COMPANIONS.values() for n in names)}
    return [
        path
        for path in sorted(folder.path.iterdir())
        if not (
            path.name in {layout.VERSIONS, layout.FAILURES, layout.DUPLICATE}
            or path.name.startswith(".")
            or (path.name in outputs and folder.is_ours(path))
        )
    ]


def _of_many(store: Store) -> Iterator[Trace]:
    """What was drawn or measured of all slides."""
    for path in (
        store.figures,
        store.report_path,
        evaluation_path(store),
        index_folder(store),
        store.arrivals_path,
        store.stillness_path,
        store.annotations_seen_path,
        store.checks,
    ):
        if path == index_folder(store) and not slides_in_index(store):
            continue
        if path.exists():
            yield Trace(path, "is removed, and made again without them", partial(_clear, path))


def _clear(path: Path) -> None:
    """Remove a file or folder of the cohort, with what is left of attempts to write it."""
    files.remove(path)
    files.sweep(path.parent, of=path.name)


def _in_models(store: Store, slides: Collection[str]) -> Iterator[Trace]:
    for path in models_of(store, slides):
        what = "is told no longer that it was fitted on them"
        yield Trace(path, what, partial(strike_slides, path, slides))


def _in_register(store: Store, slides: Collection[str]) -> Iterator[Trace]:
    path = store.register_path

    def remove() -> None:
        with files.locked_to_write(path):
            content = files.read_json(path)
            for slide_id in slides:
                content["slides"].pop(slide_id, None)
            aliases = content.get("aliases", {})
            content["aliases"] = {a: s for a, s in aliases.items() if not {a, s} & {*slides}}
            for slide_id in slides:
                content.get("former", {}).pop(slide_id, None)
            files.write_json(path, content)

    known = [*Register(store).entries(), *Register(store).aliases()]
    if path.is_file() and not set(slides).isdisjoint(known):
        yield Trace(path, "loses their entries", remove)


def _in_contents(store: Store, slides: Collection[str]) -> Iterator[Trace]:
    """Which slide has which content."""
    found = [p for p in store.contents.glob("*/*") if p.read_text("utf-8").strip() in slides]

    def remove() -> None:
        with Contents(store).locked():
            for path in found:
                files.remove(path)

    if found:
        yield Trace(store.contents, "loses their entries", remove)


def _in_duplicates(store: Store, slides: Collection[str]) -> Iterator[Trace]:
    """Files that were set aside as copies of one of the slides: nothing is left to copy."""
    for slide_id in store.slide_ids():
        folder = store.slide(slide_id)
        told = folder.duplicate()
        if told is not None and told["of"] in slides and slide_id not in slides:
            path = folder.file(layout.DUPLICATE)
            yield Trace(path, "is removed, so that it is computed itself", partial(_clear, path))


def _in_catalog(store: Store, slides: Sequence[str]) -> Iterator[Trace]:
    path = store.catalog_path
    if slides_in_catalog(store, slides):
        yield Trace(path, "is written anew without them", partial(forget_slides, store, slides))


def _names(slide_id: str, entry: Entry | None) -> set[str]:
    """All names that people may call a slide by."""
    if entry is None:
        return {slide_id}
    return {slide_id, entry.relative, Path(entry.path).name, Path(entry.path).stem}


def _mentions(path: Path, names: Collection[str]) -> bool:
    """Whether a file is named after a slide, or is text that holds one of its names."""
    if any(path.name == name or path.name.startswith((f"{name}.", f"{name}_")) for name in names):
        return True
    if path.suffix.lower() not in _TEXT or path.stat().st_size > _MOST_BYTES:
        return False
    content = path.read_bytes()
    return any(name.encode() in content for name in names)
