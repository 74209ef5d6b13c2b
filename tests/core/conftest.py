from __future__ import annotations

import os
from pathlib import Path

import pytest

from histoencoder_core.store import Store


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of public test files, described by its own README.md."""
    folder = os.environ.get("HISTOENCODER_TEST_DATA")
    if not folder:
        pytest.skip("HISTOENCODER_TEST_DATA does not name the folder of public test files")
    return Path(folder)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the deployment that the tests happen to run on."""
    for name in os.environ:
        if name.startswith("HISTOENCODER_"):
            monkeypatch.delenv(name)
