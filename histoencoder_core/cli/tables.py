"""Printing a table for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pyarrow as pa
from rich.console import Console
from rich.table import Table


def print_table(result: pa.Table) -> None:
    """Print a table, in full where the output is no terminal."""
    table = Table(*result.column_names, box=None)
    for row in result.to_pylist():
        table.add_row(*(_cell(value) for value in row.values()))
    _print(table)


def print_row(row: Mapping[str, object]) -> None:
    """Print one row of a table, a line a column."""
    table = Table.grid(padding=(0, 2))
    for name, value in row.items():
        table.add_row(name, _cell(value))
    _print(table)


def _print(table: Table) -> None:
    # Away from a terminal no column is cut.
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    console.print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
