"""Dagster instances as the platform is deployed with, on SQLite or a PostgreSQL server."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

DEPLOY = Path(__file__).parents[1] / "deploy"


@contextlib.contextmanager
def dagster_home(home: Path, storage: str) -> Iterator[dict[str, str]]:
    """A folder with the deployment's settings, and with PostgreSQL a server of its own.

    Args:
        home: The folder; one that is there is taken, with what it holds.
        storage: ``sqlite`` or ``postgres``.

    Yields:
        The instance's environment variables, which this process then has, too.
    """
    with contextlib.ExitStack() as stack:
        environment = {"DAGSTER_HOME": str(home)}
        home.mkdir(exist_ok=True)
        if storage == "postgres":
            from temporary_postgres import postgres

            shutil.copy(DEPLOY / "dagster.postgres.yaml", home / "dagster.yaml")
            for place in (home, home.parent, home.parent.parent):
                place.chmod(0o755)
            environment |= stack.enter_context(postgres(home))
        else:
            shutil.copy(DEPLOY / "dagster.yaml", home / "dagster.yaml")
        os.environ.update(environment)
        yield environment
