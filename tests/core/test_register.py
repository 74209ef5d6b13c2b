"""Slide ids: one for each file, for ever."""

from __future__ import annotations

import logging
import multiprocessing
import re
import shutil
from pathlib import Path

import pytest
from making import described, found_at, tissue_pixels, write_tiff

from histoencoder_core.errors import SlideError
from histoencoder_core.slides import FoundSlide, Register, describe_slide
from histoencoder_core.slides.sheet import SheetRow
from histoencoder_core.store import Store

ROOT = Path("/scans")


def slides(*names: str, root: Path = ROOT) -> list[FoundSlide]:
    return [FoundSlide(root / name, name) for name in names]


def ids(store: Store, *names: str, root: Path = ROOT) -> dict[str, str]:
    """Ids by relative path."""
    assigned = Register(store).assign(slides(*names, root=root))
    return {slide.relative: slide_id for slide_id, slide in assigned.items()}


def test_two_files_never_share_an_id(store: Store) -> None:
    names = ["CMU-1.svs", "CMU-1.ndpi", "a/CMU-1.svs", "b/CMU-1.svs", "a/cmu-1.SVS", "x/CMU 2.svs"]
    names += ["x/CMU_2.svs", "x/CMU(2).svs"]
    found = ids(store, *names)
    assert found["CMU-1.svs"] == "CMU-1"
    assert found["x/CMU 2.svs"] == "CMU_2"
    assert len({slide_id.casefold() for slide_id in found.values()}) == len(names)
    for name, slide_id in found.items():
        if name not in {"CMU-1.svs", "x/CMU 2.svs"}:
            assert re.fullmatch(r"(?i)CMU[-_][12]-[0-9a-f]{8}", slide_id)


def test_an_id_never_changes_when_other_slides_come_and_go(store: Store) -> None:
    later = ids(store, "b/A.svs", "c/A.svs")
    everything = ids(store, "a/A.svs", "b/A.svs", "c/A.svs")
    assert everything | later == everything
    assert ids(store, "c/A.svs") == {"c/A.svs": later["c/A.svs"]}
    assert ids(store, "b/A.svs")["b/A.svs"] == "A"
    # The id of a slide that is gone is not given to another.
    assert ids(store, "d/A.svs")["d/A.svs"] != "A"


@pytest.mark.parametrize(
    "name",
    [
        "test3-DAPI-2-(387).ndpi", "ä ö.svs", "患者.svs", "..a..b...svs", "-x-.svs", "_cohort.svs",
        "a/../b.svs", "x" * 250 + ".svs", "😀", ".svs", "CON .svs", "a\nb.svs", "A&B;rm -rf.tif",
    ],
)  # fmt: skip
def test_any_name_gives_an_id_that_can_be_a_folder(store: Store, name: str) -> None:
    for slide in slides(name, f"again/{name}"):
        [slide_id] = Register(store).assign([slide])
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", slide_id)
        assert ".." not in slide_id
        assert store.slide(slide_id).path.parent == store.root


def test_more_clashes_than_a_short_hash_can_tell_apart(store: Store) -> None:
    """The hash is of the relative path, which may be the same below several folders."""
    found = [
        slide_id
        for i in range(5)
        for slide_id in Register(store).assign(slides("x/A.svs", root=Path(f"/disk{i}")))
    ]
    # None of these folders is there, so each looks like the one before, mounted elsewhere.
    assert found == ["A"] * 5
    roots = []
    for i in range(4):
        root = store.root.parent / f"disk{i}"
        (root / "x").mkdir(parents=True)
        (root / "x" / "B.svs").touch()
        roots.append(root)
    found = [i for root in roots for i in Register(store).assign(slides("x/B.svs", root=root))]
    assert found[0] == "B"
    assert len(set(found)) == 4


def test_slides_mounted_elsewhere_keep_their_ids(store: Store, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for name in ("a/A.svs", "b/A.svs"):
        (old / name).parent.mkdir(parents=True)
        (old / name).touch()
    before = ids(store, "a/A.svs", "b/A.svs", root=old)
    old.rename(new)
    assert ids(store, "b/A.svs", "a/A.svs", root=new) == before
    assert Register(store).entries()["A"].path == str(new / "a" / "A.svs")
    shutil.copytree(new, old)  # while the first is still there, a copy is another slide
    assert not set(ids(store, "a/A.svs", root=old).values()) & set(before.values())


def test_the_register_is_rebuilt_from_the_slides(store: Store, tmp_path: Path) -> None:
    root = tmp_path / "scans"
    good = write_tiff(root / "b" / "A.tiff", tissue_pixels(64, 64))
    also = write_tiff(root / "a" / "A.tiff", tissue_pixels(64, 64))
    bad = [root / "a" / "B.tiff", root / "b" / "B.tiff"]
    for path in bad:
        path.write_bytes(b"no slide")
    found = [found_at(path, root) for path in (good, also, *bad)]
    before = Register(store).assign(found)
    for slide_id, slide in before.items():
        if slide.path in bad:
            with pytest.raises(SlideError):
                describe_slide(store.slide(slide_id), slide, SheetRow())
        else:
            describe_slide(store.slide(slide_id), slide, SheetRow())
    store.register_path.unlink()
    # In the other order, each would get the other's id if it were not known.
    after = Register(store).assign(list(reversed(found)))
    assert after == before
    assert set(Register(store).entries()) == set(before)


def test_a_damaged_register_is_rebuilt(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiff(tmp_path / "scans" / "A.tiff", tissue_pixels(64, 64))
    Register(store).assign([found_at(path)])
    described(store, path)
    for damage in ('{"slides": ', "[]", '{"slides": {"A": {"path": 3}}}', '{"slides": 5}'):
        store.register_path.write_text(damage)
        with caplog.at_level(logging.WARNING):
            assert list(Register(store).assign([found_at(path)])) == ["A"]
        assert str(store.register_path) in caplog.text
        caplog.clear()


def test_a_description_that_was_interrupted_reserves_no_id(store: Store) -> None:
    [slide_id] = ids(store, "A.svs").values()
    (store.slide(slide_id).path / ".slides.1-2.tmp").mkdir(parents=True)
    store.register_path.unlink()
    assert list(ids(store, "A.svs").values()) == [slide_id]


@pytest.mark.parametrize("folder", ["A", "a"])
def test_the_folder_of_another_program_is_not_reused(store: Store, folder: str) -> None:
    (store.root / folder).mkdir(parents=True)
    (store.root / folder / "metadata.parquet").write_bytes(b"HistoPrep's")
    [slide_id] = ids(store, "A.svs").values()
    assert re.fullmatch(r"A-[0-9a-f]{8}", slide_id)
    assert ids(store, "A.svs") == {"A.svs": slide_id}


def _assign(root: Path, number: int, barrier) -> None:
    barrier.wait()
    for i in range(5):
        Register(Store(root)).assign(slides(f"shared/{i}/A.svs", f"{number}/{i}/A.svs"))


def test_processes_that_assign_at_once_do_not_clash(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_assign, args=(store.root, n, barrier)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    entries = Register(store).entries()
    assert len(entries) == 5 + 4 * 5
    assert len({entry.relative for entry in entries.values()}) == len(entries)
    assert len({slide_id.casefold() for slide_id in entries}) == len(entries)
