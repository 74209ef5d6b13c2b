"""What the documentation promises: every SQL example answers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from histoencoder_core.clusters import (
    assign_slide,
    current_model,
    feature_files,
    fit_clusters,
    save_model,
)
from histoencoder_core.cohort import build_catalog, run_sql
from histoencoder_core.settings import ClusterSettings
from histoencoder_core.store import Stamp, Store
from histoencoder_core.store.tables import feature_list, key_table, tile_name

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = re.findall(r"```sql\n(.*?)```", (DOCS / "sql.md").read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def labelled_cohort(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three slides of two kinds of tiles, labelled, with features far apart."""
    store = Store(tmp_path_factory.mktemp("store"))
    rng = np.random.default_rng(0)
    for number in range(3):
        folder = store.slide(f"slide-{number}")
        places = [(512 * i, 0, 512, 512) for i in range(40)]
        keys = key_table([tile_name(*place) for place in places], list(places))
        kinds = np.arange(40) % 2
        features = rng.normal(size=(40, 8)) + 20 * kinds[:, None]
        stamp = Stamp.of("features", algorithm=1, made_from={"tiles": f"{number}", "encoder": {}})
        with folder.writing("features") as writer:
            table = keys.append_column("features", feature_list(features, "float32"))
            writer.table(table, stamp.with_result(space="s", encoder="e", tiles=40, unreadable=0))
        labels = pa.array(["benign" if kind else "tumour" for kind in kinds])
        shares = pa.array([1.0] * 40, pa.float32())
        with folder.writing("labels") as writer:
            table = keys.append_column("label", labels).append_column("share", shares)
            writer.table(table, Stamp.of("labels", algorithm=1, made_from={}))
    save_model(store, fit_clusters(feature_files(store), ClusterSettings(n_clusters=(8, 16))))
    model = current_model(store)
    assert model is not None
    for slide_id in store.slide_ids():
        assign_slide(store.slide(slide_id), model)
    build_catalog(store)
    return store


@pytest.mark.parametrize("query", EXAMPLES)
def test_sql_examples_answer(query: str, labelled_cohort: Store) -> None:
    answer = run_sql(labelled_cohort, query)
    if "completeness" not in query:
        assert answer.num_rows > 0


def test_the_table_of_tables_is_complete(labelled_cohort: Store) -> None:
    """The table in the documentation names every table and column of the catalog, in order."""
    text = (DOCS / "sql.md").read_text("utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| `([^`]+)` \|$", text, re.MULTILINE))
    columns = run_sql(
        labelled_cohort,
        "SELECT table_name, string_agg(column_name, ', ' ORDER BY ordinal_position) AS columns "
        "FROM information_schema.columns GROUP BY table_name",
    )
    assert told == dict(zip(*columns.to_pydict().values(), strict=True))
