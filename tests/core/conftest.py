from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cohorts import COHORT_K

from histoencoder_core.clusters import assign_slide, current_model, feature_files, save_model
from histoencoder_core.clusters.fit import fit_clusters
from histoencoder_core.labels import Annotations, label_annotated
from histoencoder_core.settings import ClusterSettings, LabelSettings, TilingSettings
from histoencoder_core.slides import Register, Sheet, describe_slide, find_slides
from histoencoder_core.store import Store
from histoencoder_core.tiles import cut_tiles, tile_source


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


@pytest.fixture(scope="session")
def cohort_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The synthetic cohort through every stage of the core: six slides, about 250 tiles.

    Read only: a test that changes it copies its folder first. The slides themselves lie in
    ``../slides`` with ``slides.csv`` and ``annotations/``.
    """
    from encoding import small_encoder  # imports torch, which takes seconds

    from histoencoder_core.cohort import publish_catalog
    from histoencoder_core.demo import make_synthetic_cohort
    from histoencoder_core.features import Runner, extract_slides

    root = tmp_path_factory.mktemp("cohort")
    make_synthetic_cohort(root / "slides")
    store = Store(root / "store")
    annotations = root / "slides" / "annotations"
    sheet = Sheet.read(root / "slides" / "slides.csv")
    found = Register(store).assign(find_slides(root / "slides"))
    tiling = TilingSettings(tile_px=256, overlap=0)
    for slide_id, slide in found.items():
        folder = store.slide(slide_id)
        describe_slide(folder, slide, sheet.row(slide_id, relative=slide.relative))
        cut_tiles(folder, tiling)
    runner = Runner(small_encoder(), device="cpu", backend="eager")
    with extract_slides(store, list(found), runner) as features:
        for slide_id in found:
            features[slide_id].result()
    save_model(store, fit_clusters(feature_files(store), ClusterSettings(n_clusters=COHORT_K)))
    model = current_model(store)
    assert model is not None
    said = Annotations(store, annotations)
    for slide_id in found:
        assign_slide(store.slide(slide_id), model)
        source = tile_source(store, slide_id)
        assert source is not None
        label_annotated(store.slide(slide_id), source, said, LabelSettings())
    publish_catalog(store, annotations=annotations)
    return store


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
