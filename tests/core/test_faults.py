"""A full disk, a read-only store, slides whose folder goes away, another clock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from encoding import small_encoder
from killing import contents_of, differences
from making import halved, tissue_pixels, write_tiff

from histoencoder_core.annotate import annotate_slide, derive_labels
from histoencoder_core.cli import main
from histoencoder_core.clusters import assign_slide, cluster_slide, current_model, feature_files
from histoencoder_core.clusters.fit import ensure_model
from histoencoder_core.clusters.naming import current_cluster_labels
from histoencoder_core.cohort import build_catalog, ensure_statistics
from histoencoder_core.errors import KINDS, kind_of
from histoencoder_core.features import Runner, extract_slides
from histoencoder_core.labels import Annotations, label_annotated
from histoencoder_core.settings import (
    AnnotationSettings,
    ClusterSettings,
    LabelSettings,
    TilingSettings,
)
from histoencoder_core.slides import Register, Sheet, find_slides, receive_slide
from histoencoder_core.store import Store
from histoencoder_core.store.files import remove
from histoencoder_core.tiles import cut_tiles, tile_source

pytestmark = pytest.mark.usefixtures("one_thread")

TILING = TilingSettings(tile_px=128, overlap=0)
CLUSTERS = ClusterSettings(n_clusters=(2, 3))
SLIDES = ["a", "b"]


def mounted(*words: str | Path) -> None:
    """Mount something, or skip the test."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


def unmounted(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted("-t", "tmpfs", "-o", "size=24m", "tmpfs", folder)
    yield folder
    unmounted(folder)


def write_slides(folder: Path) -> None:
    for seed, name in enumerate(SLIDES):
        pixels = tissue_pixels(1024, 768, seed=seed)
        write_tiff(folder / f"{name}.tiff", pixels, halved(pixels))
    (folder / "annotations").mkdir()
    ring = [[0, 0], [512, 0], [512, 768], [0, 768], [0, 0]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": "tumour"}},
    }
    content = {"type": "FeatureCollection", "features": [feature]}
    (folder / "annotations" / "a.geojson").write_text(json.dumps(content))


@dataclass
class Work:
    """All stages, on slides in a folder."""

    slides: Path
    store: Store
    runner: Runner

    def stages(self) -> dict[str, Callable[[], Any]]:
        """What makes each stage, of the slide a where it is of a slide, in order."""
        folder = self.store.slide("a")
        return {
            "register": self.register,
            "slides": lambda: self.describe("a"),
            "tiles": lambda: cut_tiles(folder, TILING),
            "tiles with images": lambda: cut_tiles(folder, TILING, save_images=True),
            "features": self.extract,
            "cluster model": lambda: ensure_model(self.store, feature_files(self.store), CLUSTERS),
            "clusters": self.assign,
            "clusters of one slide": lambda: cluster_slide(folder, CLUSTERS),
            "labels": self.label,
            "catalog": lambda: build_catalog(self.store, annotations=self.slides / "annotations"),
            "statistics": lambda: ensure_statistics(self.store, replicates=20),
            "cluster labels": lambda: derive_labels(self.store, AnnotationSettings()),
            "annotations": self.annotate,
        }

    def complete(self) -> None:
        """Make all; the catalog once more, with what comes after it."""
        for make in (*self.stages().values(), self.stages()["catalog"]):
            make()

    def register(self) -> dict[str, Any]:
        return Register(self.store).assign(find_slides(self.slides))

    def describe(self, name: str) -> Any:
        found = {slide.path.stem: slide for slide in find_slides(self.slides)}
        return receive_slide(self.store, name, found[name], Sheet()).stamp

    def extract(self) -> Any:
        with extract_slides(self.store, ["a"], self.runner) as found:
            return found["a"].result()

    def assign(self) -> Any:
        model = current_model(self.store)
        assert model is not None
        return assign_slide(self.store.slide("a"), model)

    def label(self) -> Any:
        source = tile_source(self.store, "a")
        assert source is not None
        said = Annotations(self.store, self.slides / "annotations", SLIDES)
        return label_annotated(self.store.slide("a"), source, said, LabelSettings())

    def annotate(self) -> Any:
        labels = current_cluster_labels(self.store, AnnotationSettings())
        assert labels is not None
        return annotate_slide(self.store.slide("a"), labels)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(small_encoder(), device="cpu", backend="eager", batch_size=8)


@pytest.fixture
def work(tmp_path: Path, store: Store, runner: Runner) -> Work:
    write_slides(tmp_path / "slides")
    return Work(tmp_path / "slides", store, runner)


def fill(disk: Path, free: int) -> None:
    """Leave so many bytes free."""
    remove(disk / "filler")
    room = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - free)


def failure_of(make: Callable[[], Any]) -> Exception | None:
    try:
        make()
    except Exception as error:  # noqa: BLE001 - its kind is looked at
        return error
    return None


def test_a_full_disk_leaves_what_was_there_and_the_stage_succeeds_with_space(
    work: Work, disk: Path
) -> None:
    work.store = Store(disk / "store")
    work.store.root.mkdir()
    failed = {}
    for stage, make in work.stages().items():
        before = contents_of(work.store)
        free, failed[stage] = 0, 0
        while True:
            fill(disk, free)
            failure = failure_of(make)
            remove(disk / "filler")
            if failure is None:
                break
            assert kind_of(failure) == "out-of-disk", (stage, failure)
            failed[stage] += 1
            found = contents_of(work.store)
            found.pop("a/failures.json", None)
            # A model's version, or what clusters mean, is there, whole, before it is named last; a
            # content is claimed before its slide is described.
            early = ("_cohort/cluster_", "_cohort/contents/")
            new = [n for n in found.keys() - before.keys() if not n.startswith(early)]
            assert new == differences(before, {n: found.get(n) for n in before}) == [], stage
            free = 2 * free or 4096
        assert work.store.slide("a").failures() == {}, stage
        assert make() is not None
    told = {"full disk": sum(failed.values()), "by stage": failed}
    print(json.dumps(told))  # noqa: T201 - the figures of `make chaos`
    assert min(failed.values()) > 0, failed


def test_on_a_read_only_store_what_is_done_is_found_and_what_is_due_says_why(
    work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work.complete()
    work.describe("b")
    work.complete()
    before = contents_of(work.store)
    folder = tmp_path / "read-only"
    folder.mkdir()
    mounted("--bind", work.store.root, folder)
    try:
        mounted("-o", "remount,ro,bind", folder)
        work.store = Store(folder)
        for stage, make in work.stages().items():
            if stage != "register":  # whose file is locked to be read and written in one
                assert make() is not None, stage
        for name in ("HISTOENCODER_STORE", "HISTOENCODER_SLIDES"):
            monkeypatch.delenv(name, raising=False)
        for command in (["status"], ["sql", "SELECT slide FROM slides ORDER BY slide"]):
            monkeypatch.setattr(sys, "argv", ["histoencoder", *command, "-i", str(folder)])
            code = 0
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
            told = capsys.readouterr()
            assert code == (command == ["status"]), told.err  # tiles of the slide b are missing
            assert "b" in told.out
        with pytest.raises(OSError, match="Read-only file system") as caught:
            cut_tiles(work.store.slide("b"), TILING)
        assert kind_of(caught.value) == "read-only"
        assert contents_of(work.store) == before
    finally:
        unmounted(folder)


def test_while_the_folder_of_slides_is_away_nothing_is_lost(
    work: Work, disk: Path, tmp_path: Path
) -> None:
    work.slides = disk / "slides"
    write_slides(work.slides)
    for make in list(work.stages().values())[:3]:
        make()
    work.describe("b")
    before = contents_of(work.store)
    shutil.copytree(work.slides, tmp_path / "copies")
    unmounted(disk)
    for name in SLIDES:  # one of them is done already
        failure = failure_of(lambda: cut_tiles(work.store.slide(name), TILING))  # noqa: B023
        assert (failure and kind_of(failure)) == (None if name == "a" else "missing")
    assert KINDS["missing"].transient
    assert differences(contents_of(work.store), before) == ["b/failures.json"]
    assert set(Register(work.store).entries()) == set(SLIDES)
    mounted("-t", "tmpfs", "tmpfs", disk)
    shutil.copytree(tmp_path / "copies", work.slides)
    assert cut_tiles(work.store.slide("b"), TILING).made_now
    assert work.store.slide("b").failures() == {}


def test_the_clock_decides_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is set back by a year, so that every file there is comes from the future."""
    work.complete()
    before = contents_of(work.store)
    monkeypatch.setattr("time.time", lambda: 1.0)
    for path in work.store.root.rglob("*"):
        if path.is_file():
            os.utime(path, (4e9, 4e9))
    for stage, make in work.stages().items():
        make()
        assert differences(contents_of(work.store), before) == [], stage
    # What is new is older than all there is.
    annotation = work.slides / "annotations" / "a.geojson"
    annotation.write_text(annotation.read_text().replace("tumour", "stroma"))
    os.utime(annotation, (1, 1))
    assert work.label().made_now
    os.utime(work.store.slide("a").record("labels"), (1, 1))
    assert build_catalog(work.store, annotations=work.slides / "annotations").read == 1
