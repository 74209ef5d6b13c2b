"""Reading what the catalog holds of one slide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from histoencoder_core.cohort.completeness import StageState
from histoencoder_core.cohort.looking import SlideLook
from histoencoder_core.errors import HistoEncoderError, StoreError
from histoencoder_core.store import layout
from histoencoder_core.store.layout import Stage
from histoencoder_core.store.tables import (
    KEY_COLUMNS,
    TILE_FIELDS,
    cluster_column,
    cluster_columns,
    distance_column,
    normalise_keys,
    read_keys,
    read_table,
)

Read = TypeVar("Read")

_METRICS = (
    "background", "ink", "blank", "blur", "black_pixels", "white_pixels", "laplacian_std",
    "gray_mean", "saturation_mean",
)  # fmt: skip


_WITH_KEYS: tuple[Stage, ...] = ("features", "clusters", "labels")
"""Where tiles are told of if they are nowhere else."""


def tiles_schema(n_clusters: list[int]) -> pa.Schema:
    """The columns of the table ``tiles``: labels and clusters lie beside the tile they are of.

    Args:
        n_clusters: The current model's numbers of clusters.
    """
    return pa.schema(
        [
            pa.field("slide", pa.string()),
            *TILE_FIELDS,
            pa.field("level", pa.int32()),
            pa.field("mpp", pa.float64()),
            *(pa.field(name, pa.float32()) for name in _METRICS),
            pa.field("label", pa.string()),
            pa.field("label_share", pa.float32()),
            *(pa.field(f"k{k}", pa.uint8() if k <= 2**8 else pa.uint16()) for k in n_clusters),
        ]
    )


OTHER_CLUSTERS = pa.schema(
    [
        ("slide", pa.string()),
        ("tile", pa.string()),
        ("k", pa.int32()),
        ("cluster", pa.int32()),
        ("model", pa.string()),
        ("untrained", pa.bool_()),
        ("label", pa.string()),
    ]
)
"""The columns of the table ``other_clusters``."""


@dataclass
class SlideRows:
    """What the catalog holds of one slide.

    Attributes:
        slide: The slide's id.
        states: The state of each of its stages.
        tiles: Its rows of the table ``tiles``.
        other_clusters: Its clusters that are not of the current model.
        properties: Its row of the table ``slides``.
        distance: Its row of the table ``slide_distance``, if its clusters tell.
        clusters: Fingerprint of its clusters, whichever they are.
        counted: Fingerprints of its clusters and labels, if both count.
        annotations: The stamp of its annotation by cluster, as JSON.
        own_tiles: Whether its tiles were cut by this program.
        path: Its slide's file, if it was described.
    """

    slide: str
    states: list[StageState]
    tiles: pa.Table
    other_clusters: pa.Table
    properties: dict[str, object]
    distance: dict[str, object] | None
    clusters: str | None
    counted: str | None
    annotations: str | None
    own_tiles: bool
    path: str | None


def read_slide(look: SlideLook, states: list[StageState], n_clusters: list[int]) -> SlideRows:
    """Read one slide. A damaged file is told as its stage's failure, and the rest is read.

    Args:
        look: The slide's files.
        states: The states of its stages.
        n_clusters: The current model's numbers of clusters.
    """
    told = {state.stage: state for state in states}

    def attempt(stage: Stage, read: Callable[[], Read]) -> Read | None:
        try:
            return read()
        except HistoEncoderError as error:
            # What can't be read may be another stage's file, read in the place of one not there.
            named = [s for s in layout.STAGES if layout.RECORD[s] in str(error)]
            stage, reason, kind = named[0] if named else stage, str(error), error.kind
        except (pa.ArrowException, KeyError, OSError) as error:  # it holds something else
            reason = f"{look.folder.record(stage)}: can't be used ({type(error).__name__}: {error})"
            kind = "store"
        told[stage] = StageState(look.slide_id, stage, "failed", reason, kind)
        return None

    done = {state.stage for state in states if state.state == "done"}
    schema = tiles_schema(n_clusters)
    tiles = attempt("tiles", lambda: _typed(_tiles(look), schema))
    clusters = attempt("clusters", lambda: _clusters(look))
    counting = other = labels = None
    if clusters is not None and "clusters" in done:
        counting = attempt("clusters", lambda: _typed(_counting(clusters, n_clusters), schema))
    elif clusters is not None:
        other = attempt("clusters", lambda: _other_clusters(look, clusters))
    # Labels of other tiles, or of an annotation that is gone, say nothing of these tiles.
    if "labels" in done:
        labels = attempt("labels", lambda: _typed(_labels(look), schema))
    parts = [part for part in (tiles, counting, labels) if part is not None]
    table = _joined(parts, schema, look.slide_id)
    stamps = {stage: look.folder.stamp(stage) for stage in layout.STAGES}
    prints = {stage: stamp.fingerprint for stage, stamp in stamps.items() if stamp is not None}
    annotated = stamps["annotations"]
    both = counting is not None and labels is not None
    return SlideRows(
        slide=look.slide_id,
        states=[told[stage] for stage in layout.STAGES if stage in told],
        tiles=table,
        other_clusters=_with_labels(other, table),
        properties=_properties(look, table if parts else None, clusters),
        distance=None if counting is None else _distance(look, clusters),
        clusters=prints.get("clusters"),
        counted=f"{prints['clusters']} {prints['labels']}" if both else None,
        annotations=None if annotated is None else annotated.model_dump_json(),
        own_tiles=look.folder.stamp("tiles") is not None,
        path=None if look.description is None else look.description.path,
    )


def _tiles(look: SlideLook) -> pa.Table | None:
    """A slide's tiles with what is known of them; None if it has none."""
    if look.folder.stamp("tiles") is not None:
        names = [*KEY_COLUMNS, "level", "mpp_x", *_METRICS]
        table = read_table(look.folder.record("tiles"), names)
        lost = [name for name in (*KEY_COLUMNS, "mpp_x") if name not in table.column_names]
        if lost:
            raise StoreError(
                f"{look.folder.record('tiles')}: lacks {', '.join(lost)}. Remove it, and cut the "
                "slide's tiles again."
            )
        return table.append_column("mpp", table.column("mpp_x"))
    if look.source is not None:
        return look.source.keys
    for stage in _WITH_KEYS:
        if look.folder.record(stage).exists():
            return read_keys(look.folder.record(stage))
    return None


def _clusters(look: SlideLook) -> pa.Table | None:
    path = look.folder.record("clusters")
    return _with_keys(look, "clusters", read_table(path)) if path.exists() else None


def _counting(clusters: pa.Table, n_clusters: list[int]) -> pa.Table:
    """The clusters that count: a column a K beside the keys."""
    columns = {f"k{k}": cluster_column(k) for k in n_clusters}
    table = clusters.select([*KEY_COLUMNS, *columns.values()])
    return table.rename_columns([*KEY_COLUMNS, *columns])


def _other_clusters(look: SlideLook, clusters: pa.Table) -> pa.Table:
    """Clusters that do not count: a row a tile and K."""
    stamp = look.folder.stamp("clusters")
    parts = []
    for k, name in sorted(cluster_columns(clusters.schema).items()):
        numbers = clusters.column(name).cast(pa.int32())
        part = pa.table({"tile": clusters.column("tile"), "cluster": numbers})
        part = part.filter(numbers.is_valid())
        same = {
            "slide": pa.scalar(look.slide_id),
            "k": pa.scalar(k, pa.int32()),
            "model": pa.scalar(_version(clusters), pa.string()),
            "untrained": pa.scalar(None if stamp is None else stamp.untrained, pa.bool_()),
        }
        for column, value in same.items():
            part = part.append_column(column, pa.repeat(value, part.num_rows))
        parts.append(part)
    return pa.concat_tables(parts)


def _labels(look: SlideLook) -> pa.Table:
    table = _with_keys(look, "labels", read_table(look.folder.record("labels")))
    share = pc.if_else(table.column("label").is_valid(), table.column("share"), None)
    return table.append_column("label_share", share)


def _typed(table: pa.Table | None, schema: pa.Schema) -> pa.Table | None:
    """The columns of a table that the catalog has, in the types that they have there."""
    if table is None:
        return None
    names = set(table.column_names)
    fields = [field for field in schema if field.name in names]
    return table.select([field.name for field in fields]).cast(pa.schema(fields))


def _with_keys(look: SlideLook, stage: Stage, table: pa.Table) -> pa.Table:
    """A table of tiles with keys in our form."""
    if look.folder.stamp(stage) is not None:
        return table
    keys = normalise_keys(table, look.folder.record(stage))
    for name in KEY_COLUMNS:
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, keys.column(name))
    return table


def _version(clusters: pa.Table) -> str | None:
    if "model" not in clusters.column_names or not len(clusters):
        return None
    version = clusters.column("model")[0].as_py()
    return None if version is None else str(version)


def _joined(parts: list[pa.Table], schema: pa.Schema, slide_id: str) -> pa.Table:
    """Lay tables of one slide's tiles beside each other, by the tiles' names."""
    keys = parts[0].select(KEY_COLUMNS) if parts else schema.empty_table().select(KEY_COLUMNS)
    for part in parts[1:]:
        new = pc.invert(pc.is_in(part.column("tile"), keys.column("tile")))
        if pc.any(new).as_py():
            keys = pa.concat_tables([keys, part.select(KEY_COLUMNS).filter(new)])
    columns = {name: keys.column(name) for name in KEY_COLUMNS}
    columns["slide"] = pa.array([slide_id] * keys.num_rows, pa.string())
    for part in parts:
        rows = None
        if not part.column("tile").equals(keys.column("tile")):
            rows = pc.index_in(keys.column("tile"), part.column("tile"))
        for name in set(part.column_names) & set(schema.names) - set(columns):
            column = part.column(name)
            columns[name] = column if rows is None else column.take(rows)
    arrays = [
        columns[f.name] if f.name in columns else pa.nulls(keys.num_rows, f.type) for f in schema
    ]
    return pa.table(arrays, schema=schema)


def _with_labels(other: pa.Table | None, tiles: pa.Table) -> pa.Table:
    """Clusters that do not count, each with its tile's label."""
    if other is None:
        return OTHER_CLUSTERS.empty_table()
    rows = pc.index_in(other.column("tile"), tiles.column("tile"))
    other = other.append_column("label", tiles.column("label").take(rows))
    return other.select(OTHER_CLUSTERS.names).cast(OTHER_CLUSTERS)


def _distance(look: SlideLook, clusters: pa.Table) -> dict[str, object] | None:
    """How far the slide's tiles lie from their centroids, as far as its clusters tell."""
    stamp = look.folder.stamp("clusters")
    if stamp is None or "outside_k" not in stamp.result:
        return None
    k = stamp.result["outside_k"]
    distance = clusters.column(distance_column(k)).drop_null().to_numpy()
    median = float(np.median(distance)) if len(distance) else None
    return {"slide": look.slide_id, "k": k, "median": median, "outside": stamp.result["outside"]}


def _properties(
    look: SlideLook, tiles: pa.Table | None, clusters: pa.Table | None
) -> dict[str, object]:
    features, description = look.folder.stamp("features"), look.description
    row: dict[str, object] = {
        "slide": look.slide_id,
        "tiles": None if tiles is None else tiles.num_rows,
        "labelled_tiles": None if tiles is None else tiles.column("label").drop_null().length(),
        "model": None if clusters is None else _version(clusters),
        "encoder": None if features is None else features.result["encoder"],
        "untrained": None if features is None else features.untrained,
    }
    if description is not None:
        row |= {
            "file": description.relative_path,
            "vendor": description.vendor,
            "objective_power": description.objective_power,
            "width": description.width,
            "height": description.height,
            "levels": len(description.levels),
            "mpp": description.mpp_x,
            "mpp_source": description.mpp_source,
            **description.facts,
        }
    return row
