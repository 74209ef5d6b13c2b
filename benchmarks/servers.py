"""Dagster's daemon and web server on a deployment: their memory, their ticks, their answers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.scheduler.instigation import TickStatus

Line = dict[str, Any]

PATIENCE = 180.0
"""Seconds that a server may take to start."""


_STATS = "partitionStats {numMaterialized numPartitions numFailed numMaterializing}"
_STATUSES = (
    "assetPartitionStatuses {... on DefaultPartitionStatuses {"
    "materializedPartitions failedPartitions unmaterializedPartitions materializingPartitions}}"
)
_EVENT = "timestamp runId partition metadataEntries {label description}"


def _of_node(selection: str) -> str:
    node = f"{{... on AssetNode {{{selection}}}}}"
    return _query(f"assetNodeOrError(assetKey: {{path: [$asset]}}) {node}")


def _of_events(selection: str) -> str:
    asset = f"{{... on Asset {{{selection}}}}}"
    return _query(f"assetOrError(assetKey: {{path: [$asset]}}) {asset}")


def _query(selection: str) -> str:
    slide = ", $slide: String!" if "$slide" in selection else ""
    return f"query($asset: String!{slide}) {{{selection}}}"


QUERIES = {
    "asset graph": "{assetNodes {assetKey {path} groupName isPartitioned dependencyKeys {path}}}",
    "state of all assets": f"{{assetNodes {{assetKey {{path}} {_STATS}}}}}",
    "partition stats": _of_node(_STATS),
    "partition statuses": _of_node(_STATUSES),
    "partition keys": _of_node("partitionKeysByDimension {name partitionKeys}"),
    "staleness of a partition": _of_node("staleStatus(partition: $slide)"),
    "latest of a partition": _of_events(
        f"assetMaterializations(partitions: [$slide], limit: 1) {{{_EVENT}}}"
    ),
    "latest 100 events": _of_events(f"assetMaterializations(limit: 100) {{{_EVENT}}}"),
    "latest 25 runs": "{runsOrError(limit: 25) {... on Runs {results {id status tags {key}}}}}",
}
"""What the web UI asks for on an asset's page and around it, by what it shows."""


def served(
    environment: Mapping[str, str], *, asset: str, slide: str, seconds: float, repeats: int
) -> Iterator[Line]:
    """Start both, as docs/operations.md tells, let them tick, ask them.

    Args:
        environment: Of the deployment; `DAGSTER_HOME` among it.
        asset: The asset that is asked about.
        slide: The partition that is asked about.
        seconds: How long the daemon ticks.
        repeats: How often each query is asked.
    """
    port = free_port()
    with contextlib.ExitStack() as stack:
        code_process, location = stack.enter_context(code_server(environment))
        web = ["-m", "dagster_webserver", "-h", "127.0.0.1", "-p", str(port), *location]
        daemon = ["-m", "dagster._daemon", "run", *location]
        started = time.time()
        daemon_process, web_process = (
            stack.enter_context(running([sys.executable, *command], environment))
            for command in (daemon, web)
        )
        _wait_for(f"http://127.0.0.1:{port}/server_info")
        yield {"measure": "start of the web server", "unit": "s", "wall": time.time() - started}
        for name, query in QUERIES.items():
            times, size = [], 0
            for _ in range(repeats):
                began = time.perf_counter()
                size = len(_ask(port, query, {"asset": asset, "slide": slide}))
                times.append(round(time.perf_counter() - began, 3))
            yield {
                "measure": f"GraphQL: {name}",
                "unit": "s",
                "wall": statistics.median(times),
                "first": times[0],
                "bytes": size,
            }
        time.sleep(max(0.0, seconds - (time.time() - started)))
        for name, process in (
            ("daemon", daemon_process),
            ("web server", web_process),
            ("code server", code_process),
        ):
            own, below = resident_mb(process.pid)
            yield {
                "measure": f"memory of the {name}",
                "unit": "MB",
                "own": own,
                "of_what_it_started": below,
            }
    yield from _ticks_since(started)


@contextlib.contextmanager
def code_server(
    environment: Mapping[str, str],
) -> Iterator[tuple[subprocess.Popen[bytes], list[str]]]:
    """The server of the platform's code: its process, and the words that name it to others."""
    port = free_port()
    place = ["-h", "127.0.0.1", "-p", str(port)]
    module = ["-m", "histoencoder_dagster.definitions", "--location-name", "histoencoder_dagster"]
    words = [sys.executable, "-m", "dagster", "code-server", "start", *module, *place]
    with running(words, environment) as process:
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > end:
                raise TimeoutError("the code server does not start")
            time.sleep(0.5)
        yield process, ["--grpc-host", "127.0.0.1", "--grpc-port", str(port)]


@contextlib.contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process, ended with all that it started."""
    log = Path(environment["DAGSTER_HOME"]) / f"{command[2]}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def resident_mb(pid: int) -> tuple[int, int]:
    """Memory in MB of a process, and of all that it started; of what several share, its part."""
    children: dict[int, list[int]] = {}
    memory = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, KeyError):
            status = _values(folder / "status")
            own, parent = int(status["Pid"]), int(status["PPid"])
            children.setdefault(parent, []).append(own)
            memory[own] = int(_values(folder / "smaps_rollup")["Pss"].split()[0]) / 1024
    below, waiting = 0.0, list(children.get(pid, []))
    while waiting:
        child = waiting.pop()
        below += memory.get(child, 0.0)
        waiting += children.get(child, [])
    return round(memory.get(pid, 0.0)), round(below)


def _values(path: Path) -> dict[str, str]:
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return {name: value.strip() for name, _, value in lines}


def _ticks_since(started: float) -> Iterator[Line]:
    """What the daemon's ticks took, as it recorded them."""
    with dg.DagsterInstance.get() as instance:
        for state in instance.all_instigator_state():
            records = instance.get_ticks(state.instigator_origin_id, state.selector_id)
            done = [
                tick for tick in records
                if tick.timestamp >= started and tick.status is not TickStatus.STARTED
            ]  # fmt: skip
            if not done:
                continue
            took = [
                round((tick.end_timestamp or tick.timestamp) - tick.timestamp, 3) for tick in done
            ]
            yield {
                "measure": f"daemon's tick of {state.instigator_name}",
                "unit": "s",
                "wall": round(statistics.median(took), 3),
                "max": max(took),
                "ticks": len(took),
                "failed": sum(tick.status is TickStatus.FAILURE for tick in done),
            }


def _ask(port: int, query: str, variables: dict[str, str]) -> bytes:
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = response.read()
    if b'"errors"' in answer[:200] or b"PythonError" in answer[:200]:
        raise RuntimeError(answer[:2000].decode())
    return bytes(answer)


def _wait_for(url: str) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(url, timeout=10).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
        else:
            return


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
