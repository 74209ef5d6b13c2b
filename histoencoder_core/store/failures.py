"""When a failed stage is worth another try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from histoencoder_core.errors import KINDS

FIRST_WAIT = 300.0
"""Seconds from a first failure to the second try; then four times as long, and so on."""

LONGEST_WAIT = 86400.0


def wait_after(attempts: int) -> float:
    """Seconds from the last of so many tries to the next.

    Example:
        >>> wait_after(1), wait_after(2), wait_after(999)
        (300.0, 1200.0, 86400.0)
    """
    # Of more than some hundred tries, the power would be too large for a number.
    return float(min(FIRST_WAIT * 4.0 ** min(attempts - 1, 9), LONGEST_WAIT))


def due_again(failure: Mapping[str, Any], now: float) -> bool:
    """Whether a failure may have passed: it is of a transient kind, and some time has gone by.

    Args:
        failure: An entry of `SlideFolder.failures`.
        now: In seconds since 1970.

    Example:
        >>> due_again({"kind": "no-mpp", "attempts": 1, "at": 0.0}, now=1e9)
        False
        >>> failure = {"kind": "out-of-disk", "attempts": 2, "at": 1e9}
        >>> due_again(failure, now=1e9 + 1000), due_again(failure, now=1e9 + 1201)
        (False, True)
    """
    kind = KINDS.get(failure.get("kind", ""))
    if kind is None or not kind.transient:
        return False
    at, wait = float(failure.get("at", 0)), wait_after(int(failure.get("attempts", 1)))
    # A time in the future is that of a clock that was set back since.
    return not at <= now < at + wait
