"""The one `Definitions` that Dagster loads."""

import warnings

import dagster as dg

# BackfillPolicy is marked beta; without this every process says so.
warnings.filterwarnings("ignore", category=dg.BetaWarning)

from histoencoder_core.settings import PlatformSettings  # noqa: E402
from histoencoder_dagster.assets import ALL_ASSETS  # noqa: E402
from histoencoder_dagster.checks import ALL_CHECKS  # noqa: E402
from histoencoder_dagster.jobs import ALL_JOBS  # noqa: E402
from histoencoder_dagster.resources import Platform  # noqa: E402
from histoencoder_dagster.sensors import platform_sensors  # noqa: E402
from histoencoder_dagster.versions import with_settings  # noqa: E402


def platform_definitions(settings: PlatformSettings) -> dg.Definitions:
    """The platform for one deployment."""
    return dg.Definitions(
        assets=with_settings(ALL_ASSETS, settings),
        asset_checks=ALL_CHECKS,
        jobs=ALL_JOBS,
        sensors=platform_sensors(settings),
        resources={"platform": Platform(settings)},
        executor=dg.in_process_executor,
    )


defs = platform_definitions(PlatformSettings())
