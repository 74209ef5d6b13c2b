"""Watching for what people say of slides, and of clusters."""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import DagsterEventType

from histoencoder_core.clusters import current_model
from histoencoder_core.errors import HistoEncoderError
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.labels import Annotations
from histoencoder_core.slides.content import signature
from histoencoder_core.store import Store, files
from histoencoder_core.store.stamp import read_stamp
from histoencoder_core.tiles import tile_source
from histoencoder_dagster.assets import labels
from histoencoder_dagster.jobs import label_slides
from histoencoder_dagster.partitions import SLIDES
from histoencoder_dagster.resources import Platform
from histoencoder_dagster.sensors.batches import (
    LOOKING_SECONDS,
    Attempts,
    InFlight,
    next_batches,
    read_cursor,
    request,
)

_GONE, _FOLDER_SEEN = "gone", "_folder"
"""Among what was seen: labels whose annotation is gone; that there was a folder. No slide's id
begins with an underscore."""

_read: dict[str, tuple[tuple[int, int], str | None]] = {}
"""Fingerprints of tiles that this process has read, by the file and what it was."""


def new_annotations(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Label the slides whose annotations, or whose tiles, changed since they were last labelled.

    A table or a ``masks.yaml`` of many slides calls only for those of which it says something new,
    and an annotation that is taken away for its slide. While a folder of annotations that was there
    is not, nothing is asked for: it is not mounted.
    """
    store, settings, instance = platform.store, platform.settings, context.instance
    folder = settings.annotations_folder
    cursor = read_cursor(context.cursor)
    seen = _seen(store, cursor)
    if _FOLDER_SEEN in seen and not folder.is_dir():
        return dg.SkipReason(f"the folder of annotations {folder} is not there any more")
    order = instance.get_dynamic_partitions(SLIDES)
    try:
        said = Annotations(store, folder, order)
    except HistoEncoderError as error:
        return dg.SkipReason(str(error))
    recorded = instance.get_latest_storage_id_by_partition(
        labels.key, DagsterEventType.ASSET_MATERIALIZATION
    )
    now = _signs(store, said, order, seen=seen, ever={*recorded, *seen})
    attempts = Attempts(cursor.get("attempts", {}))
    clock = time.time()
    in_flight = InFlight.of(instance, label_slides.name, order, now=clock)
    owed: dict[str, str] = {}
    for slide_id, sign in now.items():
        under_way = attempts.is_unrecorded(slide_id, recorded) or slide_id in in_flight.slides
        if attempts.of(slide_id, sign) and not under_way:
            continue
        if seen.get(slide_id) != sign:
            owed[slide_id] = sign
    batches = next_batches(
        owed,
        attempts,
        order=order,
        recorded=recorded,
        in_flight=in_flight,
        failure=lambda slide_id: store.slide(slide_id).failures().get("labels"),
        most_runs=settings.runs_in_flight,
        size=settings.slides_per_run,
        now=clock,
    )
    attempts.keep({*owed, *in_flight.slides})
    done = {slide_id: sign for slide_id, sign in now.items() if slide_id not in owed}
    if folder.is_dir():
        done[_FOLDER_SEEN] = str(folder)
    told = {"seen": _remember(store, done, seen), "attempts": attempts.told()}
    context.update_cursor(json.dumps(told))
    if not batches:
        return dg.SkipReason("; ".join(["no new annotations", *said.faults]))
    return dg.SensorResult(run_requests=[request(batch) for batch in batches])


def _signs(
    store: Store,
    said: Annotations,
    order: Sequence[str],
    *,
    seen: Mapping[str, str],
    ever: Collection[str],
) -> dict[str, str]:
    """What labels would be made from, of all slides that are annotated, or were.

    Where there is no time to read a slide's tiles, it is taken for what it was; it comes next time.
    """
    # Half of it: to ask what is said of 50,000 annotated slides takes three seconds already.
    end = time.monotonic() + LOOKING_SECONDS / 2
    signs: dict[str, str | None] = {}
    for slide_id in said.slides():
        path = store.slide(slide_id).record("tiles")
        put = _put_in_place(path)
        known = None if put is None else _read.get(str(path))
        if put is not None and (known is None or known[0] != put):
            if time.monotonic() > end:
                signs[slide_id] = seen.get(slide_id)
                continue
            stamp = read_stamp(path)
            known = _read[str(path)] = (put, None if stamp is None else stamp.fingerprint)
        tiles = None if known is None else known[1]
        there = tiles is not None or tile_source(store, slide_id) is not None
        signs[slide_id] = fingerprint([said.signature(slide_id), tiles])[:16] if there else None
    found = {slide_id: sign for slide_id, sign in signs.items() if sign is not None}
    if said.folder is not None and said.folder.is_dir():
        # Of 50,000 slides, few were ever annotated.
        bare = (store.slide(s) for s in order if s not in signs and s in ever)
        found |= {
            slide.slide_id: _GONE
            for slide in bare
            if slide.stamp("labels") is not None or "labels" in slide.failures()
        }
    return found


def edited_cluster_labels(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Look again at what clusters mean when a pathologist has edited ``cluster_labels.csv``."""
    path = platform.store.cluster_labels_csv
    sign = fingerprint(signature(path)) if path.is_file() else ""
    if sign == (context.cursor or ""):
        return dg.SkipReason(f"{path} has not changed")
    if current_model(platform.store) is None:
        return dg.SkipReason(f"{path} waits for a cluster model")
    return dg.SensorResult(run_requests=[dg.RunRequest()], cursor=sign)


def _seen(store: Store, cursor: Mapping[str, Any]) -> dict[str, str]:
    """What is labelled as it was said. It is in the store: Dagster copies a cursor into each tick.

    If the cursor was lost, so were Dagster's records: all is asked for again.
    """
    try:
        seen = files.read_json(store.annotations_seen_path) if cursor else {}
    except (FileNotFoundError, ValueError):
        return {}
    return seen if isinstance(seen, dict) and fingerprint(seen) == cursor.get("seen") else {}


def _remember(store: Store, seen: dict[str, str], before: dict[str, str]) -> str:
    if seen != before:
        with files.locked_to_write(store.annotations_seen_path):
            files.write_json(store.annotations_seen_path, seen, indent=None)
    return fingerprint(seen)


def _put_in_place(path: Path) -> tuple[int, int] | None:
    """What a file has that another one in its place has not; None if it is not there."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns
