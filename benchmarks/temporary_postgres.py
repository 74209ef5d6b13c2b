"""A PostgreSQL server of one's own, on a loopback port, while a block runs."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

USER, PASSWORD, DATABASE = "dagster", "dagster", "dagster"
RUNS_AS = "nobody"
"""PostgreSQL refuses to run as root."""


@contextlib.contextmanager
def postgres(folder: Path | None = None) -> Iterator[dict[str, str]]:
    """Start a server, and stop it in the end.

    Args:
        folder: Where its data are kept; a temporary folder if None.

    Yields:
        The environment variables that ``deploy/dagster.postgres.yaml`` reads.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.chmod(0o755)
        data, log = folder / "data", folder / "postgres.log"
        if not data.exists():
            password = folder / "password"
            password.write_text(PASSWORD)
            data.mkdir()
            _hand_over(data)
            _run(["initdb", "-D", str(data), "-U", USER, "--pwfile", str(password),
                  "-A", "scram-sha-256", "-E", "UTF8", "--no-instructions"])  # fmt: skip
        port = _free_port()
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={data}"
        log.touch()
        _hand_over(log)
        with log.open("ab") as output:
            server = subprocess.Popen(
                [_program("postgres"), "-D", str(data), *options.split()],
                stdout=output, stderr=output, **_as_another(),
            )  # fmt: skip
        stack.callback(_stop, server)
        _create_database(port)
        yield {
            "DAGSTER_PG_HOST": "127.0.0.1",
            "DAGSTER_PG_PORT": str(port),
            "DAGSTER_PG_USERNAME": USER,
            "DAGSTER_PG_PASSWORD": PASSWORD,
            "DAGSTER_PG_DB": DATABASE,
        }


def _create_database(port: int, *, patience: float = 60) -> None:
    import psycopg2
    from psycopg2 import errors

    end = time.monotonic() + patience
    while True:
        try:
            connection = psycopg2.connect(
                host="127.0.0.1", port=port, user=USER, password=PASSWORD, dbname="postgres"
            )
            break
        except psycopg2.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    connection.autocommit = True
    exists = contextlib.suppress(errors.DuplicateDatabase)
    with contextlib.closing(connection), connection.cursor() as cursor, exists:
        cursor.execute(f"CREATE DATABASE {DATABASE}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(2)  # a fast shutdown
    server.wait(60)


def _run(command: list[str]) -> None:
    program, *options = command
    subprocess.run(
        [_program(program), *options], check=True, stdout=subprocess.DEVNULL, **_as_another()
    )


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not on the PATH; PostgreSQL is needed for this.")
    return found


def _hand_over(path: Path) -> None:
    if os.getuid() == 0:
        shutil.chown(path, RUNS_AS)


def _as_another() -> dict[str, Any]:
    if os.getuid() != 0:
        return {}
    other = pwd.getpwnam(RUNS_AS)
    return {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": [], "cwd": "/"}


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
