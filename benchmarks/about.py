"""What a figure was measured on: the machine, the versions, the day."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = {"torch": "torch", "openvino": "openvino", "ours": "histoencoder-platform"}


def about(**packages: str) -> dict[str, Any]:
    """What every line of output says, whatever it measures.

    Args:
        packages: Further packages whose versions matter, by the names they are told under.
    """
    versions = {name: version(package) for name, package in {**PACKAGES, **packages}.items()}
    return {
        "machine": {"cpu": cpu_model(), "cores": usable_cores()},
        "versions": {"python": platform.python_version(), **versions},
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def cpu_model() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def version(package: str) -> str | None:
    """Version of an installed package, if there is one."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
