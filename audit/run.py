"""Look up the installed packages' known vulnerabilities, but for those allowed with a reason.

Run it with ``make audit``, which installs pip-audit first. It asks a vulnerability service over the
network, so it is no part of the tests. Its exit code is pip-audit's: 1 if anything was found that
`allowed.toml` does not name.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ALLOWED = Path(__file__).with_name("allowed.toml")


@dataclass(frozen=True)
class Allowed:
    """A vulnerability that is passed over.

    Attributes:
        id: Its CVE number, or another name that the vulnerability service knows.
        package: The package that has it.
        fixed: The first version without it.
        what: What it is.
        why: Why it can't be reached here.
        checked_by: The test that would fail if it could.
    """

    id: str
    package: str
    fixed: str
    what: str
    why: str
    checked_by: str


def read_allowed(path: Path = ALLOWED) -> list[Allowed]:
    """Read the list.

    Raises:
        TypeError: An entry lacks a field, or has one that is not known.
    """
    return [Allowed(**entry) for entry in tomllib.loads(path.read_text("utf-8"))["allowed"]]


def main() -> int:
    """Run pip-audit on this environment."""
    allowed = read_allowed()
    for entry in allowed:
        print(f"passed over: {entry.package} {entry.id}: {' '.join(entry.why.split())}")
    ignored = [f"--ignore-vuln={entry.id}" for entry in allowed]
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", *ignored]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
