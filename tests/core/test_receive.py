"""Whose content a file is: slides that were moved, copied, or scanned again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from making import contents, tissue_pixels, write_tiff

from histoencoder_core.errors import SlideError
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import Received, Register, Sheet, content, receive_slide
from histoencoder_core.slides import receive as receive_module
from histoencoder_core.slides.arrivals import Arrivals
from histoencoder_core.slides.find import find_slides
from histoencoder_core.store import Store
from histoencoder_core.tiles import cut_tiles

TILING = TilingSettings(tile_px=64, overlap=0)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    return tmp_path / "scans"


def scan(path: Path, *, seed: int = 0, size: int = 256) -> Path:
    return write_tiff(path, tissue_pixels(size, size, seed=seed))


def receive(store: Store, scans: Path) -> dict[str, Received]:
    """Take up all slides, by relative path; those that are described are cut into tiles."""
    told = {}
    for slide_id, found in Register(store).assign(find_slides(scans)).items():
        told[found.relative] = received = receive_slide(store, slide_id, found, Sheet())
        if received.stamp is not None:
            cut_tiles(store.slide(received.slide), TILING)
    return told


def made(store: Store, slide_id: str) -> int:
    return store.slide(slide_id).record("tiles").stat().st_ino


def test_describing_a_slide_waits_for_no_library_that_only_later_stages_need(
    tmp_path: Path, scans: Path
) -> None:
    """Else each command that describes slides pays for them, too."""
    scan(scans / "a.tiff")
    code = (
        "import sys; from pathlib import Path\n"
        "from histoencoder_core.slides import Register, Sheet, find_slides, receive_slide\n"
        "from histoencoder_core.store import Store\n"
        "store, scans = Store(Path(sys.argv[1])), Path(sys.argv[2])\n"
        "for slide_id, found in Register(store).assign(find_slides(scans)).items():\n"
        "    assert receive_slide(store, slide_id, found, Sheet()).stamp\n"
        "print({'torch', 'histoprep', 'sklearn', 'scipy', 'matplotlib'} & {*sys.modules})"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "store"), str(scans)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_renamed_slide_keeps_its_id_and_its_outputs(store: Store, scans: Path) -> None:
    path = scan(scans / "a.tiff")
    receive(store, scans)
    before = made(store, "a")
    path.rename(scans / "renamed.tiff")
    told = receive(store, scans)
    assert [(name, it.slide) for name, it in told.items()] == [("renamed.tiff", "a")]
    assert made(store, "a") == before
    assert Register(store).entries()["a"].relative == "renamed.tiff"
    assert Register(store).aliases() == {"renamed": "a"}
    assert {it.slide for it in receive(store, scans).values()} == {"a"}
    # The name is free for another slide, but not the id: Dagster knows it as another's.
    scan(scans / "other" / "renamed.tiff", seed=1)
    assert receive(store, scans)["other/renamed.tiff"].slide not in {"a", "renamed"}


def test_a_slide_moved_to_another_folder_under_another_time_is_recognised(
    store: Store, scans: Path
) -> None:
    path = scan(scans / "inbox" / "a.tiff")
    receive(store, scans)
    before = made(store, "a")
    (scans / "archive").mkdir()
    shutil.copyfile(path, scans / "archive" / "a.tiff")
    path.unlink()
    assert {name: it.slide for name, it in receive(store, scans).items()} == {"archive/a.tiff": "a"}
    assert made(store, "a") == before


def test_the_same_content_twice_is_told_and_computed_once(store: Store, scans: Path) -> None:
    path = scan(scans / "a.tiff")
    receive(store, scans)
    shutil.copyfile(path, scans / "b.tiff")
    told = receive(store, scans)
    assert (told["b.tiff"].duplicate_of, told["b.tiff"].stamp) == ("a", None)
    assert set(contents(store.slide("b").path)) <= {"duplicate.json", ".lock"}
    arrivals = Arrivals(store, [scans], settle_seconds=0)
    look = arrivals.look(Sheet())
    assert (look.ready, look.described) == ([], ["a"])
    # Once the original is gone, the copy is the slide.
    before = made(store, "a")
    path.unlink()
    for _ in range(2):
        look = arrivals.look(Sheet())
    assert [it.slide for it in look.ready] == ["b"]
    assert receive(store, scans)["b.tiff"].slide == "a"
    assert made(store, "a") == before


def test_a_copy_that_becomes_another_slide_is_described(store: Store, scans: Path) -> None:
    shutil.copyfile(scan(scans / "a.tiff"), scans / "b.tiff")
    assert receive(store, scans)["b.tiff"].duplicate_of == "a"
    scan(scans / "b.tiff", seed=1)
    told = receive(store, scans)["b.tiff"]
    assert (told.slide, told.duplicate_of) == ("b", None)
    assert store.slide("b").duplicate() is None


def test_a_copy_that_becomes_another_slide_is_no_copy_even_after_a_kill(
    store: Store, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(scan(scans / "a.tiff"), scans / "b.tiff")
    assert receive(store, scans)["b.tiff"].duplicate_of == "a"
    scan(scans / "b.tiff", seed=1)
    real = receive_module.write_description

    def killed(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(receive_module, "write_description", killed)
        with pytest.raises(KeyboardInterrupt):
            receive(store, scans)
    assert receive(store, scans)["b.tiff"].duplicate_of is None
    assert store.slide("b").duplicate() is None


def test_a_slide_that_becomes_a_copy_takes_its_outputs_back(store: Store, scans: Path) -> None:
    scan(scans / "a.tiff")
    scan(scans / "b.tiff", seed=1)
    receive(store, scans)
    shutil.copyfile(scans / "a.tiff", scans / "b.tiff")
    assert receive(store, scans)["b.tiff"].duplicate_of == "a"
    assert store.slide("b").stamp("slides") is None
    assert store.slide("b").stamp("tiles") is None


def test_of_two_slides_that_change_places_none_keeps_the_others_outputs(
    store: Store, scans: Path
) -> None:
    a, b = scan(scans / "a.tiff"), scan(scans / "b.tiff", seed=1)
    receive(store, scans)
    content_of = {
        s: store.slide(s).stamp("slides").made_from["slide"]  # type: ignore[union-attr]
        for s in "ab"
    }
    a.rename(scans / "x.tiff")
    b.rename(scans / "a.tiff")
    (scans / "x.tiff").rename(scans / "b.tiff")
    for _ in range(3):
        told = receive(store, scans)
    for received in told.values():
        folder = store.slide(received.slide)
        slide, tiles = folder.stamp("slides"), folder.stamp("tiles")
        assert slide is not None
        assert tiles is not None
        assert tiles.made_from["slide"] == slide.made_from["slide"]
    assert {
        store.slide(it.slide).stamp("slides").made_from["slide"]  # type: ignore[union-attr]
        for it in told.values()
    } == set(content_of.values())


def test_a_rescan_replaces_the_old_outputs_and_no_tiles_of_the_old_are_left(
    store: Store, scans: Path
) -> None:
    scan(scans / "a.tiff")
    receive(store, scans)
    scan(scans / "a.tiff", seed=1)
    [(slide_id, found)] = Register(store).assign(find_slides(scans)).items()
    receive_slide(store, slide_id, found, Sheet())
    assert store.slide("a").stamp("tiles") is None, "old tiles of a new slide"
    assert [stamp.stage for stamp, _ in store.slide("a").versions()] == ["tiles"]
    receive(store, scans)
    assert store.slide("a").stamp("tiles") is not None


@pytest.fixture
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of more than a thousand bytes are known by 16 blocks of 64."""
    monkeypatch.setattr(content, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(content, "_BLOCK", 64)
    monkeypatch.setattr(content, "_BLOCKS", 16)


def scan_sampled(path: Path) -> Path:
    """A slide with bytes that no such sample reads."""
    scan(path)
    path.write_bytes(path.read_bytes() + bytes(100_000))
    return path


def change_unsampled(path: Path) -> None:
    """Change a byte between the last two of the blocks."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek((size - 64) * 14 // 15 + 64)
        file.write(b"x")


@pytest.mark.usefixtures("small_samples")
def test_what_a_sample_misses_is_found_once_the_files_time_has_changed(
    store: Store, scans: Path
) -> None:
    """A damaged copy that is mended in place, in bytes that no sample reads."""
    path = scan_sampled(scans / "a.tiff")
    receive(store, scans)
    first = store.slide("a").stamp("slides")
    change_unsampled(path)
    stat = path.stat()
    sample = content.content_fingerprint(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    rescanned = receive_slide(store, "a", find_slides(scans)[0], Sheet())
    assert rescanned.stamp is not None
    assert first is not None
    assert rescanned.stamp.fingerprint != first.fingerprint
    assert content.content_fingerprint(path) == sample
    # Touched once more, it is known whole, and known to be the same.
    again = rescanned.stamp.fingerprint
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 2 * 10**9))
    told = receive_slide(store, "a", find_slides(scans)[0], Sheet())
    assert told.stamp is not None
    assert told.stamp.fingerprint == again


@pytest.mark.usefixtures("small_samples")
def test_a_damaged_copy_is_no_duplicate_although_its_sample_is_the_same(
    store: Store, scans: Path
) -> None:
    """It was sent again under another name, and differs in bytes that no sample reads."""
    damaged = scan_sampled(scans / "a.tiff")
    receive(store, scans)
    sound = Path(shutil.copy(damaged, scans / "b.tiff"))
    change_unsampled(sound)
    assert content.content_fingerprint(sound) == content.content_fingerprint(damaged)
    assert receive(store, scans)["b.tiff"].duplicate_of is None
    a, b = (store.slide(slide_id).stamp("slides") for slide_id in "ab")
    assert a is not None
    assert b is not None
    assert a.fingerprint != b.fingerprint
    shutil.copy(sound, scans / "c.tiff")
    assert receive(store, scans)["c.tiff"].duplicate_of == "b"


def test_a_file_that_changes_while_it_is_worked_on_is_refused(
    store: Store, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = scan(scans / "a.tiff")
    [(slide_id, found)] = Register(store).assign(find_slides(scans)).items()
    receive_slide(store, slide_id, found, Sheet())
    scan(path, seed=1)
    with pytest.raises(SlideError, match="has changed") as caught:
        cut_tiles(store.slide("a"), TILING)
    assert caught.value.kind == store.slide("a").failures()["tiles"]["kind"] == "changing"
    assert store.slide("a").stamp("tiles") is None


def test_a_store_without_the_list_of_contents_makes_it_again(store: Store, scans: Path) -> None:
    path = scan(scans / "a.tiff")
    receive(store, scans)
    shutil.rmtree(store.contents)
    path.rename(scans / "b.tiff")
    assert receive(store, scans)["b.tiff"].slide == "a"


def test_what_is_said_of_a_slide_that_was_not_described_yet_is_looked_at_again(
    store: Store, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It claims a content, fails, is renamed, and another takes its place: there is no copy."""
    path = scan(scans / "a.tiff")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(receive_module, "write_description", full)
        with pytest.raises(OSError, match="No space"):
            receive(store, scans)
    path.rename(scans / "c.tiff")
    scan(path, seed=1)
    found = {slide.relative: slide for slide in find_slides(scans)}
    ids = Register(store).assign(found.values())
    assert list(ids) == ["a", "c"]
    assert receive_slide(store, "c", found["c.tiff"], Sheet()).duplicate_of == "a"
    assert receive_slide(store, "a", found["a.tiff"], Sheet()).duplicate_of is None
    arrivals = Arrivals(store, [scans], settle_seconds=0)
    for _ in range(2):
        look = arrivals.look(Sheet())
    assert [it.slide for it in look.ready] == ["c"]
    assert receive(store, scans)["c.tiff"].duplicate_of is None
    assert store.slide("c").stamp("slides") is not None


def test_a_share_that_is_away_does_not_give_its_slides_to_their_copies(
    store: Store, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    path = scan(one / "x.tiff")
    other.mkdir()
    shutil.copyfile(path, other / "y.tiff")
    receive(store, one)
    assert receive(store, other)["y.tiff"].duplicate_of == "x"
    one.rename(tmp_path / "away")
    arrivals = Arrivals(store, [one, other], settle_seconds=0)
    for _ in range(2):
        assert arrivals.look(Sheet()).ready == []
    one.mkdir()  # an empty mount point
    assert receive(store, other)["y.tiff"].duplicate_of == "x"
    assert Register(store).entries()["x"].path == str(path)


def test_a_slide_that_was_only_touched_does_not_give_its_id_to_its_copy(
    store: Store, scans: Path
) -> None:
    path = scan(scans / "a.tiff")
    receive(store, scans)
    shutil.copyfile(path, scans / "b.tiff")
    receive(store, scans)
    os.utime(path, (1, 1))
    found = {slide.relative: slide for slide in find_slides(scans)}
    (scans / "b.tiff").touch()
    assert receive_slide(store, "b", found["b.tiff"], Sheet()).duplicate_of == "a"
    assert Register(store).entries()["a"].path == str(path)
    receive(store, scans)
    assert Arrivals(store, [scans], settle_seconds=0).look(Sheet()).described == ["a"]
