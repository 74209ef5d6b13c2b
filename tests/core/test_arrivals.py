"""Watching folders of slides: what is ready, what waits, what is gone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from making import tissue_pixels, write_dicom, write_tiff

from histoencoder_core.slides import Arrivals, Register, Sheet, receive_slide
from histoencoder_core.slides import arrivals as arrivals_module
from histoencoder_core.slides.arrivals import Look, find_in, read_arrivals, write_arrivals
from histoencoder_core.slides.find import missing_part
from histoencoder_core.store import Store

OLD = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.wall, self.steady = 2e9, 1e5

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(time=lambda: clock.wall, monotonic=lambda: clock.steady)
    monkeypatch.setattr(arrivals_module, "time", fake)
    return clock


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    return folder


def watch(store: Store, *folders: Path, settle: float = 60) -> Arrivals:
    return Arrivals(store, folders, settle_seconds=settle)


def ready(look: Look) -> list[str]:
    return [it.found.relative for it in look.ready]


def waiting(look: Look) -> dict[str, str]:
    return {it.relative: it.reason for it in look.waiting}


def old(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (OLD, OLD))
    return path


def take_up(store: Store, *folders: Path) -> dict[str, str]:
    """Take up all slides there are: relative path to the id that it got."""
    found, _ = find_in(folders)
    ids = Register(store).assign(found)
    return {
        slide.relative: receive_slide(store, slide_id, slide, Sheet()).slide
        for slide_id, slide in ids.items()
    }


def test_a_copy_that_keeps_an_old_time_is_found_once_it_stands_still(
    store: Store, scans: Path, clock: Clock
) -> None:
    arrivals = watch(store, scans)
    old(scans / "a.svs")
    assert waiting(arrivals.look(Sheet())) == {"a.svs": "was just seen, or has just changed"}
    assert waiting(arrivals.look(Sheet())) == {"a.svs": "has not stood still for 60 s"}
    clock.pass_by(60)
    assert ready(arrivals.look(Sheet())) == ["a.svs"]


def test_a_copy_that_grows_under_an_old_time_waits(store: Store, scans: Path, clock: Clock) -> None:
    """`rsync -t --inplace`, or a copy whose time was set before its end."""
    arrivals = watch(store, scans)
    for size in range(1, 4):
        old(scans / "a.svs", b"x" * size)
        assert ready(arrivals.look(Sheet())) == []
        clock.pass_by(59)
    assert ready(arrivals.look(Sheet())) == []
    clock.pass_by(1)
    assert ready(arrivals.look(Sheet())) == ["a.svs"]


@pytest.mark.parametrize("shift", [-86400.0, 0.0, 86400.0])
def test_a_file_waits_out_the_settle_time_whatever_its_clock_says(
    store: Store, scans: Path, clock: Clock, shift: float
) -> None:
    arrivals = watch(store, scans)
    path = old(scans / "a.svs")
    os.utime(path, (clock.wall + shift, clock.wall + shift))
    arrivals.look(Sheet())
    for _ in range(2):
        clock.pass_by(20)
        assert ready(arrivals.look(Sheet())) == []
    clock.pass_by(20)
    assert ready(arrivals.look(Sheet())) == ["a.svs"]


def test_a_process_for_each_minute_sees_files_stand_still_as_one_does(
    store: Store, scans: Path, clock: Clock
) -> None:
    """Dagster's daemon starts the process that sensors run in anew each minute."""
    old(scans / "a.svs")
    seen = []
    for _ in range(4):
        clock.steady = 0.0  # of another boot, even
        arrivals = watch(store, scans)
        for _ in range(2):
            seen.append(ready(arrivals.look(Sheet())))
            clock.pass_by(15)
    assert seen[:5] == [[]] * 5
    assert seen[-1] == ["a.svs"]
    old(scans / "a.svs", b"xy")
    assert waiting(watch(store, scans).look(Sheet())) == {
        "a.svs": "was just seen, or has just changed"
    }


def test_troubles_are_told_the_same_by_another_process(
    store: Store, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals_module, "_AT_LEAST", 1)
    for name in "ab":
        write_tiff(scans / f"{name}.tiff", tissue_pixels(64, 64))  # of one content
    take_up(store, scans)
    write_arrivals(store, watch(store, scans).look(Sheet()))
    told = read_arrivals(store)
    assert told["troubles"] is not None
    another = watch(store, scans)
    for _ in range(3):
        write_arrivals(store, another.look(Sheet(), seconds=0))
        assert read_arrivals(store) == told


def test_a_folder_that_can_not_be_read_is_away_with_its_slides(
    store: Store, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiff(scans / "november" / "a.tiff", tissue_pixels(64, 64))
    write_tiff(scans / "b.tiff", tissue_pixels(64, 64, seed=1))
    take_up(store, scans)
    real = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "november":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    look = watch(store, scans).look(Sheet())
    assert (look.described, look.absent) == (["b"], [])
    [told] = look.away.values()
    assert told == f"{scans / 'november'}: can't be read (Permission denied)"


def test_a_later_file_of_a_dicom_series_makes_no_second_slide(store: Store, scans: Path) -> None:
    pixels = tissue_pixels(512, 512)
    uids = ("1.2.3.1", "1.2.3.2")
    write_dicom(scans / "2.dcm", pixels, uids=uids, mpp=0.5, patient="X")
    assert take_up(store, scans) == {"2.dcm": "2"}
    write_dicom(scans / "1.dcm", pixels[::2, ::2], uids=uids, mpp=1.0, patient="X", level=1)
    arrivals = watch(store, scans, settle=0)
    for _ in range(2):
        look = arrivals.look(Sheet())
    assert ([it.slide for it in look.ready], look.absent) == (["2"], [])
    assert take_up(store, scans) == {"2.dcm": "2"}


def test_a_clock_that_is_set_back_loses_no_slide(store: Store, scans: Path, clock: Clock) -> None:
    arrivals = watch(store, scans)
    path = old(scans / "a.svs")
    os.utime(path, (clock.wall, clock.wall))
    arrivals.look(Sheet())
    clock.wall -= 86400
    clock.steady += 61
    assert ready(arrivals.look(Sheet())) == ["a.svs"]


def test_an_empty_file_is_not_whole(store: Store, scans: Path, clock: Clock) -> None:
    arrivals = watch(store, scans)
    old(scans / "a.svs", b"")
    for _ in range(3):
        assert waiting(arrivals.look(Sheet())) == {"a.svs": "is empty so far"}


MRXS = """[HIERARCHICAL]
INDEXFILE = Index.dat
[DATAFILE]
FILE_COUNT = 2
FILE_0 = Data0000.dat
FILE_1 = Data0001.dat
"""
VMS = "[Virtual Microscope Specimen]\nImageFile=a.jpg\nImageFile(1,0)=b.jpg\nMapFile=m.jpg\n"


@pytest.mark.parametrize(
    ("main", "text", "parts"),
    [
        (
            "m.mrxs", "x",
            [("m/Slidedat.ini", MRXS), ("m/Index.dat", "x"), ("m/Data0000.dat", "x"),
             ("m/Data0001.dat", "x")],
        ),
        ("v.vms", VMS, [("a.jpg", "x"), ("b.jpg", "x"), ("m.jpg", "x")]),
    ],
)  # fmt: skip
def test_a_slide_of_many_files_waits_for_all_of_them(
    store: Store, scans: Path, clock: Clock, main: str, text: str, parts: list[tuple[str, str]]
) -> None:
    arrivals = watch(store, scans)
    old(scans / main, text.encode())
    for name, content in parts:
        for _ in range(3):
            look = arrivals.look(Sheet())
            assert main not in ready(look)
        assert "not there yet" in waiting(look)[main]
        assert Path(missing_part(scans / main) or "").name == Path(name).name
        old(scans / name, content.encode())
    assert missing_part(scans / main) is None
    arrivals.look(Sheet())
    clock.pass_by(60)
    assert main in ready(arrivals.look(Sheet()))


def test_what_waits_is_told_with_since_when(store: Store, scans: Path, clock: Clock) -> None:
    arrivals = watch(store, scans)
    first = clock.wall
    for size in range(1, 5):
        old(scans / "a.svs", b"x" * size)
        look = arrivals.look(Sheet())
        clock.pass_by(1800)
    write_arrivals(store, look)
    [told] = read_arrivals(store)["waiting"]
    assert (told["relative"], told["since"]) == ("a.svs", first)


def test_nothing_is_owed_of_a_slide_that_was_taken_up(store: Store, scans: Path) -> None:
    path = write_tiff(scans / "a.tiff", tissue_pixels(64, 64))
    arrivals = watch(store, scans, settle=0)
    for _ in range(2):
        look = arrivals.look(Sheet())
    assert ready(look) == ["a.tiff"]
    take_up(store, scans)
    look = arrivals.look(Sheet())
    assert (ready(look), look.described) == ([], ["a"])
    assert arrivals.look(Sheet()).described == watch(store, scans).look(Sheet()).described == ["a"]
    os.utime(path)
    for _ in range(2):
        look = arrivals.look(Sheet())
    assert ready(look) == ["a.tiff"]
    take_up(store, scans)
    shutil.rmtree(store.slide("a").path)
    for _ in range(2):
        look = arrivals.look(Sheet())
    assert ready(look) == ["a.tiff"], "its results were deleted"


def test_a_transient_failure_is_tried_again_and_a_permanent_one_is_not(
    store: Store, scans: Path, clock: Clock
) -> None:
    arrivals = watch(store, scans, settle=0)
    found, _ = find_in([old(scans / "full.svs").parent, old(scans / "bad.svs").parent])
    for slide_id, slide in Register(store).assign(found).items():
        size, mtime_ns = slide.path.stat().st_size, slide.path.stat().st_mtime_ns
        inputs = {"path": str(slide.path), "size": size, "mtime_ns": mtime_ns}
        inputs["sheet"] = {"mpp": None, "facts": {}}
        error = OSError(28, "full") if slide_id == "full" else ValueError("x")
        store.slide(slide_id).record_failure("slides", error, inputs=inputs)
    clock.wall = store.slide("full").failures()["slides"]["at"]
    arrivals.look(Sheet())
    clock.pass_by(200)
    assert ready(arrivals.look(Sheet())) == []
    clock.pass_by(101)
    arrivals.look(Sheet())
    assert ready(arrivals.look(Sheet())) == ["full.svs"]


def test_a_file_that_is_gone_is_absent_and_a_share_that_is_away_takes_nothing(
    store: Store, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, name in ((here, "a"), (here, "b"), (there, "c")):
        write_tiff(folder / f"{name}.tiff", tissue_pixels(64, 64, seed=ord(name)))
    take_up(store, here, there)
    arrivals = watch(store, here, there)
    (here / "b.tiff").unlink()
    there.rename(tmp_path / "unmounted")
    look = arrivals.look(Sheet())
    assert (look.absent, list(look.away)) == (["b"], [there])
    write_arrivals(store, look)
    since = read_arrivals(store)["absent"]["b"]
    write_arrivals(store, arrivals.look(Sheet()))
    assert read_arrivals(store)["absent"] == {"b": since}
    assert store.slide("b").record("slides").exists()


def test_a_look_with_little_time_reads_some_and_goes_on(
    store: Store, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals_module, "_AT_LEAST", 2)
    for name in "abcde":
        write_tiff(scans / f"{name}.tiff", tissue_pixels(64, 64, seed=ord(name)))
    take_up(store, scans)
    arrivals = watch(store, scans)
    told = [arrivals.look(Sheet(), seconds=0) for _ in range(3)]
    assert [look.unlooked for look in told] == [3, 1, 0]
    assert told[-1].described == list("abcde")
    assert all(not look.ready for look in told)
