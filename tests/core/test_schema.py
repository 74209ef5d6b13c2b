"""The store's schema version: older stores are brought up to date, newer ones refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from making import contents

from histoencoder_core.cohort import database, publish_catalog
from histoencoder_core.cohort.query import attached
from histoencoder_core.errors import KINDS, StoreError
from histoencoder_core.slides import Register
from histoencoder_core.store import Store, schema

VERSION_1 = Path(__file__).parent / "data" / "store_version_1"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store that a version without a schema version wrote; see data/make_store_version_1.py."""
    return Path(shutil.copytree(VERSION_1, tmp_path / "store"))


def failures(root: Path) -> dict[str, dict[str, str]]:
    return {
        name: {
            s: f["kind"] for s, f in json.loads((root / name / "failures.json").read_text()).items()
        }
        for name in "AB"
    }


def test_an_old_store_is_brought_up_to_date_when_it_is_opened(old: Path) -> None:
    before = contents(old)
    store = Store(old)
    assert schema.read_version(old) == schema.VERSION
    assert failures(old) == {
        "A": {"labels": "labels", "features": "out-of-memory"},
        "B": {"slides": "unreadable"},
    }
    for slide_id in "AB":
        for failure in store.slide(slide_id).failures().values():
            assert failure["kind"] in KINDS
            assert failure["attempts"] == 1
            assert failure["at"] > 0
    after = contents(old)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"A/failures.json", "B/failures.json"}
    assert store.slide("A").stamp("tiles") is not None
    assert list(Register(store).entries()) == ["A", "B"]


def test_an_opened_store_is_not_looked_through_again(old: Path) -> None:
    Store(old)
    (old / "A" / "failures.json").write_bytes((VERSION_1 / "A" / "failures.json").read_bytes())
    before = contents(old)
    schema._checked.clear()  # as in another process
    Store(old)
    assert contents(old) == before


@pytest.mark.parametrize("killed_at", ["failures.json", "store.json"])
def test_a_step_that_was_killed_is_done_again(old: Path, killed_at: str) -> None:
    program = (
        "import os, sys, signal\n"
        "from histoencoder_core.store import Store, files\n"
        "write, seen = files.write_json, []\n"
        "def dying(path, *args, **kwargs):\n"
        f"    if path.name == {killed_at!r} and (path.name == 'store.json' or seen):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    seen.append(path)\n"
        "    write(path, *args, **kwargs)\n"
        "files.write_json = dying\n"
        f"Store({str(old)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert schema.read_version(old) == 1
    once = Path(shutil.copytree(VERSION_1, old.parent / "once"))
    for root in (old, once):
        Store(root)
    assert failures(old) == failures(once)
    assert schema.read_version(old) == schema.VERSION


def test_a_newer_store_is_refused_and_not_touched(old: Path) -> None:
    Store(old)
    (old / "_cohort" / "store.json").write_text('{"version": 99}')
    schema._checked.clear()
    before = contents(old)
    with pytest.raises(StoreError, match=r"schema version 99.*Install a newer one"):
        Store(old)
    command = [sys.executable, "-c", "from histoencoder_core.cli import main; main()"]
    for arguments in (["status"], ["forget", "A", "--yes"]):
        done = subprocess.run(
            [*command, arguments[0], "-i", str(old), *arguments[1:]],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stdout
        assert "schema version 99" in done.stderr
    assert contents(old) == before


@pytest.mark.parametrize("damage", ["", "[]", '{"version": "2"}', '{"version": 0}', "{}"])
def test_a_damaged_record_is_told(old: Path, damage: str) -> None:
    (old / "_cohort" / "store.json").write_text(damage)
    with pytest.raises(StoreError, match=r"store\.json: tells no schema version"):
        Store(old)


def test_two_that_open_an_old_store_at_once_both_find_it_up_to_date(old: Path) -> None:
    """The second waits for the lock, and finds the work done."""
    wrote: list[Path] = []
    original = schema._MIGRATIONS[1]

    def counted(root: Path) -> None:
        wrote.append(root)
        original(root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(schema._MIGRATIONS, 1, counted)
        threads = [threading.Thread(target=schema.ensure_schema, args=(old,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert wrote == [old]


def test_nothing_is_written_where_there_is_no_store(tmp_path: Path) -> None:
    Store(tmp_path / "nowhere")
    (tmp_path / "images" / "A").mkdir(parents=True)
    Store(tmp_path / "images")
    assert list(tmp_path.rglob("*")) == [tmp_path / "images", tmp_path / "images" / "A"]


def test_an_old_store_that_can_only_be_read_is_read(old: Path) -> None:
    before = contents(old)
    read_only = (
        f"mount --bind '{old}' '{old}' && mount -o remount,ro,bind '{old}' || exit 77; "
        f"exec '{sys.executable}' -c 'from histoencoder_core.cli import main; main()' "
        f"status -i '{old}'"
    )
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", read_only],
            env={k: v for k, v in os.environ.items() if not k.startswith("HISTOENCODER_")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no `unshare`")
    if done.returncode == 77 or "Operation not permitted" in done.stderr:
        pytest.skip("this user may not mount")
    assert "B slides: /scans/B.svs: can't be opened." in done.stdout, done.stderr
    assert "can't be brought up to date" in done.stderr
    assert contents(old) == before


def test_a_catalog_of_another_form_is_written_anew(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(old)
    publish_catalog(store)
    with attached(store) as connection:
        rows = connection.sql("SELECT slide, tiles FROM slides ORDER BY ALL").fetchall()
    assert publish_catalog(store).read == 0
    monkeypatch.setattr(database, "form", lambda: "of another release")
    assert publish_catalog(store).read == len(rows) == 2
    with attached(store) as connection:
        assert connection.sql("SELECT slide, tiles FROM slides ORDER BY ALL").fetchall() == rows
