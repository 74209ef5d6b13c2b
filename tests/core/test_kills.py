"""Killed at random moments and started again, the platform makes what it makes undisturbed.

The short form runs with the other tests. `make chaos` kills at least `HISTOENCODER_CHAOS_KILLS`
times, and prints how often which stage was hit.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cohorts import tables_of
from killing import (
    CATALOG,
    CommandLines,
    Watcher,
    command_lines,
    content_of,
    contents_of,
    differences,
)
from making import halved, tissue_pixels, write_tiff

from histoencoder_core.store import Store, layout

SHORT = 10
KILLS = int(os.environ.get("HISTOENCODER_CHAOS_KILLS", SHORT))
LONG = KILLS > SHORT
SEED = int(os.environ.get("HISTOENCODER_CHAOS_SEED", 0))


@dataclass
class Step:
    """A command of the plan.

    Attributes:
        name: What it is called.
        words: The command.
        code: Its exit code.
        seconds: How long it takes undisturbed.
        made: The files that it makes, in order.
        after: What the store holds after it.
    """

    name: str
    words: list[str]
    code: int = 0
    seconds: float = 0.0
    made: list[str] = field(default_factory=list)
    after: dict[str, Any] = field(default_factory=dict)

    def stage(self, store: Store) -> str:
        """The stage that was under way when it was killed: that of the first file not yet made."""
        for name in self.made:
            if name == CATALOG:
                found = (
                    tables_of(store, but=("internal.sources",))
                    if store.catalog_path.exists()
                    else None
                )
            else:
                path = store.root / name
                found = content_of(name, path.read_bytes()) if path.exists() else None
            if found != self.after[name]:
                return stage_of(name)
        return self.words[0] if self.words[0] == "prune" else "nothing left to do"


def stage_of(name: str) -> str:
    """The stage that makes a file."""
    folder, _, rest = name.partition("/")
    if folder == layout.COHORT or name == CATALOG:
        return rest.partition("/")[0].partition(".")[0] or CATALOG
    for stage in layout.STAGES:
        if rest.partition("/")[0] in {layout.RECORD[stage], *layout.COMPANIONS[stage]}:
            return stage
    return "slides"  # a failure is written down


def plan_of(slides: Path, store: Path) -> list[Step]:
    """Each stage, then again with other settings, so that outputs are replaced, and pruned."""
    where = ["-i", str(store)]
    tile = ["tile", "-i", str(slides), "-o", str(store), "--tile-px", "128", "--overlap", "0"]
    extract = ["extract", *where, "-m", "untrained:test_resnet", "-s", "32", "-c", "-b", "8"]
    extract += ["--backend", "eager"]
    cluster = ["cluster", *where, "-n", "2", "-n", "3", "-c"]
    label = ["label", *where, "--annotations", str(slides / "annotations")]
    annotate = ["annotate", *where, "--folds", "2"]
    steps = [
        Step("tile", tile, code=1),  # a slide is broken
        Step("extract", extract),
        Step("cluster", cluster),
        Step("cluster --per-slide", [*cluster, "--per-slide"]),
        Step("label", label),
        Step("annotate", annotate),
        Step("tile anew", [*tile, "--save-tiles", "--max-background", "0.8"], code=1),
        Step("extract anew", extract),
        Step("cluster anew", [*cluster, "--refit"]),
        Step("label anew", [*label, "--min-share", "0.6"]),
        Step("annotate anew", annotate),
        Step("prune", ["prune", *where, "--yes"]),
    ]
    if LONG:  # drawing takes half a minute
        steps.insert(6, Step("report", ["report", *where]))
    return steps


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run made."""

    slides: Path
    steps: list[Step]

    def plan(self, store: Store) -> Iterator[tuple[Step, Step]]:
        """The same commands on another store, each with what it made here."""
        return zip(plan_of(self.slides, store.root), self.steps, strict=True)

    @property
    def known(self) -> dict[str, list[Any]]:
        """By file, all that it held after some step."""
        known: dict[str, list[Any]] = {}
        for step in self.steps:
            for name, content in step.after.items():
                known.setdefault(name, []).append(content)
        return known


def times_of(store: Store) -> dict[str, int]:
    return {
        CATALOG if path == store.catalog_path else path.relative_to(store.root).as_posix(): (
            path.stat().st_mtime_ns
        )
        for path in store.root.rglob("*")
        if path.is_file()
    }


def make_slides(folder: Path) -> None:
    """Three slides, of which two have outlines of two classes, one that is broken, a real one."""
    for seed, name in enumerate("abc"):
        pixels = tissue_pixels(1536, 1024, seed=seed)
        write_tiff(folder / f"{name}.tiff", pixels, halved(pixels))
    (folder / "annotations").mkdir()
    for name in "ab":
        halves = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [rectangle(x, 0, 768, 1024)]},
                "properties": {"classification": {"name": label}},
            }
            for x, label in ((0, "stroma"), (768, "tumour"))
        ]
        path = folder / "annotations" / f"{name}.geojson"
        path.write_text(json.dumps({"type": "FeatureCollection", "features": halves}))
    (folder / "broken.svs").write_bytes(b"II*\0 no slide at all")
    data = os.environ.get("HISTOENCODER_TEST_DATA")
    if data:
        shutil.copy(Path(data) / "slides" / "CMU-1-Small-Region.svs", folder)


def rectangle(x: int, y: int, w: int, h: int) -> list[list[int]]:
    return [[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLines]:
    with command_lines(tmp_path_factory.mktemp("lines") / "logs") as lines:
        yield lines


@pytest.fixture(scope="module")
def reference(lines: CommandLines, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    root = tmp_path_factory.mktemp("undisturbed")
    slides, store = root / "slides", Store(root / "store")
    make_slides(slides)
    steps = plan_of(slides, store.root)
    before: dict[str, int] = {}
    for step in steps:
        started = time.perf_counter()
        lines.run(*step.words, code=step.code)
        step.seconds = time.perf_counter() - started
        step.after = contents_of(store)
        now = times_of(store)
        changed = [name for name, at in now.items() if before.get(name) != at]
        step.made = sorted((name for name in changed if name in step.after), key=now.__getitem__)
        before = now
    return Reference(slides, steps)


@pytest.mark.timeout(1500)
def test_killed_at_random_moments_the_command_line_makes_what_it_makes_undisturbed(
    lines: CommandLines, reference: Reference, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    hits: Counter[str] = Counter()
    faults: list[str] = []
    looks = rounds = 0
    known = reference.known
    while hits.total() < KILLS:
        rounds += 1
        # The store's name is on the report.
        store = Store(tmp_path / str(rounds) / "store")
        with Watcher(store, known) as watcher:
            for step, planned in reference.plan(store):
                running = lines.start(*step.words)
                most = (3 if step.name == "report" else 10) if LONG else 1
                for _ in range(most if hits.total() < KILLS else 0):
                    # A little late at times, so that also the end is hit.
                    if running.wait(rng.uniform(0, 1.1 * planned.seconds)) is not None:
                        break
                    if not running.kill():
                        break
                    hits[planned.stage(store)] += 1
                    running = lines.start(*step.words)
                assert running.wait() == step.code, running.log.read_text()
                found = contents_of(store)
                assert differences(found, planned.after) == [], step.name
        faults += watcher.faults
        looks += watcher.looks
        shutil.rmtree(store.root)
    told = {
        "seed": SEED,
        "kills": hits.total(),
        "rounds": rounds,
        "by stage": dict(hits.most_common()),
        "looks while killing": looks,
        "faults": faults,
    }
    print(json.dumps(told))  # noqa: T201 - the figures of `make chaos`
    assert faults == []
    assert looks > 0


@pytest.mark.timeout(600)
def test_killed_in_each_stage_of_a_slide_a_command_makes_what_it_makes_undisturbed(
    lines: CommandLines, reference: Reference, tmp_path: Path
) -> None:
    """Random moments seldom hit stages that take but a moment: here each is waited for."""
    rng = random.Random(SEED)
    hits: Counter[str] = Counter()
    store = Store(tmp_path / "store")
    with Watcher(store, reference.known) as watcher:
        for step, planned in reference.plan(store):
            for stage in layout.STAGES:
                if stage in hits or stage not in map(stage_of, planned.made):
                    continue
                running = lines.start(*step.words)
                while running.code is None and planned.stage(store) != stage:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.05))
                if running.kill():
                    hits[planned.stage(store)] += 1
            running = lines.start(*step.words)
            assert running.wait() == step.code, running.log.read_text()
            assert differences(contents_of(store), planned.after) == [], step.name
            if hits.keys() >= {*layout.STAGES}:
                break
    told = {"seed": SEED, "kills": hits.total(), "by stage": dict(hits.most_common())}
    print(json.dumps(told))  # noqa: T201 - the figures of `make chaos`
    assert watcher.faults == []
    assert hits.keys() >= {"labels", "annotations"}


def test_of_two_command_lines_at_once_each_slide_is_made_by_one(
    lines: CommandLines, reference: Reference, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    steps = plan_of(reference.slides, store.root)
    for step, planned in zip(steps[:6], reference.steps, strict=False):
        both = [lines.start(*step.words) for _ in range(2)]
        assert [running.wait() for running in both] == [step.code] * 2
        told = [running.log.read_text() for running in both]
        for log in told:
            assert "Traceback" not in log, log
        assert differences(contents_of(store), planned.after) == [], step.name
        counts = [re.search(r"(\d+) slides: (?:(\d+) made)?", log) for log in told]
        assert None not in counts, told
        found = [(int(count[1]), int(count[2] or 0)) for count in counts if count is not None]
        failed = step.name == "tile"  # the broken slide, by both
        assert found[0][0] == found[1][0] == sum(made for _, made in found) + failed, told
        if step.name == "cluster":
            assert sum("Fitted cluster model" in log for log in told) == 1, told
