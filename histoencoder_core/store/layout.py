"""Names of files and folders, and which stage owns them."""

from __future__ import annotations

import re
from typing import Literal

Stage = Literal[
    "slides", "tiles", "features", "clusters", "slide_clusters", "labels", "annotations"
]

STAGES: tuple[Stage, ...] = (
    "slides", "tiles", "features", "clusters", "slide_clusters", "labels", "annotations",
)  # fmt: skip

PROPERTIES = "properties.json"
METADATA = "metadata.parquet"
FEATURES = "features.parquet"
CLUSTERS = "clusters.parquet"
SLIDE_CLUSTERS = "slide_clusters.parquet"
LABELS = "labels.parquet"
ANNOTATIONS = "annotations.parquet"
ANNOTATIONS_GEOJSON = "annotations.geojson"
THUMBNAIL = "thumbnail.jpeg"
THUMBNAIL_TISSUE = "thumbnail_tissue.jpeg"
THUMBNAIL_TILES = "thumbnail_tiles.jpeg"
THUMBNAIL_CLUSTERS = "thumbnail_clusters.jpeg"
THUMBNAIL_SLIDE_CLUSTERS = "thumbnail_slide_clusters.jpeg"
THUMBNAIL_LABELS = "thumbnail_labels.jpeg"
THUMBNAIL_ANNOTATIONS = "thumbnail_annotations.jpeg"
TILES = "tiles"
VERSIONS = "versions"
FAILURES = "failures.json"
DUPLICATE = "duplicate.json"
LOCK = ".lock"
TILES_CSV = "tiles.csv"

COHORT = "_cohort"
REGISTER = "register.json"
SCHEMA = "store.json"

RECORD: dict[Stage, str] = {
    "slides": PROPERTIES,
    "tiles": METADATA,
    "features": FEATURES,
    "clusters": CLUSTERS,
    "slide_clusters": SLIDE_CLUSTERS,
    "labels": LABELS,
    "annotations": ANNOTATIONS,
}
"""The file of a stage that carries its fingerprint and is put in place last."""

COMPANIONS: dict[Stage, tuple[str, ...]] = {
    "slides": (THUMBNAIL,),
    "tiles": (THUMBNAIL_TISSUE, THUMBNAIL_TILES, TILES),
    "features": (),
    "clusters": (THUMBNAIL_CLUSTERS,),
    "slide_clusters": (THUMBNAIL_SLIDE_CLUSTERS,),
    "labels": (THUMBNAIL_LABELS,),
    "annotations": (THUMBNAIL_ANNOTATIONS, ANNOTATIONS_GEOJSON),
}
"""What else a stage owns."""

FEATURES_ALGORITHM = 2
"""Version of the features stage's algorithm; here because its own package takes long to import."""

SLIDE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def is_slide_id(name: str) -> bool:
    """Whether a name may be a slide's id, and so a folder's and a partition's name.

    Example:
        >>> is_slide_id("CMU-1"), is_slide_id("_cohort"), is_slide_id("a..b")
        (True, False, False)
    """
    return SLIDE_ID.fullmatch(name) is not None and ".." not in name
