"""The cohort: one DuckDB catalog, its statistics, and which clusters are pure in which label."""

from collections import Counter

import dagster as dg

from histoencoder_core.cohort import ensure_statistics, run_sql
from histoencoder_core.store import layout
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
    counts = Counter((state.stage, state.state) for state in summary.states)
    open_ends = run_sql(
        platform.store,
        "SELECT * FROM completeness WHERE state IN ('failed', 'stale', 'missing', 'empty') "
        "ORDER BY state, slide",
    )
    return dg.MaterializeResult(
        metadata={
            "path": dg.MetadataValue.path(str(summary.path.resolve())),
            "slides": summary.slides,
            "tiles": summary.tiles,
            "labelled_tiles": summary.labelled_tiles,
            "slides_read": summary.read,
            "seconds": summary.seconds,
            "slides_failed": len({s.slide for s in summary.states if s.state == "failed"}),
            **{f"{stage}_done": counts[stage, "done"] for stage in layout.STAGES},
            "not_done": table_metadata(open_ends),
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
