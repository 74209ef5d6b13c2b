"""One partition a slide."""

import dagster as dg

SLIDES = "slides"
"""Dagster's name for the set of partitions."""

slide_partitions = dg.DynamicPartitionsDefinition(name=SLIDES)

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"
PARTITION = "dagster/partition"
"""Dagster's names for the tags that say which partitions a run is of."""
