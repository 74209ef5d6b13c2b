"""The state of every stage of every slide: from the catalog where it stands, else looked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from histoencoder_core.clusters import ClusterModel
from histoencoder_core.cohort.arrived import read_arrived
from histoencoder_core.cohort.changes import Scan
from histoencoder_core.cohort.completeness import (
    Asked,
    StageState,
    known_cluster_labels,
    states_of,
)
from histoencoder_core.cohort.looking import SlideLook
from histoencoder_core.cohort.published import read_published, states_that_stand
from histoencoder_core.labels import Annotations
from histoencoder_core.settings import (
    AnnotationSettings,
    EncoderSettings,
    LabelSettings,
    TilingSettings,
)
from histoencoder_core.slides import FoundSlide, Register
from histoencoder_core.store import Store


def slide_states(
    store: Store,
    *,
    tiling: TilingSettings | None = None,
    encoder: EncoderSettings | None = None,
    model: ClusterModel | None = None,
    annotations: Path | None = None,
    labels: LabelSettings | None = None,
    annotate: AnnotationSettings | None = None,
    found: Iterable[FoundSlide] | None = None,
) -> list[StageState]:
    """Tell the state of every stage of every expected slide.

    Slides whose files have not changed since the catalog was written are not opened.

    Args:
        store: The store.
        tiling: Tiles made otherwise are stale; if None, any tiles will do.
        encoder: Features of another encoder are stale; if None, any features will do.
        model: The current cluster model; clusters of another are stale.
        annotations: Folder of annotations; if None, labels made from any will do.
        labels: Labels made otherwise are stale; if None, any labels will do.
        annotate: Which K annotates; the one that did last if None.
        found: Slide files there are; those that the platform saw last if not given. One that was
            never registered is waiting, or missing.

    Returns:
        The states, by slide and in the order of the stages.
    """
    entries = Register(store).entries()
    states = read_arrived(store, entries, found).states
    scan = Scan(store)
    expected = scan.expected(entries)
    said = Annotations(store, annotations, expected)
    asked = Asked(tiling, encoder, model, known_cluster_labels(store, annotate), said, labels)
    standing: dict[str, list[StageState]] = {}
    published = read_published(store)
    if published is not None:
        now = scan.signatures(expected, entries, said, published.known)
        standing = states_that_stand(store, published, asked, now)
    for slide_id in expected:
        if slide_id in standing:
            states += standing[slide_id]
        else:
            look = SlideLook(store, slide_id, entries.get(slide_id))
            states += states_of(look, asked)
    return states
