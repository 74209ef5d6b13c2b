"""Features: tiles through an encoder, on a GPU where there is one."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from histoencoder_dagster.assets.tiles import tiles
from histoencoder_dagster.batches import each_slide
from histoencoder_dagster.metadata import result_metadata
from histoencoder_dagster.partitions import slide_partitions
from histoencoder_dagster.resources import Platform

GPU_TAGS: dict[str, Any] = {
    "dagster-k8s/config": {
        "container_config": {
            "resources": {
                "requests": {"cpu": "4", "memory": "16Gi"},
                "limits": {"nvidia.com/gpu": "1"},
            },
            "volume_mounts": [{"name": "dshm", "mount_path": "/dev/shm"}],  # noqa: S108
        },
        "pod_spec_config": {
            "tolerations": [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
            ],
            "volumes": [{"name": "dshm", "empty_dir": {"medium": "Memory"}}],
        },
    },
    "dagster-celery/queue": "gpu",
    "dagster-ray/config": {"num_gpus": 1, "num_cpus": 4},
}
"""One GPU, in the words of each engine that may run the step."""


@dg.asset(
    partitions_def=slide_partitions,
    deps=[tiles],
    group_name="slide",
    kinds={"pytorch", "parquet"},
    op_tags=GPU_TAGS,
    pool="gpu",
)
def features(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.MaterializeResult[None]]:
    """A feature vector for each tile, by the deployment's encoder."""
    from histoencoder_core.features import extract_slides  # takes seconds; see Platform.runner

    store, readers = platform.store, platform.settings.readers
    with extract_slides(
        store, context.partition_keys, platform.runner, readers=readers
    ) as extracted:
        yield from each_slide(
            context, lambda s: result_metadata(store.slide(s), extracted[s].result())
        )
