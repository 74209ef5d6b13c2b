"""Labels: what people say of the slide's tiles."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from histoencoder_core.errors import LabelError
from histoencoder_core.labels import Annotations, label_annotated
from histoencoder_core.store import SlideFolder, layout
from histoencoder_core.tiles import tile_source
from histoencoder_dagster.assets.tiles import tiles
from histoencoder_dagster.batches import Metadata, each_slide
from histoencoder_dagster.metadata import result_metadata
from histoencoder_dagster.partitions import slide_partitions
from histoencoder_dagster.resources import Platform


@dg.asset(partitions_def=slide_partitions, deps=[tiles], group_name="slide", kinds={"geojson"})
def labels(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.MaterializeResult[None]]:
    """A label for each annotated tile. Only slides with annotations have this.

    It is requested by the sensor `new_annotations`, not by new tiles: most slides have no
    annotation, and theirs is not missing. If an annotation is taken away, so are its labels.
    """
    store, settings = platform.store, platform.settings
    said = Annotations(store, settings.annotations_folder, context.partition_keys)
    for fault in said.faults:
        context.log.warning(fault)

    def label(slide_id: str) -> Metadata:
        folder = store.slide(slide_id)
        source = tile_source(store, slide_id)
        if source is None:
            raise LabelError(f"{slide_id}: has no tiles, so there is nothing to label.")
        stamp = label_annotated(folder, source, said, settings.labels)
        if stamp is None:
            return _withdraw(folder, settings.annotations_folder)
        counts = {name: dg.MetadataValue.json(stamp.result[name]) for name in ("labels", "by")}
        return {**result_metadata(folder, stamp, layout.THUMBNAIL_LABELS), **counts}

    yield from each_slide(context, label)


def _withdraw(folder: SlideFolder, annotations: Path) -> Metadata:
    """Take labels away, or their failure, whose annotation was taken away."""
    if not annotations.is_dir() or not (folder.stamp("labels") or "labels" in folder.failures()):
        raise LabelError(f"{folder.slide_id}: has no annotation, so there is nothing to label.")
    with folder.locked():
        folder.withdraw("labels")
    return {"labelled": 0, "withdrawn": "the annotation was taken away"}
