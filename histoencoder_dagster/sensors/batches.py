"""Which slides to ask for next: in ranges of partitions, a bounded number at a time.

A sensor knows what is owed. Here it is decided what of that is asked for now: not what is under
way, not what has just failed, not more runs than may be in flight. So a sensor that was paused for
a week goes on at the pace of any other day.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import dagster as dg
from dagster import DagsterRunStatus, RunsFilter
from dagster._core.storage.tags import AUTO_RETRY_RUN_ID_TAG, WILL_RETRY_TAG

from histoencoder_core.store.failures import LONGEST_WAIT, due_again, wait_after
from histoencoder_dagster.partitions import PARTITION, RANGE_END, RANGE_START, UNFINISHED

FROM_STAGE = "histoencoder/from"
"""Tag of a run: the stage that it begins with."""

OUTDATED = "outdated"
"""Sign of no slide, whatever it looks like."""

RETRY_SECONDS = 600.0
"""A run that was killed longer ago, and was to be tried again, will not be: nobody did."""

LOOKING_SECONDS = 2.0
"""Time that a tick may read slides' folders in; one that has more to do beside takes half of it.
After a restart it takes several ticks to have read those of a large archive."""


@dataclass(frozen=True)
class Attempt:
    """What was asked for, and has not gone well yet.

    Attributes:
        sign: What the slide looked like then; if it has changed since, nothing was asked for. One
            that begins with a slash is open: how the slide will look is only known once what comes
            before in the same run is made, so the sign is the end of whatever that will be.
            `OUTDATED` is that of no slide.
        requests: How often it was asked for.
        not_before: When it may be asked for again if no word is heard of it.
        failed: When the stage had last failed on it by then, in seconds since 1970; 0 if never.
        record: Number of Dagster's last record of it by then; 0 if there was none.
    """

    sign: str
    requests: int
    not_before: int
    failed: float = 0
    record: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it was asked for together with what it is made from."""
        return self.sign.startswith("/")

    def is_of(self, sign: str) -> bool:
        """Whether this is what was asked for."""
        return sign.endswith(self.sign) if self.is_open else sign == self.sign

    @property
    def length(self) -> int:
        """Number of values up to the last that is none of the defaults."""
        return 5 if self.record else 4 if self.failed else 3


class Attempts:
    """Attempts by slide, kept in a sensor's cursor: only of slides that are owed."""

    def __init__(self, told: Mapping[str, Sequence[Any]]) -> None:
        self._by_slide = {slide_id: Attempt(*values) for slide_id, values in told.items()}

    def of(self, slide_id: str, sign: str) -> Attempt | None:
        """The last attempt at a slide as it is now."""
        attempt = self._by_slide.get(slide_id)
        return attempt if attempt is not None and attempt.is_of(sign) else None

    def is_outdated(self, slide_id: str, sign: str) -> bool:
        """Whether a slide was asked for, and has changed since: what was made may be of before."""
        attempt = self._by_slide.get(slide_id)
        return attempt is not None and not attempt.is_of(sign)

    def is_closed(self, slide_id: str) -> bool:
        """Whether a slide was asked for as it then was: its sign tells if it has changed since."""
        attempt = self._by_slide.get(slide_id)
        return attempt is not None and not attempt.is_open

    def outdate(self, slide_id: str, *, record: int) -> None:
        """What was recorded is known to be of before: the slide is owed until it is asked for."""
        self._by_slide[slide_id] = Attempt(OUTDATED, requests=0, not_before=0, record=record)

    def is_unrecorded(self, slide_id: str, recorded: Mapping[str, int]) -> bool:
        """Whether a slide was asked for as it then was, and nothing was recorded of it since."""
        attempt = self._by_slide.get(slide_id)
        if attempt is None or attempt.is_open:
            return False
        return recorded.get(slide_id, 0) <= attempt.record

    def note(
        self, slide_id: str, sign: str, *, requests: int, now: float, failed: float, record: int
    ) -> None:
        """A slide was asked for, for the first or another time.

        Without a word on it, it is asked for again after five minutes, then 20, and so on.
        """
        not_before = int(now + wait_after(requests))
        self._by_slide[slide_id] = Attempt(sign, requests, not_before, failed, record)

    def close(self, slide_id: str, sign: str) -> None:
        """What was asked for is known now: the slide as it is."""
        self._by_slide[slide_id] = replace(self._by_slide[slide_id], sign=sign)

    def keep(self, slides: Collection[str]) -> None:
        """Forget all other slides: nothing is owed of them."""
        self._by_slide = {s: attempt for s, attempt in self._by_slide.items() if s in slides}

    def told(self) -> dict[str, list[Any]]:
        """What to put into the cursor."""
        # Dagster keeps a cursor with each tick: zeros at the end are left out.
        return {
            slide_id: [it.sign, it.requests, it.not_before, it.failed, it.record][: it.length]
            for slide_id, it in self._by_slide.items()
        }


@dataclass(frozen=True)
class InFlight:
    """Runs of one job that are queued or running, or that Dagster is about to try again.

    Attributes:
        runs: Their number.
        slides: The partitions that they are going to make.
        by_stage: Their number by the stage that they were asked for to begin with.
    """

    runs: int
    slides: frozenset[str]
    by_stage: Mapping[str, int]

    @classmethod
    def of(
        cls, instance: dg.DagsterInstance, job_name: str, order: Sequence[str], *, now: float
    ) -> "InFlight":
        """Look at the runs of a job.

        Args:
            instance: Dagster's.
            job_name: The job.
            order: All partition keys in Dagster's order.
            now: In seconds since 1970.
        """
        runs = [*instance.get_runs(RunsFilter(job_name=job_name, statuses=UNFINISHED))]
        killed = RunsFilter(
            job_name=job_name,
            statuses=[DagsterRunStatus.FAILURE],
            tags={WILL_RETRY_TAG: "true"},
            updated_after=datetime.fromtimestamp(now - RETRY_SECONDS, UTC),
        )
        runs += [r for r in instance.get_runs(killed) if AUTO_RETRY_RUN_ID_TAG not in r.tags]
        place = {key: i for i, key in enumerate(order)} if runs else {}
        found: set[str] = set()
        for run in runs:
            first = place.get(run.tags.get(RANGE_START) or run.tags.get(PARTITION, ""))
            last = place.get(run.tags.get(RANGE_END) or run.tags.get(PARTITION, ""))
            if first is not None and last is not None:
                found.update(order[first : last + 1])
        by_stage = Counter(run.tags[FROM_STAGE] for run in runs if FROM_STAGE in run.tags)
        return cls(len(runs), frozenset(found), by_stage)

    def beginning_with(self, stage: str) -> "InFlight":
        """The same slides, but only the runs that begin with a stage."""
        return replace(self, runs=self.by_stage.get(stage, 0))

    def and_asked(self, batches: Sequence[Sequence[str]]) -> "InFlight":
        """The same, and the slides that have just been asked for."""
        asked = (slide_id for batch in batches for slide_id in batch)
        return replace(self, slides=self.slides.union(asked))


def is_under_way(instance: dg.DagsterInstance, job_name: str) -> bool:
    """Whether a run of a job is queued or running."""
    return instance.get_runs_count(RunsFilter(job_name=job_name, statuses=UNFINISHED)) > 0


def next_batches(
    owed: Mapping[str, str],
    attempts: Attempts,
    *,
    order: Sequence[str],
    recorded: Mapping[str, int],
    in_flight: InFlight,
    failure: Callable[[str], Mapping[str, Any] | None],
    most_runs: int,
    size: int,
    now: float,
    newest_first: bool = False,
) -> list[list[str]]:
    """Choose what to ask for now, and note it.

    Args:
        owed: What each slide that is owed looks like now.
        attempts: What was asked for before; what is asked for now is added.
        order: All partition keys in Dagster's order.
        recorded: Number of Dagster's last record of each slide.
        in_flight: Runs under way.
        failure: How the stage failed on a slide, if it did.
        most_runs: Runs that may be in flight.
        size: Largest length of a batch.
        now: In seconds since 1970.
        newest_first: Begin at the end of `order`.

    Returns:
        Ranges of partitions. A slide that was asked for before and of which nothing was heard is a
        range of its own: it may be what killed its run. One that was asked for with a stage before
        goes with its batch once more, as that stage may have ended the run.
    """
    fresh, alone = [], []
    for slide_id, sign in owed.items():
        if slide_id in in_flight.slides:
            continue
        attempt = attempts.of(slide_id, sign)
        if attempt is None:
            fresh.append(slide_id)
        # A failure of before is none of what was asked for since.
        elif (failed := failure(slide_id)) is not None and time_of(failed) != attempt.failed:
            attempts.close(slide_id, sign)
            if due_again(failed, now):
                fresh.append(slide_id)
        # Its run did not come so far, as another slide failed in a stage before. (If it was killed
        # in this stage, so may be the next; then each goes alone.)
        elif attempt.is_open:
            fresh.append(slide_id)
        # A time farther off than any wait is that of a clock that was set back since.
        elif not now < attempt.not_before <= now + LONGEST_WAIT:
            alone.append(slide_id)
    room = max(0, most_runs - in_flight.runs)
    batches = contiguous_batches(fresh, order, size=size)
    if newest_first:
        batches.reverse()
    # One that may kill its run is not to hold up the others, nor to be put off for ever.
    alone = alone[: room if not batches else min(room, 1)]
    chosen = [[slide_id] for slide_id in alone] + batches[: room - len(alone)]
    for slide_id in (s for batch in chosen for s in batch):
        before = attempts.of(slide_id, owed[slide_id])
        again = before.requests if before is not None and slide_id in alone else 0
        attempts.note(
            slide_id,
            owed[slide_id],
            requests=again + 1,
            now=now,
            failed=time_of(failure(slide_id)),
            record=recorded.get(slide_id, 0),
        )
    return chosen


def time_of(failure: Mapping[str, Any] | None) -> float:
    """When a stage failed, in seconds since 1970; 0 if it did not."""
    return 0.0 if failure is None else float(failure.get("at", 0))


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
    for key in order if wanted else ():
        if key not in wanted or len(batches[-1]) == size:
            batches.append([])
        if key in wanted:
            batches[-1].append(key)
    return [batch for batch in batches if batch]


def request(batch: Sequence[str], *, stages: Sequence[str] | None = None) -> dg.RunRequest:
    """Ask for a range of partitions.

    There is no run key: Dagster silently drops a request whose key was ever used, also if that run
    was killed.

    Args:
        batch: Partition keys.
        stages: Those of the job's assets that are to be made; all if None.
    """
    tags = {RANGE_START: batch[0], RANGE_END: batch[-1]}
    if stages is None:
        return dg.RunRequest(tags=tags)
    return dg.RunRequest(
        tags={**tags, FROM_STAGE: stages[0]},
        asset_selection=[dg.AssetKey(stage) for stage in stages],
        asset_check_keys=[],  # else the checks of what is selected are run, which the job has not
    )


def read_cursor(cursor: str | None) -> dict[str, Any]:
    """What a sensor's cursor holds; nothing if it was lost."""
    content = json.loads(cursor) if cursor else {}
    return content if isinstance(content, dict) else {}
