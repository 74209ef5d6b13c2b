"""Annotating one slide by the meaning of its tiles' clusters: ``annotations.parquet``, GeoJSON."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from histoencoder_core.annotate.polygons import Boxes, as_geojson, merge, own_parts
from histoencoder_core.clusters.naming import ClusterLabels, annotations_stamp
from histoencoder_core.colours import label_colours
from histoencoder_core.errors import ClusterError
from histoencoder_core.overlay import draw_tiles
from histoencoder_core.slides import Description, read_description
from histoencoder_core.store import SlideFolder, Stamp, layout
from histoencoder_core.store.tables import KEY_COLUMNS, cluster_column, key_table, read_table

UNTRAINED = "UNTRAINED ENCODER"


def annotate_slide(folder: SlideFolder, labels: ClusterLabels) -> Stamp:
    """Annotate a slide's tiles with the labels of their clusters, unless that is done already.

    The stamp's result tells ``coverage``, the share of the slide's tiles that got a label, and, if
    the slide is labelled, ``agreement``, the share of tiles with both an annotation and a label in
    which the two agree. Agreement is no measure of accuracy: the slide's own labels may have named
    the clusters. `evaluation` measures that.

    Args:
        folder: The slide's folder, with clusters.
        labels: What the clusters of the current model mean.

    Returns:
        The stamp of ``annotations.parquet``.

    Raises:
        ClusterError: The slide's clusters are missing, another program's, or of another model.
        StoreError: Another program's files stand in the way.
    """
    with folder.locked():
        clusters = folder.stamp("clusters")
        if clusters is None:
            raise ClusterError(
                f"{folder.record('clusters')}: is missing or another program's, whose clusters are "
                "of a model that is not known. Run `histoencoder cluster` first."
            )
        stamp = annotations_stamp(clusters, labels)
        if folder.fetch("annotations", stamp.fingerprint):
            folder.clear_failure("annotations")
            return folder.stamp("annotations") or stamp
        try:
            if clusters.made_from["model"] != labels.model:
                raise ClusterError(
                    f"{folder.record('clusters')}: is of cluster model "
                    f"{clusters.made_from['model']}, but the labels are of {labels.model}. Run "
                    "`histoencoder cluster` to assign it anew."
                )
            return _annotate(folder, labels, stamp)
        except Exception as error:
            folder.record_failure("annotations", error, inputs=stamp.fingerprint)
            raise


def _annotate(folder: SlideFolder, labels: ClusterLabels, stamp: Stamp) -> Stamp:
    started = time.perf_counter()
    column = cluster_column(labels.k)
    table = read_table(folder.record("clusters"), [*KEY_COLUMNS, column])
    clusters = table.column(column).cast(pa.int32())
    names = pa.array([labels.labels[c] for c in range(labels.k)], pa.string())
    purities = pa.array([labels.purity.get(c) for c in range(labels.k)], pa.float32())
    table = table.select(KEY_COLUMNS).append_column("cluster", clusters)
    table = table.append_column("label", pc.take(names, clusters))
    table = table.append_column("purity", pc.take(purities, clusters))
    counts = Counter(label for label in table.column("label").to_pylist() if label is not None)
    annotated = sum(counts.values())
    stamp = stamp.with_result(
        tiles=table.num_rows,
        annotated=annotated,
        coverage=round(annotated / table.num_rows, 4) if table.num_rows else None,
        labels=dict(sorted(counts.items())),
        **_agreement(folder, table),
        seconds=round(time.perf_counter() - started, 3),
    )
    slide = read_description(folder)
    owned = _owned(table, slide)
    # Over all labels there are, so that a class has the same colour on every slide.
    colours = label_colours(labels.names)
    features = [
        _feature(folder, label, colour, owned[label], slide, labels, stamp)
        for label, colour in colours.items()
        if label in owned
    ]
    with folder.writing("annotations") as writer:
        writer.geojson(layout.ANNOTATIONS_GEOJSON, features, stamp)
        picture = _picture(folder, owned, colours, untrained=stamp.untrained)
        if picture is not None:
            writer.image(layout.THUMBNAIL_ANNOTATIONS, picture, stamp)
        writer.table(table, stamp)
    return stamp.just_made()


def _agreement(folder: SlideFolder, table: pa.Table) -> dict[str, Any]:
    """In how many tiles the annotation and the slide's own label agree; empty without labels."""
    if folder.stamp("labels") is None:
        return {}
    said = read_table(folder.record("labels"), ["tile", "label"]).rename_columns(["tile", "said"])
    both = table.select(["tile", "label"]).join(said, "tile", join_type="inner").drop_null()
    agree = pc.sum(pc.equal(both.column("label"), both.column("said"))).as_py() or 0
    share = round(agree / both.num_rows, 4) if both.num_rows else None
    return {"agreement": share, "agreement_tiles": both.num_rows}


def _owned(
    table: pa.Table, slide: Description | None
) -> dict[str, tuple[Boxes, npt.NDArray[np.float32]]]:
    """By label, the parts of the slide that its tiles own, and the purity of their clusters."""
    placed = table.filter(pc.is_valid(table.column("x")))
    columns = [placed.column(name).to_numpy() for name in "xywh"]
    places = np.stack(columns, axis=1).astype(np.int64)
    # Tiles without a label own their part too: nothing is said of it.
    parts = own_parts(places, None if slide is None else (slide.width, slide.height))
    names = np.asarray(placed.column("label").to_pylist(), object)
    purity = placed.column("purity").to_numpy()
    there = (parts[:, 2:] > parts[:, :2]).all(axis=1)
    return {
        label: (parts[there & (names == label)], purity[there & (names == label)])
        for label in sorted({name for name in names[there] if name is not None})
    }


def _picture(
    folder: SlideFolder,
    owned: dict[str, tuple[Boxes, npt.NDArray[np.float32]]],
    colours: dict[str, tuple[int, int, int]],
    *,
    untrained: bool,
) -> npt.NDArray[np.uint8] | None:
    """The slide's thumbnail with what is said of it; None if nothing is."""
    parts = [(label, *part) for label, (parts, _) in owned.items() for part in parts.tolist()]
    places = [(left, top, right - left, bottom - top) for _, left, top, right, bottom in parts]
    return draw_tiles(
        folder,
        key_table([label for label, *_ in parts], places),
        [colours[label] for label, *_ in parts],
        legend={label: colours[label] for label in owned},
        untrained=untrained,
    )


def _feature(
    folder: SlideFolder,
    label: str,
    colour: tuple[int, int, int],
    owned: tuple[Boxes, npt.NDArray[np.float32]],
    slide: Description | None,
    labels: ClusterLabels,
    stamp: Stamp,
) -> dict[str, Any]:
    """All tiles of a label as one GeoJSON Feature, as QuPath writes and reads annotations."""
    parts, purity = owned
    properties: dict[str, Any] = {
        "objectType": "annotation",
        "classification": {"name": label, "color": list(colour)},
        "isLocked": False,
        "measurements": _measurements(parts, purity, slide),
        # QuPath keeps texts only.
        "metadata": {
            "Cluster model": labels.model,
            "Clusters": str(labels.k),
            "Cluster labels": labels.source,
        },
    }
    if stamp.untrained:
        properties["name"] = f"{label} ({UNTRAINED})"
        properties["metadata"]["Encoder"] = UNTRAINED
    # The same annotation has the same id whenever it is made.
    name = f"histoencoder:{folder.slide_id}:{stamp.fingerprint}:{label}"
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
        "geometry": as_geojson(merge(parts)),
        "properties": properties,
    }


def _measurements(
    parts: Boxes, purity: npt.NDArray[np.float32], slide: Description | None
) -> dict[str, float]:
    measured: dict[str, float] = {"Tiles": len(parts)}
    if np.isfinite(purity).any():
        measured["Mean purity of clusters"] = round(float(np.nanmean(purity)), 4)
    if slide is not None and slide.mpp_x is not None and slide.mpp_y is not None:
        area = int((parts[:, 2:] - parts[:, :2]).prod(axis=1).sum())
        measured["Annotated area µm^2"] = round(area * slide.mpp_x * slide.mpp_y, 2)
    return measured
