"""What the documentation promises: every SQL example answers, every table and macro is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cohorts import COHORT_K

from histoencoder_core.cohort import run_sql
from histoencoder_core.store import Store

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "sql.md").read_text("utf-8")
EXAMPLES = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
TABLES = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| `([^`]+)` \|$", TEXT, re.MULTILINE))
MACROS = dict(re.findall(r"^\| `(\w+\([\w, ]+\))` \| [^|]+ \| `([^`]+)` \|$", TEXT, re.MULTILINE))


@pytest.mark.parametrize("query", EXAMPLES)
def test_sql_examples_answer(query: str, cohort_store: Store) -> None:
    answer = run_sql(cohort_store, query)
    if "-- often none" not in query:
        assert answer.num_rows > 0


def test_the_table_of_tables_is_complete(cohort_store: Store) -> None:
    """The documentation names every table and column of the catalog, in order."""
    columns = run_sql(
        cohort_store,
        "SELECT table_name, string_agg(column_name, ', ' ORDER BY ordinal_position) AS columns "
        "FROM information_schema.columns WHERE table_schema = 'main' GROUP BY table_name",
    )
    found = dict(zip(*columns.to_pydict().values(), strict=True))
    wide = {f"slide_composition_k{k}" for k in COHORT_K}
    assert wide <= found.keys()
    assert {name: told for name, told in found.items() if name not in wide} == TABLES


def test_the_tables_of_macros_are_complete(cohort_store: Store) -> None:
    """The documentation names every macro with its parameters and columns, in order."""
    macros = run_sql(
        cohort_store,
        "SELECT function_name AS name, parameters FROM duckdb_functions() "
        "WHERE database_name = 'catalog' AND function_type = 'table_macro'",
    ).to_pylist()
    found = {}
    for macro in macros:
        values = {"k": "8", "purity": "0.9"}
        called = ", ".join(values[name] for name in macro["parameters"])
        answer = run_sql(cohort_store, f"FROM {macro['name']}({called})")
        name = f"{macro['name']}({', '.join(macro['parameters'])})"
        found[name] = ", ".join(answer.column_names)
    assert found == MACROS


@pytest.mark.parametrize("name", [*TABLES, *(macro.split("(")[0] + "(" for macro in MACROS)])
def test_every_table_and_macro_has_an_example(name: str) -> None:
    place = re.escape(name) if name.endswith("(") else rf"{name}\b(?!\()"
    assert any(re.search(rf"\b(FROM|JOIN) {place}", query) for query in EXAMPLES)


def test_columns_of_one_name_are_told_apart(cohort_store: Store) -> None:
    joined = run_sql(cohort_store, "SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a")
    assert joined.column_names == ["a", "a_1", "a_1_1", "a_2"]
    assert [column[0].as_py() for column in joined.columns] == [1, 2, 3, 4]
