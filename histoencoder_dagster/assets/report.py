"""The report: figures of the cohort, and the page that joins them."""

from collections.abc import Iterator

import dagster as dg

from histoencoder_core.cohort import run_sql
from histoencoder_core.report import FIGURES
from histoencoder_dagster.assets.annotations import annotation_accuracy
from histoencoder_dagster.assets.cohort import cluster_purity
from histoencoder_dagster.automation import NIGHTLY
from histoencoder_dagster.metadata import figure_metadata
from histoencoder_dagster.resources import Platform


def _has_clusters(context: dg.AssetExecutionContext, platform: Platform) -> bool:
    """Whether there is anything to draw; before that, an asset stays missing and is asked for."""
    found = bool(run_sql(platform.store, "FROM cluster_purity LIMIT 1").num_rows)
    if not found:
        context.log.info("no slide is assigned to clusters yet")
    return found


def _figure_asset(name: str, description: str) -> dg.AssetsDefinition:
    """The asset of one figure, with its picture to look at."""

    @dg.asset(
        name=name,
        deps=[cluster_purity],
        group_name="report",
        kinds={"matplotlib"},
        automation_condition=NIGHTLY,
        output_required=False,
        description=description,
    )
    def asset(
        context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
    ) -> Iterator[dg.MaterializeResult[None]]:
        if not _has_clusters(context, platform):
            return
        from histoencoder_core.report.draw import DRAW  # matplotlib takes long to import

        figure = DRAW[name](platform.store)
        yield dg.MaterializeResult(metadata=figure_metadata(figure))

    return asset


figures = tuple(_figure_asset(name, description) for name, description in FIGURES.items())


# Not made from the assets of figures: Dagster would pass it over when one of them can't be drawn.
@dg.asset(
    deps=[cluster_purity, annotation_accuracy],
    group_name="report",
    kinds={"html"},
    automation_condition=NIGHTLY,
    output_required=False,
    pool="cohort",
)
def cohort_report(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.MaterializeResult[None]]:
    """All figures and numbers of the cohort in one HTML page, to keep or to send."""
    # Annotations are made after the catalog, so that it does not know of the last ones.
    platform.refresh_catalog()
    if not _has_clusters(context, platform):
        return
    from histoencoder_core.report.draw import write_report  # matplotlib takes long to import

    path = write_report(platform.store)
    yield dg.MaterializeResult(
        metadata={
            "page": dg.MetadataValue.path(str(path.resolve())),
            "megabytes": round(path.stat().st_size / 1e6, 1),
        }
    )
