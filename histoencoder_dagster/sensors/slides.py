"""Watching for slides: newly scanned, scanned again, moved, copied, gone.

What is owed is worked out from the files, from the store and from what Dagster recorded, not from a
cursor: Dagster adds partitions before it creates runs, so that a crash between the two must not
lose a slide, and losing the cursor must not compute an archive anew.
"""

import json
import time
from collections.abc import Collection

import dagster as dg
from dagster import DagsterEventType

from histoencoder_core.errors import HistoEncoderError, SettingsError, StoreError
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.slides import Register
from histoencoder_core.slides.arrivals import NEVER_SETTLES, Look, write_arrivals
from histoencoder_core.store import Store
from histoencoder_core.tiles import tile_source
from histoencoder_core.tiles.source import slide_ids_with_tiles
from histoencoder_dagster.assets import slides
from histoencoder_dagster.jobs import describe_slides
from histoencoder_dagster.partitions import SLIDES, slide_partitions
from histoencoder_dagster.resources import Platform
from histoencoder_dagster.sensors.batches import (
    LOOKING_SECONDS,
    Attempts,
    InFlight,
    next_batches,
    read_cursor,
    request,
)


def new_slides(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Turn newly scanned slides into partitions, and describe them in batches.

    A slide is owed until its file of this size and time, with its row of ``slides.csv``, was
    described, and Dagster recorded that, or failed to be. It is asked for once it stood still over
    two ticks and the settle time. If its run was killed it is asked for again later, alone: it may
    be what killed the run. The cursor holds only what was asked for and is still owed.
    """
    settings, instance, store = platform.settings, context.instance, platform.store
    try:
        sheet = platform.sheet()
    except SettingsError as error:  # each slide would fail, and not be asked for again
        return dg.SkipReason(str(error))
    recorded = instance.get_latest_storage_id_by_partition(
        slides.key, DagsterEventType.ASSET_MATERIALIZATION
    )
    if recorded and not store.register_path.exists():
        return dg.SkipReason(
            f"the store {store.root} holds no slide, but {len(recorded)} are on record: is it "
            "mounted? To begin a new one, wipe the asset 'slides' in Dagster."
        )
    now = time.time()
    look = platform.arrivals.look(sheet, seconds=LOOKING_SECONDS)
    write_arrivals(store, look)
    order = instance.get_dynamic_partitions(SLIDES)
    cursor = read_cursor(context.cursor)
    attempts = Attempts(cursor.get("attempts", {}))
    in_flight = InFlight.of(instance, describe_slides.name, order, now=now)
    try:
        tiles = _tiles_there(store, but={*recorded, *look.registered})
    except StoreError as error:  # a faulty tiles.csv is no reason to hold back scanned slides
        context.log.warning(str(error))
        tiles = {}
    # A run that was killed may have described a slide anew and told nobody.
    unrecorded = [
        slide_id
        for slide_id in look.described
        if slide_id not in recorded or attempts.is_unrecorded(slide_id, recorded)
    ]
    owed = {
        **_register(platform, look, room=settings.runs_in_flight - in_flight.runs),
        **dict.fromkeys(unrecorded, "described"),
        **{s: sign for s, sign in tiles.items() if cursor.get("tiles", {}).get(s) == sign},
    }
    known = set(order)
    new = [slide_id for slide_id in owed if slide_id not in known]
    batches = next_batches(
        owed,
        attempts,
        order=[*order, *new],
        recorded=recorded,
        in_flight=in_flight,
        failure=lambda slide_id: store.slide(slide_id).failures().get("slides"),
        most_runs=settings.runs_in_flight,
        size=settings.slides_per_run,
        now=now,
    )
    asked = {slide_id for batch in batches for slide_id in batch}
    attempts.keep({*owed, *in_flight.slides})
    told = json.dumps({"attempts": attempts.told(), "tiles": tiles})
    _warn(context, look, now)
    new = [slide_id for slide_id in new if slide_id in asked]
    aliases = [s for s in look.aliases if s in known and s not in in_flight.slides]
    changes: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
    if new:
        changes.append(slide_partitions.build_add_request(new))
    if aliases:
        changes.append(slide_partitions.build_delete_request(aliases))
    if not batches and not changes:
        context.update_cursor(told)
        return dg.SkipReason(_summary(look, in_flight))
    return dg.SensorResult(
        dynamic_partitions_requests=changes,
        run_requests=[request(batch) for batch in batches],
        cursor=told,
    )


def _register(platform: Platform, look: Look, *, room: int) -> dict[str, str]:
    """Give ids to as many new slides as can be asked for; tell what each ready one looks like."""
    settings = platform.settings
    ready = look.ready[::-1] if settings.newest_first else look.ready
    unknown = [it for it in ready if it.slide is None][: max(0, room) * settings.slides_per_run]
    assigned = Register(platform.store).assign([it.found for it in unknown]) if unknown else {}
    ids = {found.path: slide_id for slide_id, found in assigned.items()}
    chosen = [it for it in ready if it.slide is not None or it.found.path in ids]
    return {
        it.slide or ids[it.found.path]: fingerprint([str(it.found.path), *it.signature])[:12]
        for it in chosen
    }


def _tiles_there(store: Store, *, but: Collection[str]) -> dict[str, str]:
    """Slides that only have tiles, which another program made, with how many it has written."""
    return {
        slide_id: str(_tile_count(store, slide_id))
        for slide_id in slide_ids_with_tiles(store, but=but)
        if "slides" not in store.slide(slide_id).failures()
    }


def _tile_count(store: Store, slide_id: str) -> int:
    """How many tiles there are so far; none of a slide that can't be read."""
    try:
        source = tile_source(store, slide_id)
    except HistoEncoderError:  # the asset will tell
        return 0
    return 0 if source is None else source.keys.num_rows


def _warn(context: dg.SensorEvaluationContext, look: Look, now: float) -> None:
    for away in look.away.values():
        context.log.warning(f"{away}; its slides are kept")
    for it in look.waiting:
        if now - it.since > NEVER_SETTLES:
            hours = (now - it.since) / 3600
            context.log.warning(f"{it.path} has been waiting for {hours:.0f} h: it {it.reason}")


def _summary(look: Look, in_flight: InFlight) -> str:
    """Why nothing is asked for, in one line."""
    told = [
        (len(look.ready), "ready"),
        (len(look.waiting), "waiting until they stand still"),
        (in_flight.runs, "runs in flight"),
        (look.unlooked, "to be looked at"),
        (len(look.absent), "absent"),
    ]
    parts = ["no new slides", *(f"{count} {what}" for count, what in told if count)]
    return "; ".join([*parts, *look.away.values()])
