"""Cohort: what all slides together tell.

Flow: `completeness` says which stage of which slide is done, failed or stale, `catalog` gathers
every slide's tables into one DuckDB file, and `query` answers SQL over it, read-only.
"""

from histoencoder_core.cohort.catalog import CatalogSummary, build_catalog
from histoencoder_core.cohort.completeness import StageState, slide_states
from histoencoder_core.cohort.query import run_sql

__all__ = ["CatalogSummary", "StageState", "build_catalog", "run_sql", "slide_states"]
