"""One tick of each sensor, and one evaluation of each automation sensor, as the daemon does it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

import dagster as dg
from cohort_home import tiny_slide
from dagster._core.definitions.automation_tick_evaluation_context import (
    AutomationTickEvaluationContext,
)
from dagster._core.instance.types import CachingDynamicPartitionsLoader
from dagster._daemon.asset_daemon import (
    asset_daemon_cursor_from_instigator_serialized_cursor as read_cursor,
)
from dagster._daemon.asset_daemon import (
    asset_daemon_cursor_to_instigator_serialized_cursor as written_cursor,
)

from histoencoder_core.settings import PlatformSettings
from histoencoder_dagster.definitions import platform_definitions
from histoencoder_dagster.partitions import SLIDES
from histoencoder_dagster.sensors.batches import LOOKING_SECONDS

Line = dict[str, Any]

SENSORS = (
    "new_slides", "next_stages", "new_annotations", "first_cluster_model", "edited_cluster_labels",
    "new_troubles",
)  # fmt: skip
AUTOMATION = ("cohort_follows_slides", "report_follows_cohort")

WARMING = 20
"""Most ticks until a sensor that reads what it has time for has read all."""


class Ticking:
    """A deployment whose sensors are evaluated one by one; cursors are kept."""

    def __init__(self, instance: dg.DagsterInstance, settings: PlatformSettings) -> None:
        self.instance = instance
        self.settings = settings
        self.defs = platform_definitions(settings)
        self.cursors: dict[str, str | None] = {}

    def sensor(self, name: str, when: str) -> tuple[dg.SensorResult | dg.SkipReason, Line]:
        """One tick."""
        started = time.perf_counter(), time.process_time()
        with dg.build_sensor_context(
            instance=self.instance,
            cursor=self.cursors.get(name),
            resources={"platform": self.defs.resources["platform"]},
        ) as context:
            result = self.defs.resolve_sensor_def(name)(context)
            told = result.cursor if isinstance(result, dg.SensorResult) else None
            self.cursors[name] = told or context.cursor
        requests = len(result.run_requests or []) if isinstance(result, dg.SensorResult) else 0
        return result, self._line(name, when, started, requests)

    def warmed(self, name: str) -> Iterator[Line]:
        """Tick until all slides' folders were read, of which each tick reads what it has time for.

        Yields:
            The slowest of these ticks, with their number.
        """
        lines: list[Line] = []
        while len(lines) < 2 or (lines[-1]["wall"] > LOOKING_SECONDS and len(lines) < WARMING):
            lines.append(self.sensor(name, "slowest after a start")[1])
        yield {**max(lines, key=lambda line: line["wall"]), "ticks": len(lines)}

    def automation(self, name: str, when: str) -> Line:
        """One evaluation, with its cursor read and written."""
        graph = self.defs.resolve_asset_graph()
        selection = self.defs.resolve_sensor_def(name).asset_selection
        started = time.perf_counter(), time.process_time()
        with dg.partition_loading_context(
            dynamic_partitions_store=CachingDynamicPartitionsLoader(self.instance)
        ):
            cursor = read_cursor(self.cursors.get(name), graph)
            evaluation = AutomationTickEvaluationContext(
                evaluation_id=cursor.evaluation_id + 1,
                asset_graph=graph,
                asset_selection=selection,
                instance=self.instance,
                cursor=cursor,
                materialize_run_tags={},
                observe_run_tags={},
                emit_backfills=True,
                auto_observe_asset_keys=set(),
                logger=logging.getLogger("benchmark"),
            )
            requests, cursor, _ = asyncio.run(evaluation.async_evaluate())
            self.cursors[name] = written_cursor(cursor)
        return self._line(name, when, started, len(requests))

    def _line(self, name: str, when: str, started: tuple[float, float], requests: int) -> Line:
        return {
            "measure": f"tick of {name}, {when}",
            "unit": "s",
            "wall": round(time.perf_counter() - started[0], 3),
            "cpu": round(time.process_time() - started[1], 3),
            "requests": requests,
            "cursor_bytes": len(self.cursors[name] or ""),
        }


def ticks(
    instance: dg.DagsterInstance, settings: PlatformSettings, new: list[str]
) -> Iterator[Line]:
    """Tick with nothing new, twice, then with new slides.

    Args:
        instance: With all slides done.
        settings: The deployment's.
        new: Names of slides that come, and are taken away in the end.
    """
    ticking = Ticking(instance, settings)
    for name in SENSORS:
        yield ticking.sensor(name, "first")[1]
    yield from ticking.warmed("new_slides")
    yield from ticking.warmed("new_annotations")
    for name in SENSORS:
        yield ticking.sensor(name, "nothing new")[1]
    for when in ("first", "second", "nothing new"):
        for name in AUTOMATION:
            yield ticking.automation(name, when)
    [folder] = settings.slides
    files = [folder / f"{name}.tiff" for name in new]
    try:
        for seed, path in enumerate(files):
            tiny_slide(path, seed=seed)
        yield ticking.sensor("new_slides", f"{len(new)} new")[1]
        result, line = ticking.sensor("new_slides", f"{len(new)} settled")
        yield line
        assert isinstance(result, dg.SensorResult)
        for request in result.dynamic_partitions_requests or []:
            instance.add_dynamic_partitions(SLIDES, list(request.partition_keys))
        for name in new:
            instance.report_runless_asset_event(dg.AssetMaterialization("slides", partition=name))
        for when in (f"{len(new)} described", "after that"):
            yield ticking.sensor("next_stages", when)[1]
            yield ticking.automation("cohort_follows_slides", when)
    finally:
        for path in files:
            path.unlink(missing_ok=True)
        for name in new:
            instance.delete_dynamic_partition(SLIDES, name)
