"""Checks over the whole cohort, each listing the slides at fault.

A check on a partitioned asset keeps one result, not one a slide, so each tells of all slides. Only
those that changed since are opened. A slide whose files can't be read is at fault too.
"""

import dagster as dg
import numpy as np

from histoencoder_core.cohort import judge_slides
from histoencoder_core.cohort.verdicts import Judge
from histoencoder_core.store import SlideFolder, Store
from histoencoder_core.store.tables import cluster_columns, iter_features, read_keys, read_table
from histoencoder_core.tiles import tile_source
from histoencoder_dagster.assets import clusters, features, tiles
from histoencoder_dagster.automation import AFTER_ANY_SLIDE
from histoencoder_dagster.resources import Platform

_FINE = ""

OUTSIDE = 0.1
"""A slide with a larger share of tiles outside of the training distribution is worth a look; on
average it is 0.01."""

FEW = 5
"""So few tiles outside tell nothing: every small cohort has its farthest tiles somewhere."""

RULES = 1
"""To be raised when a check judges a slide otherwise: what it found before then counts no more."""


@dg.asset_check(asset=tiles, automation_condition=AFTER_ANY_SLIDE)
def tissue_found(platform: dg.ResourceParam[Platform]) -> dg.AssetCheckResult:
    """Every slide has tiles with tissue; one without is a result, but worth a look."""

    def judge(folder: SlideFolder) -> str | None:
        stamp = folder.stamp("tiles")
        if stamp is None:
            return None
        return _FINE if stamp.result["tiles"] else str(stamp.result["reason"])

    return _over_slides(platform.store, "tissue_found", judge, severity=dg.AssetCheckSeverity.WARN)


@dg.asset_check(asset=features, automation_condition=AFTER_ANY_SLIDE)
def features_finite(platform: dg.ResourceParam[Platform]) -> dg.AssetCheckResult:
    """No feature is NaN or infinite, but those of tiles known to be unreadable."""

    def judge(folder: SlideFolder) -> str | None:
        path = folder.record("features")
        if not path.exists():
            return None
        known = _unreadable(folder)
        rows = sum(int((~np.isfinite(part).all(axis=1)).sum()) for part in iter_features(path))
        if rows == known:
            return _FINE
        return f"{rows} tiles without finite features, {known} expected"

    return _over_slides(platform.store, "features_finite", judge)


@dg.asset_check(asset=features, automation_condition=AFTER_ANY_SLIDE)
def feature_rows_equal_tile_rows(platform: dg.ResourceParam[Platform]) -> dg.AssetCheckResult:
    """Every tile has its row of features, and no row is without a tile."""
    store = platform.store

    def judge(folder: SlideFolder) -> str | None:
        source = tile_source(store, folder.slide_id)
        if source is None or not folder.record("features").exists():
            return None
        expected = source.keys.column("tile")
        found = read_keys(folder.record("features")).column("tile")
        if found.equals(expected):
            return _FINE
        return f"{len(found)} rows of features for {len(expected)} tiles, or in another order"

    return _over_slides(store, "feature_rows_equal_tile_rows", judge)


@dg.asset_check(asset=clusters, automation_condition=AFTER_ANY_SLIDE)
def clusters_cover_every_tile(platform: dg.ResourceParam[Platform]) -> dg.AssetCheckResult:
    """Every tile with features is in one cluster of every K."""

    def judge(folder: SlideFolder) -> str | None:
        if not folder.record("clusters").exists():
            return None
        tables = [read_keys(folder.record(stage)) for stage in ("features", "clusters")]
        if not tables[0].column("tile").equals(tables[1].column("tile")):
            return "its tiles are not those of its features"
        assigned = read_table(folder.record("clusters"))
        counts = {
            k: assigned.column(name).null_count
            for k, name in cluster_columns(assigned.schema).items()
        }
        known = _unreadable(folder)
        told = [f"{n} for K = {k}" for k, n in counts.items() if n != known]
        return f"tiles in no cluster: {', '.join(told)}; {known} expected" if told else _FINE

    return _over_slides(platform.store, "clusters_cover_every_tile", judge)


@dg.asset_check(asset=clusters, automation_condition=AFTER_ANY_SLIDE)
def slides_are_like_the_training_slides(
    platform: dg.ResourceParam[Platform],
) -> dg.AssetCheckResult:
    """No slide lies outside of what the cluster model was fitted on, such as another stain.

    A tile is outside if it is farther from its centroid than 99 % of the tiles that the model was
    fitted on.
    """

    def judge(folder: SlideFolder) -> str | None:
        stamp = folder.stamp("clusters")
        outside = None if stamp is None else stamp.result.get("outside")
        if stamp is None or outside is None:
            return None
        if outside <= OUTSIDE or outside * stamp.result["tiles"] < FEW:
            return _FINE
        return (
            f"{outside:.0%} of its tiles are unlike those that cluster model "
            f"{stamp.made_from['model']} was fitted on"
        )

    return _over_slides(
        platform.store,
        "slides_are_like_the_training_slides",
        judge,
        severity=dg.AssetCheckSeverity.WARN,
    )


ALL_CHECKS = (
    tissue_found,
    features_finite,
    feature_rows_equal_tile_rows,
    clusters_cover_every_tile,
    slides_are_like_the_training_slides,
)


def _unreadable(folder: SlideFolder) -> int:
    """Number of tiles that are known to have no features."""
    stamp = folder.stamp("features")
    return 0 if stamp is None else int(stamp.result["unreadable"])


def _over_slides(
    store: Store,
    name: str,
    judge: Judge,
    *,
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
) -> dg.AssetCheckResult:
    found = judge_slides(store, name, judge, rules=RULES)
    judged = {slide_id: verdict for slide_id, verdict in found.items() if verdict is not None}
    bad = {slide_id: verdict for slide_id, verdict in judged.items() if verdict}
    listed = "\n".join(f"- **{slide}**: {reason}" for slide, reason in bad.items())
    return dg.AssetCheckResult(
        passed=not bad,
        severity=severity,
        description=f"{len(bad)} of {len(judged)} slides are at fault",
        metadata={"slides": len(judged), "at_fault": dg.MetadataValue.md(listed or "none")},
    )
