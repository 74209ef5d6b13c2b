"""One partition a slide."""

import dagster as dg

SLIDES = "slides"
"""Dagster's name for the set of partitions."""

slide_partitions = dg.DynamicPartitionsDefinition(name=SLIDES)
