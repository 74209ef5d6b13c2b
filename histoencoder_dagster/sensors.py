"""Watching for what comes from outside: slides, annotations, and enough slides for a first model.

What is owed is worked out from the store, from what Dagster recorded, and from the runs under way,
not from a cursor alone: Dagster adds partitions before it creates runs, so that a crash between the
two must not lose a slide, and losing the cursor must not compute an archive anew. Everything after
a slide's arrival follows by automation conditions on the assets.
"""

import json
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import dagster as dg
from dagster import DagsterRunStatus, RunsFilter

from histoencoder_core.clusters import current_model
from histoencoder_core.errors import HistoEncoderError, SettingsError, StoreError
from histoencoder_core.labels import Annotations
from histoencoder_core.settings import PlatformSettings, fingerprint
from histoencoder_core.slides import Sheet
from histoencoder_core.slides.content import signature
from histoencoder_core.slides.describe import was_tried
from histoencoder_core.store import Store
from histoencoder_core.tiles import tile_source
from histoencoder_core.tiles.source import slide_ids_with_tiles
from histoencoder_dagster.assets import cluster_model, slides
from histoencoder_dagster.jobs import describe_slides, fit_clusters, label_slides, name_clusters
from histoencoder_dagster.partitions import SLIDES, slide_partitions
from histoencoder_dagster.resources import Platform

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"
PARTITION = "dagster/partition"

_UNFINISHED = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]


class _Watching(TypedDict):
    minimum_interval_seconds: int
    default_status: dg.DefaultSensorStatus


RETRY_SECONDS = 300
"""A slide whose run ended without a word on it is asked for again after this time, then 4 times
as long, and so on."""

RETRY_SECONDS_LIMIT = 86400

_GONE, _FOLDER_SEEN = "gone", "_folder"
"""In the cursor of `new_annotations`: labels whose annotation is gone; that there was a folder. No
slide's id begins with an underscore."""

_Seen = tuple[str, int, int]
"""Path, size and time of a slide's file."""


@dataclass(frozen=True)
class _Owed:
    """A slide to describe.

    Attributes:
        sign: Short fingerprint of its file as it is now: the cursor is kept with every tick.
        settled: Whether it is the same as a tick ago, and old enough.
        requests: How often this very file was asked for.
        not_before: When it may be asked for again.
    """

    sign: str
    settled: bool
    requests: int = 0
    not_before: int = 0

    def requested(self, now: float) -> "_Owed":
        """The same after it was asked for."""
        wait = min(RETRY_SECONDS * 4**self.requests, RETRY_SECONDS_LIMIT)
        return replace(self, requests=self.requests + 1, not_before=int(now + wait))


def new_slides(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Turn newly scanned slides into partitions, and describe them in batches.

    A slide is owed until its file of this size and time, with its row of ``slides.csv``, was
    described, and Dagster recorded that, or failed to be. It is asked for once it stood still over
    two ticks and the settle time. If its run was killed it is asked for again later, alone: it may
    be what killed the run. The cursor holds only what is owed.
    """
    settings, instance = platform.settings, context.instance
    if not settings.slides.is_dir():
        return dg.SkipReason(f"the folder of slides {settings.slides} is not there")
    try:
        sheet = platform.sheet()
    except SettingsError as error:  # each slide would fail, and not be asked for again
        return dg.SkipReason(str(error))
    now = time.time()
    order = instance.get_dynamic_partitions(SLIDES)
    recorded = instance.get_materialized_partitions(slides.key)
    seen = _files_owed(platform, sheet, recorded)
    try:
        seen |= _tiles_owed(platform.store, but={*recorded, *seen})
    except StoreError as error:  # a faulty tiles.csv is no reason to hold back scanned slides
        context.log.warning(str(error))
    owed = _owed(seen, context.cursor, now=now, settle_seconds=settings.settle_seconds)
    under_way = _partitions_under_way(instance, describe_slides.name, order)
    ready = [
        slide_id
        for slide_id, slide in owed.items()
        if slide.settled and slide.not_before <= now and slide_id not in under_way
    ]
    new = [slide_id for slide_id in ready if slide_id not in set(order)]
    first = [slide_id for slide_id in ready if not owed[slide_id].requests]
    batches = contiguous_batches(first, [*order, *new], size=settings.slides_per_run)
    batches += [[slide_id] for slide_id in ready if owed[slide_id].requests]
    owed |= {slide_id: owed[slide_id].requested(now) for slide_id in ready}
    cursor = json.dumps({s: [it.sign, it.requests, it.not_before] for s, it in owed.items()})
    if not ready:
        context.update_cursor(cursor)
        return dg.SkipReason(f"no new slides; {len(owed)} settling, under way or to be tried again")
    return dg.SensorResult(
        dynamic_partitions_requests=[slide_partitions.build_add_request(new)] if new else [],
        run_requests=[_request(batch) for batch in batches],
        cursor=cursor,
    )


def new_annotations(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Label the slides whose annotations, or whose tiles, changed since they were last labelled.

    A table or a ``masks.yaml`` of many slides calls only for those of which it says something new,
    and an annotation that is taken away for its slide. While a folder of annotations that was there
    is not, nothing is asked for: it is not mounted.
    """
    store, folder = platform.store, platform.settings.annotations_folder
    before: dict[str, str] = json.loads(context.cursor) if context.cursor else {}
    if _FOLDER_SEEN in before and not folder.is_dir():
        return dg.SkipReason(f"the folder of annotations {folder} is not there any more")
    order = context.instance.get_dynamic_partitions(SLIDES)
    try:
        said = Annotations(store, folder, order)
    except HistoEncoderError as error:
        return dg.SkipReason(str(error))
    signs = {slide_id: _said(store, slide_id, said) for slide_id in said.slides()}
    now = {slide_id: sign for slide_id, sign in signs.items() if sign is not None}
    if folder.is_dir():
        bare = (store.slide(slide_id) for slide_id in order if slide_id not in signs)
        now |= {
            slide.slide_id: _GONE
            for slide in bare
            if slide.stamp("labels") is not None or "labels" in slide.failures()
        }
        now[_FOLDER_SEEN] = str(folder)
    changed = [slide_id for slide_id, sign in now.items() if before.get(slide_id) != sign]
    batches = contiguous_batches(changed, order, size=platform.settings.slides_per_run)
    if not batches:
        context.update_cursor(json.dumps(now))
        return dg.SkipReason("; ".join(["no new annotations", *said.faults]))
    return dg.SensorResult(
        run_requests=[_request(batch) for batch in batches],
        cursor=json.dumps(now),
    )


def first_cluster_model(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Fit the cohort's first cluster model once enough slides have features; never a later one.

    A model that was fitted without Dagster is taken as it is.
    """
    if context.instance.get_latest_materialization_event(cluster_model.key) is not None:
        return dg.SkipReason("there is a cluster model; refitting is asked for by hand")
    store, needed = platform.store, platform.settings.first_fit_slides
    model = current_model(store)
    if model is not None:
        found = dg.AssetMaterialization(
            cluster_model.key,
            description="Found in the store, fitted without Dagster.",
            metadata={"version": model.version, "untrained": model.untrained},
        )
        return dg.SensorResult(asset_events=[found])
    ready = sum(store.slide(s).record("features").exists() for s in store.slide_ids())
    if ready < needed:
        return dg.SkipReason(f"{ready} of {needed} slides have features")
    # A run that failed is tried again when more slides have features.
    return dg.SensorResult(run_requests=[dg.RunRequest(run_key=f"first-model-{ready}")])


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


def platform_sensors(settings: PlatformSettings) -> list[dg.SensorDefinition]:
    """The sensors of one deployment; all are on from the start."""
    watching: _Watching = {
        "minimum_interval_seconds": settings.tick_seconds,
        "default_status": dg.DefaultSensorStatus.RUNNING,
    }
    return [
        dg.sensor(job=describe_slides, **watching)(new_slides),
        dg.sensor(job=label_slides, **watching)(new_annotations),
        dg.sensor(job=fit_clusters, **watching)(first_cluster_model),
        dg.sensor(job=name_clusters, **watching)(edited_cluster_labels),
        dg.AutomationConditionSensorDefinition(
            "stages_follow_each_other",
            target=dg.AssetSelection.groups("slide").without_checks(),
            description="Runs each stage on the slides whose stage before is new, in batches.",
            **watching,
        ),
        # A sensor of its own, for two reasons. What two sensors ask for is never one backfill, in
        # which a failed slide would hold back the cohort. And as each refresh is a process and a
        # pass over all slides, there are fewer of them.
        dg.AutomationConditionSensorDefinition(
            "cohort_follows_slides",
            target=dg.AssetSelection.groups("cohort").without_checks()
            | dg.AssetSelection.all_asset_checks(),
            description="Refreshes catalog, purity and checks after any slide's stage.",
            minimum_interval_seconds=4 * settings.tick_seconds,
            default_status=dg.DefaultSensorStatus.RUNNING,
        ),
        # A figure that can't be drawn must not hold back the catalog.
        dg.AutomationConditionSensorDefinition(
            "report_follows_cohort",
            target=dg.AssetSelection.groups("report").without_checks(),
            description="Draws the report once as soon as it can be, then at night if need be.",
            minimum_interval_seconds=4 * settings.tick_seconds,
            default_status=dg.DefaultSensorStatus.RUNNING,
        ),
    ]


def contiguous_batches(
    chosen: Iterable[str], order: Sequence[str], *, size: int
) -> list[list[str]]:
    """Split slides into batches that are ranges of partitions.

    Args:
        chosen: Partition keys.
        order: All partition keys in Dagster's order.
        size: Largest length of a batch.

    Returns:
        The chosen keys, each once, neighbours in `order` together.

    Example:
        >>> contiguous_batches("abde", "abcde", size=3)
        [['a', 'b'], ['d', 'e']]
    """
    wanted = set(chosen)
    batches: list[list[str]] = [[]]
    for key in order:
        if key not in wanted or len(batches[-1]) == size:
            batches.append([])
        if key in wanted:
            batches[-1].append(key)
    return [batch for batch in batches if batch]


def _owed(
    seen: dict[str, _Seen], cursor: str | None, *, now: float, settle_seconds: float
) -> dict[str, _Owed]:
    """Slides to describe, with what the cursor tells of them."""
    before = json.loads(cursor) if cursor else {}
    owed = {}
    for slide_id, file in seen.items():
        sign = fingerprint(file)[:12]
        last_sign, requests, not_before = before.get(slide_id, ["", 0, 0])
        if last_sign != sign:
            owed[slide_id] = _Owed(sign, settled=False)
            continue
        # A time in the future is that of another clock and tells nothing.
        settled = not 0 <= now - file[2] / 1e9 < settle_seconds
        owed[slide_id] = _Owed(sign, settled, requests, not_before)
    return owed


def _tiles_owed(store: Store, *, but: Collection[str]) -> dict[str, _Seen]:
    """Slides that only have tiles, which another program made; their number stands for a size."""
    return {
        slide_id: ("", _tiles_there(store, slide_id), 0)
        for slide_id in slide_ids_with_tiles(store, but=but)
        if "slides" not in store.slide(slide_id).failures()
    }


def _tiles_there(store: Store, slide_id: str) -> int:
    """How many tiles another program has written so far; none of a slide that can't be read."""
    try:
        source = tile_source(store, slide_id)
    except HistoEncoderError:  # the asset will tell
        return 0
    return 0 if source is None else source.keys.num_rows


def _files_owed(platform: Platform, sheet: Sheet, recorded: Collection[str]) -> dict[str, _Seen]:
    """Slides that were never tried as they are now, or whose success is not recorded."""
    owed = {}
    for slide_id, found in platform.register_slides().items():
        try:
            size, mtime_ns = signature(found.path)
        except FileNotFoundError:  # taken away in between
            continue
        folder, row = platform.store.slide(slide_id), sheet.row(slide_id, relative=found.relative)
        tried = was_tried(folder, found.path, (size, mtime_ns), row)
        if not tried or not (slide_id in recorded or "slides" in folder.failures()):
            owed[slide_id] = (str(found.path), size, mtime_ns)
    return owed


def _said(store: Store, slide_id: str, said: Annotations) -> str | None:
    """What labels would be made from, as far as can be told cheaply; None if there are no tiles."""
    tiles = store.slide(slide_id).stamp("tiles")
    if tiles is None and tile_source(store, slide_id) is None:
        return None
    made_from = [said.signature(slide_id), None if tiles is None else tiles.fingerprint]
    return fingerprint(made_from)[:16]


def _partitions_under_way(
    instance: dg.DagsterInstance, job_name: str, order: Sequence[str]
) -> set[str]:
    """Partitions that runs of a job, queued or started, are going to make."""
    found: set[str] = set()
    for run in instance.get_runs(RunsFilter(job_name=job_name, statuses=_UNFINISHED)):
        first = run.tags.get(RANGE_START) or run.tags.get(PARTITION)
        last = run.tags.get(RANGE_END) or run.tags.get(PARTITION)
        if first in order and last in order:
            found.update(order[order.index(first) : order.index(last) + 1])
    return found


def _request(batch: list[str]) -> dg.RunRequest:
    """Ask for a range of partitions.

    There is no run key: Dagster silently drops a request whose key was ever used, also if that run
    was killed.
    """
    return dg.RunRequest(tags={RANGE_START: batch[0], RANGE_END: batch[-1]})
