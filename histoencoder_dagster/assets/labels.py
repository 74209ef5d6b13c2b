"""Labels: what people say of the slide's tiles."""

import dagster as dg

from histoencoder_core.errors import LabelError
from histoencoder_core.labels import find_annotation, label_slide
from histoencoder_core.tiles import tile_source
from histoencoder_dagster.assets.tiles import tiles
from histoencoder_dagster.batches import Metadata, each_slide
from histoencoder_dagster.metadata import result_metadata
from histoencoder_dagster.partitions import slide_partitions
from histoencoder_dagster.resources import Platform


@dg.asset(partitions_def=slide_partitions, deps=[tiles], group_name="slide", kinds={"geojson"})
def labels(context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]) -> None:
    """A label for each annotated tile. Only slides with annotations have this.

    It is requested by the sensor `new_annotations`, not by new tiles: most slides have no
    annotation, and theirs is not missing.
    """
    store = platform.store

    def label(slide_id: str) -> Metadata:
        folder = store.slide(slide_id)
        annotation = find_annotation(store, platform.settings.annotations_folder, slide_id)
        source = tile_source(store, slide_id)
        if annotation is None or source is None:
            lacks = "annotation" if annotation is None else "tiles"
            raise LabelError(f"{slide_id}: has no {lacks}, so there is nothing to label.")
        stamp = label_slide(folder, source, annotation)
        counts = dg.MetadataValue.json(stamp.result["labels"])
        return {**result_metadata(folder, stamp), "labels": counts}

    each_slide(context, label)
