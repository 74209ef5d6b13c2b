"""Answering SQL over the catalog, read-only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import duckdb
import pyarrow as pa

from histoencoder_core.errors import StoreError
from histoencoder_core.store import Store

SETTINGS = (
    "temp_directory = ''",
    "enable_external_access = false",
    # What was attached, and its write-ahead log, would stay open to COPY otherwise.
    "disabled_filesystems = 'LocalFileSystem'",
    "lock_configuration = true",
)
"""What keeps a query inside the catalog, in the order that DuckDB takes it in."""


def run_sql(store: Store, query: str) -> pa.Table:
    """Run one query on the published catalog.

    The catalog is opened read-only, with access to files, the network and extensions off and the
    configuration locked, so a query can neither change nor reach anything, the catalog included.

    Args:
        store: The store.
        query: SQL, as DuckDB understands it.

    Returns:
        The result. Of columns with one name, the later ones are numbered: ``label``, ``label_1``.

    Raises:
        StoreError: There is no catalog yet, or the query fails; the message is DuckDB's.
    """
    try:
        with attached(store) as connection:
            for setting in SETTINGS:
                connection.execute(f"SET {setting}")
            answer = connection.sql(query)
            # A statement that is no query, such as SET, has no result.
            return pa.table({}) if answer is None else _told_apart(answer.to_arrow_table())
    except duckdb.Error as error:
        raise StoreError(f"The query failed. {error}") from error


def _told_apart(table: pa.Table) -> pa.Table:
    """A table in which no two columns have one name, as those of a join may."""
    names: list[str] = []
    for name in table.column_names:
        number = 0
        while (f"{name}_{number}" if number else name) in names:
            number += 1
        names.append(f"{name}_{number}" if number else name)
    return table.rename_columns(names)


@contextlib.contextmanager
def attached(store: Store) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that reads the published catalog, and is closed in the end.

    Raises:
        StoreError: There is no catalog yet.
        duckdb.Error: It is damaged.
    """
    if not store.catalog_path.exists():
        raise StoreError(
            f"{store.catalog_path}: there is no catalog yet. It is written by `histoencoder "
            "cluster`, and by the asset 'catalog'."
        )
    path = str(store.catalog_path).replace("'", "''")
    # Connections of a process to one file share its settings and its contents, even after the file
    # was replaced; a database in memory is nobody else's.
    with duckdb.connect(":memory:") as connection:
        # DuckDB draws one on stdout where it takes a process for an interactive one.
        connection.execute("SET enable_progress_bar = false")
        connection.execute(f"ATTACH '{path}' AS catalog (READ_ONLY)")
        connection.execute("USE catalog")
        yield connection
