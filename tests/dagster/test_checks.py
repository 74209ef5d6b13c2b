"""Each check names the slides at fault, and only those."""

import shutil

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from histoencoder_core.settings import ClusterSettings


@pytest.fixture
def done(deployment, done_store):
    shutil.copytree(done_store, deployment.settings.store)
    return deployment


@pytest.fixture
def verdict(done):
    """A function from a check's name to what it says now."""

    def evaluate(name):
        selection = dg.AssetSelection.checks(
            *(key for d in done.defs.asset_checks for key in d.check_keys if key.name == name)
        )
        result = dg.materialize(
            [*done.defs.assets, *done.defs.asset_checks],
            selection=selection,
            instance=done.instance,
            resources={"platform": done.platform},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        (told,) = result.get_asset_check_evaluations()
        listed = told.metadata["at_fault"].value
        slides = {line.split("**")[1] for line in listed.splitlines() if "**" in line}
        return told.passed, told.severity.value, slides

    return evaluate


def tamper(deployment, slide_id, stage, change):
    """Change a table without changing what it says of its origin."""
    path = deployment.folder(slide_id).record(stage)
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def replaced(table, name, column):
    index = table.column_names.index(name)
    return table.set_column(index, table.schema.field(name).with_type(column.type), column)


NAMES = (
    "tissue_found",
    "features_finite",
    "feature_rows_equal_tile_rows",
    "clusters_cover_every_tile",
    "slides_are_like_the_training_slides",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_cohort_passes(verdict, name):
    assert verdict(name)[::2] == (True, set())


def test_a_slide_without_tissue_is_a_warning(done, verdict):
    done.drop("blank", tissue=False)
    done.register()
    for stage in ("slides", "tiles", "features", "clusters"):
        assert done.run(stage, slides=["blank"]).success, stage
    assert verdict("tissue_found") == (False, "WARN", {"blank"})
    for name in NAMES[1:]:
        assert verdict(name)[0], f"{name}: no tiles is no fault of a later stage"


def test_a_feature_that_is_not_finite_is_found(done, verdict):
    def spoil(table):
        column = table.column("features").combine_chunks()
        values = np.array(column.values)
        values[5] = np.inf
        return replaced(
            table, "features", pa.FixedSizeListArray.from_arrays(values, column.type.list_size)
        )

    tamper(done, "b", "features", spoil)
    assert verdict("features_finite") == (False, "ERROR", {"b"})


def test_a_lost_row_of_features_is_found(done, verdict):
    tamper(done, "b", "features", lambda table: table.slice(1))
    assert verdict("feature_rows_equal_tile_rows") == (False, "ERROR", {"b"})
    assert verdict("clusters_cover_every_tile") == (False, "ERROR", {"b"})


def test_features_of_as_many_other_tiles_are_found(done, verdict):
    def rename(table):
        names = [f"{name}_other" for name in table.column("tile").to_pylist()]
        return replaced(table, "tile", pa.array(names))

    tamper(done, "c", "features", rename)
    assert verdict("feature_rows_equal_tile_rows") == (False, "ERROR", {"c"})


@pytest.mark.parametrize("k", ["n_clusters=2", "n_clusters=3"])
def test_a_tile_in_no_cluster_is_found(done, verdict, k):
    def empty(table):
        clusters = table.column(k).to_pylist()
        return replaced(table, k, pa.array([None, *clusters[1:]], pa.int32()))

    tamper(done, "a", "clusters", empty)
    assert verdict("clusters_cover_every_tile") == (False, "ERROR", {"a"})


@pytest.mark.parametrize(("outside", "tiles", "told"), [(0.2, 50, True), (0.2, 10, False)])
def test_a_slide_unlike_those_of_the_model_is_a_warning(done, verdict, outside, tiles, told):
    path = done.folder("b").record("clusters")
    stamp = done.folder("b").stamp("clusters").with_result(outside=outside, tiles=tiles)
    pq.write_table(stamp.on_table(pq.read_table(path)), path)
    expected = (False, "WARN", {"b"}) if told else (True, "WARN", set())
    assert verdict("slides_are_like_the_training_slides") == expected


def test_damaged_files_are_faults_of_their_slides_and_not_of_the_check(done, verdict):
    for slide_id, stage in (("a", "features"), ("b", "clusters")):
        path = done.folder(slide_id).record(stage)
        path.write_bytes(path.read_bytes()[:-100])
    assert verdict("features_finite") == (False, "ERROR", {"a"})
    assert verdict("feature_rows_equal_tile_rows") == (False, "ERROR", {"a"})
    assert verdict("clusters_cover_every_tile") == (False, "ERROR", {"a", "b"})


def test_a_k_that_a_small_first_cohort_left_out_is_no_fault(deployment):
    deployment.change(clusters=ClusterSettings(n_clusters=(2, 5000)))
    deployment.add("a", "b", "c")
    deployment.run_all()
    run = deployment.run("clusters")
    assert run.success
    assert {e.check_name: e.passed for e in run.get_asset_check_evaluations()} == {
        "clusters_cover_every_tile": True,
        "slides_are_like_the_training_slides": True,
    }
    assert deployment.metadata("cluster_model")["left_out"] == [5000]
