"""Searching files for texts, also where they are compressed."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

_CURSOR = re.compile(rb'"0([A-Za-z0-9+/]{16,}={0,2})\\*"')


def found_in(folder: Path, texts: Iterable[str]) -> dict[str, list[str]]:
    """Which files under a folder hold which of some texts, in any case or encoding, or their name.

    Beside their bytes, the rows of parquet files and of DuckDB's and SQLite's tables are searched,
    and what an automation's cursor holds.
    """
    forms = {
        text: {form for t in (text, text.upper(), text.lower()) for form in _encoded(t)}
        for text in texts
    }
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        for content in _contents(path):
            for text, wanted in forms.items():
                if any(form in content for form in wanted):
                    found.setdefault(path.relative_to(folder).as_posix(), []).append(text)
    return {path: sorted(set(texts)) for path, texts in found.items()}


def _encoded(text: str) -> Iterator[bytes]:
    yield text.encode()
    yield json.dumps(text)[1:-1].encode()
    yield text.encode("utf-16-le")
    yield text.encode("latin-1", "replace")


def _contents(path: Path) -> Iterator[bytes]:
    yield str(path).encode()
    if not path.is_file():
        return
    content = path.read_bytes()
    yield content
    if path.suffix == ".parquet":
        table = pq.read_table(path, partitioning=None)
        yield repr(table.schema.metadata).encode()
        yield repr(
            table.drop_columns(["features"] if "features" in table.column_names else []).to_pylist()
        ).encode()
    elif path.suffix == ".duckdb":
        yield from _rows_of_duckdb(path)
    elif content.startswith(b"SQLite format 3"):
        yield from _rows_of_sqlite(path)


def _rows_of_duckdb(path: Path) -> Iterator[bytes]:
    with duckdb.connect(str(path), read_only=True) as connection:
        names = connection.sql("SELECT schema, name FROM (SHOW ALL TABLES)").fetchall()
        for schema, name in names:
            yield repr(connection.sql(f"SELECT * FROM {schema}.{name}").fetchall()).encode()


def _rows_of_sqlite(path: Path) -> Iterator[bytes]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in names:
            for row in connection.execute(f"SELECT * FROM {name}"):
                for value in row:
                    content = value if isinstance(value, bytes) else str(value).encode()
                    yield content
                    with contextlib.suppress(zlib.error):
                        yield zlib.decompress(content)
                    for packed in _CURSOR.findall(content):
                        with contextlib.suppress(zlib.error, ValueError):
                            yield zlib.decompress(base64.b64decode(packed))
