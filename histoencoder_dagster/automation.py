"""When an asset of the cohort is due: once what it is made from was made anew.

Dagster's own `eager()` takes an update for handled that comes while its target is requested or
runs, and waits for ever for a slide that failed. Here an update counts until the target is
requested after it: at worst an asset is asked for once more and finds everything done. The stages
of a slide follow each other otherwise, see `sensors.stages`.
"""

import dagster as dg

_Condition = dg.AutomationCondition

_updated = _Condition.any_deps_match(_Condition.newly_updated()).with_label("any_deps_updated")
_requested_since = _Condition.newly_requested() & ~_updated

AFTER_ANY_SLIDE = (_updated.since(_requested_since) & ~_Condition.in_progress()).with_label(
    "after_any_slide"
)
"""For the cohort: something is new. A missing, failed or running slide does not hold it back."""

WITH_ITS_INPUTS = (
    _Condition.any_deps_updated().since(
        _Condition.newly_requested() & ~_Condition.any_deps_updated()
    )
    & ~_Condition.in_progress()
).with_label("with_its_inputs")
"""In the same run as what it is made from."""

NIGHTLY = (
    _updated.since(_requested_since)
    & (_Condition.missing() | _Condition.cron_tick_passed("0 4 * * *"))
    & ~_Condition.in_progress()
).with_label("nightly")
"""For what is slow to draw: once as soon as it can be, then at night if something is new."""
