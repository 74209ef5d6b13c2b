"""Command lines that can be killed at any moment, and what a store holds when they are done."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from cohorts import tables_of
from PIL import Image

from histoencoder_core.cohort.query import attached
from histoencoder_core.store import Store, layout
from histoencoder_core.store.stamp import KEY

PATIENCE = 120.0
"""Seconds after which a test that waits for a process has failed."""

SERVER = """
import json, os, signal, sys
from pathlib import Path

import histoencoder_core.features, histoencoder_core.report.draw
from histoencoder_core.cli.app import main

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
print("ready", flush=True)
for number, line in enumerate(sys.stdin):
    command, log, ended = json.loads(line)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["histoencoder", *command]
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    part = Path(f"{ended}.part")
    part.write_text(str(code))
    part.replace(ended)
    os._exit(0)
"""
"""Forks a process for each command: what takes seconds to import is there already."""

NOTES = {
    "seconds",
    "start_up_seconds",
    "tiles_per_second",
    "software",
    "at",
    "attempts",
    "mtime_ns",
}
"""What may differ between two runs: durations and counts of attempts."""

CATALOG = "catalog"
"""What the catalog's rows are called among a store's contents."""

_SVG = re.compile(rb"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)")
_CLIP = re.compile(rb"\bp[0-9a-f]{10}\b|\b[0-9a-f]{64}\b")
_LOCK = re.compile(r"(.*\.)?lock")


@dataclass
class Running:
    """A command that was started."""

    pid: int
    log: Path
    ended: Path

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs, and if it was killed."""
        try:
            return int(self.ended.read_text())
        except FileNotFoundError:
            return None

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Wait for its end, at most so long."""
        until = time.monotonic() + seconds
        while self.code is None and time.monotonic() < until:
            time.sleep(min(0.005, max(0.0, until - time.monotonic())))
        return self.code

    def kill(self) -> bool:
        """Kill it and all that it started, and wait until they are gone: was it still at work?"""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                # It may not have become a group yet.
                try:
                    os.kill(self.pid, signal.SIGKILL)
                except ProcessLookupError:
                    return self.code is None
            time.sleep(0.002)
        raise AssertionError(f"{self.pid} does not die")


class CommandLines:
    """Starts the program ``histoencoder`` in processes of their own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        folder.mkdir()
        ours = {k: v for k, v in os.environ.items() if not k.startswith("HISTOENCODER_")}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=ours | threads | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        self._count = 0

    def start(self, *command: str | Path) -> Running:
        """Start a command."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._count += 1
        log, ended = self.folder / f"{self._count}.log", self.folder / f"{self._count}.ended"
        line = json.dumps([[str(word) for word in command], str(log), str(ended)])
        self._server.stdin.write(f"{line}\n")
        self._server.stdin.flush()
        return Running(int(self._server.stdout.readline()), log, ended)

    def run(self, *command: str | Path, code: int = 0) -> str:
        """Run a command to its end and give what it printed."""
        running = self.start(*command)
        assert running.wait() == code, running.log.read_text()
        return running.log.read_text()

    def close(self) -> None:
        self._server.communicate()


# What a store holds ------------------------------------------------------------------------------


def content_of(name: str, content: bytes) -> Any:
    """A file's content without what may differ between two runs.

    Raises:
        Exception: The file is not whole.
    """
    suffix = Path(name).suffix
    if suffix == ".parquet":
        table = pq.read_table(pa.BufferReader(content))
        stamp = json.loads((table.schema.metadata or {}).get(KEY.encode(), b"null"))
        # In words, where no number equals itself but a NaN does.
        return repr(table.to_pylist()), _lasting(stamp)
    if suffix in {".json", ".geojson"}:
        return _lasting(json.loads(content))
    if suffix in {".jpeg", ".png"}:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    elif not content.endswith((b"\n", b">")):  # CSV, SVG, HTML
        raise ValueError(f"{name} is cut short")
    # Names of clipping paths hang on the last digits of a figure's layout, and the fingerprint of
    # the report on them.
    return _SVG.sub(
        lambda found: _CLIP.sub(b"", base64.b64decode(found[1])), _CLIP.sub(b"", content)
    )


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lasting(part) for name, part in value.items() if name not in NOTES}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


def contents_of(store: Store) -> dict[str, Any]:
    """All that a store holds, by relative path, and the rows of the catalog's tables.

    Raises:
        AssertionError: There is a temporary file, or another that nobody expects.
    """
    found: dict[str, Any] = {}
    for path in sorted(store.root.rglob("*")):
        name = path.relative_to(store.root).as_posix()
        if _LOCK.fullmatch(path.name) or path == store.catalog_path:
            continue
        assert not path.name.startswith("."), f"{name} was left behind"
        if path.is_file():
            found[name] = content_of(name, path.read_bytes())
    if store.catalog_path.exists():
        found[CATALOG] = tables_of(store, but=("internal.sources",))
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of files that are missing, too many or different."""
    names = {*found, *wanted}
    return sorted(name for name in names if found.get(name) != wanted.get(name))


class Watcher:
    """Reads a store again and again while others write it, and are killed.

    Attributes:
        looks: How often a file was looked at.
        faults: What was not whole, or stood for something else than in an undisturbed run.
    """

    def __init__(self, store: Store, known: dict[str, list[Any]]) -> None:
        """Watch a store.

        Args:
            store: The store.
            known: By file, all that it may hold.
        """
        self.looks = 0
        self.faults: list[str] = []
        self._store, self._known = store, known
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            for path in self._files():
                self._look(path)
            self._look_into_catalog()

    def _files(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(self._store.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from (
                Path(folder, n) for n in names if not n.startswith(".") and ".lock" not in n
            )

    def _look(self, path: Path) -> None:
        name = path.relative_to(self._store.root).as_posix()
        if path == self._store.catalog_path:
            return
        try:
            content = path.read_bytes()
        except OSError:  # replaced or retired meanwhile
            return
        self.looks += 1
        try:
            found = content_of(name, content)
        except Exception as error:  # noqa: BLE001 - whatever a half file makes of a parser
            self.faults.append(f"{name} is not whole: {error}")
            return
        if name.startswith(layout.COHORT) or path.name == layout.FAILURES:
            return  # they change with each slide
        if found not in self._known.get(name, []):
            self.faults.append(f"{name} holds what no undisturbed run wrote")

    def _look_into_catalog(self) -> None:
        if self._store.catalog_path.exists():
            self.looks += 1
            try:
                with attached(self._store) as connection:
                    names = connection.sql(
                        "SELECT table_schema || '.' || table_name FROM information_schema.tables "
                        "WHERE table_type = 'BASE TABLE'"
                    ).fetchall()
                    for (name,) in names:
                        connection.sql(f"SELECT * FROM {name}").fetchall()
            except Exception as error:  # noqa: BLE001 - DuckDB's, or of a table that is gone
                self.faults.append(f"the catalog is not whole: {error}")


@contextlib.contextmanager
def command_lines(folder: Path, **environment: str) -> Iterator[CommandLines]:
    """`CommandLines` that are closed in the end."""
    lines = CommandLines(folder, **environment)
    try:
        yield lines
    finally:
        lines.close()
