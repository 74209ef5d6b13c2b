"""The live platform: files are dropped into a folder, and purity is read through SQL."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import dagster as dg
import pytest

from histoencoder_core.errors import KINDS

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECONDS = 600
"""Time for all that a test waits for."""

PARTITIONS = """query($key: [String!]!) {
  assetNodeOrError(assetKey: {path: $key}) { ... on AssetNode { assetPartitionStatuses {
    ... on DefaultPartitionStatuses { materializedPartitions failedPartitions } } } } }"""
CHECKS = """query($key: [String!]!) {
  assetNodeOrError(assetKey: {path: $key}) { ... on AssetNode { assetChecksOrError {
    ... on AssetChecks { checks { name executionForLatestMaterialization { status evaluation {
      success severity metadataEntries { label ... on MarkdownMetadataEntry { mdStr } } }
    } } } } } } }"""
STALE = """query($key: [String!]!, $slide: String!) {
  assetNodeOrError(assetKey: {path: $key}) { ... on AssetNode {
    staleStatus(partition: $slide) } } }"""
RUNS = "{ runsOrError(limit: 100) { ... on Runs { results { status jobName } } } }"


class Live:
    """Web server and daemon on folders of their own."""

    def __init__(self, folder):
        self.slides, self.store = folder / "slides", folder / "store"
        self.home, self.log = folder / "home", folder / "dagster.log"
        for path in (self.slides, self.home):
            path.mkdir()
        shutil.copy(REPOSITORY / "deploy" / "dagster.yaml", self.home)
        ours = {k: v for k, v in os.environ.items() if not k.startswith("HISTOENCODER_")}
        self.env = ours | {
            "DAGSTER_HOME": str(self.home),
            "HISTOENCODER_SLIDES": str(self.slides),
            "HISTOENCODER_STORE": str(self.store),
            "HISTOENCODER_SETTLE_SECONDS": "1",
            "HISTOENCODER_TICK_SECONDS": "4",
            "HISTOENCODER_FIRST_FIT_SLIDES": "2",
            "HISTOENCODER_DEVICE": "cpu",
            "HISTOENCODER_TILING": '{"tile_px": 128, "overlap": 0}',
            "HISTOENCODER_ENCODER": '{"name": "untrained:test_resnet", "input_size": 32}',
            "HISTOENCODER_CLUSTERS__N_CLUSTERS": "[4,8]",
            "OMP_NUM_THREADS": "1",
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.started = time.monotonic()
        self.told = []

    @contextlib.contextmanager
    def running(self):
        # Two processes that make the same new SQLite files at once get in each other's way.
        with dg.DagsterInstance.from_config(str(self.home)):
            pass
        with self.log.open("wb") as log:
            server = subprocess.Popen(
                [
                    BIN / "dagster",
                    "dev",
                    "-w",
                    "workspace.yaml",
                    "-h",
                    "127.0.0.1",
                    "-p",
                    str(self.port),
                ],
                cwd=REPOSITORY,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield
            except BaseException:
                sys.stdout.write(self.log.read_text("utf-8", "replace")[-50_000:])
                raise
            finally:
                sys.stdout.write("\n".join(["", *self.told, ""]))
                server.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(20)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                server.wait(10)

    def wait(self, what, found):
        """Wait until `found` gives something true, and give it."""
        while (now := time.monotonic() - self.started) < SECONDS:
            answer = found()
            if answer:
                self.told.append(f"{now:6.1f} s  {what}")
                return answer
            time.sleep(0.5)
        raise AssertionError(f"after {SECONDS} s there was still no {what}")

    def ask(self, query, **variables):
        """Ask the web server's GraphQL; None while it does not answer."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                content = json.loads(answer.read())
        except (urllib.error.URLError, OSError):
            return None
        assert "errors" not in content, content["errors"]
        return content["data"]

    def wait_for_sql(self, what, query):
        """Wait until a query has rows; each catalog is asked once, as starting takes seconds."""
        asked = []

        def rows():
            catalog = self.store / "_cohort" / "catalog.duckdb"
            made = catalog.stat().st_mtime_ns if catalog.exists() else None
            if made is None or made in asked:
                return None
            asked.append(made)
            return self.sql(query)

        return self.wait(what, rows)

    def sql(self, query):
        """Ask the catalog as a user does."""
        command = [BIN / "histoencoder", "sql", query, "--format", "json"]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def node(self, query, asset, **variables):
        answer = self.ask(query, key=[asset], **variables)
        return answer["assetNodeOrError"] if answer else None

    def partitions(self, asset):
        """Slides of which an asset is there, and those that failed."""
        status = self.node(PARTITIONS, asset)["assetPartitionStatuses"]
        return set(status["materializedPartitions"]), set(status["failedPartitions"])

    def all_checks(self):
        """``{check: (passed, severity, what is at fault)}``; None before all are up to date."""
        told = {}
        for asset in ("tiles", "features", "clusters"):
            for check in self.node(CHECKS, asset)["assetChecksOrError"]["checks"]:
                execution = check["executionForLatestMaterialization"]
                said = execution and execution["evaluation"]
                if not said:
                    return None
                (fault,) = [e["mdStr"] for e in said["metadataEntries"] if e["label"] == "at_fault"]
                told[check["name"]] = (said["success"], said["severity"], fault)
        return told

    def runs(self):
        return self.ask(RUNS)["runsOrError"]["results"]

    def clusters(self, slides):
        return {s: (self.store / s / "clusters.parquet").read_bytes() for s in slides}


@pytest.fixture
def live(tmp_path):
    return Live(tmp_path)


def annotate(folder, slide, label):
    ring = [[0, 0], [1024, 0], [1024, 1024], [0, 1024], [0, 0]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": label}},
    }
    folder.mkdir(exist_ok=True)
    content = {"type": "FeatureCollection", "features": [feature]}
    (folder / f"{slide}.geojson").write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_dropped_slide_to_purity_in_sql(live, write_slide):
    write_slide(live.slides / "a_no_mpp.tiff", mpp=None)
    write_slide(live.slides / "b.tiff", size=1024)
    write_slide(live.slides / "c_blank.tiff", tissue=False)
    (live.slides / "d_broken.svs").write_bytes(b"II*\0 no slide at all")
    good = {"b", "c_blank"}
    with live.running():
        live.wait("web server", lambda: live.node(PARTITIONS, "slides"))
        live.wait("slides", lambda: live.partitions("slides")[0])
        annotate(live.slides / "annotations", "b", "tumour")
        live.wait("tiles", lambda: live.partitions("tiles")[0])
        live.wait("features", lambda: live.partitions("features")[0] == good)
        live.wait("model", lambda: list(live.store.glob("_cohort/cluster_models/*.parquet")))

        # One more slide, too late for the model.
        write_slide(live.slides / "e_late.tiff", seed=9)
        dropped = time.monotonic()
        live.wait("clusters", lambda: live.partitions("clusters")[0] >= good)
        before = live.clusters(good)
        purity = "SELECT k, label, purity, untrained FROM cluster_purity WHERE labelled_tiles > 0"
        rows = live.wait_for_sql("purity in SQL", purity)
        assert {(row["k"], row["label"], row["untrained"]) for row in rows} == {
            (4, "tumour", True),
            (8, "tumour", True),
        }
        late = "SELECT DISTINCT model, current FROM clusters WHERE slide = 'e_late'"
        (model,) = live.wait_for_sql("late slide's clusters in SQL", late)
        live.told.append(f"{time.monotonic() - dropped:6.1f} s  from its drop")
        fitted = "SELECT version AS model, true AS current FROM model WHERE slides = 2"
        assert live.sql(fitted) == [model]
        assert live.clusters(good) == before, "the others were not touched"
        assert len(list(live.store.glob("_cohort/cluster_models/*.parquet"))) == 1

        # What clusters mean is written onto slides, and the report is drawn.
        good |= {"e_late"}
        live.wait("annotations", lambda: live.partitions("annotations")[0] == good)
        drawn = json.loads((live.store / "e_late" / "annotations.geojson").read_text())
        classes = {f["properties"]["classification"]["name"] for f in drawn["features"]}
        assert classes <= {"tumour"}
        page = live.store / "_cohort" / "report.html"
        live.wait("report", page.exists)
        assert "UNTRAINED" in page.read_text("utf-8")

        # What Dagster knows of all this, and shows.
        assert live.partitions("slides") == (good | {"a_no_mpp"}, {"d_broken"})
        assert live.partitions("tiles") == (good, {"a_no_mpp"})
        # The run that was to make its features ended with its tiles; nothing was asked for since.
        assert live.partitions("features") == (good, {"a_no_mpp"})
        assert live.partitions("clusters") == (good, set())
        assert live.partitions("labels") == ({"b"}, set())
        checks = live.wait("checks of all that is there", live.all_checks)
        passed, severity, fault = checks.pop("tissue_found")
        assert (passed, severity, fault.split("**")[1]) == (False, "WARN", "c_blank")
        assert all(passed for passed, *_ in checks.values())
        assert {live.node(STALE, "tiles", slide=s)["staleStatus"] for s in good} == {"FRESH"}
        runs = [(run["status"], run["jobName"]) for run in live.runs()]
        assert [job for status, job in runs if status == "FAILURE"] == [
            "work_up_slides",
            "describe_slides",
        ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_good_slides_two_broken_ones_and_one_that_grows(live, write_slide):
    growing, stop = live.slides / "growing.svs", threading.Event()

    def grow():
        while not stop.wait(1):
            with growing.open("ab") as file:
                file.write(b"x" * 1000)

    growing.write_bytes(b"II*\0")
    scanner = threading.Thread(target=grow)
    scanner.start()
    try:
        with live.running():
            live.wait("web server", lambda: live.node(PARTITIONS, "slides"))
            for number in range(10):
                write_slide(live.slides / f"good_{number}.tiff", seed=number)
            (live.slides / "broken.svs").write_bytes(b"II*\0 no slide at all")
            whole = write_slide(live.slides / "torn.tiff", seed=11).read_bytes()
            (live.slides / "torn.tiff").write_bytes(whole[: len(whole) // 2])
            good = {f"good_{number}" for number in range(10)}
            live.wait("features", lambda: live.partitions("features")[0] >= good)
            expected = {"done": 10, "failed": 2, "waiting": 1}
            counted = " AND ".join(
                f"count(*) FILTER (state = '{state}') = {n}" for state, n in expected.items()
            )
            live.wait_for_sql(
                "completeness in SQL",
                f"SELECT true AS ok FROM completeness WHERE stage = 'slides' HAVING {counted}",
            )
            reasons = live.sql(
                "SELECT slide, kind, reason FROM completeness "
                "WHERE stage = 'slides' AND state IN ('failed', 'waiting') ORDER BY slide"
            )
            assert [row["slide"] for row in reasons] == ["broken", "growing.svs", "torn"]
            assert all(row["reason"] for row in reasons)
            assert {row["kind"] for row in reasons if row["slide"] != "growing.svs"} <= KINDS.keys()
            assert live.partitions("slides") == (good, {"broken", "torn"})
            status = subprocess.run(
                [BIN / "histoencoder", "status"], env=live.env, capture_output=True, text=True
            )
            assert status.returncode == 1, "two slides failed"
            [header, row] = [line.split() for line in status.stdout.splitlines()[:2]]
            told = dict(zip(header, row, strict=False))
            assert {name: int(told[name]) for name in expected} == expected
            assert "waiting: growing.svs" in status.stdout
            # Once it is written to its end, it is taken up.
            stop.set()
            write_slide(growing.with_suffix(".tiff"), seed=12)
            growing.unlink()
            live.wait("last slide", lambda: "growing" in live.partitions("features")[0])
    finally:
        stop.set()
        scanner.join()
