"""Doing one thing slide by slide, and telling how it went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import typer
from tqdm import tqdm

from histoencoder_core.errors import HistoEncoderError
from histoencoder_core.store import Stamp

Bar = Callable[[int], None]


def each_slide(
    verb: str, slides: Iterable[str], work: Callable[[str], Stamp | str], *, describe: str = "tiles"
) -> Counter[str]:
    """Do some work on every slide; one that fails does not stop the others.

    Args:
        verb: What is being done, for the progress bar.
        slides: Ids of the slides.
        work: Does it, and gives the stamp of the result; or says why there is none to be made.
        describe: The number in the stamp's result that is worth telling.

    Returns:
        How many were ``made``, ``up to date``, ``left out`` and ``failed``.
    """
    counts: Counter[str] = Counter()
    listed = list(slides)
    # `disable=None` shows no bar where there is no terminal.
    for slide_id in tqdm(listed, desc=verb, unit="slide", disable=None):
        try:
            stamp = work(slide_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other slides go on
            counts["failed"] += 1
            known = isinstance(error, HistoEncoderError)
            told = str(error) if known else f"{type(error).__name__}: {error}"
            _say(f"{slide_id}: {told}", fg="red", err=True)
            continue
        if isinstance(stamp, str):
            counts["left out"] += 1
            _say(f"{slide_id}: {stamp}")
            continue
        counts["made" if stamp.made_now else "up to date"] += 1
        if stamp.made_now:
            reason = stamp.result.get("reason") or stamp.result.get("note")
            note = f" ({reason})" if reason else ""
            _say(f"{slide_id}: {stamp.result.get(describe, 0)} {describe}{note}")
    ends = ("made", "up to date", "left out", "failed")
    summary = ", ".join(f"{counts[k]} {k}" for k in ends if counts[k])
    _say(f"{verb}: {len(listed)} slides: {summary or 'nothing to do'}.")
    return counts


def finish(*counts: Counter[str]) -> None:
    """End the program with exit code 1 if anything failed."""
    if any(count["failed"] for count in counts):
        raise typer.Exit(1)


def _say(text: str, *, fg: str | None = None, err: bool = False) -> None:
    with tqdm.external_write_mode():
        typer.secho(text, fg=fg, err=err)
