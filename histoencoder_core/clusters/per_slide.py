"""Clustering one slide by itself: ``slide_clusters.parquet`` and its picture.

Clusters of different slides have nothing to do with each other. No cohort model is needed.
"""

from __future__ import annotations

import time

from histoencoder_core.clusters.assign import draw_clusters, picture_k, with_clusters
from histoencoder_core.clusters.inputs import FeatureFile, feature_file
from histoencoder_core.clusters.model import ALGORITHM as FIT_ALGORITHM
from histoencoder_core.errors import ClusterError
from histoencoder_core.settings import ClusterSettings
from histoencoder_core.store import SlideFolder, Stamp, layout
from histoencoder_core.store.tables import read_features

ALGORITHM = 1


def slide_clusters_stamp(features: FeatureFile, settings: ClusterSettings) -> Stamp:
    """The stamp that a slide's own clusters carry if they are made with these settings."""
    return Stamp.of(
        "slide_clusters",
        algorithm=ALGORITHM,
        made_from={
            "features": features.fingerprint,
            "settings": settings.model_dump(mode="json", exclude_defaults=True),
            "fit": FIT_ALGORITHM,
        },
        untrained=features.untrained,
    ).with_result(encoder=features.encoder)


def cluster_slide(
    folder: SlideFolder,
    settings: ClusterSettings,
    *,
    memory_gb: float = 2.0,
    device: str = "cpu",
    overwrite: bool = False,
) -> Stamp:
    """Cluster the tiles of one slide alone, unless that is done already.

    Args:
        folder: The slide's folder, with features.
        settings: How to cluster. A K with fewer tiles than clusters is left out with a warning.
        memory_gb: See `fit_clusters`.
        device: See `fit_clusters`.
        overwrite: Do it again even if it is done.

    Returns:
        The stamp of ``slide_clusters.parquet``.

    Raises:
        ClusterError: The slide has no features, or fewer tiles than the smallest K.
        SettingsError: There is no such device.
        StoreError: Another program's files stand in the way.
    """
    from histoencoder_core.clusters.fit import fit_clusters  # torch takes seconds to import

    with folder.locked():
        file = feature_file(folder)
        if file is None:
            raise ClusterError(f"{folder.path}: has no features; run `histoencoder extract` first.")
        stamp = slide_clusters_stamp(file, settings)
        if not overwrite and folder.fetch("slide_clusters", stamp.fingerprint):
            folder.clear_failure("slide_clusters")
            return folder.stamp("slide_clusters") or stamp
        try:
            started = time.perf_counter()
            model = fit_clusters([file], settings, memory_gb=memory_gb, device=device)
            keys, features = read_features(file.path)
            assigned = model.assign(features)
            shown = picture_k(assigned)
            stamp = stamp.with_result(
                tiles=keys.num_rows,
                n_clusters=sorted(assigned),
                picture_k=shown,
                inertia={str(k): value for k, value in model.inertia.items()},
                seconds=round(time.perf_counter() - started, 3),
            )
            with folder.writing("slide_clusters") as writer:
                picture = draw_clusters(folder, keys, assigned[shown][0], untrained=stamp.untrained)
                if picture is not None:
                    writer.image(layout.THUMBNAIL_SLIDE_CLUSTERS, picture, stamp)
                writer.table(with_clusters(keys, assigned), stamp)
        except Exception as error:
            folder.record_failure("slide_clusters", error, inputs=stamp.fingerprint)
            raise
        return stamp.just_made()
