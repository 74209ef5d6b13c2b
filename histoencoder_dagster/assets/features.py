"""Features: tiles through an encoder, on a GPU where there is one."""

from collections.abc import Iterator
from typing import Any, NoReturn

import dagster as dg

from histoencoder_core.errors import WeightsError
from histoencoder_core.store import SlideFolder
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
    try:
        yield from _extracted(context, platform)
    finally:
        platform.release_encoder()  # other runs wait for the GPU while this one goes on to clusters


def _extracted(
    context: dg.AssetExecutionContext, platform: Platform
) -> Iterator[dg.MaterializeResult[None]]:
    from histoencoder_core.features import extract_slides  # takes seconds; see Platform.runner

    store, readers = platform.store, platform.settings.readers
    try:
        runner = platform.runner
    except WeightsError as error:
        # Each slide remembers it, so that it is told of all of them, and tried again.
        missing = error
        yield from each_slide(context, lambda s: _without_weights(store.slide(s), missing))
        return
    with extract_slides(store, context.partition_keys, runner, readers=readers) as extracted:
        yield from each_slide(
            context, lambda s: result_metadata(store.slide(s), extracted[s].result())
        )


def _without_weights(folder: SlideFolder, error: WeightsError) -> NoReturn:
    with folder.locked():
        folder.record_failure("features", error)
    raise error
