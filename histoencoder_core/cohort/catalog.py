"""Gathering every slide's tables into ``<store>/_cohort/catalog.duckdb``.

The catalog holds tables, not views over files, so that user queries can run with file access off.
It is written under a temporary name and renamed: a reader never sees a half and blocks no run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

import duckdb
import pyarrow as pa

from histoencoder_core.clusters import ClusterModel, current_model
from histoencoder_core.cohort.completeness import StageState, expected_slides, slide_states
from histoencoder_core.errors import StoreError
from histoencoder_core.settings import EncoderSettings, TilingSettings
from histoencoder_core.slides import read_description
from histoencoder_core.store import SlideFolder, Store, files, layout
from histoencoder_core.store.layout import Stage
from histoencoder_core.store.tables import cluster_columns, read_keys, read_table
from histoencoder_core.tiles import tile_source

DERIVED = ("cluster_purity", "slide_composition")
"""Tables computed from the others, each by the SQL file of its name."""


@dataclass(frozen=True)
class CatalogSummary:
    """What a catalog holds.

    Attributes:
        path: The DuckDB file.
        slides: Number of slides.
        tiles: Number of tiles.
        labelled_tiles: Number of tiles with a label.
        states: State of every stage of every slide.
        purity: The table ``cluster_purity``.
        seconds: Time taken to build it.
    """

    path: Path
    slides: int
    tiles: int
    labelled_tiles: int
    states: list[StageState]
    purity: pa.Table
    seconds: float


def build_catalog(
    store: Store,
    *,
    tiling: TilingSettings | None = None,
    encoder: EncoderSettings | None = None,
    annotations: Path | None = None,
) -> CatalogSummary:
    """Build the catalog anew and put it in place of the old one.

    Args:
        store: The store.
        tiling: What tiles are expected; see `slide_states`.
        encoder: What features are expected; see `slide_states`.
        annotations: What labels are expected; see `slide_states`.

    Returns:
        What the catalog holds.

    Raises:
        ClusterError: The current model's file is damaged.
    """
    started = time.perf_counter()
    model = current_model(store)
    states = slide_states(
        store, tiling=tiling, encoder=encoder, model=model, annotations=annotations
    )
    # The database is closed, and so whole, before the file is renamed.
    with (
        files.atomic_path(store.catalog_path) as temporary,
        duckdb.connect(str(temporary)) as connection,
    ):
        # One transaction: a commit waits for the disk.
        connection.begin()
        connection.execute(sql("tables"))
        done = {(s.slide, s.stage) for s in states if s.state == "done"}
        for slide_id in expected_slides(store):
            try:
                _add_slide(connection, store, slide_id, done=done)
            except StoreError as error:
                # The others' answers are worth more than none; this one is told as failed.
                damaged = [s for s in layout.STAGES if layout.RECORD[s] in str(error)]
                stage = damaged[0] if damaged else "tiles"
                states = [s for s in states if (s.slide, s.stage) != (slide_id, stage)]
                states.append(StageState(slide_id, stage, "failed", str(error)))
        for state in states:
            connection.execute(
                "INSERT INTO completeness VALUES (?, ?, ?, ?)",
                [state.slide, state.stage, state.state, state.reason],
            )
        if model is not None:
            _add_model(connection, model)
        for name in DERIVED:
            connection.execute(sql(name))
        counts = [
            _count(connection, f"SELECT count(*) FROM {table}")  # noqa: S608 - constants
            for table in ("slides", "tiles", "labels")
        ]
        purity = connection.sql("SELECT * FROM cluster_purity").to_arrow_table()
        connection.commit()
    return CatalogSummary(
        path=store.catalog_path,
        slides=counts[0],
        tiles=counts[1],
        labelled_tiles=counts[2],
        states=states,
        purity=purity,
        seconds=round(time.perf_counter() - started, 3),
    )


def sql(name: str) -> str:
    """The text of one of this package's SQL files."""
    return (package_files("histoencoder_core.cohort") / "sql" / f"{name}.sql").read_text("utf-8")


def _add_slide(
    connection: duckdb.DuckDBPyConnection,
    store: Store,
    slide_id: str,
    *,
    done: set[tuple[str, Stage]],
) -> None:
    folder = store.slide(slide_id)
    tiles = _tiles(store, folder)
    if tiles is not None:
        _insert(connection, "tiles", tiles, slide_id)
    clusters = folder.record("clusters")
    version = None
    if clusters.exists():
        version = _add_clusters(connection, folder, current=(slide_id, "clusters") in done)
    # Labels of other tiles, or of an annotation that is gone, say nothing of these tiles.
    if (slide_id, "labels") in done:
        labels = read_table(folder.record("labels"), ["tile", "label", "share"])
        _insert(connection, "labels", labels.filter(labels.column("label").is_valid()), slide_id)
    _add_properties(connection, folder, None if tiles is None else tiles.num_rows, version)


def _tiles(store: Store, folder: SlideFolder) -> pa.Table | None:
    """A slide's tiles with what is known of them; None if it has none."""
    if folder.stamp("tiles") is not None:
        table = read_table(folder.record("tiles"))
        return table.append_column("mpp", table.column("mpp_x"))
    source = tile_source(store, folder.slide_id)
    if source is not None:
        return source.keys
    for stage in ("features", "clusters"):
        if folder.record(stage).exists():
            return read_keys(folder.record(stage))
    return None


def _add_clusters(
    connection: duckdb.DuckDBPyConnection, folder: SlideFolder, *, current: bool
) -> str | None:
    path = folder.record("clusters")
    stamp = folder.stamp("clusters")
    table = read_table(path)
    keys = read_keys(path).column("tile")
    version = (
        table.column("model")[0].as_py() if "model" in table.column_names and len(table) else None
    )
    same = {
        "model": pa.scalar(version, pa.string()),
        "current": pa.scalar(current),
        "untrained": pa.scalar(None if stamp is None else stamp.untrained, pa.bool_()),
    }
    for k, name in sorted(cluster_columns(table.schema).items()):
        try:
            rows = pa.table({"tile": keys, "cluster": table.column(name).cast(pa.int32())})
        except pa.ArrowException as error:
            raise StoreError(f"{path}: {name} holds no cluster numbers ({error}).") from error
        rows = rows.filter(rows.column("cluster").is_valid())
        for column, value in {"k": pa.scalar(k, pa.int32()), **same}.items():
            rows = rows.append_column(column, pa.repeat(value, rows.num_rows))
        _insert(connection, "clusters", rows, folder.slide_id)
    return version


def _add_properties(
    connection: duckdb.DuckDBPyConnection,
    folder: SlideFolder,
    tiles: int | None,
    version: str | None,
) -> None:
    description = read_description(folder)
    features = folder.stamp("features")
    row: dict[str, object] = {"slide": folder.slide_id, "tiles": tiles, "model": version}
    row["encoder"] = None if features is None else features.result["encoder"]
    row["untrained"] = None if features is None else features.untrained
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
    names = ", ".join(row)
    marks = ", ".join("?" * len(row))
    connection.execute(f"INSERT INTO slides ({names}) VALUES ({marks})", list(row.values()))  # noqa: S608


def _add_model(connection: duckdb.DuckDBPyConnection, model: ClusterModel) -> None:
    told = model.stamp.result
    row = [model.version, told["encoder"], model.untrained, told["slides"], told["tiles"]]
    connection.execute("INSERT INTO model VALUES (?, ?, ?, ?, ?)", row)


def _insert(
    connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table, slide_id: str
) -> None:
    """Insert the columns that the catalog's table has."""
    rows = rows.append_column("slide", pa.array([slide_id] * rows.num_rows, pa.string()))
    known = [r[0] for r in connection.execute(f"DESCRIBE {table}").fetchall()]
    names = [name for name in rows.column_names if name in known]
    connection.register("incoming", rows.select(names))
    columns = ", ".join(names)
    try:
        connection.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM incoming")  # noqa: S608
    except duckdb.Error as error:
        raise StoreError(
            f"{slide_id}: its {table} can't be put into the catalog ({error})."
        ) from error
    finally:
        connection.unregister("incoming")


def _count(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    return int(connection.execute(query).fetchall()[0][0])
