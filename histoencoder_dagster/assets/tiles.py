"""Tiles: where there is tissue, and how good they are."""

from collections.abc import Iterator

import dagster as dg

from histoencoder_core.slides import read_description
from histoencoder_core.store import layout
from histoencoder_core.tiles import cut_tiles, tile_source
from histoencoder_dagster.assets.slides import slides
from histoencoder_dagster.batches import Metadata, each_slide
from histoencoder_dagster.metadata import result_metadata
from histoencoder_dagster.partitions import slide_partitions
from histoencoder_dagster.resources import Platform


@dg.asset(
    partitions_def=slide_partitions,
    deps=[slides],
    group_name="slide",
    kinds={"parquet"},
)
def tiles(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.MaterializeResult[None]]:
    """The slide's tiles with tissue: place, resolution, shares of background and ink, quality."""
    store = platform.store

    def cut(slide_id: str) -> Metadata:
        folder = store.slide(slide_id)
        if read_description(folder) is None:
            source = tile_source(store, slide_id)
            if source is not None:
                return {"source": "made by another program", "tiles": source.keys.num_rows}
        stamp = cut_tiles(folder, platform.settings.tiling)
        pictures = (layout.THUMBNAIL_TILES, layout.THUMBNAIL_TISSUE)
        return result_metadata(folder, stamp, *pictures)

    yield from each_slide(context, cut)
