from __future__ import annotations

import os
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take many times as long."""
    import torch  # most tests do without, and it takes seconds

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the deployment that the tests happen to run on."""
    for name in os.environ:
        if name.startswith("HISTOENCODER_"):
            monkeypatch.delenv(name)
