"""The cohort: one DuckDB catalog, and which clusters are pure in which label."""

from collections import Counter

import dagster as dg

from histoencoder_core.cohort import build_catalog, run_sql
from histoencoder_core.store import layout
from histoencoder_dagster.assets.clusters import clusters
from histoencoder_dagster.assets.features import features
from histoencoder_dagster.assets.labels import labels
from histoencoder_dagster.assets.slides import slides
from histoencoder_dagster.assets.tiles import tiles
from histoencoder_dagster.automation import AFTER_ANY_SLIDE, WITH_ITS_INPUTS
from histoencoder_dagster.metadata import table_metadata
from histoencoder_dagster.resources import Platform


@dg.asset(
    deps=[slides, tiles, features, clusters, labels],
    group_name="cohort",
    kinds={"duckdb"},
    automation_condition=AFTER_ANY_SLIDE,
    pool="cohort",
)
def catalog(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult[None]:
    """All slides' tiles, clusters and labels in one DuckDB file, for SQL."""
    store, settings = platform.store, platform.settings
    folder = settings.annotations_folder
    summary = build_catalog(
        store,
        tiling=settings.tiling,
        encoder=settings.encoder,
        annotations=folder if folder.is_dir() else None,
    )
    counts = Counter((state.stage, state.state) for state in summary.states)
    open_ends = run_sql(
        store,
        "SELECT * FROM completeness WHERE state IN ('failed', 'stale', 'missing', 'empty') "
        "ORDER BY state, slide",
    )
    return dg.MaterializeResult(
        metadata={
            "path": dg.MetadataValue.path(str(summary.path.resolve())),
            "slides": summary.slides,
            "tiles": summary.tiles,
            "labelled_tiles": summary.labelled_tiles,
            "seconds": summary.seconds,
            "slides_failed": len({s.slide for s in summary.states if s.state == "failed"}),
            **{f"{stage}_done": counts[stage, "done"] for stage in layout.STAGES},
            "not_done": table_metadata(open_ends),
        }
    )


@dg.asset(
    deps=[catalog], group_name="cohort", kinds={"duckdb"}, automation_condition=WITH_ITS_INPUTS
)
def cluster_purity(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult[None]:
    """Which clusters are pure in which label: the catalog's table `cluster_purity`."""
    store = platform.store
    purity = run_sql(store, "SELECT * FROM cluster_purity ORDER BY k, purity DESC, cluster")
    shares = run_sql(
        store,
        "SELECT k, sum(labelled_tiles) FILTER (purity >= 0.9) / sum(labelled_tiles) AS pure, "
        "sum(labelled_tiles * purity) / sum(labelled_tiles) AS mean "
        "FROM cluster_purity GROUP BY k HAVING sum(labelled_tiles) > 0 ORDER BY k",
    )
    numbers = {}
    for row in shares.to_pylist():
        numbers[f"share_of_tiles_in_pure_clusters_k{row['k']}"] = float(row["pure"] or 0)
        numbers[f"mean_purity_k{row['k']}"] = float(row["mean"])
    untrained = any(purity.column("untrained").to_pylist())
    return dg.MaterializeResult(
        metadata={"purity": table_metadata(purity, rows=300), "untrained": untrained, **numbers}
    )
