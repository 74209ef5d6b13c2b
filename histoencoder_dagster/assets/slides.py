"""Slides: opened, described, and shown."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from histoencoder_core.errors import SlideError
from histoencoder_core.slides import FoundSlide, Register, read_description, receive_slide
from histoencoder_core.store import SlideFolder, Stamp, layout
from histoencoder_core.tiles import tile_source
from histoencoder_dagster.batches import Metadata, each_slide, recorder
from histoencoder_dagster.metadata import result_metadata
from histoencoder_dagster.partitions import slide_partitions
from histoencoder_dagster.resources import Platform


# Not required: a file that is found to be another slide's is no slide to record.
@dg.asset(
    partitions_def=slide_partitions,
    group_name="slide",
    kinds={"openslide"},
    output_required=False,
)
def slides(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.MaterializeResult[None]]:
    """A scanned slide: where it is, how large, how fine, and a thumbnail.

    Of the file's own properties only resolution, size, vendor and magnification are kept. A file
    that has the content of another slide is told as its duplicate, and not recorded here. A file
    that was moved or renamed is recorded under the id that it had before.
    """
    store = platform.store
    sheet = platform.sheet()
    entries = Register(store).entries()
    record = recorder(context)

    def receive(slide_id: str) -> Metadata | None:
        entry = entries.get(slide_id)
        if entry is None:
            return _of_other_program(platform, slide_id)
        received = receive_slide(
            store, slide_id, FoundSlide(Path(entry.path), entry.relative), sheet
        )
        if received.stamp is None:
            context.log.warning(
                f"{slide_id} has the content of {received.duplicate_of}: it is not computed again"
            )
            return None
        metadata = _shown(store.slide(received.slide), received.stamp)
        if received.slide == slide_id:
            return metadata
        context.log.info(f"{slide_id} is {received.slide}, whose file was moved or renamed")
        record(received.slide, metadata)
        return None

    yield from each_slide(context, receive)


def _of_other_program(platform: Platform, slide_id: str) -> Metadata:
    source = tile_source(platform.store, slide_id)
    if source is None:
        raise SlideError(
            f"{slide_id}: is no registered slide, and there are no tiles of it in "
            f"{platform.store.slide(slide_id).path}. Is its file still in "
            f"{', '.join(map(str, platform.settings.slides))}?",
            kind="missing",
        )
    return {"source": "tiles made by another program", "tiles": source.keys.num_rows}


def _shown(folder: SlideFolder, stamp: Stamp) -> Metadata:
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
