"""Slides: opened, described, and shown."""

from pathlib import Path

import dagster as dg

from histoencoder_core.errors import SlideError
from histoencoder_core.slides import FoundSlide, Register, describe_slide, read_description
from histoencoder_core.store import layout
from histoencoder_core.tiles import tile_source
from histoencoder_dagster.batches import Metadata, each_slide
from histoencoder_dagster.metadata import result_metadata
from histoencoder_dagster.partitions import slide_partitions
from histoencoder_dagster.resources import Platform


@dg.asset(partitions_def=slide_partitions, group_name="slide", kinds={"openslide"})
def slides(context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]) -> None:
    """A scanned slide: where it is, how large, how fine, and a thumbnail.

    Of the file's own properties only resolution, size, vendor and magnification are kept.
    """
    store = platform.store
    sheet = platform.sheet()
    entries = Register(store).entries()

    def describe(slide_id: str) -> Metadata:
        folder = store.slide(slide_id)
        entry = entries.get(slide_id)
        if entry is None:
            source = tile_source(store, slide_id)
            if source is None:
                raise SlideError(
                    f"{slide_id}: is no registered slide, and there are no tiles of it in "
                    f"{folder.path}. Is its file still in {platform.settings.slides}?",
                    kind="missing",
                )
            return {"source": "tiles made by another program", "tiles": source.keys.num_rows}
        found = FoundSlide(Path(entry.path), entry.relative)
        row = sheet.row(slide_id, relative=entry.relative)
        stamp = describe_slide(folder, found, row)
        slide = read_description(folder)
        assert slide is not None
        return {
            "file": slide.relative_path,
            "width": slide.width,
            "height": slide.height,
            "levels": len(slide.levels),
            **({"mpp_problem": slide.mpp_problem} if slide.mpp_x is None else {"mpp": slide.mpp_x}),
            **result_metadata(folder, stamp, layout.THUMBNAIL),
        }

    each_slide(context, describe)
