"""Slides in a bucket: found, fetched when they are read, told from folders' in nothing else."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from making import contents, tissue_pixels, write_dicom, write_tiff
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileInfo, FileSelector, FileSystem
from pydantic import ValidationError

from histoencoder_core.buckets import Bucket, BucketAwayError, copied, copies
from histoencoder_core.buckets import bucket as bucket_module
from histoencoder_core.errors import SlideError
from histoencoder_core.forgetting import traces
from histoencoder_core.settings import PlatformSettings, TilingSettings
from histoencoder_core.slides import Arrivals, Register, Sheet, find_slides, receive_slide
from histoencoder_core.slides.arrivals import Look, Source, find_in
from histoencoder_core.slides.find import parts_of
from histoencoder_core.store import Store
from histoencoder_core.tiles import cut_tiles, tile_source

TILING = TilingSettings(tile_px=64, overlap=0)


@dataclass
class Objects:
    """A prefix of a bucket on a server of this machine."""

    url: str
    system: FileSystem
    prefix: str

    def put(self, relative: str, content: bytes | Path) -> None:
        with self.system.open_output_stream(f"{self.prefix}/{relative}") as out:
            out.write(content if isinstance(content, bytes) else content.read_bytes())

    def remove(self, relative: str) -> None:
        self.system.delete_file(f"{self.prefix}/{relative}")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server that speaks S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def objects(server: str, monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    name = f"bucket-{uuid.uuid4()}"
    query = f"endpoint_override={server}&scheme=http&region=us-east-1"
    system, _ = FileSystem.from_uri(
        f"s3://{name}/?{query}&allow_bucket_creation=true&allow_bucket_deletion=true"
    )
    system.create_dir(name)
    return Objects(f"s3://{name}/scans?{query}", system, f"{name}/scans")


@pytest.fixture
def bucket(objects: Objects, tmp_path: Path) -> Bucket:
    return Bucket(objects.url, folder=tmp_path / "buckets", max_bytes=10**9)


def scan(path: Path, *, seed: int = 0, size: int = 256) -> Path:
    return write_tiff(path, tissue_pixels(size, size, seed=seed))


def take_up(store: Store, *sources: Source) -> dict[str, str]:
    """Take up and cut all slides there are: relative path to the id that it got."""
    found, away = find_in(sources)
    assert not away
    told = {}
    for slide_id, slide in Register(store).assign(found).items():
        received = receive_slide(store, slide_id, slide, Sheet())
        told[slide.relative] = received.slide
        if received.stamp is not None:
            cut_tiles(store.slide(received.slide), TILING)
    return told


def look(store: Store, bucket: Bucket) -> Look:
    """The second look, at which what stands still is ready."""
    arrivals = Arrivals(store, [bucket], settle_seconds=0)
    arrivals.look(Sheet())
    return arrivals.look(Sheet())


def fetch(path: Path) -> None:
    """Read a slide of one file, and be done with it."""
    with copied([path]):
        pass


def copies_of(bucket: Bucket) -> list[str]:
    return sorted(path.name for path in bucket.root.glob("copies/*/*"))


def test_a_slide_in_a_bucket_gives_what_it_gives_in_a_folder(
    data: Path, objects: Objects, bucket: Bucket, tmp_path: Path
) -> None:
    slide = data / "slides" / "CMU-1-Small-Region.svs"
    objects.put("day 1/a.svs", slide)
    here = tmp_path / "scans" / "day 1" / "a.svs"
    here.parent.mkdir(parents=True)
    here.write_bytes(slide.read_bytes())
    stores = Store(tmp_path / "one"), Store(tmp_path / "other")
    for store, source in zip(stores, (bucket, tmp_path / "scans"), strict=True):
        assert take_up(store, source) == {"day 1/a.svs": "a"}
    one, other = (pq.read_table(store.slide("a").record("tiles")) for store in stores)
    assert one.equals(other)
    pixels = []
    for store in stores:
        source = tile_source(store, "a")
        assert source is not None
        with source.open() as tiles:
            pixels.append(
                [np.asarray(tile) for block in tiles.blocks for tile in tiles.read(block)]
            )
    assert len(pixels[0]) > 100
    assert all((a == b).all() for a, b in zip(*pixels, strict=True))


def test_what_changes_moves_or_goes_in_a_bucket_is_taken_as_in_a_folder(
    store: Store, objects: Objects, bucket: Bucket, tmp_path: Path
) -> None:
    first, second = scan(tmp_path / "1.tiff"), scan(tmp_path / "2.tiff", seed=1)
    objects.put("a.tiff", first)
    take_up(store, bucket)
    before = contents(store.slide("a").path)
    assert look(store, bucket).described == ["a"]

    objects.put("b.tiff", first)
    assert take_up(store, bucket) == {"a.tiff": "a", "b.tiff": "b"}
    duplicate = store.slide("b").duplicate()
    assert duplicate is not None
    assert duplicate["of"] == "a"
    objects.remove("b.tiff")

    objects.put("moved/c.tiff", first)
    objects.remove("a.tiff")
    assert take_up(store, bucket) == {"moved/c.tiff": "a"}
    assert contents(store.slide("a").path)["metadata.parquet"] == before["metadata.parquet"]

    objects.put("moved/c.tiff", second)
    assert [it.slide for it in look(store, bucket).ready] == ["a"]
    take_up(store, bucket)
    assert contents(store.slide("a").path)["metadata.parquet"] != before["metadata.parquet"]

    objects.put("d.tiff", scan(tmp_path / "3.tiff", seed=2))
    objects.remove("moved/c.tiff")
    assert look(store, bucket).absent == ["a", "b"]
    assert "metadata.parquet" in contents(store.slide("a").path)


def test_of_a_bucket_that_can_not_be_listed_nothing_is_absent(
    store: Store, objects: Objects, bucket: Bucket, tmp_path: Path
) -> None:
    objects.put("a.tiff", scan(tmp_path / "a.tiff"))
    take_up(store, bucket)
    name = objects.prefix.partition("/")[0]
    objects.system.delete_dir(name)
    seen = look(store, bucket)
    assert (seen.absent, list(seen.away)) == ([], [bucket.listed])
    [told] = seen.away.values()
    assert told.startswith(f"{objects.url}: can't be listed: ")
    assert "NO_SUCH_BUCKET" in told


def test_a_bucket_that_is_slow_to_list_holds_up_nobody(
    objects: Objects, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put("a.tiff", scan(tmp_path / "a.tiff"))
    asked, go_on = bucket._ask, threading.Event()

    def slow() -> object:
        go_on.wait(60)
        return asked()

    monkeypatch.setattr(bucket, "_ask", slow)
    for _ in range(2):
        with pytest.raises(BucketAwayError, match="listed for the first time"):
            bucket.list_anew(seconds=0.01)  # so that none of its slides is taken for absent
    go_on.set()
    bucket.list_anew(seconds=30)
    assert [slide.relative for slide in find_slides(bucket.listed)] == ["a.tiff"]
    go_on.clear()
    bucket.list_anew(seconds=0.01)
    assert [slide.relative for slide in find_slides(bucket.listed)] == ["a.tiff"]
    go_on.set()


def test_slides_that_there_was_no_time_to_list_yet_are_not_absent(
    store: Store, objects: Objects, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the folder of copies was emptied."""
    for number, name in enumerate("abc"):
        objects.put(f"{name}.tiff", scan(tmp_path / "x.tiff", seed=number))
    take_up(store, bucket)
    shutil.rmtree(bucket.root)
    write, out_of_time = bucket._write, threading.Event()

    def write_one(*told: object) -> None:
        write(*told)  # type: ignore[arg-type]
        out_of_time.set()

    monkeypatch.setattr(bucket, "_write", write_one)
    later = itertools.count(1, 1000)
    clock = SimpleNamespace(
        monotonic=lambda: next(later) if out_of_time.is_set() else 0, time_ns=time.time_ns
    )
    with monkeypatch.context() as patched:
        patched.setattr(bucket_module, "time", clock)
        seen = look(store, bucket)
    assert (seen.absent, list(seen.away)) == ([], [bucket.listed])
    out_of_time.clear()
    assert look(store, bucket).away == {}


def test_one_object_that_can_not_be_read_takes_no_other_away(
    objects: Objects, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.tiff", "archived.csv", "z.tiff"):
        objects.put(name, b"x")
    write = bucket._write

    def refused(relative: str, *told: object) -> None:
        if relative == "archived.csv":
            raise OSError("AWS Error ACCESS_DENIED")
        write(relative, *told)  # type: ignore[arg-type]

    monkeypatch.setattr(bucket, "_write", refused)
    bucket.list_anew(seconds=30)
    assert [slide.relative for slide in find_slides(bucket.listed)] == ["a.tiff", "z.tiff"]


def test_copies_make_room_for_others_but_not_while_they_are_read(
    objects: Objects, bucket: Bucket, tmp_path: Path
) -> None:
    for number, name in enumerate("abc"):
        objects.put(f"{name}.tiff", scan(tmp_path / "x.tiff", seed=number))
    size = (tmp_path / "x.tiff").stat().st_size
    bucket.max_bytes = int(2.5 * size)
    bucket.list_anew(seconds=30)
    a, b, c = (bucket.listed / f"{name}.tiff" for name in "abc")
    with copied([a]) as copy:
        assert copy.read_bytes() != a.read_bytes()
        fetch(b)
        fetch(c)
        assert copies_of(bucket) == ["a.tiff", "c.tiff"]
        with (
            copied([c]),
            pytest.raises(SlideError, match="BUCKET_COPIES_GB") as caught,
            copied([b]),
        ):
            pass
        assert caught.value.kind == "out-of-disk"
    assert copies_of(bucket) == ["a.tiff", "c.tiff"]


def test_one_copy_serves_all_who_read_at_once(
    objects: Objects, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put("a.tiff", scan(tmp_path / "a.tiff"))
    bucket.list_anew(seconds=30)
    fetched = []
    fetch = copies._download
    monkeypatch.setattr(copies, "_download", lambda *told: (fetched.append(told), fetch(*told)))

    def read(_: int) -> bytes:
        with copied([bucket.listed / "a.tiff"]) as path:
            return path.read_bytes()

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(read, range(16))) == {(tmp_path / "a.tiff").read_bytes()}
    assert len(fetched) == 1


def test_a_slide_that_changes_while_it_is_fetched_is_refused(
    objects: Objects, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put("a.tiff", scan(tmp_path / "a.tiff"))
    bucket.list_anew(seconds=30)
    objects.put("a.tiff", scan(tmp_path / "b.tiff", size=320))
    with pytest.raises(SlideError, match=r"scans/a\.tiff: has changed") as caught:
        fetch(bucket.listed / "a.tiff")
    assert caught.value.kind == "changing"
    assert copies_of(bucket) == []
    objects.remove("a.tiff")
    with pytest.raises(SlideError, match="is not in its bucket any more") as caught:
        fetch(bucket.listed / "a.tiff")
    assert caught.value.kind == "missing"


def test_slides_of_many_objects_are_whole_before_they_are_ready(
    store: Store, objects: Objects, bucket: Bucket
) -> None:
    objects.put("m.mrxs", b"x")
    objects.put("m/Slidedat.ini", b"[HIERARCHICAL]\nINDEXFILE=Index.dat\n")
    assert [it.reason for it in look(store, bucket).waiting] == [
        "its part m/Index.dat is not there yet"
    ]
    objects.put("m/Index.dat", b"index")
    assert [it.found.relative for it in look(store, bucket).ready] == ["m.mrxs"]
    with copied(parts_of(bucket.listed / "m.mrxs")) as path:
        assert path.with_name("m").joinpath("Index.dat").read_bytes() == b"index"


def test_a_dicom_series_in_a_bucket_is_one_slide(
    store: Store, objects: Objects, bucket: Bucket, tmp_path: Path
) -> None:
    pixels = tissue_pixels(512, 512)
    for level, (name, mpp) in enumerate([("l0.dcm", 0.5), ("l1.dcm", 1.0)]):
        path = write_dicom(
            tmp_path / name, pixels[:: level + 1, :: level + 1], uids=("1.2.3.1", "1.2.3.2"),
            mpp=mpp, patient="X", level=level,
        )  # fmt: skip
        objects.put(name, path)
    assert take_up(store, bucket) == {"l0.dcm": "l0"}
    assert copies_of(bucket) == ["l0.dcm", "l1.dcm"]


def test_tables_and_annotations_beside_slides_are_read(objects: Objects, tmp_path: Path) -> None:
    settings = PlatformSettings(slides=objects.url, bucket_copies=tmp_path / "buckets")
    objects.put("slides.csv", b"slide,mpp\na,0.5\n")
    objects.put("annotations/a.geojson", b"{}")
    objects.put("annotations/a.png", b"a mask")
    objects.put("a.tiff", b"x" * 10)
    find_in(settings.sources)
    assert settings.sheet_path is not None
    assert Sheet.read(settings.sheet_path).row("a", relative="a.tiff").mpp == 0.5
    assert (settings.annotations_folder / "a.geojson").read_text() == "{}"
    assert (settings.annotations_folder / "a.png").read_bytes() == b"a mask"


def test_no_object_can_leave_the_folder(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "../../out.svs",
        "a/../../out.svs",
        "/out.svs",
        "a//b.svs",
        f"{'x' * 300}.svs",
        "a\0.svs",
    ]
    names += ["fine.svs", "clash", "clash/b.svs"]
    found = [FileInfo(f"{bucket_prefix(bucket)}/{n}", type=2, size=1, mtime_ns=1) for n in names]

    class Listed:
        def get_file_info(self, _: FileSelector) -> list[FileInfo]:
            return found

    monkeypatch.setattr(bucket, "connect", lambda: (Listed(), bucket_prefix(bucket)))
    bucket.list_anew(seconds=30)
    inside = {p.relative_to(bucket.listed).as_posix() for p in bucket.listed.rglob("*.svs")}
    assert inside <= {"fine.svs", "clash/b.svs"}
    assert "fine.svs" in inside
    assert not list(bucket.root.parent.parent.rglob("out.svs"))


def bucket_prefix(bucket: Bucket) -> str:
    return bucket.url.removeprefix("s3://").partition("?")[0]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://key:secret@hospital/scans", "AWS_ACCESS_KEY_ID"),
        ("abfss://scans:secret@account.dfs.core.windows.net", "must hold no key or password"),
        ("abfss://scans@account.dfs.core.windows.net?sig=secret", "must not tell sig"),
        ("s3://hospital/scans?secret_key=secret", "must not tell secret_key"),
        ("ftp://hospital/scans", "ftp:// is not read"),
    ],
)
def test_an_address_that_can_not_be_used_is_refused(url: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told) as caught:
        PlatformSettings(slides=url)
    assert "secret" not in str(caught.value).replace("SECRET", "").replace("secret_key", "")


def test_forgetting_a_slide_removes_its_copy(
    store: Store, objects: Objects, bucket: Bucket, tmp_path: Path
) -> None:
    objects.put("a.tiff", scan(tmp_path / "a.tiff"))
    take_up(store, bucket)
    assert copies_of(bucket) == ["a.tiff"]
    for trace in traces(store, ["a"]):
        trace.remove()
    assert copies_of(bucket) == []


def test_an_address_of_nothing_says_so(tmp_path: Path) -> None:
    bucket = Bucket(f"file://{tmp_path}/nothing", folder=tmp_path / "buckets", max_bytes=1)
    with pytest.raises(BucketAwayError, match="nothing: can't be listed"):
        bucket.list_anew(seconds=30)
