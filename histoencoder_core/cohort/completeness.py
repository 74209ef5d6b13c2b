"""Which stage of a slide is done, and if not, why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa

from histoencoder_core.clusters import ClusterModel, clusters_stamp
from histoencoder_core.clusters.inputs import made_by
from histoencoder_core.clusters.naming import (
    ANNOTATIONS_ALGORITHM,
    ClusterLabels,
    current_cluster_labels,
)
from histoencoder_core.cohort.looking import SlideLook
from histoencoder_core.errors import HistoEncoderError, LabelError, SettingsError, kind_of
from histoencoder_core.labels import Annotations, why_due
from histoencoder_core.settings import (
    AnnotationSettings,
    EncoderSettings,
    LabelSettings,
    TilingSettings,
)
from histoencoder_core.slides.content import signature
from histoencoder_core.store import Stamp, Store, layout
from histoencoder_core.store.layout import Stage
from histoencoder_core.tiles import tiles_stamp

log = logging.getLogger(__name__)

RULES = 2
"""Version of how states are told from files: a catalog of another version is written anew."""

State = Literal[
    "done", "empty", "input", "duplicate", "waiting", "stale", "failed", "missing", "not due"
]

STATES: tuple[State, ...] = get_args(State)

NOT_DONE: tuple[State, ...] = ("failed", "missing", "waiting", "stale", "empty", "duplicate")
"""States that a person wants to know the reason of, the worst first."""


@dataclass(frozen=True)
class StageState:
    """One stage of one slide.

    Attributes:
        slide: The slide's id; of a file that has none yet, its path in the folder of slides.
        stage: The stage.
        state: ``done``; ``empty`` (done, with no tiles); ``input`` (another program's files);
            ``duplicate`` (has another slide's content); ``waiting`` (its file is not whole yet);
            ``failed``; ``stale`` (made from something that has changed since); ``missing``;
            ``not due`` (nothing to do yet, or nothing asked for).
        reason: Why it is not done, in a sentence.
        kind: Of a failure, one of `errors.KINDS`.
    """

    slide: str
    stage: Stage
    state: State
    reason: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Asked:
    """What is asked of every slide; where it is None, whatever there is will do.

    Attributes:
        tiling: How tiles are cut.
        encoder: What features are made with.
        model: The current cluster model, if there is one.
        cluster_labels: What its clusters mean, if that is known.
        annotations: What people say of slides.
        labels: How that becomes labels.
    """

    tiling: TilingSettings | None = None
    encoder: EncoderSettings | None = None
    model: ClusterModel | None = None
    cluster_labels: ClusterLabels | None = None
    annotations: Annotations | None = None
    labels: LabelSettings | None = None


def count_states(states: Iterable[StageState]) -> pa.Table:
    """Count the slides in each state, by stage.

    Args:
        states: Of all stages of all slides.

    Returns:
        Table of ``stage``, ``expected`` and a column for each of `STATES`; one row a stage that
        anything is known of.
    """
    listed = list(states)
    counts = Counter((state.stage, state.state) for state in listed)
    slides = len({state.slide for state in listed})
    rows = [
        {"stage": stage, "expected": slides, **{name: counts[stage, name] for name in STATES}}
        for stage in layout.STAGES
        if any(counts[stage, name] for name in STATES)
    ]
    names = ("stage", "expected", *STATES)
    return pa.table({name: [row[name] for row in rows] for name in names})


def known_cluster_labels(store: Store, settings: AnnotationSettings | None) -> ClusterLabels | None:
    """What clusters mean; None if that is not known, or an edited table does not fit."""
    try:
        return current_cluster_labels(store, settings)
    except (LabelError, SettingsError) as error:
        log.warning("what clusters mean is not known: %s", error)
        return None


def states_of(look: SlideLook, asked: Asked) -> list[StageState]:
    """Tell the state of every stage of one slide.

    Args:
        look: The slide's files.
        asked: What is asked of every slide.
    """
    failures = look.folder.failures()
    states: dict[Stage, State] = {}
    told = []
    stages: list[tuple[Stage, Callable[[], _Found]]] = [
        ("slides", lambda: _slides(look)),
        ("tiles", lambda: _tiles(look, asked)),
        ("features", lambda: _features(look, asked)),
        ("clusters", lambda: _clusters(look, asked)),
        ("labels", lambda: _labels(look, asked)),
        ("annotations", lambda: _annotations(look, asked)),
    ]
    if look.folder.record("slide_clusters").exists() or "slide_clusters" in failures:
        stages.insert(4, ("slide_clusters", lambda: _slide_clusters(look)))
    for stage, find in stages:
        kind = None
        try:
            state, reason = find()
        except HistoEncoderError as error:  # a damaged file must not hide what the others are
            state, reason, kind = "failed", str(error), error.kind
        except (OSError, ValueError, KeyError) as error:
            state, reason, kind = "failed", f"{type(error).__name__}: {error}", kind_of(error)
        if stage in failures:
            kept = "; the former result is kept" if state in {"done", "empty", "stale"} else ""
            state, reason = "failed", f"{failures[stage]['reason']}{kept}"
            kind = failures[stage]["kind"]
        states[stage], reason = with_what_precedes(stage, state, reason, states)
        told.append(StageState(look.slide_id, stage, states[stage], reason, kind))
    return told


_Found = tuple[State, str | None]

_MADE_FROM: dict[Stage, tuple[Stage, ...]] = {
    "slides": (),
    "tiles": ("slides",),
    "features": ("tiles",),
    "clusters": ("features",),
    "slide_clusters": ("features",),
    "labels": ("tiles",),
    "annotations": ("clusters",),
}


def with_what_precedes(
    stage: Stage, state: State, reason: str | None, states: dict[Stage, State]
) -> _Found:
    """A stage is only as good as the ones it is made from.

    Args:
        stage: The stage.
        state: What its own files say.
        reason: Why.
        states: Of the stages that precede it.
    """
    before = [s for s in _MADE_FROM[stage] if states[s] in {"failed", "stale"}]
    if before and state in {"done", "empty"}:
        return "stale", f"its {before[-1]} are {states[before[-1]]}"
    if state == "missing" and any(
        states[s] in {"failed", "missing", "not due", "duplicate"} for s in _MADE_FROM[stage]
    ):
        return "not due", f"its {_MADE_FROM[stage][-1]} are not done"
    return state, reason


def _slides(look: SlideLook) -> _Found:
    description, entry = look.description, look.entry
    duplicate = look.folder.duplicate()
    if duplicate is not None:
        return "duplicate", f"has the content of {duplicate['of']}, and is not computed again"
    if description is None:
        if entry is not None:
            return "missing", None
        return "input", "tiles made by another program"
    path = Path(entry.path if entry is not None else description.path)
    # A folder of slides that is not mounted takes nothing away.
    if path.exists() and signature(path) != (description.size, description.mtime_ns):
        return "stale", f"{path} has changed"
    return "done", None


def _tiles(look: SlideLook, asked: Asked) -> _Found:
    stamp = look.folder.stamp("tiles")
    if stamp is None:
        made = look.folder.is_foreign("tiles") or look.source is not None
        return ("input", None) if made else ("missing", None)
    if look.description is not None and asked.tiling is not None:
        expected = tiles_stamp(look.description, asked.tiling)
        if stamp.fingerprint != expected.fingerprint:
            return "stale", _what_changed(stamp, expected)
    return _done(stamp)


def _features(look: SlideLook, asked: Asked) -> _Found:
    stamp = look.folder.stamp("features")
    if stamp is None:
        return "input" if look.folder.is_foreign("features") else "missing", None
    if look.is_outdated("features"):
        return "stale", "the tiles have changed"
    if asked.encoder is not None and not made_by(stamp, asked.encoder):
        return "stale", f"made by {stamp.result['encoder']} with other settings"
    return _done(stamp)


def _clusters(look: SlideLook, asked: Asked) -> _Found:
    stamp, model = look.folder.stamp("clusters"), asked.model
    if stamp is None:
        if look.folder.is_foreign("clusters"):
            return "input", None
        if model is None:
            return "not due", "no cluster model has been fitted yet"
        return "missing", None
    if model is not None and stamp.made_from["model"] != model.version:
        return "stale", f"of model {stamp.made_from['model']}, not {model.version}"
    if look.features is not None and model is not None:
        expected = clusters_stamp(look.features, model)
        if expected.fingerprint != stamp.fingerprint:
            return "stale", "the features have changed"
    return _done(stamp)


def _slide_clusters(look: SlideLook) -> _Found:
    stamp = look.folder.stamp("slide_clusters")
    if stamp is None:
        return "input" if look.folder.is_foreign("slide_clusters") else "missing", None
    if look.is_outdated("slide_clusters"):
        return "stale", "the features have changed"
    return _done(stamp)


def _labels(look: SlideLook, asked: Asked) -> _Found:
    stamp, said = look.folder.stamp("labels"), asked.annotations
    if stamp is None:
        if said is None or said.signature(look.slide_id) is None:
            return "not due", "no annotation"
        return "missing", None
    if look.source is not None and said is not None:
        reason = why_due(look.folder, look.source, said, asked.labels)
        if reason is not None:
            return "stale", reason
    return _done(stamp)


def _annotations(look: SlideLook, asked: Asked) -> _Found:
    if look.folder.is_foreign("annotations"):
        return "input", None
    clusters = look.folder.stamp("clusters")
    return annotations_state(
        look.folder.stamp("annotations"),
        None if clusters is None else clusters.fingerprint,
        asked.cluster_labels,
    )


def annotations_state(
    stamp: Stamp | None, clusters: str | None, labels: ClusterLabels | None
) -> _Found:
    """Tell whether a slide's annotation by cluster says what its clusters mean now.

    Args:
        stamp: Of the annotation, if there is one.
        clusters: Fingerprint of the slide's clusters, if there are any.
        labels: What clusters mean; None if that is not known.
    """
    if stamp is None:
        if labels is None:
            return "not due", "what clusters mean is not known"
        if not labels.names:
            return "not due", "no cluster has a label yet"
        return "missing", None
    if stamp.made_from["clusters"] != clusters:
        return "stale", "the clusters have changed"
    if labels is None:
        return "stale", "what clusters mean is not known any more"
    known = (labels.fingerprint, ANNOTATIONS_ALGORITHM)
    if (stamp.made_from["cluster_labels"], stamp.algorithm) != known:
        return "stale", "what clusters mean has changed"
    return _done(stamp)


def _done(stamp: Stamp) -> _Found:
    if stamp.result.get("tiles") == 0:
        return "empty", stamp.result.get("reason") or "no tiles"
    return "done", None


def _what_changed(stamp: Stamp, expected: Stamp) -> str:
    changed = [k for k, v in expected.made_from.items() if stamp.made_from.get(k) != v]
    return f"made with another {' and '.join(changed) or 'version of the algorithm'}"
