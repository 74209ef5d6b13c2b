"""Labels: what people say of a slide's tiles.

Flow: `annotations` finds what there is for a slide (a GeoJSON of polygons, rows of a CSV, labels of
``tiles.csv``), `assign` turns it into one label a tile and writes ``labels.parquet``.
"""

from histoencoder_core.labels.annotations import Annotation, find_annotation, find_annotations
from histoencoder_core.labels.assign import label_slide, labels_stamp

__all__ = ["Annotation", "find_annotation", "find_annotations", "label_slide", "labels_stamp"]
