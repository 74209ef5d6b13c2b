"""Two instances of Dagster, each with a daemon of its own, may work on one store."""

import json
import shutil
import subprocess

import dagster as dg
import pytest
from test_end_to_end import BIN, REPOSITORY, Live

from histoencoder_core.slides import Register, find_slides
from histoencoder_core.store import Store
from histoencoder_dagster.partitions import RANGE_END, RANGE_START, SLIDES

NAMES = ("a", "b", "c", "d", "e", "f")


def materialise(asset, *homes, env):
    """Make an asset of all slides from several instances at once; what each told of each slide."""
    tags = json.dumps({RANGE_START: NAMES[0], RANGE_END: NAMES[-1]})
    module = ["-m", "histoencoder_dagster.definitions", "-j", "__ASSET_JOB", "-o", asset]
    command = [BIN / "dagster", "job", "execute", *module, "--tags", tags]
    runs = [
        subprocess.Popen(command, cwd=REPOSITORY, env=env | {"DAGSTER_HOME": str(home)}, stderr=-1)
        for home in homes
    ]
    for run in runs:
        _, told = run.communicate(timeout=300)
        assert run.returncode == 0, told.decode()[-5000:]
    made = []
    for home in homes:
        with dg.DagsterInstance.from_config(str(home)) as instance:
            key = dg.AssetKey(asset)
            events = instance.fetch_materializations(key, limit=100).records
            made.append({e.partition_key: e.asset_materialization.metadata for e in events})
    return made


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_slide_is_worked_on_by_one_and_both_have_it_on_record(tmp_path, write_slide):
    live = Live(tmp_path)
    other = tmp_path / "other home"
    shutil.copytree(live.home, other)
    for seed, name in enumerate(NAMES):
        write_slide(live.slides / f"{name}.tiff", seed=seed, size=2048)
    Register(Store(live.store)).assign(find_slides(live.slides))
    for home in (live.home, other):
        with dg.DagsterInstance.from_config(str(home)) as instance:
            instance.add_dynamic_partitions(SLIDES, list(NAMES))
    for asset in ("slides", "tiles"):
        one, two = materialise(asset, live.home, other, env=live.env)
        assert set(one) == set(two) == set(NAMES)
        for name in NAMES:
            assert one[name]["fingerprint"] == two[name]["fingerprint"]
            by = one[name]["recomputed"].value + two[name]["recomputed"].value
            assert by == 1, f"{asset} of {name} was made by {by} of 2"
    assert not list(Store(live.store).root.rglob("*.tmp*"))
