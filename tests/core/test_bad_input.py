"""Bad input: every odd file and many damaged ones fail alone, with a reason, and crash nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from encoding import small_encoder

from histoencoder_core.errors import KINDS, SlideError
from histoencoder_core.features import Runner, extract_slides
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import Register, Sheet, find_slides, receive_slide
from histoencoder_core.store import Store
from histoencoder_core.tiles import cut_tiles

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

ODD = {
    "DERIVED_empty.svs": "unreadable",
    "DERIVED_truncated_1200000_CMU-1-Small-Region.svs": "truncated",
    "histolab_broken.svs": "unsupported",
    "largeimage_zero_gi.tif": "unsupported",
    "lfs_pointer_default.svs": "unreadable",
    "openslide_boxes.tiff": "implausible-mpp",
    "openslide_small.svs": "done",
    "openslide_unopenable.tiff": "unreadable",
    "openslide_unreadable.svs": "unreadable",
}
GOOD = ("CMU-1-Small-Region.svs", "rationai_CMU-1-small.tiff")
MUTANTS = 32


def test_odd_files_fail_alone_and_their_neighbours_are_done(
    data: Path, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "slides"
    shutil.copytree(data / "odd", folder)
    for name in GOOD:
        shutil.copy(data / "slides" / name, folder)
    found = Register(store).assign(find_slides(folder))
    outcomes, reasons = {}, {}
    for slide_id, slide in found.items():
        try:
            receive_slide(store, slide_id, slide, Sheet())
            cut_tiles(store.slide(slide_id), TilingSettings(mpp=4, tile_px=64))
        except SlideError as error:
            outcomes[slide.relative], reasons[slide.path] = error.kind, str(error)
    described = [i for i in found if found[i].relative not in outcomes]
    runner = Runner(small_encoder(), device="cpu", backend="eager")
    with extract_slides(store, described, runner) as features:
        for slide_id in described:
            assert features[slide_id].result().result.get("unreadable", 0) == 0
            outcomes[found[slide_id].relative] = "done"
    assert outcomes == ODD | dict.fromkeys(GOOD, "done")
    assert all(reason.startswith(f"{path}: ") for path, reason in reasons.items())
    for slide_id, slide in found.items():
        done = outcomes[slide.relative] == "done"
        assert store.slide(slide_id).record("features").exists() == done
        assert bool(store.slide(slide_id).failures()) != done


def test_a_mutant_is_told_by_its_number() -> None:
    specification = importlib.util.spec_from_file_location("mutation", BENCHMARKS / "mutation.py")
    assert specification is not None
    assert specification.loader is not None
    mutation = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(mutation)
    content = b"\xff\xd8" + bytes(range(256)) * 40
    made = [mutation.mutant("a.jpg", content, seed=0, number=i) for i in range(8)]
    assert made == [mutation.mutant("a.jpg", content, seed=0, number=i) for i in range(8)]
    assert len({damaged for damaged, _ in made} | {content}) == 9
    assert made[0] != mutation.mutant("a.jpg", content, seed=1, number=0)


@pytest.mark.slow
def test_mutants_crash_nothing_and_leave_nothing_that_was_not_read(data: Path) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "mutants.py", data / "slides", "--mutants", str(MUTANTS)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    mutants, summary = [line for line in lines if "number" in line], lines[-1]
    assert {line["number"] for line in mutants} == set(range(MUTANTS))
    assert (summary["crashes"], summary["hangs"], summary["accepted"]) == (0, 0, 0)
    assert summary["peak_rss_mb"]["program"] < 3000
    assert set(summary["outcomes"]) <= {"done"} | KINDS.keys() - {"unexpected", "encoder", "store"}
    assert 0 < summary["outcomes"]["done"] < MUTANTS
    assert {line["outcome"] for line in mutants if "cut at" in line["damage"]} == {"truncated"}
