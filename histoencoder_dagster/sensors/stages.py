"""Stages that follow each other: each slide's next ones, once the one before is new.

Dagster's automation conditions are not used between the stages of a slide. They ask for all slides
at once, as a backfill, however many that are; they forget an update that comes while their target
runs, and they know of no second try. Here a stage is owed for as long as one that it is made from
was recorded after it, whatever was asked for in between.

What is owed is asked for together with all that follows it, in one run. If a slide fails in a
stage, its run ends there, and the stages that follow are owed of the others.

A record may come after that of a stage before and yet be of what was there before it: somebody
made tiles anew while a run was encoding those of before. So of each new record it is looked up in
the store, once, what it was made from.
"""

import json
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import dagster as dg
from dagster import DagsterEventType

from histoencoder_core.clusters.naming import current_cluster_labels
from histoencoder_core.cohort.looking import SlideLook
from histoencoder_core.errors import HistoEncoderError
from histoencoder_core.store import Store
from histoencoder_core.store.layout import Stage
from histoencoder_dagster.jobs import work_up_slides
from histoencoder_dagster.partitions import SLIDES
from histoencoder_dagster.resources import Platform
from histoencoder_dagster.sensors.batches import (
    LOOKING_SECONDS,
    Attempts,
    InFlight,
    next_batches,
    read_cursor,
    request,
    time_of,
)

FOLLOWS: dict[Stage, tuple[Stage, str | None]] = {
    "tiles": ("slides", None),
    "features": ("tiles", None),
    "clusters": ("features", "cluster_model"),
    "annotations": ("clusters", "cluster_labels"),
}
"""The stage of the slide, and the asset of the cohort, that a stage is made from."""

_RECORDED: tuple[Stage, ...] = ("slides", *FOLLOWS)

_LOOKED = "looked"
"""In the cursor, beside the stages: the last record of each that was looked up."""


def next_stages(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Run the stages that follow on the slides whose stage before is new, in batches.

    A slide that failed is asked for again if its stage before is made anew, or after some time if
    what it failed for may pass by itself, such as a full disk.
    """
    settings, instance, store = platform.settings, context.instance, platform.store
    now = time.time()
    order = instance.get_dynamic_partitions(SLIDES)
    cursor = read_cursor(context.cursor)
    # First what is under way: what ends after this look is taken for under way for a tick longer.
    in_flight = InFlight.of(instance, work_up_slides.name, order, now=now)
    recorded = {stage: _recorded(instance, stage) for stage in _RECORDED}
    attempts = {stage: Attempts(cursor.get(stage, {})) for stage in FOLLOWS}
    since = _since(instance, platform)
    looked = _look_up(store, since, recorded, attempts, cursor.get(_LOOKED, {}))
    possible = list(since)
    requests: list[dg.RunRequest] = []
    for stage in since:
        before, _ = FOLLOWS[stage]
        there = {s: recorded[before][s] for s in order if s in recorded[before]}
        owed = _owed(there, recorded[stage], attempts[stage], since[stage])
        batches = next_batches(
            owed,
            attempts[stage],
            order=order,
            recorded=recorded[stage],
            # Each stage has its own bound: those that wait for tiles must not hold up the others.
            in_flight=in_flight.beginning_with(stage),
            failure=partial(_failure, store, stage),
            most_runs=settings.runs_in_flight,
            size=settings.slides_per_run,
            now=now,
            newest_first=settings.newest_first,
        )
        in_flight = in_flight.and_asked(batches)
        if batches:
            following = possible[possible.index(stage) :]
            requests += [request(batch, stages=following) for batch in batches]
            asked = [slide_id for batch in batches for slide_id in batch]
            for later in following[1:]:
                _note_open(
                    attempts[later], asked, store, later, since[later], recorded[later], now=now
                )
        attempts[stage].keep({*owed, *in_flight.slides})
    told = {stage: asked_for.told() for stage, asked_for in attempts.items()}
    new_cursor = json.dumps({**told, _LOOKED: looked})
    if not requests:
        context.update_cursor(new_cursor)
        return dg.SkipReason("nothing is owed that is not under way or waiting for another try")
    return dg.SensorResult(run_requests=requests, cursor=new_cursor)


def _look_up(
    store: Store,
    stages: Iterable[Stage],
    recorded: Mapping[Stage, Mapping[str, int]],
    attempts: Mapping[Stage, Attempts],
    looked: Mapping[str, int],
) -> dict[str, int]:
    """Find the new records that are of what was there before; their slides become outdated.

    Args:
        store: The store.
        stages: Those that are looked up.
        recorded: By stage, number of each slide's last record.
        attempts: By stage; those of such slides are changed.
        looked: By stage, number of the last record that was looked up.

    Returns:
        The same, as of now: what there was no time for comes in the next look.
    """
    end = time.monotonic() + LOOKING_SECONDS / 2
    now_looked = dict(looked)
    for stage in stages:
        seen = looked.get(stage, 0)
        new = sorted((number, s) for s, number in recorded[stage].items() if number > seen)
        for number, slide_id in new:
            if time.monotonic() > end:
                break
            # By the sign of an attempt it is known without; nor is it asked for over and over then.
            by_sign = attempts[stage].is_closed(slide_id)
            if not by_sign and _is_outdated(store, slide_id, stage):
                attempts[stage].outdate(slide_id, record=number)
            now_looked[stage] = number
    return now_looked


def _is_outdated(store: Store, slide_id: str, stage: Stage) -> bool:
    """Whether a stage was made from what was there before; one that can't be read is not."""
    look = SlideLook(store, slide_id, None)
    before, _ = FOLLOWS[stage]
    if before != "slides" and look.folder.stamp(before) is None:
        return False  # another program's: to read all of it takes longer than a tick may
    try:
        return look.is_outdated(stage)
    except (HistoEncoderError, OSError, ValueError, KeyError):  # `status` tells of it
        return False


def _note_open(
    attempts: Attempts,
    slides: Iterable[str],
    store: Store,
    stage: Stage,
    since: int,
    recorded: Mapping[str, int],
    *,
    now: float,
) -> None:
    """Slides were asked for with a stage before: how they will look is not known yet."""
    for slide_id in slides:
        attempts.note(
            slide_id,
            _sign("", since),
            requests=1,
            now=now,
            failed=time_of(_failure(store, stage, slide_id)),
            record=recorded.get(slide_id, 0),
        )


def _since(instance: dg.DagsterInstance, platform: Platform) -> dict[Stage, int]:
    """The stages that can be made as yet, with the last record of what the cohort gives to them."""
    since: dict[Stage, int] = {}
    for stage, (_, of_cohort) in FOLLOWS.items():
        newest = 0 if of_cohort is None else _newest(instance, of_cohort)
        if newest is None or (of_cohort == "cluster_labels" and not _are_named(platform)):
            break
        since[stage] = newest
    return since


def _are_named(platform: Platform) -> bool:
    """Whether the clusters of the current model have labels: those of one before are of no use."""
    try:
        labels = current_cluster_labels(platform.store, platform.settings.annotate)
    except HistoEncoderError:  # the asset tells
        return False
    return labels is not None and bool(labels.names)


def _failure(store: Store, stage: Stage, slide_id: str) -> Mapping[str, Any] | None:
    """How a stage failed on a slide, if it did."""
    return store.slide(slide_id).failures().get(stage)


def _recorded(instance: dg.DagsterInstance, stage: Stage) -> Mapping[str, int]:
    """Number of each slide's last record of a stage; a later one is larger."""
    return instance.get_latest_storage_id_by_partition(
        dg.AssetKey(stage), DagsterEventType.ASSET_MATERIALIZATION
    )


def _newest(instance: dg.DagsterInstance, asset: str) -> int | None:
    """Number of the last record of an asset without partitions; None if there is none."""
    [*records] = instance.get_asset_records([dg.AssetKey(asset)])
    last = records[0].asset_entry.last_materialization_record if records else None
    return None if last is None else last.storage_id


def _owed(
    before: Mapping[str, int], made: Mapping[str, int], attempts: Attempts, since: int
) -> dict[str, str]:
    """Slides of which a stage is owed, with what it would be made from."""
    owed = {}
    for slide_id, record in before.items():
        sign = _sign(record, since)
        if (
            made.get(slide_id, 0) < max(record, since)
            or attempts.is_outdated(slide_id, sign)
            # Outdated when it was asked for, and killed since.
            or attempts.is_unrecorded(slide_id, made)
        ):
            owed[slide_id] = sign
    return owed


def _sign(before: int | str, since: int) -> str:
    """What a stage is made from, by numbers of records: the slide's and the cohort's."""
    return f"{before}/{since}"
