"""One partition a slide, and the runs that are of it."""

import dagster as dg
from dagster import DagsterRunStatus

SLIDES = "slides"
"""Dagster's name for the set of partitions."""

slide_partitions = dg.DynamicPartitionsDefinition(name=SLIDES)

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"
PARTITION = "dagster/partition"
"""Dagster's names for the tags that say which partitions a run is of."""

UNFINISHED = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
"""States of runs that are still going to make partitions."""
