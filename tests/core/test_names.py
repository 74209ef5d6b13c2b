"""Whatever a slide's file is called, it stays one slide of many and inside of the store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from making import keys_of, stamp_of, tissue_pixels, write_tiff

from histoencoder_core.cohort import build_catalog, run_sql
from histoencoder_core.errors import SlideError, StoreError
from histoencoder_core.forgetting import traces
from histoencoder_core.slides import Register, Sheet, find_slides
from histoencoder_core.slides.receive import receive_slide
from histoencoder_core.store import Store, layout

NAMES = [
    b"a\nb.tiff", b"\x01\x02.tiff", b"x" * 250 + b".tiff", b"A.tiff", b"a.tiff", b"A-fbab44f4.tiff",
    b"dots....tiff", "ä ö.tiff".encode(), "患者.tiff".encode(), b"_cohort.tiff",
    b"-rf.tiff", b"%2e%2e%2f.tiff", b"$(id).tiff", b"a;b|c.tiff", b"<script>.tiff", b"tiles.tiff",
    b"versions.tiff", b"failures.json.tiff",
]  # fmt: skip
"""As bytes, since on Linux a name need not be text."""

NO_TEXT = b"no-text-\xff\xfe.tiff"


def test_no_name_harms_another_slide_or_leaves_the_store(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    content = write_tiff(tmp_path / "good.tiff", tissue_pixels(64, 64)).read_bytes()
    for number, name in enumerate([*NAMES, NO_TEXT]):
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
        path.write_bytes(content + bytes([number]))  # each of another content
    (folder / "link.tiff").symlink_to("/etc/passwd")
    (folder / "root.tiff").symlink_to("/")
    found = Register(store).assign(find_slides(folder))
    assert len({slide_id.casefold() for slide_id in found}) == len(found)
    failed = {}
    for slide_id, slide in found.items():
        assert layout.is_slide_id(slide_id)
        try:
            receive_slide(store, slide_id, slide, Sheet())
        except SlideError as error:
            failed[os.fsencode(slide.path.name)] = str(error)
    assert failed.keys() == {NO_TEXT, b"link.tiff"}
    assert "is not UTF-8. Rename it." in failed[NO_TEXT]
    # All of it can be read back, and told.
    assert Register(store).entries().keys() == found.keys()
    build_catalog(store)
    described = run_sql(store, "SELECT file FROM slides WHERE file IS NOT NULL").to_pylist()
    assert {row["file"].encode() for row in described} == {*NAMES}
    reasons = run_sql(store, "SELECT reason FROM completeness WHERE state = 'failed'").to_pylist()
    assert sum("Rename it." in row["reason"] for row in reasons) == 1
    inside = {path.name for path in store.root.iterdir()}
    assert inside == {*found, layout.COHORT}
    assert {path.name for path in tmp_path.iterdir()} == {"slides", "store", "good.tiff"}


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "/etc", "a\n", "", "a\0b", "-a", "ä", "a" * 201]
)
def test_what_is_no_id_opens_no_folder(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match="can't be a slide's id"):
        store.slide(name)


@pytest.mark.parametrize("link", ["A", "A/versions"])
def test_a_link_out_of_the_store_is_not_written_through(
    store: Store, tmp_path: Path, link: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    path = store.root / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside)
    folder = store.slide("A")
    with (
        pytest.raises(StoreError, match="is a link"),
        folder.writing("tiles") as writer,
    ):
        writer.table(keys_of((0, 0, 8, 8)), stamp_of("a"))
    if link == "A":
        folder.record_failure("tiles", SlideError("broken", kind="unreadable"))
        (outside / "of-others.txt").write_text("kept")
        for trace in traces(store, ["A"]):
            trace.remove()
        assert not path.is_symlink()
        assert [p.name for p in outside.iterdir()] == ["of-others.txt"]
    else:
        assert not any(outside.iterdir())
