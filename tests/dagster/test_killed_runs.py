"""Runs of the platform are killed; it heals by itself.

A run of each stage is killed once it has made something, and runs of the live platform at random
moments: in the long form, a part of `make chaos`, up to 16 of them.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import dagster as dg
import pytest
from killing import content_of, differences
from test_end_to_end import BIN, REPOSITORY, Live, annotate
from test_launching import parent_of

from histoencoder_core.store import Store
from histoencoder_dagster.partitions import RANGE_END, RANGE_START, SLIDES, UNFINISHED

KILLS = 16 if "HISTOENCODER_CHAOS_KILLS" in os.environ else 4
LIFETIME = 3.0
"""About as long as a run takes here, in seconds."""

SEED = int(os.environ.get("HISTOENCODER_CHAOS_SEED", 0))
NAMES = ("a", "b", "c", "d")
PARTITIONED = ("slides", "tiles", "features", "clusters", "annotations")

STAGES = ("slides", "tiles", "features", "clusters")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def workers(home: Path) -> list[int]:
    """Processes of the platform that execute runs, from their very beginning."""
    forked = {pid for pid in processes() if is_forker_or_run(pid, home)}
    return sorted(pid for pid in forked if parent_of(pid) in forked)


def processes() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def is_forker_or_run(pid: int, home: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return (
        b"histoencoder_dagster.launching" in words
        and f"DAGSTER_HOME={home}".encode() in environment
    )


def run_of(instance: dg.DagsterInstance, pid: int) -> str:
    """What a killed process was to make."""
    for run in instance.get_runs(limit=20):
        told = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
        if any(f"(pid: {pid})" in event.message for event in told):
            assets = sorted(key.path[-1] for key in run.asset_selection or ())
            return "+".join(assets) or run.job_name
    return "a run that was starting"


def kill(pid: int) -> bool:
    """Kill a process and its children, and wait until it is gone."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        group = [pid, *map(int, children.read_text().split())]
    except OSError:
        return False
    for one in group:
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            if one == pid:
                return False
    return True


def patient(live: Live) -> None:
    """Let the daemon look after killed runs at once, and try again as often as they are killed."""
    path = live.home / "dagster.yaml"
    text = path.read_text()
    for before, after in (
        ("free_slots_after_run_end_seconds: 60", "free_slots_after_run_end_seconds: 5"),
        ("start_timeout_seconds: 180", "start_timeout_seconds: 60"),
        ("poll_interval_seconds: 15", "poll_interval_seconds: 5"),
        ("max_retries: 2", "max_retries: 8"),
    ):
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)


def slides_of(store: Store) -> dict[str, object]:
    """What lies in the slides' folders, and the models; nothing temporary may be there."""
    found = {}
    for path in sorted(store.root.rglob("*")):
        name = path.relative_to(store.root).as_posix()
        assert ".tmp" not in path.name, f"{name} was left behind"
        kept = not name.startswith("_cohort/") or name.startswith("_cohort/cluster_")
        if path.is_file() and kept and not path.name.endswith("lock"):
            found[name] = content_of(name, path.read_bytes())
    return found


@pytest.fixture
def live(tmp_path, write_slide):
    """The folders of a platform that has what the fixture `deployment` has."""
    (tmp_path / "live").mkdir()
    live = Live(tmp_path / "live")
    live.env |= {
        "HISTOENCODER_FIRST_FIT_SLIDES": str(len(NAMES)),
        "HISTOENCODER_CLUSTERS__N_CLUSTERS": "[2,3]",
        "HISTOENCODER_BATCH_SIZE": "16",
    }
    for seed, name in enumerate(NAMES):
        write_slide(live.slides / f"{name}.tiff", seed=seed, size=1024)
    return live


def killed_at_work(live: Live, instance: dg.DagsterInstance, stage: str) -> None:
    """Run a stage on all slides, and kill it once one of them is made."""
    tags = json.dumps({RANGE_START: NAMES[0], RANGE_END: NAMES[-1]})
    module = ["-m", "histoencoder_dagster.definitions", "-j", "__ASSET_JOB", "-o", stage]
    words = [BIN / "dagster", "job", "execute", *module, "--tags", tags]
    with (live.home / f"{stage}.log").open("wb") as log:
        run = subprocess.Popen(
            words, cwd=REPOSITORY, env=live.env, stdout=log, stderr=log, start_new_session=True
        )
    first = Store(live.store).slide(NAMES[0])
    while run.poll() is None and first.stamp(stage) is None:
        time.sleep(0.01)
    assert run.poll() is None, (live.home / f"{stage}.log").read_text()
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    [started] = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
    # As the daemon does when it finds a run's process gone.
    instance.report_run_failed(started)
    instance.event_log_storage.free_concurrency_slots_for_run(started.run_id)


def test_a_run_killed_in_each_stage_loses_and_doubles_nothing(live, deployment):
    deployment.change(slides=(live.slides,))
    reference, elsewhere = deployment.settings.store, deployment.instance
    with dg.DagsterInstance.from_config(str(live.home)) as deployment.instance:
        deployment.change(store=live.store)
        deployment.register()
        for stage in STAGES:
            if stage == "clusters":
                deployment.run("cluster_model")
            killed_at_work(live, deployment.instance, stage)
            assert deployment.recorded(stage) < set(NAMES), "it was killed too late"
            if stage == "slides":
                for _ in range(2):  # what was described but not recorded is asked for at once
                    deployment.run_requests(deployment.tick("new_slides"), "describe_slides")
            else:
                deployment.run_due({stage: deployment.due_stages()[stage]})
            assert deployment.recorded(stage) == set(NAMES)
        assert set(deployment.partitions()) == set(NAMES)
    deployment.instance = elsewhere
    deployment.change(store=reference)
    deployment.register()
    for stage in ("slides", "tiles", "features"):
        assert deployment.run(stage).success
    deployment.run("cluster_model")
    deployment.run("clusters")
    assert differences(slides_of(Store(live.store)), slides_of(deployment.store)) == []


def test_killed_runs_are_made_up_for(live, deployment):
    patient(live)
    annotate(live.slides / "annotations", "a", "tumour")
    rng = random.Random(SEED)
    hits: Counter[str] = Counter()
    with live.running(), dg.DagsterInstance.from_config(str(live.home)) as instance:
        deadline = time.monotonic() + 900

        def done() -> bool:
            keys = [dg.AssetKey(name) for name in PARTITIONED]
            made = [instance.get_materialized_partitions(key) for key in keys]
            idle = not instance.get_runs_count(dg.RunsFilter(statuses=UNFINISHED))
            return idle and all(partitions == set(NAMES) for partitions in made)

        while hits.total() < KILLS and not done() and time.monotonic() < deadline:
            running = workers(live.home)
            if not running:
                time.sleep(0.2)
                continue
            pid = rng.choice(running)
            time.sleep(rng.uniform(0, LIFETIME))
            # Else what comes first would be killed over and over, and what comes after it never.
            if hits[run_of(instance, pid)] < KILLS / 4 and kill(pid):
                hits[run_of(instance, pid)] += 1
        while not done():
            assert time.monotonic() < deadline, f"not done after {dict(hits)}"
            time.sleep(1)
        time.sleep(8)  # more than slots are held after the end of a run
        held = {
            pool: info.active_slot_count
            for pool in instance.event_log_storage.get_concurrency_keys()
            if (info := instance.event_log_storage.get_concurrency_info(pool))
        }
        assert set(instance.get_dynamic_partitions(SLIDES)) == set(NAMES)
    assert held
    assert not any(held.values()), held
    told = {"seed": SEED, "kills": hits.total(), "by run": dict(hits.most_common()), "slots": held}
    print(json.dumps(told))  # noqa: T201 - the figures of `make chaos`
    assert hits

    # The same slides, undisturbed.
    deployment.change(slides=(live.slides,))
    deployment.register()
    for stage in ("slides", "tiles", "features"):
        assert deployment.run(stage).success
    deployment.run("cluster_model")
    deployment.run("clusters")
    deployment.run("labels", slides=["a"])
    deployment.run("catalog", "cluster_labels")
    deployment.run("annotations")
    assert differences(slides_of(Store(live.store)), slides_of(deployment.store)) == []
