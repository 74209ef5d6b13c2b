"""Which stage of which slide is done, and if not, why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from histoencoder_core.clusters import ClusterModel, feature_file
from histoencoder_core.clusters.assign import clusters_stamp
from histoencoder_core.clusters.inputs import made_by
from histoencoder_core.errors import StoreError
from histoencoder_core.settings import EncoderSettings, TilingSettings
from histoencoder_core.slides import FoundSlide, Register, read_description
from histoencoder_core.store import SlideFolder, Stamp, Store
from histoencoder_core.store.layout import Stage
from histoencoder_core.tiles import find_sources, tile_source, tiles_stamp

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
    """All slides that results are expected of: registered, or with tiles in the store."""
    known = {*Register(store).entries(), *store.slide_ids()}
    return sorted({*known, *find_sources(store, but=known)})


def slide_states(
    store: Store,
    *,
    tiling: TilingSettings | None = None,
    encoder: EncoderSettings | None = None,
    model: ClusterModel | None = None,
    annotated: Iterable[str] = (),
    found: Iterable[FoundSlide] = (),
) -> list[StageState]:
    """Tell the state of every stage of every expected slide.

    Args:
        store: The store.
        tiling: Tiles made otherwise are stale; if None, any tiles will do.
        encoder: Features of another encoder are stale; if None, any features will do.
        model: The current cluster model; clusters of another are stale.
        annotated: Ids of the slides that have annotations.
        found: Slide files there are; one that was never registered is missing.

    Returns:
        The states, by slide and in the order of the stages.
    """
    with_labels = set(annotated)
    entries = Register(store).entries()
    registered = set(entries)
    paths = {entry.path for entry in entries.values()}
    states = [
        StageState(slide.relative, "slides", "missing", "was found but not looked at yet")
        for slide in found
        if str(slide.path) not in paths
    ]
    for slide_id in expected_slides(store):
        folder = store.slide(slide_id)
        of_slide = [
            _slides(folder, slide_id in registered),
            _told("tiles", lambda: _tiles(store, folder, tiling)),  # noqa: B023 - called at once
            _told("features", lambda: _features(store, folder, encoder)),  # noqa: B023
            _told("clusters", lambda: _clusters(folder, model)),  # noqa: B023
            _labels(folder, slide_id in with_labels),
        ]
        failures = folder.failures()
        blocked: str | None = None
        for stage, state, reason in of_slide:
            if stage in failures and state in {"missing", "stale"}:
                state, reason = "failed", str(failures[stage]["reason"])
            elif blocked and state == "missing" and stage != "labels":
                state, reason = "not due", f"{blocked} is not done"
            if state in {"missing", "failed"} and blocked is None:
                blocked = stage
            states.append(StageState(slide_id, stage, state, reason))
    return states


_Found = tuple[Stage, State, str | None]


def _told(stage: Stage, look: Callable[[], _Found]) -> _Found:
    """One slide's damaged file must not hide what the others are."""
    try:
        return look()
    except StoreError as error:
        return stage, "failed", str(error)


def _slides(folder: SlideFolder, registered: bool) -> _Found:  # noqa: FBT001
    if read_description(folder) is not None:
        return "slides", "done", None
    if registered:
        return "slides", "missing", None
    return "slides", "input", "tiles made by another program"


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
    if encoder is not None and not made_by(stamp.made_from["encoder"], encoder):
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


def _labels(folder: SlideFolder, annotated: bool) -> _Found:  # noqa: FBT001
    stamp = folder.stamp("labels")
    if stamp is None:
        if not annotated:
            return "labels", "not due", "no annotation"
        return "labels", "missing", None
    return _done("labels", stamp)


def _done(stage: Stage, stamp: Stamp) -> _Found:
    if stamp.result.get("tiles") == 0:
        return stage, "empty", stamp.result.get("reason") or "no tiles"
    return stage, "done", None


def _what_changed(stamp: Stamp, expected: Stamp) -> str:
    changed = [k for k, v in expected.made_from.items() if stamp.made_from.get(k) != v]
    return f"made with another {' and '.join(changed) or 'version of the algorithm'}"
