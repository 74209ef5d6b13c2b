"""The store: whole files or none, other people's files untouched, nothing made twice."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import contents, keys_of, stamp_of
from PIL import Image

from histoencoder_core.errors import KINDS, SlideError, StoreError, WeightsError, kind_of
from histoencoder_core.store import SlideFolder, Stamp, Store, files, layout
from histoencoder_core.store.stamp import read_comment, read_stamp

TABLE = keys_of((0, 0, 64, 64))
PIXELS = np.full((8, 8, 3), 200, np.uint8)
TILE = "tiles/x0_y0_w64_h64.jpeg"


def write_tiles(folder: SlideFolder, stamp: Stamp, *, images: bool = True) -> None:
    with folder.writing("tiles") as writer:
        writer.image(layout.THUMBNAIL_TISSUE, PIXELS, stamp)
        writer.image(layout.THUMBNAIL_TILES, PIXELS, stamp)
        if images:
            writer.image(TILE, PIXELS, stamp)
        writer.table(TABLE, stamp)


def prints(folder: Path) -> set[str | None]:
    """The fingerprints of all of a slide's tile files in a folder."""
    pictures = [layout.THUMBNAIL_TISSUE, layout.THUMBNAIL_TILES, TILE]
    found = {read_comment(folder / name) for name in pictures if (folder / name).exists()}
    stamp = read_stamp(folder / layout.METADATA)
    return found | ({stamp.fingerprint} if stamp else set())


def save_foreign(path: Path) -> None:
    """Write a file as HistoPrep or HistoEncoder would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"x": [0], "y": [0], "w": [64], "h": [64]}), path)
    elif path.suffix == ".json":
        path.write_text('{"mpp": 0.5}')
    else:
        Image.fromarray(PIXELS).save(path)


def test_a_writer_that_raises_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "catalog.duckdb"
    target.write_text("old")

    def fail() -> None:
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert contents(tmp_path) == {"catalog.duckdb": b"old"}


def test_a_disk_that_can_not_keep_a_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems can't flush a folder, but a file that can't be flushed is lost."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC if stat.S_ISREG(os.fstat(descriptor).st_mode) else errno.EINVAL)

    files.write_json(tmp_path / "a.json", 1)
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=str(errno.ENOSPC)):
        files.write_json(tmp_path / "a.json", 2)
    assert contents(tmp_path) == before
    files.flush(tmp_path)


def test_a_stage_that_raises_changes_nothing(store: Store) -> None:
    folder = store.slide("a")
    write_tiles(folder, stamp_of("old"))
    before = contents(store.root)

    def fail() -> None:
        with folder.writing("tiles") as writer:
            writer.image(TILE, PIXELS, stamp_of("new"))
            writer.table(TABLE, stamp_of("new"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert contents(store.root) == before


def test_a_stage_must_write_its_record(store: Store) -> None:
    folder = store.slide("a")
    with (
        pytest.raises(StoreError, match=r"a/metadata\.parquet: the stage wrote no record"),
        folder.writing("tiles") as writer,
    ):
        writer.image(layout.THUMBNAIL_TILES, PIXELS, stamp_of("new"))
    assert contents(store.root) == {}


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("slides", "properties.json"),
        ("slides", "thumbnail.jpeg"),
        ("tiles", "metadata.parquet"),
        ("tiles", "thumbnail_tissue.jpeg"),
        ("tiles", "thumbnail_tiles.jpeg"),
        ("tiles", TILE),
        ("features", "features.parquet"),
        ("clusters", "clusters.parquet"),
        ("labels", "labels.parquet"),
    ],
)
def test_files_of_other_programs_are_left_alone(
    store: Store, stage: layout.Stage, name: str
) -> None:
    folder = store.slide("a")
    save_foreign(folder.file(name))
    before = contents(store.root)
    written = folder.file(name.split("/", maxsplit=1)[0])

    def write() -> None:
        with folder.writing(stage) as writer:
            writer.json({}, stamp_of("new", stage)) if stage == "slides" else writer.table(
                TABLE, stamp_of("new", stage)
            )

    with pytest.raises(StoreError, match="was not written by this program") as caught:
        write()
    assert str(written) in str(caught.value)
    store.prune(slides=["a"])
    assert contents(store.root) == before


def test_files_of_other_programs_are_not_replaced_by_an_earlier_version(store: Store) -> None:
    folder = store.slide("a")
    old, new = stamp_of("old"), stamp_of("new")
    write_tiles(folder, old)
    write_tiles(folder, new)
    save_foreign(folder.record("tiles"))
    before = contents(store.root)
    with pytest.raises(StoreError, match=r"metadata\.parquet"):
        folder.fetch("tiles", old.fingerprint)
    assert contents(store.root) == before


def test_stamps_come_back_as_they_were_written(store: Store) -> None:
    folder = store.slide("a")
    tiles = stamp_of("µm").with_result(tiles=1, reason=None)
    write_tiles(folder, tiles)
    slide = Stamp.of("slides", algorithm=1, made_from={"path": "Zürich.svs"}, untrained=True)
    with folder.writing("slides") as writer:
        writer.json({"width": 3}, slide)
    assert folder.stamp("tiles") == tiles
    assert folder.stamp("slides") == slide
    assert files.read_json(folder.record("slides"))["width"] == 3
    assert prints(folder.path) == {tiles.fingerprint}


def test_the_fingerprint_is_for_ever() -> None:
    """If this fails, every archive would be computed again: raise an ALGORITHM instead."""
    stamp = Stamp.of("tiles", algorithm=1, made_from={"slide": "c", "mpp": [0.25, 0.25]})
    expected = "1dad9d8525214c47943d9580d44746132d1f097f6ebffcb9cc518f3eebe2ec08"
    assert stamp.fingerprint == expected
    assert stamp.with_result(tiles=3).fingerprint == expected


def test_another_version_of_the_software_makes_nothing_due(store: Store) -> None:
    folder = store.slide("a")
    stamp = stamp_of("same")
    write_tiles(folder, stamp.model_copy(update={"software": "999.0"}))
    assert folder.fetch("tiles", stamp.fingerprint)


def test_other_settings_keep_the_old_output_and_switching_back_finds_it(store: Store) -> None:
    folder = store.slide("a")
    a, b = stamp_of("a"), stamp_of("b")
    write_tiles(folder, a)
    made = contents(folder.path)
    assert not folder.fetch("tiles", b.fingerprint)
    write_tiles(folder, b, images=False)
    assert prints(folder.path) == {b.fingerprint}
    assert not folder.file(layout.TILES).exists()
    [(kept, path)] = folder.versions()
    assert kept == a
    assert contents(path) == made
    assert folder.fetch("tiles", a.fingerprint)
    assert prints(folder.path) == {a.fingerprint}
    assert [stamp for stamp, _ in folder.versions()] == [b]


def test_versions_are_kept_where_the_file_system_has_no_hard_links(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    folder = store.slide("a")
    write_tiles(folder, stamp_of("a"))
    write_tiles(folder, stamp_of("b"))
    assert [stamp for stamp, _ in folder.versions()] == [stamp_of("a")]


def test_making_the_same_again_keeps_no_version(store: Store) -> None:
    folder = store.slide("a")
    write_tiles(folder, stamp_of("a"), images=False)
    write_tiles(folder, stamp_of("a"))
    write_tiles(folder, stamp_of("a"))
    assert folder.versions() == []
    assert folder.file(TILE).is_file()


def test_what_is_made_again_replaces_itself(store: Store) -> None:
    folder = store.slide("a")
    write_tiles(folder, stamp_of("a"))
    write_tiles(folder, stamp_of("a"), images=False)
    assert not folder.file(layout.TILES).exists()


def test_prune_removes_versions_and_nothing_else(store: Store) -> None:
    folder = store.slide("a")
    write_tiles(folder, stamp_of("a"))
    before = contents(folder.path)
    write_tiles(folder, stamp_of("b"))
    current = {
        name: content
        for name, content in contents(folder.path).items()
        if not name.startswith("versions/")
    }
    [(_, kept)] = folder.versions()
    (kept / "notes.txt").write_text("mine")
    sizes = sorted(map(len, before.values()))

    told = store.prune(slides=["a"], dry_run=True)
    assert sorted(size for _, size in told) == sizes
    assert folder.versions()
    assert store.prune(slides=["a"], stages=["features"]) == []
    assert store.prune(slides=["a"]) == told
    assert folder.versions() == []
    notes = f"versions/{kept.name}/notes.txt"
    assert contents(folder.path) == {**current, notes: b"mine"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("images_before", [True, False])
@pytest.mark.parametrize("images", [True, False])
def test_a_run_killed_at_any_step_is_made_up_for_by_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch, images_before: bool, images: bool
) -> None:
    old, new = stamp_of("old"), stamp_of("new")
    for steps in range(30):
        folder = store.slide(f"killed-after-{steps}")
        write_tiles(folder, old, images=images_before)
        with monkeypatch.context() as patch:
            die_after(steps, patch)
            try:
                write_tiles(folder, new, images=images)
                survived = True
            except Killed:
                survived = False
        for _ in range(2):  # a record is whole, and so is what it stands for
            current = folder.stamp("tiles")
            assert current in (None, old, new)
            if current == new:
                assert prints(folder.path) == {new.fingerprint}
            if not folder.fetch("tiles", new.fingerprint):
                write_tiles(folder, new, images=images)
        assert prints(folder.path) == {new.fingerprint}
        assert folder.file(TILE).exists() == images
        assert folder.fetch("tiles", old.fingerprint)
        assert prints(folder.path) == {old.fingerprint}
        if survived:
            assert steps > 5
            return
    pytest.fail("the writer never came to an end")


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("images_after", [True, False])
@pytest.mark.parametrize("work", ["write", "fetch"])
def test_what_a_run_killed_at_any_step_began_can_be_taken_back(
    store: Store, monkeypatch: pytest.MonkeyPatch, images: bool, images_after: bool, work: str
) -> None:
    """The settings are changed, the run that follows is killed, and the settings changed back."""
    old, new = stamp_of("old"), stamp_of("new")
    for steps in range(30):
        folder = store.slide(f"killed-after-{steps}")
        write_tiles(folder, old, images=images)
        whole = contents(folder.path)
        if work == "fetch":
            write_tiles(folder, new, images=images_after)
            assert folder.fetch("tiles", old.fingerprint)
        with monkeypatch.context() as patch:
            die_after(steps, patch)
            try:
                if work == "write":
                    write_tiles(folder, new, images=images_after)
                else:
                    assert folder.fetch("tiles", new.fingerprint)
                survived = True
            except Killed:
                survived = False
        with folder.locked():
            assert folder.fetch("tiles", old.fingerprint)
        assert unversioned(folder) == whole
        store.prune(slides=[folder.slide_id])
        assert contents(folder.path) == whole
        if survived:
            assert steps > 3
            return
    pytest.fail("the writer never came to an end")


@pytest.mark.parametrize("images", [True, False])
def test_bringing_back_an_earlier_output_may_be_killed_at_any_step(
    store: Store, monkeypatch: pytest.MonkeyPatch, images: bool
) -> None:
    old, new = stamp_of("old"), stamp_of("new")
    for steps in range(30):
        folder = store.slide(f"killed-after-{steps}")
        write_tiles(folder, old, images=images)
        whole = contents(folder.path)
        write_tiles(folder, new, images=not images)
        with monkeypatch.context() as patch:
            die_after(steps, patch)
            try:
                survived = folder.fetch("tiles", old.fingerprint)
            except Killed:
                survived = False
        with folder.locked():
            assert folder.fetch("tiles", old.fingerprint)
        assert unversioned(folder) == whole
        if survived:
            assert steps > 3
            return
    pytest.fail("the output never came back")


def test_a_prune_that_was_killed_at_any_step_is_made_up_for_by_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in range(30):
        folder = store.slide(f"killed-after-{steps}")
        write_tiles(folder, stamp_of("old"))
        write_tiles(folder, stamp_of("new"))
        whole = unversioned(folder)
        with monkeypatch.context() as patch:
            die_after(steps, patch)
            try:
                store.prune(slides=[folder.slide_id])
                survived = True
            except Killed:
                survived = False
        store.prune(slides=[folder.slide_id])
        assert contents(folder.path) == whole
        if survived:
            assert steps > 2
            return
    pytest.fail("nothing was pruned")


def unversioned(folder: SlideFolder) -> dict[str, bytes]:
    """What is current in a slide's folder."""
    found = contents(folder.path)
    return {n: c for n, c in found.items() if not n.startswith((layout.VERSIONS, "."))}


def die_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Let only so many changes to the disk happen."""
    left = [steps]

    def mortal(function):
        def change(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*args, **kwargs)

        return change

    for owner, name in [
        (Path, "replace"),
        (Path, "unlink"),
        (os, "link"),
        (files.shutil, "rmtree"),
        (pq, "write_table"),
    ]:
        patch.setattr(owner, name, mortal(getattr(owner, name)))


def test_kill_9_in_the_middle_of_a_write_leaves_the_old_file_whole(
    store: Store, tmp_path: Path
) -> None:
    folder = store.slide("a")
    write_tiles(folder, stamp_of("old"))
    before = contents(folder.path)
    script = tmp_path / "write.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from histoencoder_core.store import SlideFolder, files\n"
        "folder = SlideFolder(Path(sys.argv[1]))\n"
        "record = folder.record('tiles')\n"
        "with folder.writing('tiles') as writer, files.atomic_path(record) as file:\n"
        "    file.write_bytes(b'PAR1 half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, str(script), str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    after = contents(folder.path)
    assert {name: content for name, content in after.items() if not name.startswith(".")} == before
    assert folder.stamp("tiles") == stamp_of("old")
    write_tiles(folder, stamp_of("new"))
    assert folder.stamp("tiles") == stamp_of("new")


def test_failures_are_remembered_until_the_stage_succeeds(store: Store) -> None:
    folder = store.slide("a")
    folder.record_failure("tiles", SlideError("a.svs: no µm/px", kind="no-mpp"), inputs="f00")
    folder.record_failure("labels", ValueError("x"))
    failures = folder.failures()
    assert all(abs(entry.pop("at") - time.time()) < 60 for entry in failures.values())
    assert failures == {
        "tiles": {"kind": "no-mpp", "reason": "a.svs: no µm/px", "inputs": "f00", "attempts": 1},
        "labels": {"kind": "unexpected", "reason": "ValueError: x", "inputs": None, "attempts": 1},
    }
    write_tiles(folder, stamp_of("a"))
    assert list(folder.failures()) == ["labels"]
    folder.clear_failure("labels")
    assert not folder.file(layout.FAILURES).exists()


def test_attempts_are_counted_as_long_as_the_inputs_are_the_same(store: Store) -> None:
    folder = store.slide("a")
    told = []
    for inputs in ("f00", "f00", "f00", "f01"):
        folder.record_failure("tiles", OSError(errno.ENOSPC, "full"), inputs=inputs)
        told.append((folder.failures()["tiles"]["kind"], folder.failures()["tiles"]["attempts"]))
    assert told == [("out-of-disk", 1), ("out-of-disk", 2), ("out-of-disk", 3), ("out-of-disk", 1)]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SlideError("", kind="no-mpp"), "no-mpp"),
        (WeightsError(""), "weights-missing"),
        (MemoryError(), "out-of-memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})(), "out-of-memory"),
        (OSError(errno.EDQUOT, ""), "out-of-disk"),
        (OSError(errno.EROFS, ""), "read-only"),
        (OSError(errno.EIO, ""), "input-output"),
        (TimeoutError(), "time-limit"),
        (KeyError(), "unexpected"),
    ],
)
def test_every_failure_is_of_a_kind_that_has_a_remedy(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind
    assert KINDS[kind].remedy


def test_a_damaged_record_of_failures_stops_nothing(store: Store) -> None:
    folder = store.slide("a")
    folder.path.mkdir(parents=True)
    folder.file(layout.FAILURES).write_text('{"tiles": ')
    assert folder.failures() == {}
    folder.record_failure("tiles", ValueError("x"))
    assert list(folder.failures()) == ["tiles"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "/etc", "a..b", "-a", "_cohort", "ä", "a\n", "a" * 201]
)
def test_no_id_leads_out_of_the_store(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match="can't be a slide's id"):
        store.slide(name)


def test_only_folders_that_can_be_slides_are_listed(store: Store) -> None:
    for name in ("b", "a" * 200, "_cohort", ".hidden"):
        (store.root / name).mkdir(parents=True)
    (store.root / "file").write_text("")
    assert store.slide_ids() == ["a" * 200, "b"]
