"""A deployment small enough to run every stage in a second."""

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import numpy as np
import pytest
import tifffile
import torch
from dagster._core.storage.event_log.base import AssetRecordsFilter
from threadpoolctl import threadpool_limits

from histoencoder_core.settings import (
    ClusterSettings,
    EncoderSettings,
    PlatformSettings,
    TilingSettings,
)
from histoencoder_core.store import Store
from histoencoder_dagster.definitions import platform_definitions
from histoencoder_dagster.partitions import RANGE_END, RANGE_START, SLIDES
from histoencoder_dagster.sensors.batches import contiguous_batches

STAGES = ("slides", "tiles", "features", "clusters", "labels", "annotations")
COHORT = (
    "catalog", "completeness", "cluster_statistics", "cluster_purity", "cluster_labels",
    "annotation_accuracy",
)  # fmt: skip
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def _write_slide(path, *, seed=0, mpp=0.5, tissue=True, size=512):
    """Write a pyramidal TIFF with a round piece of noisy tissue, whole at once like a rename."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size, size, 3), 243, np.uint8)
    if tissue:
        y, x = np.mgrid[:size, :size] - size / 2
        inside = x**2 + y**2 < (0.4 * size) ** 2
        colour = np.array([200, 120, 180]) - rng.integers(0, 40, 3)
        noise = rng.integers(0, 30, (size, size, 3))
        pixels[inside] = (colour - noise)[inside]
    stated = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    with tifffile.TiffWriter(part) as tiff:
        for level in range(2):
            tiff.write(
                pixels[:: 2**level, :: 2**level],
                photometric="rgb",
                tile=(128, 128),
                compression="zlib",
                subfiletype=int(level > 0),
                metadata=None,
                **stated,
            )
    part.replace(path)
    return path


@dataclass
class Deployment:
    """A platform on folders of its own, with an instance that keeps what Dagster knows."""

    settings: PlatformSettings
    instance: dg.DagsterInstance
    cursors: dict = field(default_factory=dict)

    def __post_init__(self):
        self.use(self.settings)

    def use(self, settings):
        """Deploy again with other settings, on the same instance and store."""
        self.settings = settings
        self.defs = platform_definitions(settings)
        self.platform = self.defs.resources["platform"]

    def change(self, **changes):
        self.use(self.settings.model_copy(update=changes))

    @property
    def slides(self):
        """The folder of slides."""
        return self.settings.slides[0]

    @property
    def store(self):
        return Store(self.settings.store)

    def folder(self, slide_id):
        return self.store.slide(slide_id)

    # Slides

    def drop(self, *names, seed=0, **how):
        """Scan slides, each of another content; the last name's path is given."""
        for number, name in enumerate(names, seed):
            path = self.slides / name
            path = _write_slide(
                path if path.suffix else path.with_suffix(".tiff"), seed=number, **how
            )
        return path

    def drop_broken(self, name):
        self.slides.mkdir(exist_ok=True)
        path = self.slides / name
        path.write_bytes(b"II*\0 no slide at all")
        return path

    def add(self, *names, **how):
        """Scan slides and give them partitions, without the sensor."""
        self.drop(*names, **how)
        return self.register()

    def register(self):
        ids = list(self.platform.register_slides())
        self.instance.add_dynamic_partitions(SLIDES, ids)
        return ids

    def partitions(self):
        return list(self.instance.get_dynamic_partitions(SLIDES))

    # Runs

    def run(self, *assets, slides=None, **more):
        """Run assets in one run, on a range of slides; all slides if none are named."""
        order = self.partitions()
        keys = order if slides is None else slides
        partitioned = set(assets) & set(STAGES)
        tags = {RANGE_START: keys[0], RANGE_END: keys[-1]} if partitioned else {}
        keys = [dg.AssetKey(name) for name in assets]
        return self.execute(self.defs.resolve_implicit_global_asset_job_def(), tags, keys, **more)

    def execute(self, job, tags, keys=None, **more):
        return job.execute_in_process(
            instance=self.instance,
            run_config=QUIET,
            tags=dict(tags),
            asset_selection=keys,
            raise_on_error=False,
            **more,
        )

    def run_requests(self, result, job):
        """Do what the daemon does with a sensor's result."""
        if isinstance(result, dg.SkipReason):
            return []
        for request in result.dynamic_partitions_requests or []:
            self.instance.add_dynamic_partitions(SLIDES, list(request.partition_keys))
        job_def = self.defs.resolve_job_def(job)
        return [
            self.execute(job_def, request.tags, request.asset_selection)
            for request in result.run_requests or []
        ]

    def run_all(self):
        """Every stage, as the automation would run them."""
        for stage in ("slides", "tiles", "features"):
            self.run(stage)
        self.run("cluster_model")
        self.run("clusters")
        self.run(*COHORT)

    # Ticks

    def tick(self, sensor):
        """Evaluate a sensor once; its cursor is kept."""
        with dg.build_sensor_context(
            instance=self.instance,
            cursor=self.cursors.get(sensor),
            resources={"platform": self.platform},
        ) as context:
            result = self.defs.get_sensor_def(sensor)(context)
            cursor = result.cursor if isinstance(result, dg.SensorResult) else None
            self.cursors[sensor] = cursor or context.cursor
        return result

    def due(self, **when):
        """Tick once what follows: ``{asset or check: slides}``, the cohort's ``{None}``."""
        result = dg.evaluate_automation_conditions(
            defs=self.defs, instance=self.instance, cursor=self.cursors.get("automation"), **when
        )
        self.cursors["automation"] = result.cursor
        due = {}
        for one in result.results:
            if one.true_subset.is_empty:
                continue
            if isinstance(one.key, dg.AssetCheckKey):
                due[one.key.name] = {None}
            else:
                due[one.key.path[-1]] = set(result.get_requested_partitions(one.key))
        return due | self.due_stages()

    def due_stages(self):
        """Tick the sensor of stages once: ``{stage: slides}``, of all stages asked for."""
        result, order = self.tick("next_stages"), self.partitions()
        due = {}
        for request in [] if isinstance(result, dg.SkipReason) else result.run_requests:
            first, last = (order.index(request.tags[end]) for end in (RANGE_START, RANGE_END))
            for key in request.asset_selection:
                due.setdefault(key.path[-1], set()).update(order[first : last + 1])
        return due

    def follow(self, *, ticks=12):
        """Tick and run what is due until nothing is; tell what ran in which tick."""
        told = []
        for _ in range(ticks):
            due = self.due()
            if not due:
                return told
            told.append(due)
            self.run_due(due)
        raise AssertionError(f"the automation does not come to rest: {told}")

    def run_due(self, due):
        order, size = self.partitions(), self.settings.slides_per_run
        together = {}
        for stage in (stage for stage in STAGES if stage in due):
            together.setdefault(frozenset(due[stage]), []).append(stage)
        for slides, stages in together.items():
            for batch in contiguous_batches(slides, order, size=size):
                self.run(*stages, slides=batch)
        cohort = [name for name in COHORT if name in due]
        if cohort and due.keys().isdisjoint(STAGES):  # else it is due again in the next tick
            self.run(*cohort)

    # What Dagster knows

    def recorded(self, asset):
        return set(self.instance.get_materialized_partitions(dg.AssetKey(asset)))

    def events(self, asset, slide=None):
        """An asset's materialisations, the newest first."""
        filters = AssetRecordsFilter(
            asset_key=dg.AssetKey(asset), asset_partitions=[slide] if slide else None
        )
        records = self.instance.fetch_materializations(filters, limit=100).records
        return [record.asset_materialization for record in records]

    def metadata(self, asset, slide=None):
        """Plain values of the newest materialisation's metadata."""
        return {name: entry.value for name, entry in self.events(asset, slide)[0].metadata.items()}


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Work this small only gets slower by being shared among cores that others use too."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield


@contextlib.contextmanager
def deployed(folder, instance=None):
    settings = PlatformSettings(
        slides=folder / "slides",
        store=folder / "store",
        weights=folder / "weights",
        annotations=None,
        sheet=None,
        weights_url=None,
        device="cpu",
        batch_size=16,
        slides_per_run=25,
        settle_seconds=0,
        first_fit_slides=3,
        tiling=TilingSettings(tile_px=128, overlap=0),
        encoder=EncoderSettings(name="untrained:test_resnet", input_size=32),
        clusters=ClusterSettings(n_clusters=(2, 3)),
    )
    settings.slides[0].mkdir()
    with instance or dg.DagsterInstance.ephemeral() as opened:
        yield Deployment(settings, opened)


@pytest.fixture
def deployment(tmp_path):
    with deployed(tmp_path) as deployment:
        yield deployment


@pytest.fixture
def home(tmp_path):
    """A DAGSTER_HOME as the platform is deployed with."""
    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copy(Path(__file__).parents[2] / "deploy" / "dagster.yaml", folder)
    return folder


@pytest.fixture
def kept_deployment(tmp_path, home):
    """A deployment whose instance keeps its records in `home`."""
    with deployed(tmp_path, dg.DagsterInstance.from_config(str(home))) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def done_store(tmp_path_factory):
    """A store in which all stages of the slides a, b and c are done; not to be written to."""
    with deployed(tmp_path_factory.mktemp("done")) as deployment:
        deployment.add("a", "b", "c")
        deployment.run_all()
        return deployment.settings.store


@pytest.fixture
def write_slide():
    """The function that writes a small slide."""
    return _write_slide


@pytest.fixture
def clock(monkeypatch):
    """A clock that can be put forward: ``clock(seconds)``, and set otherwise than time passes."""
    passed = [0.0, 0.0]
    real, steady = time.time, time.monotonic
    shifted = SimpleNamespace(
        time=lambda: real() + passed[0], monotonic=lambda: steady() + passed[1]
    )
    for module in (
        "histoencoder_core.slides.arrivals",
        "histoencoder_dagster.sensors.clusters",
        "histoencoder_dagster.sensors.completeness",
        "histoencoder_dagster.sensors.slides",
        "histoencoder_dagster.sensors.stages",
    ):
        monkeypatch.setattr(f"{module}.time", shifted)

    def put_forward(seconds, *, steady=None):
        passed[0] += seconds
        passed[1] += seconds if steady is None else steady

    return put_forward


@pytest.fixture(scope="session")
def test_data():
    """Folder of public slides, which are not part of this repository."""
    folder = os.environ.get("HISTOENCODER_TEST_DATA")
    if folder is None:
        pytest.skip("HISTOENCODER_TEST_DATA names no folder of public test slides")
    return Path(folder)
