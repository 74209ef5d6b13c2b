"""Judging every slide, without opening again what has not changed since it was judged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from histoencoder_core.cohort.changes import Scan
from histoencoder_core.errors import HistoEncoderError
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.store import SlideFolder, Store, files

log = logging.getLogger(__name__)

Judge = Callable[[SlideFolder], str | None]
"""Says what is wrong with a slide: nothing if ``""``; None if there is nothing to judge yet."""


def judge_slides(store: Store, name: str, judge: Judge, *, rules: int) -> dict[str, str | None]:
    """Judge every slide of a store.

    Verdicts are kept in ``_cohort/checks/<name>.json``, which can be deleted. One stands until a
    record of its slide is put in place anew. Tiles of other programs may change without that: such
    a slide is judged each time.

    Args:
        store: The store.
        name: What is judged.
        judge: Judges a slide. One whose files can't be read is at fault, for that reason.
        rules: To be raised when `judge` judges otherwise.

    Returns:
        The verdicts by slide, sorted.
    """
    path = store.checks / f"{name}.json"
    before = _kept(path).get(str(rules), {})
    verdicts: dict[str, str | None] = {}
    keep = {}
    for slide_id, records in Scan(store).records().items():
        sign = fingerprint(records)[:16]
        kept_sign, verdict = before.get(slide_id, ("", None))
        if kept_sign != sign:
            folder = store.slide(slide_id)
            try:
                verdict = judge(folder)
                own_tiles = folder.stamp("tiles") is not None
            except (HistoEncoderError, pa.ArrowException, OSError) as error:
                verdict, own_tiles = str(error), False
            if not own_tiles:
                sign = ""
        verdicts[slide_id] = verdict
        if sign:
            keep[slide_id] = [sign, verdict]
    if keep != before:
        with files.locked_to_write(path):
            files.write_json(path, {str(rules): keep}, indent=None)
    return verdicts


def _kept(path: Path) -> dict[str, Any]:
    try:
        return dict(files.read_json(path))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        log.warning("%s: is damaged; all slides are judged again.", path)
        return {}
