"""Locks: of two that work on one slide, one works and the other finds it done."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from encoding import FakePixels, colour_pixels, simple_encoder
from making import contents, keys_of, stamp_of

from histoencoder_core.features import Runner, backends, extract_slides, extraction
from histoencoder_core.store import Stamp, Store, files, layout

PATIENCE = 30.0
"""Seconds after which a test that waits for another thread or process has failed."""

HOLDER = """
import sys
from pathlib import Path
from histoencoder_core.store import SlideFolder, files
folder = SlideFolder(Path(sys.argv[1]))
with folder.locked(), folder.writing("tiles"):
    target = folder.path / "versions" / "f00" / "features.parquet"
    with files.atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        print(flush=True)
        sys.stdin.read()
"""


def eager(*, batch_size: int = 8) -> Runner:
    return Runner(simple_encoder(), device="cpu", backend="eager", batch_size=batch_size)


class GivenUpError(Exception):
    pass


def given_up_after(store: Store, name: str, *, of: str) -> Mapping[str, Future[Stamp]]:
    """Extract slides, and give up after one of them."""
    with contextlib.suppress(GivenUpError), extract_slides(store, of, eager()) as found:
        assert found[name].result(PATIENCE).made_now
        raise GivenUpError
    return found


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let slides have the tiles of these sources."""

    def put(**sources: FakePixels) -> None:
        monkeypatch.setattr(extraction, "tile_source", lambda _, name: sources[name].source())

    return put


def test_what_a_killed_process_left_is_removed_by_the_next_that_holds_the_lock(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.slide("a")
    folder.path.mkdir(parents=True)
    (folder.path / ".mine.tmp").write_text("no name that this program gives")
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    monkeypatch.setattr(files, "TELL_SECONDS", 0.1)
    told, released = threading.Event(), threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()

    def wait() -> None:
        with folder.locked():
            released.set()

    listener = Listener()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        left = {name for name in contents(folder.path) if name.endswith(".tmp")}
        assert len(left) == 2
        waiting = threading.Thread(target=wait)
        files.log.addHandler(listener)
        try:
            with caplog.at_level(logging.WARNING, logger=files.log.name):
                waiting.start()
                assert told.wait(PATIENCE)
                assert not released.is_set()
                holder.send_signal(signal.SIGKILL)
                waiting.join(PATIENCE)
        finally:
            files.log.removeHandler(listener)
    assert released.is_set()
    [message] = [record.getMessage() for record in caplog.records]  # not at every look
    assert message.startswith(f"{folder.path / layout.LOCK}: is held by another process")
    assert set(contents(folder.path)) == {".mine.tmp"}
    assert [path.name for path in folder.path.glob(".tiles.*")] == []


def test_only_who_writes_a_file_of_the_cohort_removes_what_was_left_of_it(tmp_path: Path) -> None:
    model, figure = tmp_path / "cluster_models", tmp_path / "map.png"
    left = [files.temporary_name(path) for path in (model / "a", figure, tmp_path / "map.png.b")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    database = left[1].with_name(f"{left[1].name}.wal")
    database.write_text("half")
    with files.locked_to_write(figure):
        assert [path.exists() for path in [*left, database]] == [True, False, True, False]
    with files.locked_to_write(model):
        assert [path.exists() for path in left] == [False, False, True]


def test_two_that_take_slides_in_opposite_order_do_not_block_each_other(
    store: Store, offer: Callable[..., None]
) -> None:
    """Each holds its first slide before either goes on to the other's."""
    both = threading.Barrier(2)
    sources = {
        name: colour_pixels(40, slide=number, before=lambda rows: rows[0] or both.wait(PATIENCE))
        for number, name in enumerate("ab")
    }
    offer(**sources)
    made: list[tuple[str, bool]] = []

    def work(order: str) -> None:
        with extract_slides(store, order, eager(), readers=1) as found:
            for name in order:
                stamp = found[name].result(PATIENCE)
                made.append((name, stamp.made_now))

    threads = [threading.Thread(target=work, args=[order]) for order in ("ab", "ba")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(made) == [("a", False), ("a", True), ("b", False), ("b", True)]
    assert [source.reads for source in sources.values()] == [40, 40]


def test_leaving_by_an_error_does_not_wait_for_another_process(
    store: Store, offer: Callable[..., None]
) -> None:
    offer(a=colour_pixels(40), b=colour_pixels(40), c=colour_pixels(40))
    with store.slide("b").locked():
        found = given_up_after(store, "a", of="abc")
        assert all(future.done() for future in found.values())
    for name in "abc":
        with store.slide(name).locked():
            pass


def test_a_slide_that_another_process_holds_does_not_stop_one_that_is_done_again(
    store: Store, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the GPU's memory runs out on one slide, the next one is waited for."""
    offer(a=colour_pixels(16), b=colour_pixels(16))  # so few that all are read ahead
    build, reached = backends.build, threading.Event()

    def built(*how):
        compute = build(*how)

        def limited(images: torch.Tensor) -> torch.Tensor:
            if len(images) > 4:
                assert reached.wait(PATIENCE)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return compute(images)

        return limited

    locked = files.locked

    def telling(path: Path, **how):
        if path.parent.name == "b":
            reached.set()
        return locked(path, **how)

    monkeypatch.setattr(backends, "build", built)
    with store.slide("b").locked(), monkeypatch.context() as patch:
        patch.setattr(files, "locked", telling)
        given_up_after(store, "a", of="ab")
    with extract_slides(store, "ab", eager(batch_size=4)) as found:
        assert found["b"].result(PATIENCE).made_now


def test_prune_waits_for_whoever_works_on_the_slide(store: Store) -> None:
    folder = store.slide("a")
    for name in ("old", "new"):
        with folder.locked(), folder.writing("tiles") as writer:
            writer.table(keys_of((0, 0, 8, 8)), stamp_of(name))
    assert len(store.prune(slides=["a"], dry_run=True)) == 1
    with folder.locked():
        pruning = threading.Thread(target=store.prune, kwargs={"slides": ["a"]})
        pruning.start()
        pruning.join(0.5)
        assert len(folder.versions()) == 1
        assert store.prune(slides=["a"], dry_run=True)  # looking needs no lock
    pruning.join(PATIENCE)
    assert folder.versions() == []
