from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cohorts import copy_of

from histoencoder_core.cohort import judge_slides
from histoencoder_core.errors import StoreError
from histoencoder_core.store import SlideFolder, Store


class Judging:
    """Counts tiles' bytes; tells which slides it was asked to judge."""

    def __init__(self) -> None:
        self.judged: list[str] = []
        self.unreadable: set[str] = set()

    def __call__(self, folder: SlideFolder) -> str | None:
        self.judged.append(folder.slide_id)
        if folder.slide_id in self.unreadable:
            raise StoreError("can't be read")
        return str(folder.record("features").stat().st_size)

    def over(self, store: Store, *, rules: int = 1) -> tuple[dict[str, str | None], list[str]]:
        self.judged.clear()
        return judge_slides(store, "size", self, rules=rules), list(self.judged)


@pytest.fixture
def store(cohort_store: Store, tmp_path: Path) -> Store:
    return copy_of(cohort_store, tmp_path / "store")


def test_a_verdict_stands_until_a_file_of_its_slide_changes(store: Store) -> None:
    judging, slides = Judging(), store.slide_ids()
    first, judged = judging.over(store)
    assert judged == slides == list(first)
    assert judging.over(store) == (first, [])
    changed = store.slide(slides[2]).record("features")
    shutil.copyfile(store.slide(slides[0]).record("features"), changed)
    second, judged = judging.over(store)
    assert judged == [slides[2]]
    assert second == {**first, slides[2]: str(changed.stat().st_size)}
    shutil.rmtree(store.slide(slides[1]).path)
    assert judging.over(store) == ({s: second[s] for s in slides if s != slides[1]}, [])


def test_other_rules_and_a_damaged_file_call_for_all(store: Store) -> None:
    judging, slides = Judging(), store.slide_ids()
    judging.over(store)
    assert judging.over(store, rules=2)[1] == slides
    (store.cohort / "checks" / "size.json").write_text("[")
    assert judging.over(store, rules=2)[1] == slides


def test_what_can_not_be_read_is_tried_again(store: Store) -> None:
    judging, [one, *_] = Judging(), store.slide_ids()
    judging.unreadable = {one}
    assert judging.over(store)[0][one] == "can't be read"
    judging.unreadable = set()
    found, judged = judging.over(store)
    assert judged == [one]
    assert found[one] == str(store.slide(one).record("features").stat().st_size)


def test_tiles_of_another_program_are_judged_each_time(store: Store) -> None:
    judging, [one, *_] = Judging(), store.slide_ids()
    store.slide(one).record("tiles").unlink()
    judging.over(store)
    assert judging.over(store)[1] == [one]
