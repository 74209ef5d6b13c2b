"""Slides to try the platform on: a synthetic cohort with labels, and one small public slide."""

from __future__ import annotations

from histoencoder_core.demo.cmu import fetch_cmu_small_region
from histoencoder_core.demo.synthetic import CLASSES, make_synthetic_cohort

__all__ = ["CLASSES", "fetch_cmu_small_region", "make_synthetic_cohort"]
