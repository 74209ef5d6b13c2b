"""When a stage is due: once what it is made from was made anew.

Dagster's own `eager()` loses slides here, in two ways. It asks for a stage and those after it in
one run, where one bad slide ends the run for all slides of its batch, and takes what that run did
make for handled. And it takes an update for handled that comes while its target is requested or
runs. So each stage waits for the one before it, and an update counts until the target is requested
after it: at worst a stage is asked for once more and finds everything done.
"""

import dagster as dg

_Condition = dg.AutomationCondition

_updated = _Condition.any_deps_match(_Condition.newly_updated()).with_label("any_deps_updated")
_requested_since = _Condition.newly_requested() & ~_updated

AFTER_ITS_INPUTS = (
    (_Condition.newly_missing() | _updated).since(_requested_since)
    & ~_Condition.any_deps_match(_Condition.missing())
    # Not their backfills: Dagster notices up to half a minute later that one of those has ended.
    & ~_Condition.any_deps_match(_Condition.run_in_progress())
    & ~_Condition.in_progress()
).with_label("after_its_inputs")
"""For a slide's stage: all that it is made from is there, and some of it is new."""

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
