"""Labels: what people say of a slide's tiles.

Flow: `annotations` finds what there is for a slide (`geojson` reads outlines, `masks` images of
classes, `tables` CSV), `coverage` measures how much of each tile's tissue a class covers, `assign`
turns all of it into one label a tile and writes ``labels.parquet``.
"""

from histoencoder_core.labels.annotations import Annotation, Annotations
from histoencoder_core.labels.assign import (
    label_annotated,
    label_slide,
    labels_stamp,
    why_due,
)

__all__ = [
    "Annotation",
    "Annotations",
    "label_annotated",
    "label_slide",
    "labels_stamp",
    "why_due",
]
