"""What the published catalog was made from, and what it says of slides that have not changed."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from histoencoder_core.clusters.naming import ClusterLabels
from histoencoder_core.cohort import database
from histoencoder_core.cohort.changes import Known, Signature
from histoencoder_core.cohort.completeness import (
    RULES,
    Asked,
    StageState,
    annotations_state,
    with_what_precedes,
)
from histoencoder_core.cohort.query import attached
from histoencoder_core.store import Stamp, Store, layout

log = logging.getLogger(__name__)

_OPTIONAL = ("tiling", "encoder", "labels")
"""What may be left open; whatever there is will do then."""


@dataclass(frozen=True)
class Published:
    """What the published catalog was made from.

    Attributes:
        made_for: What was asked of slides; see `made_for`.
        known: What its slides' files look like, and what is inside of them.
        cohort: Versions of cluster models, and fingerprints of what clusters meant, of the
            statistics that were there, and of what had arrived.
        size: Size in bytes of its file when that was last written from scratch.
    """

    made_for: dict[str, Any]
    known: dict[str, Known]
    cohort: tuple[list[str], str | None, str | None, str]
    size: int


def made_for(asked: Asked) -> dict[str, Any]:
    """All that calls for a new catalog when it changes, JSON-like.

    Args:
        asked: What is asked of every slide.
    """
    settings = {name: getattr(asked, name) for name in _OPTIONAL}
    return {
        "form": database.form(),
        "rules": RULES,
        "model": asked.model and asked.model.version,
        **{name: it and it.model_dump(mode="json") for name, it in settings.items()},
    }


def read_published(store: Store) -> Published | None:
    """Look at the published catalog; None if there is none that this release can read."""
    if not store.catalog_path.exists():
        return None
    try:
        with attached(store) as connection:
            state = connection.sql("SELECT * FROM internal.state").fetchall()
            sources = connection.sql(
                "SELECT slide, files, images, own_tiles, path FROM internal.sources"
            ).fetchall()
        if not state:
            return None
        asked, models, labels, statistics, arrived, size = state[0]
        return Published(
            made_for=json.loads(asked),
            known={
                slide: Known(Signature(of_files, of_images), own_tiles, path)
                for slide, of_files, of_images, own_tiles, path in sources
            },
            cohort=(models, labels, statistics, arrived),
            size=size,
        )
    except (duckdb.Error, ValueError) as error:  # of an earlier release, or damaged
        log.info("%s: can't be brought up to date (%s).", store.catalog_path, error)
        return None


def states_that_stand(
    store: Store, published: Published, asked: Asked, now: Mapping[str, Signature]
) -> dict[str, list[StageState]]:
    """The states of slides whose files are as the published catalog saw them.

    Args:
        store: The store.
        published: What the catalog was made from.
        asked: What is asked of every slide now.
        now: Signatures of slides as they are now.

    Returns:
        By slide, in the order of the stages; slides that have to be looked at are left out. If less
        is asked for than the catalog was made for, those that are stale may be done.
    """
    wanted, kept = made_for(asked), published.made_for
    left_open = [name for name in _OPTIONAL if wanted[name] is None and kept[name] is not None]
    if any(wanted[name] != kept.get(name) for name in wanted if name not in left_open):
        return {}
    known = published.known
    standing = {
        slide for slide, sign in now.items() if slide in known and known[slide].signature == sign
    }
    labels = asked.cluster_labels
    try:
        with attached(store) as connection:
            rows = connection.sql(
                "SELECT slide, stage, state, reason, kind FROM completeness"
            ).fetchall()
            anew = (
                {}
                if published.cohort[1] == (labels and labels.fingerprint)
                else annotations_anew(connection, labels)
            )
    except duckdb.Error as error:
        log.warning("%s: is damaged (%s).", store.catalog_path, error)
        return {}
    order = {stage: place for place, stage in enumerate(layout.STAGES)}
    rows.sort(key=lambda row: (row[0], order[row[1]]))
    told = {}
    for slide, of_slide in itertools.groupby(rows, key=lambda row: row[0]):
        if slide in standing:
            states = [StageState(*row) for row in of_slide]
            if slide in anew:
                states = [anew[slide] if s.stage == "annotations" else s for s in states]
            if not (left_open and any(s.state == "stale" for s in states)):
                told[slide] = states
    return told


def annotations_anew(
    connection: duckdb.DuckDBPyConnection, labels: ClusterLabels | None
) -> dict[str, StageState]:
    """States of annotations by cluster that differ from the catalog's, by slide.

    Args:
        connection: To the catalog, of which nothing else has changed.
        labels: What clusters mean now; None if that is not known.
    """
    rows = connection.execute(
        "SELECT a.slide, a.state, a.reason, c.state, s.clusters, s.annotations "
        "FROM completeness AS a "
        "JOIN completeness AS c ON c.slide = a.slide AND c.stage = 'clusters' "
        "JOIN internal.sources AS s ON s.slide = a.slide "
        "WHERE a.stage = 'annotations' AND a.state NOT IN ('failed', 'input')"
    ).fetchall()
    told = {}
    for slide, state, reason, clusters_state, clusters, annotated in rows:
        stamp = None if annotated is None else Stamp.model_validate_json(annotated)
        found = annotations_state(stamp, clusters, labels)
        found = with_what_precedes("annotations", *found, {"clusters": clusters_state})
        if found != (state, reason):
            told[slide] = StageState(slide, "annotations", *found)
    return told
