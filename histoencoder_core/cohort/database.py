"""The catalog's database: made from the SQL files of this package, filled batch by batch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from string import Template

import duckdb
import pyarrow as pa

from histoencoder_core.fingerprint import fingerprint

SCRIPTS = (
    "tables", "clusters", "statistics", "cluster_purity", "coverage", "cluster_spread",
    "slide_composition", "agreement",
)  # fmt: skip
"""The SQL files that make an empty catalog, in order."""

PER_SLIDE = (
    "slides", "tiles", "other_clusters", "cluster_counts", "completeness", "slide_distance",
    "internal.sources",
)  # fmt: skip
"""Tables whose rows are of one slide each."""

PER_COHORT = (
    "model", "models", "cluster_matches", "purity_replicates", "statistics", "absent",
    "internal.state",
)  # fmt: skip
"""The other tables that are no result of a query."""

MEMORY = "512MB"
"""What DuckDB may keep of the file in memory while it writes it."""

_FOR_EACH_K = re.compile(r"^ *-- for each k\n(.*?)^ *-- end\n", re.MULTILINE | re.DOTALL)


def script(name: str, n_clusters: Sequence[int]) -> str:
    """The text of one of this package's SQL files.

    Args:
        name: The file's name without its suffix.
        n_clusters: Numbers of clusters that the parts between ``-- for each k`` and ``-- end`` are
            repeated for.
    """
    text = (package_files("histoencoder_core.cohort") / "sql" / f"{name}.sql").read_text("utf-8")

    def repeated(match: re.Match[str]) -> str:
        part = Template(match[1])
        return "".join(part.substitute(_of(k)) for k in n_clusters)

    return _FOR_EACH_K.sub(repeated, text)


def _of(k: int) -> dict[str, str]:
    return {
        "k": str(k),
        "type": "UTINYINT" if k <= 2**8 else "USMALLINT",
        "clusters": ", ".join(f"'cluster_{cluster}'" for cluster in range(k)),
    }


def form() -> str:
    """Fingerprint of the SQL files: a catalog of another form is written anew."""
    return fingerprint([script(name, (2,)) for name in (*SCRIPTS, "cluster_counts")])


@contextlib.contextmanager
def opened(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that writes a catalog, all of which is in its file in the end.

    Raises:
        duckdb.Error: It is damaged, or there is no space for it.
    """
    with duckdb.connect(str(path)) as connection:
        connection.execute(f"SET memory_limit = '{MEMORY}'")
        # DuckDB draws one on stdout where it takes a process for an interactive one.
        connection.execute("SET enable_progress_bar = false")
        yield connection
        # Closing a database does this too, but says nothing when the disk is full; its rows then
        # stay in a log beside it.
        connection.execute("CHECKPOINT")


def create(connection: duckdb.DuckDBPyConnection, n_clusters: Sequence[int]) -> None:
    """Make an empty catalog."""
    for name in SCRIPTS:
        connection.execute(script(name, n_clusters))


def numbers_of_clusters(connection: duckdb.DuckDBPyConnection) -> list[int]:
    """Each K that a catalog's table of tiles has a column for, rising."""
    names = [row[0] for row in connection.execute("DESCRIBE tiles").fetchall()]
    return sorted(int(name[1:]) for name in names if re.fullmatch(r"k\d+", name))


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Insert rows by the names of their columns; columns they lack are NULL."""
    connection.register("incoming", rows)
    names = ", ".join(f'"{name}"' for name in rows.column_names)
    connection.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM incoming")  # noqa: S608
    connection.unregister("incoming")


def insert_tiles(
    connection: duckdb.DuckDBPyConnection, tiles: pa.Table, n_clusters: Sequence[int]
) -> None:
    """Insert rows of ``tiles``, and count them."""
    insert(connection, "tiles", tiles)
    connection.register("incoming", tiles)
    connection.execute(script("cluster_counts", n_clusters))
    connection.unregister("incoming")


def remove_slides(connection: duckdb.DuckDBPyConnection, slides: Iterable[str]) -> None:
    """Remove all rows of some slides."""
    gone = pa.table({"slide": pa.array(slides, pa.string())})
    connection.register("gone", gone)
    for table in PER_SLIDE:
        connection.execute(f"DELETE FROM {table} WHERE slide IN (SELECT slide FROM gone)")  # noqa: S608
    connection.unregister("gone")


def copy_tables(connection: duckdb.DuckDBPyConnection, source: str) -> None:
    """Copy the tables of an attached catalog into an empty one of the same form, by slide."""
    for table in (*PER_SLIDE, *PER_COHORT):
        order = "ORDER BY slide" if table in PER_SLIDE else ""
        connection.execute(f"INSERT INTO {table} SELECT * FROM {source}.{table} {order}")  # noqa: S608
