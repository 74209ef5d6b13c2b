"""Files that are not slides of the store yet, and slides whose file is gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from histoencoder_core.cohort.completeness import StageState
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.slides import FoundSlide
from histoencoder_core.slides.arrivals import read_arrivals
from histoencoder_core.slides.register import Entry
from histoencoder_core.store import Store


@dataclass(frozen=True)
class Arrived:
    """What was last seen in the folders of slides, beside the slides that are there.

    Attributes:
        states: Of files that are not registered: ``waiting``, or ``missing`` if nobody has looked
            at them yet.
        absent: Slides whose file is gone, with when that was first seen. Their results are kept.
        away: Folders of slides that were not there.
        fingerprint: Of all that.
    """

    states: list[StageState]
    absent: dict[str, datetime]
    away: list[str]
    fingerprint: str


def read_arrived(
    store: Store, entries: dict[str, Entry], found: Iterable[FoundSlide] | None = None
) -> Arrived:
    """Read what the platform saw last.

    Args:
        store: The store.
        entries: The register.
        found: The files that are there now; those that the platform saw if not given.
    """
    told = read_arrivals(store)
    registered = {entry.path for entry in entries.values()}
    waiting = {it["path"]: it for it in told["waiting"] if it["path"] not in registered}
    new = {it["path"]: it["relative"] for it in told["new"]}
    if found is not None:
        new = {str(slide.path): slide.relative for slide in found}
    states = [
        StageState(relative, "slides", "missing", "was found but not looked at yet")
        for path, relative in sorted(new.items())
        if path not in registered and path not in waiting
    ]
    states += [_waiting(it) for it in waiting.values() if found is None or it["path"] in new]
    absent = {s: since for s, since in told["absent"].items() if s in entries}
    return Arrived(
        sorted(states, key=lambda state: state.slide),
        {slide_id: datetime.fromtimestamp(since, UTC) for slide_id, since in absent.items()},
        told["away"],
        fingerprint([[state.slide, state.reason] for state in states] + [absent]),
    )


def _waiting(told: dict[str, Any]) -> StageState:
    since = datetime.fromtimestamp(told["since"], UTC).astimezone()
    reason = f"{told['reason']}; first seen {since:%Y-%m-%d %H:%M}"
    return StageState(told["relative"], "slides", "waiting", reason)
