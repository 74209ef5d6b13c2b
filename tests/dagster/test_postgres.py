"""What Dagster keeps, in PostgreSQL: the same path, and nothing of a slide that was forgotten."""

import os
import shutil
import subprocess
from pathlib import Path

import dagster as dg
import pytest
from conftest import deployed
from dagster import DagsterEventType

from histoencoder_dagster.forget import forget_in_dagster

REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("initdb") is None, reason="needs PostgreSQL's programs"),
]


@pytest.fixture
def platform(tmp_path, monkeypatch):
    """A deployment on a server of its own, as `deploy/dagster.postgres.yaml` tells."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from temporary_postgres import postgres

    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(REPOSITORY / "deploy" / "dagster.postgres.yaml", home / "dagster.yaml")
    with postgres() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # As for runs that are forked.
        monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", "100")
        with deployed(tmp_path, dg.DagsterInstance.from_config(str(home))) as deployment:
            yield deployment


def dump():
    """All that the server holds, as text."""
    server = ["-h", os.environ["DAGSTER_PG_HOST"], "-p", os.environ["DAGSTER_PG_PORT"]]
    done = subprocess.run(
        ["pg_dump", *server, "-U", os.environ["DAGSTER_PG_USERNAME"], os.environ["DAGSTER_PG_DB"]],
        env=os.environ | {"PGPASSWORD": os.environ["DAGSTER_PG_PASSWORD"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_slides_go_through_all_stages_and_one_is_forgotten(platform):
    names = {"zz-one", "zz-two", "zz-three"}
    platform.drop(*sorted(names))
    platform.drop_broken("zz-broken.svs")
    written = []
    store_batch = platform.instance.event_log_storage.store_event_batch
    platform.instance.event_log_storage.store_event_batch = lambda events: (
        written.append(len(events)),
        store_batch(events),
    )
    for _ in range(2):
        platform.run_requests(platform.tick("new_slides"), "describe_slides")
    platform.follow()
    assert platform.recorded("features") == names
    assert written, "the records of a batch of slides are written at once"
    platform.run_requests(platform.tick("first_cluster_model"), "fit_clusters")
    platform.follow()
    assert platform.recorded("clusters") == names
    for stage in ("slides", "tiles", "features", "clusters"):
        for name in names:
            assert platform.metadata(stage, name)["fingerprint"]
    assert platform.metadata("completeness")["slides_failed"] == 1
    assert platform.due() == {}

    # One at the end of the range that its runs were of.
    gone = [name for name in platform.partitions() if name in names][-1]
    assert gone in dump()
    told = forget_in_dagster(platform.instance, [gone], [str(platform.slides / f"{gone}.tiff")])
    assert told["partitions"] == 1
    assert gone not in dump()
    assert platform.recorded("clusters") == names - {gone}
    last = platform.instance.get_latest_storage_id_by_partition(
        dg.AssetKey("features"), DagsterEventType.ASSET_MATERIALIZATION
    )
    assert last.keys() == names - {gone}
