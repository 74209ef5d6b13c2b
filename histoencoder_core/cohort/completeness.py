"""Which stage of which slide is done, and if not, why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from histoencoder_core.clusters import ClusterModel, feature_file
from histoencoder_core.clusters.assign import clusters_stamp
from histoencoder_core.clusters.inputs import made_by
from histoencoder_core.errors import LabelError, StoreError
from histoencoder_core.labels import find_annotation, find_annotations
from histoencoder_core.labels.assign import grid_fingerprint, labels_stamp
from histoencoder_core.settings import EncoderSettings, TilingSettings
from histoencoder_core.slides import FoundSlide, Register, read_description
from histoencoder_core.slides.content import signature
from histoencoder_core.slides.register import Entry
from histoencoder_core.store import SlideFolder, Stamp, Store, layout
from histoencoder_core.store.layout import Stage
from histoencoder_core.tiles import tile_source, tiles_stamp
from histoencoder_core.tiles.source import slide_ids_with_tiles

log = logging.getLogger(__name__)

State = Literal["done", "empty", "input", "failed", "stale", "missing", "not due"]


@dataclass(frozen=True)
class StageState:
    """One stage of one slide.

    Attributes:
        slide: The slide's id.
        stage: The stage.
        state: ``done``; ``empty`` (done, with no tiles); ``input`` (another program's files);
            ``failed``; ``stale`` (made from something that has changed since); ``missing``;
            ``not due`` (nothing to do yet, or nothing asked for).
        reason: Why it is not done, in a sentence.
    """

    slide: str
    stage: Stage
    state: State
    reason: str | None = None


def expected_slides(store: Store) -> list[str]:
    """All slides that results are expected of: registered, with tiles, or with results."""
    with_results = {
        slide_id
        for slide_id in store.slide_ids()
        if any(store.slide(slide_id).record(stage).exists() for stage in layout.STAGES)
    }
    return sorted({*Register(store).entries(), *slide_ids_with_tiles(store), *with_results})


def slide_states(
    store: Store,
    *,
    tiling: TilingSettings | None = None,
    encoder: EncoderSettings | None = None,
    model: ClusterModel | None = None,
    annotations: Path | None = None,
    found: Iterable[FoundSlide] = (),
) -> list[StageState]:
    """Tell the state of every stage of every expected slide.

    Args:
        store: The store.
        tiling: Tiles made otherwise are stale; if None, any tiles will do.
        encoder: Features of another encoder are stale; if None, any features will do.
        model: The current cluster model; clusters of another are stale.
        annotations: Folder of annotations; if None, labels made from any will do.
        found: Slide files there are; one that was never registered is missing.

    Returns:
        The states, by slide and in the order of the stages.
    """
    entries = Register(store).entries()
    paths = {entry.path for entry in entries.values()}
    states = [
        StageState(slide.relative, "slides", "missing", "was found but not looked at yet")
        for slide in found
        if str(slide.path) not in paths
    ]
    expected = expected_slides(store)
    try:
        annotated = find_annotations(store, annotations, expected)
    except LabelError as error:  # one bad file must not hide what all slides are
        log.warning("which slides have annotations is not known: %s", error)
        annotations, annotated = None, {}
    for slide_id in expected:
        folder = store.slide(slide_id)
        of_slide = [
            _slides(folder, entries.get(slide_id)),
            # The functions are called at once.
            _told("tiles", lambda: _tiles(store, folder, tiling)),  # noqa: B023
            _told("features", lambda: _features(store, folder, encoder)),  # noqa: B023
            _told("clusters", lambda: _clusters(folder, model)),  # noqa: B023
            _told("labels", lambda: _labels(store, folder, annotations, slide_id in annotated)),  # noqa: B023
        ]
        states += _with_what_precedes(folder, of_slide)
    return states


def _with_what_precedes(folder: SlideFolder, of_slide: list[_Found]) -> Iterator[StageState]:
    """A stage is only as good as the ones it is made from, and a failure is never hidden."""
    failures = folder.failures()
    states: dict[Stage, State] = {}
    for stage, state, reason in of_slide:
        before = [s for s in _MADE_FROM[stage] if states[s] in {"failed", "stale"}]
        if stage in failures:
            kept = "; the former result is kept" if state in {"done", "empty", "stale"} else ""
            state, reason = "failed", f"{failures[stage]['reason']}{kept}"
        elif before and state in {"done", "empty"}:
            state, reason = "stale", f"its {before[-1]} are {states[before[-1]]}"
        elif state == "missing" and any(
            states[s] in {"failed", "missing", "not due"} for s in _MADE_FROM[stage]
        ):
            state, reason = "not due", f"its {_MADE_FROM[stage][-1]} are not done"
        states[stage] = state
        yield StageState(folder.slide_id, stage, state, reason)


_Found = tuple[Stage, State, str | None]

_MADE_FROM: dict[Stage, tuple[Stage, ...]] = {
    "slides": (),
    "tiles": ("slides",),
    "features": ("tiles",),
    "clusters": ("features",),
    "labels": ("tiles",),
}


def _told(stage: Stage, look: Callable[[], _Found]) -> _Found:
    """One slide's damaged file must not hide what the others are."""
    try:
        return look()
    except StoreError as error:
        return stage, "failed", str(error)


def _slides(folder: SlideFolder, entry: Entry | None) -> _Found:
    description = read_description(folder)
    if description is None:
        if entry is not None:
            return "slides", "missing", None
        return "slides", "input", "tiles made by another program"
    path = Path(entry.path if entry is not None else description.path)
    # A folder of slides that is not mounted takes nothing away.
    if path.exists() and signature(path) != (description.size, description.mtime_ns):
        return "slides", "stale", f"{path} has changed"
    return "slides", "done", None


def _tiles(store: Store, folder: SlideFolder, tiling: TilingSettings | None) -> _Found:
    stamp = folder.stamp("tiles")
    description = read_description(folder)
    if stamp is None:
        made = folder.is_foreign("tiles") or tile_source(store, folder.slide_id) is not None
        return ("tiles", "input", None) if made else ("tiles", "missing", None)
    if description is not None and tiling is not None:
        expected = tiles_stamp(description, tiling)
        if stamp.fingerprint != expected.fingerprint:
            return "tiles", "stale", _what_changed(stamp, expected)
    return _done("tiles", stamp)


def _features(store: Store, folder: SlideFolder, encoder: EncoderSettings | None) -> _Found:
    stamp = folder.stamp("features")
    if stamp is None:
        return "features", "input" if folder.is_foreign("features") else "missing", None
    source = tile_source(store, folder.slide_id)
    if source is not None and stamp.made_from["tiles"] != source.upstream():
        return "features", "stale", "the tiles have changed"
    if encoder is not None and not made_by(stamp, encoder):
        return "features", "stale", f"made by {stamp.result['encoder']} with other settings"
    return _done("features", stamp)


def _clusters(folder: SlideFolder, model: ClusterModel | None) -> _Found:
    stamp = folder.stamp("clusters")
    if stamp is None:
        if folder.is_foreign("clusters"):
            return "clusters", "input", None
        if model is None:
            return "clusters", "not due", "no cluster model has been fitted yet"
        return "clusters", "missing", None
    features = feature_file(folder)
    if model is not None and stamp.made_from["model"] != model.version:
        return "clusters", "stale", f"of model {stamp.made_from['model']}, not {model.version}"
    if features is not None and model is not None:
        expected = clusters_stamp(features, model)
        if expected.fingerprint != stamp.fingerprint:
            return "clusters", "stale", "the features have changed"
    return _done("clusters", stamp)


def _labels(
    store: Store,
    folder: SlideFolder,
    annotations: Path | None,
    annotated: bool,  # noqa: FBT001 - private
) -> _Found:
    stamp = folder.stamp("labels")
    source = tile_source(store, folder.slide_id)
    if stamp is None:
        if not annotated:
            return "labels", "not due", "no annotation"
        return "labels", "missing", None
    if source is None:
        return _done("labels", stamp)
    if stamp.made_from["tiles"] != grid_fingerprint(source):
        return "labels", "stale", "the tiles have changed"
    if annotated:
        try:
            annotation = find_annotation(store, annotations, folder.slide_id)
        except LabelError as error:
            return "labels", "failed", str(error)
        if annotation and labels_stamp(source, annotation).fingerprint != stamp.fingerprint:
            return "labels", "stale", "the annotation has changed"
    elif annotations is not None:
        return "labels", "stale", "the annotation is gone"
    return _done("labels", stamp)


def _done(stage: Stage, stamp: Stamp) -> _Found:
    if stamp.result.get("tiles") == 0:
        return stage, "empty", stamp.result.get("reason") or "no tiles"
    return stage, "done", None


def _what_changed(stamp: Stamp, expected: Stamp) -> str:
    changed = [k for k, v in expected.made_from.items() if stamp.made_from.get(k) != v]
    return f"made with another {' and '.join(changed) or 'version of the algorithm'}"
