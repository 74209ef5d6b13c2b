"""The table of slides."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoencoder_core.errors import SettingsError
from histoencoder_core.slides import Sheet
from histoencoder_core.slides.sheet import SheetRow


def read(tmp_path: Path, text: str, encoding: str = "utf-8") -> Sheet:
    path = tmp_path / "slides.csv"
    path.write_bytes(text.encode(encoding))
    return Sheet.read(path)


def test_facts_and_resolution(tmp_path: Path) -> None:
    sheet = read(
        tmp_path,
        "\ufeffslide, mpp,patient ,site,scanner,stain,split\r\n"
        'CMU-1,0.25, P1,,"Aperio, AT2",H&E,train\r\n'
        "b/CMU-2.svs,,Zoë\r\n",
    )
    facts = {"patient": "P1", "scanner": "Aperio, AT2", "stain": "H&E", "split": "train"}
    assert sheet.row("CMU-1", relative="x/CMU-1.svs") == SheetRow(0.25, facts)
    assert sheet.row("CMU-2", relative="b/CMU-2.svs") == SheetRow(None, {"patient": "Zoë"})
    assert sheet.row("CMU-3", relative="CMU-3.svs") == SheetRow()
    assert Sheet.read(None).row("CMU-1") == SheetRow()


@pytest.mark.parametrize("name", ["A_1", "x/A (1).svs", "A (1).svs", "A (1)"])
def test_a_slide_is_named_by_id_path_file_or_stem(tmp_path: Path, name: str) -> None:
    sheet = read(tmp_path, f"slide,mpp\n{name},0.3\n")
    assert sheet.row("A_1", relative="x/A (1).svs").mpp == 0.3


def test_the_more_exact_name_wins(tmp_path: Path) -> None:
    sheet = read(tmp_path, "slide,mpp\nA,0.1\nA.svs,0.2\nx/A.svs,0.3\nid,0.4\n")
    assert sheet.row("id", relative="x/A.svs").mpp == 0.4
    assert sheet.row("B", relative="x/A.svs").mpp == 0.3
    assert sheet.row("A", relative="y/A.svs").mpp == 0.1


@pytest.mark.parametrize("name", ["CMU-1", "CMU-1.svs"])
def test_a_row_is_not_taken_for_another_slide_of_the_same_name(tmp_path: Path, name: str) -> None:
    sheet = read(tmp_path, f"slide,patient\n{name},P1\n")
    assert sheet.row("CMU-1", relative="a/CMU-1.svs").facts == {"patient": "P1"}
    assert sheet.row("CMU-1-9f86d081", relative="b/CMU-1.svs") == SheetRow()
    sheet = read(tmp_path, "slide,patient\nCMU-1,P1\nCMU-1.ndpi,P2\n")
    assert sheet.row("CMU-1-60303ae2", relative="CMU-1.ndpi").facts == {"patient": "P2"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "first line must name the columns slide, mpp"),
        ("slide;mpp\nA;0,25\n", "unknown: slide;mpp"),
        ("slide,pateint\nA,x\n", "unknown: pateint"),
        ("mpp\n0.25\n", "'slide' is required"),
        ("slide,mpp\nA,0.25\n\nB,0.25\nA,0.3\n", "line 5: A is named twice"),
        ("slide,mpp\n,0.25\n", "line 2: the column 'slide' is empty"),
        ('slide,mpp\nA,0.25\n\n\nB,"0,25"\n', "line 5: mpp is '0,25'"),
        ("slide,mpp\nA,0.0\n", "line 2: mpp is '0.0'"),
        ("slide,mpp\nA,nan\n", "line 2: mpp is 'nan'"),
        ("slide,mpp\nA,40x\n", "line 2: mpp is '40x'"),
        ("slide,mpp\nA,896\n", "line 2: mpp is '896'"),
    ],
)
def test_mistakes_are_told_by_file_and_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "slides.csv"))
    assert told in str(caught.value)


def test_a_table_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"slides\.csv: the table of slides can't be read"):
        Sheet.read(tmp_path / "slides.csv")
    with pytest.raises(SettingsError, match=r"slides\.csv: the table of slides can't be read"):
        read(tmp_path, "slide,patient\nA,Zoë\n", encoding="latin-1")
