"""Runs forked from a process that has imported what they need."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest
import waiting
from dagster import DagsterRunStatus
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._core.errors import DagsterInvariantViolationError
from dagster._core.launcher import LaunchRunContext, WorkerStatus
from dagster._core.remote_origin import (
    GrpcServerCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.test_utils import create_test_daemon_workspace_context
from dagster._core.workspace.load_target import EmptyWorkspaceTarget
from dagster._daemon.monitoring import execute_run_monitoring_iteration

from histoencoder_dagster.launching import ForkingRunLauncher, launcher
from histoencoder_dagster.launching.process import Process, process_of, tags_of

DEPLOY = Path(__file__).parents[2] / "deploy"
SECONDS = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="runs are forked on Linux"),
]


class Launched:
    """A run that waits, on an instance as it is deployed."""

    def __init__(self, instance, folder, *, tags=None, interpreter=sys.executable):
        self.instance, self.folder = instance, folder
        folder.mkdir()
        origin = ReconstructableJob.for_file(waiting.__file__, "waiting").get_python_origin()
        origin = origin._replace(
            repository_origin=origin.repository_origin._replace(executable_path=interpreter)
        )
        config = {"ops": {"wait": {"config": {"folder": str(folder)}}}}
        self.run_id = instance.create_run_for_job(
            waiting.waiting, run_config=config, job_code_origin=origin, tags=tags
        ).run_id
        self.launch()

    def launch(self):
        self.instance.launch_run(self.run_id, workspace=None)

    @property
    def run(self):
        return self.instance.get_run_by_id(self.run_id)

    @property
    def process(self):
        return process_of(self.run)

    def until(self, found):
        end = time.monotonic() + SECONDS
        while not found():
            assert time.monotonic() < end, [e.message for e in self.instance.all_logs(self.run_id)]
            time.sleep(0.05)

    def until_it_waits(self):
        self.until((self.folder / "waits").exists)
        return self

    def until_it_is(self, status):
        self.until(lambda: self.run.status == status)

    def go_on(self):
        (self.folder / "go on").touch()


def parent_of(pid: int) -> int | None:
    """None of a process that has ended meanwhile."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


@pytest.fixture
def instance(tmp_path):
    shutil.copy(DEPLOY / "dagster.yaml", tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert isinstance(instance.run_launcher, ForkingRunLauncher)
        yield instance
        for run in instance.get_runs():
            process = process_of(run)
            if process is not None and process.is_alive:
                os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def launch(instance, tmp_path):
    return lambda name, **asked: Launched(instance, tmp_path / name, **asked)


def test_a_run_is_a_process_of_its_own_that_is_on_record_and_ends(launch):
    one, two = launch("one").until_it_waits(), launch("two").until_it_waits()
    assert one.process.is_here
    assert one.process.is_alive
    assert one.process != two.process
    forker = parent_of(one.process.pid)
    assert parent_of(two.process.pid) == forker != os.getpid()
    told = [e.message for e in one.instance.all_logs(one.run_id)]
    assert f"Started process for run (pid: {one.process.pid})." in told
    one.go_on()
    one.until_it_is(DagsterRunStatus.SUCCESS)
    one.until(lambda: not Path(f"/proc/{one.process.pid}").exists())  # nor is it a zombie
    assert two.process.is_alive


def test_a_run_that_is_asked_to_stop_ends_as_canceled(launch):
    run = launch("run").until_it_waits()
    assert run.instance.run_launcher.terminate(run.run_id)
    run.until_it_is(DagsterRunStatus.CANCELED)
    run.until(lambda: not run.process.is_alive)
    assert not run.instance.run_launcher.terminate(run.run_id)


def test_runs_outlive_the_daemon_and_what_they_were_forked_from(launch):
    one = launch("one").until_it_waits()
    forker = parent_of(one.process.pid)
    one.instance.run_launcher.dispose()
    assert not Path(f"/proc/{forker}").exists()
    assert one.process.is_alive
    two = launch("two").until_it_waits()
    forker = parent_of(two.process.pid)
    os.kill(forker, signal.SIGKILL)
    two.until(lambda: parent_of(two.process.pid) != forker)
    three = launch("three").until_it_waits()
    for run in (one, two, three):
        run.go_on()
        run.until_it_is(DagsterRunStatus.SUCCESS)


def test_a_killed_run_is_told_as_failed_so_that_dagster_tries_again(launch):
    killed, other = launch("killed").until_it_waits(), launch("other").until_it_waits()
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.until(lambda: not killed.process.is_alive)
    monitor(killed.instance)
    assert killed.run.status == DagsterRunStatus.FAILURE
    assert killed.run.tags["dagster/will_retry"] == "true"
    assert other.run.status == DagsterRunStatus.STARTED
    [*_, told] = killed.instance.all_logs(killed.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
    assert f"process {killed.process.pid} is gone" in told.message


def test_a_run_of_before_the_machine_was_started_anew_is_told_as_failed(launch):
    run = launch("run").until_it_waits()
    here = run.process
    for other, status in (
        (Process(here.host, "an-earlier-boot", here.started, here.pid), WorkerStatus.FAILED),
        (Process(here.host, here.boot, here.started - 1, here.pid), WorkerStatus.FAILED),
        (Process("elsewhere", here.boot, here.started, here.pid), WorkerStatus.RUNNING),
        (here, WorkerStatus.RUNNING),
    ):
        run.instance.add_run_tags(run.run_id, tags_of(run.run_id, other))
        health = run.instance.run_launcher.check_run_worker_health(run.run)
        assert (other, health.status) == (other, status)
        stopped = status is WorkerStatus.RUNNING and other == here
        assert run.instance.run_launcher.terminate(run.run_id) is stopped


def test_a_run_that_is_tried_again_is_not_taken_for_the_process_of_before(launch):
    killed = launch("killed").until_it_waits()
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.until(lambda: not killed.process.is_alive)
    again = launch("again", tags=killed.run.tags)
    launcher_of = again.instance.run_launcher
    assert launcher_of.check_run_worker_health(again.run).status is WorkerStatus.RUNNING
    again.until_it_waits()
    assert again.process.is_alive


def test_a_run_that_is_launched_twice_is_executed_once(launch):
    run = launch("run").until_it_waits()
    first = run.process
    told = "Ignoring a duplicate run"
    context = LaunchRunContext(run.run, None)
    run.instance.run_launcher.launch_run(context)
    run.until(lambda: any(told in e.message for e in run.instance.all_logs(run.run_id)))
    assert run.process == first
    run.go_on()
    run.until_it_is(DagsterRunStatus.SUCCESS)


def test_code_that_is_installed_or_served_elsewhere_is_left_to_dagsters_launcher(launch):
    with pytest.raises(DagsterInvariantViolationError, match="DefaultRunLauncher requires"):
        launch("run", interpreter="/elsewhere/bin/python")
    run = launch("another").until_it_waits().run
    for host, forked in (("127.0.0.1", True), ("code.example", False)):
        place = GrpcServerCodeLocationOrigin(host=host, port=4000, location_name="x")
        origin = RemoteJobOrigin(RemoteRepositoryOrigin(place, "__repository__"), "waiting")
        served = run._replace(remote_job_origin=origin)
        assert launcher._can_fork(served, run.job_code_origin) is forked


def test_runs_are_of_the_code_as_it_is(launch, tmp_path, monkeypatch):
    for name in ("histoencoder_core", "histoencoder_dagster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").touch()
    monkeypatch.setattr(launcher, "_PACKAGES", tmp_path)
    one, two = launch("one").until_it_waits(), launch("two").until_it_waits()
    (tmp_path / "histoencoder_core" / "b.py").touch()
    three = launch("three").until_it_waits()
    assert parent_of(two.process.pid) == parent_of(one.process.pid)
    assert parent_of(three.process.pid) != parent_of(two.process.pid)


def test_a_forker_that_can_not_import_fails_the_run_and_not_the_daemon(launch, monkeypatch):
    monkeypatch.setattr(launcher, "__package__", "histoencoder_dagster.no_such_module")
    with pytest.raises(Exception, match="forked from is of no use"):
        launch("run")
    monkeypatch.undo()
    launch("another").until_it_waits()


def test_what_works_slides_up_is_imported_before_runs_are_forked(tmp_path, write_slide):
    """Else each run imports it for itself."""
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides" / "a.tiff")
    code = """
import importlib, sys, threading
from histoencoder_dagster.launching.forker import IMPORTED
for name in IMPORTED:
    importlib.import_module(name)
before = {*sys.modules}
assert threading.active_count() == 1, "a thread does not survive a fork"
assert not sys.modules["torch"].cuda.is_initialized()
import dagster as dg
from histoencoder_dagster.definitions import defs
from histoencoder_dagster.partitions import SLIDES
instance = dg.DagsterInstance.ephemeral()
instance.add_dynamic_partitions(SLIDES, [*defs.resources["platform"].register_slides()])
for job, stages in (
    ("describe_slides", ["slides"]),
    ("work_up_slides", ["tiles", "features"]),
    ("fit_clusters", None),
    ("work_up_slides", ["clusters"]),
):
    assets = stages and [dg.AssetKey(stage) for stage in stages]
    done = defs.resolve_job_def(job).execute_in_process(
        instance=instance, partition_key=stages and "a", asset_selection=assets
    )
    assert done.success
print("new:", *({*sys.modules} - before))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HISTOENCODER_")}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=environment | {
            "HISTOENCODER_SLIDES": str(tmp_path / "slides"),
            "HISTOENCODER_STORE": str(tmp_path / "store"),
            "HISTOENCODER_DEVICE": "cpu",
            "HISTOENCODER_BACKEND": "eager",
            "HISTOENCODER_TILING": '{"tile_px": 128, "overlap": 0}',
            "HISTOENCODER_ENCODER": '{"name": "untrained:test_resnet", "input_size": 32}',
            "HISTOENCODER_CLUSTERS__N_CLUSTERS": "[2]",
        },
    )  # fmt: skip
    new = told.stdout.rpartition("new:")[2].split()
    large = {"torch", "torchvision", "timm", "histoprep", "sklearn", "scipy", "matplotlib"}
    assert [name for name in new if name.split(".")[0] in large] == []


def monitor(instance):
    with create_test_daemon_workspace_context(EmptyWorkspaceTarget(), instance) as context:
        errors = [*execute_run_monitoring_iteration(context, logging.getLogger())]
    assert errors.count(None) == len(errors)
