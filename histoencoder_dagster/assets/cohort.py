"""The cohort: one DuckDB catalog, its statistics, and which clusters are pure in which label."""

from collections import Counter
from dataclasses import asdict

import dagster as dg
import pyarrow as pa

from histoencoder_core.cohort import (
    NOT_DONE,
    StageState,
    count_states,
    ensure_statistics,
    run_sql,
)
from histoencoder_core.errors import KINDS
from histoencoder_dagster.assets.clusters import clusters
from histoencoder_dagster.assets.features import features
from histoencoder_dagster.assets.labels import labels
from histoencoder_dagster.assets.slides import slides
from histoencoder_dagster.assets.tiles import tiles
from histoencoder_dagster.automation import AFTER_ANY_SLIDE, WITH_ITS_INPUTS
from histoencoder_dagster.metadata import table_metadata
from histoencoder_dagster.resources import Platform

PURE = 0.9
"""The purity that HistoEncoder counts a cluster as pure from."""


@dg.asset(
    deps=[slides, tiles, features, clusters, labels],
    group_name="cohort",
    kinds={"duckdb"},
    automation_condition=AFTER_ANY_SLIDE,
    pool="cohort",
)
def catalog(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult[None]:
    """All slides' tiles, clusters and labels in one DuckDB file, for SQL."""
    summary = platform.refresh_catalog()
    return dg.MaterializeResult(
        metadata={
            "path": dg.MetadataValue.path(str(summary.path.resolve())),
            "slides": summary.slides,
            "tiles": summary.tiles,
            "labelled_tiles": summary.labelled_tiles,
            "slides_read": summary.read,
            "seconds": summary.seconds,
        }
    )


@dg.asset(
    deps=[catalog],
    group_name="cohort",
    kinds={"duckdb"},
    automation_condition=WITH_ITS_INPUTS,
    pool="cohort",
)
def completeness(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult[None]:
    """What is done, what is not, and why: the same numbers as `histoencoder status`."""
    store = platform.store
    rows = run_sql(store, "SELECT slide, stage, state, reason, kind FROM completeness").to_pylist()
    states = [StageState(**row) for row in rows]
    counts = count_states(states)
    kinds = Counter(state.kind or "unexpected" for state in states if state.state == "failed")
    told = sorted(
        (state for state in states if state.state in NOT_DONE),
        key=lambda state: (NOT_DONE.index(state.state), state.slide),
    )
    absent = run_sql(store, "SELECT slide, CAST(since AS VARCHAR) AS since FROM absent")
    numbers = {
        f"{row['stage']}_{name}": row[name]
        for row in counts.to_pylist()
        for name in ("done", "failed", "missing", "waiting")
    }
    return dg.MaterializeResult(
        metadata={
            "stages": table_metadata(counts),
            "not_done": table_metadata(pa.Table.from_pylist([asdict(state) for state in told])),
            "failures": dg.MetadataValue.json(dict(kinds)),
            "remedies": dg.MetadataValue.md(
                "\n".join(f"- **{kind}**: {KINDS[kind].remedy}" for kind in sorted(kinds))
                or "none needed"
            ),
            "absent": table_metadata(absent),
            "slides_with_failures": len(
                {state.slide for state in states if state.state == "failed"}
            ),
            **numbers,
        }
    )


@dg.asset(
    deps=[catalog],
    group_name="cohort",
    kinds={"scipy"},
    automation_condition=WITH_ITS_INPUTS,
    pool="cohort",
)
def cluster_statistics(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult[None]:
    """What SQL alone can't tell of purity: intervals by bootstrap, and chance by permutation.

    Computed anew if clusters or labels of labelled slides changed; the catalog takes it in.
    """
    stamp = ensure_statistics(platform.store)
    if stamp is None:
        return dg.MaterializeResult(
            metadata={"labelled_slides": 0, "labelled_tiles": 0, "recomputed": False}
        )
    platform.refresh_catalog()
    return dg.MaterializeResult(
        metadata={
            "labelled_slides": stamp.result["labelled_slides"],
            "labelled_tiles": stamp.result["labelled_tiles"],
            "replicates": stamp.made_from["replicates"],
            "seed": stamp.made_from["seed"],
            "seconds": stamp.result["seconds"],
            "recomputed": stamp.made_now,
        },
        data_version=dg.DataVersion(stamp.fingerprint),
    )


@dg.asset(
    deps=[catalog, cluster_statistics],
    group_name="cohort",
    kinds={"duckdb"},
    automation_condition=WITH_ITS_INPUTS,
)
def cluster_purity(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult[None]:
    """Which clusters are pure in which label: the catalog's table `cluster_purity`.

    ``coverage_at_90_k…`` is the share of labelled tiles that lie in clusters at least 90 % pure,
    ``p_value_k…`` how often labels that are permuted within their slides reach that share.
    """
    store = platform.store
    purity = run_sql(store, "SELECT * FROM cluster_purity ORDER BY k, purity DESC, cluster")
    numbers: dict[str, float] = {}
    for k in sorted(set(purity.column("k").to_pylist())):
        [covered] = run_sql(store, f"FROM coverage_at({k}, {PURE})").to_pylist()
        if not covered["labelled_tiles"]:
            continue
        numbers[f"coverage_at_90_k{k}"] = float(covered["coverage"])
        null = run_sql(store, f"FROM coverage_null({k}, {PURE})").to_pylist()
        numbers |= {
            f"p_value_k{k}": float(row["p_value"])
            for row in null
            if row["scheme"] == "within_slides" and row["p_value"] is not None
        }
    untrained = any(purity.column("untrained").to_pylist())
    return dg.MaterializeResult(
        metadata={"purity": table_metadata(purity, rows=300), "untrained": untrained, **numbers}
    )
