"""The audit's allow-list: every entry is needed, and its reason holds."""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).parents[2]
OURS = [
    path
    for package in ("histoencoder_core", "histoencoder_dagster")
    for path in sorted((REPOSITORY / package).rglob("*.py"))
]
NEVER_IMPORTED = {"ImageMath", "ImageCms"}


def load_audit():
    spec = importlib.util.spec_from_file_location("audit_run", REPOSITORY / "audit" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # which dataclasses look up
    spec.loader.exec_module(module)
    return module


ALLOWED = load_audit().read_allowed()


@pytest.mark.parametrize("entry", ALLOWED, ids=lambda entry: entry.id)
def test_an_entry_is_of_what_is_installed_and_says_why_it_is_harmless(entry) -> None:
    assert Version(version(entry.package)) < Version(entry.fixed), "it is fixed: remove the entry"
    assert entry.what
    assert entry.why
    assert (REPOSITORY / entry.checked_by.partition(":")[0]).is_file()


def test_no_entry_stands_twice() -> None:
    assert len({entry.id for entry in ALLOWED}) == len(ALLOWED) > 0


def test_it_is_histoprep_that_holds_pillow_back() -> None:
    pins = [Requirement(text) for text in requires("histoprep") or ()]
    assert [pin.specifier.contains("10.3.0") for pin in pins if pin.name.lower() == "pillow"] == [
        False
    ]


def test_every_image_open_names_its_formats() -> None:
    calls = 0
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                "Image.open",
                "PIL.Image.open",
            }:
                calls += 1
                assert "formats" in {keyword.arg for keyword in node.keywords}, (
                    f"{path}:{node.lineno}"
                )
    assert calls > 3


def test_modules_that_are_never_imported() -> None:
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {part for alias in node.names for part in alias.name.split(".")}
                names |= set((getattr(node, "module", None) or "").split("."))
                assert not names & NEVER_IMPORTED, f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in NEVER_IMPORTED, f"{path}:{node.lineno}"
