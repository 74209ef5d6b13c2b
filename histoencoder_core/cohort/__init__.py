"""Cohort: what all slides together tell.

Flow: `arrived` tells of files that are no slides yet or not any more, `changes` which slides' files
have changed, `completeness` which stage of a slide is
done, failed or stale, and `reading` what it holds. `catalog` gathers that of all slides into one
DuckDB file, whose tables and macros are the SQL files of this package. `published` says what that
file was made from, and so `states` opens only slides that have changed since. `statistics` computes
what SQL alone can't, and `query` answers SQL over the catalog, read-only. `verdicts` keeps what
checks found in a slide until its files change.
"""

from histoencoder_core.cohort.catalog import CatalogSummary, build_catalog, publish_catalog
from histoencoder_core.cohort.completeness import NOT_DONE, StageState, count_states
from histoencoder_core.cohort.query import run_sql
from histoencoder_core.cohort.states import slide_states
from histoencoder_core.cohort.statistics import ensure_statistics
from histoencoder_core.cohort.verdicts import judge_slides

__all__ = [
    "NOT_DONE",
    "CatalogSummary",
    "StageState",
    "build_catalog",
    "count_states",
    "ensure_statistics",
    "judge_slides",
    "publish_catalog",
    "run_sql",
    "slide_states",
]
