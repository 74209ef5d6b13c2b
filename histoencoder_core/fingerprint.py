"""The hash that stands for settings and for what a result was made from."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(value: Any) -> str:
    """Hash a JSON-like value into 64 hexadecimal digits.

    Args:
        value: Anything that `json.dumps` takes; the order of a mapping's keys does not matter.

    Returns:
        The SHA-256 of the value's canonical JSON form.

    Example:
        >>> fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
        True
    """
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
