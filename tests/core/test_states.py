"""The state of all slides, told from the catalog where files have not changed since."""

# ruff: noqa: F811 - fixtures
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import test_catalog as changes
from test_catalog import annotations_of, copied, refresh  # noqa: F401

from histoencoder_core.clusters import current_model
from histoencoder_core.cohort import StageState, slide_states, states
from histoencoder_core.settings import TilingSettings
from histoencoder_core.store import Store

OTHER = TilingSettings(tile_px=300, overlap=0)


def told(store: Store, **asked) -> list[StageState]:
    return slide_states(
        store, model=current_model(store), annotations=annotations_of(store), **asked
    )


def looked_for(store: Store, **asked) -> list[StageState]:
    """What a look into every slide's files tells."""
    away = store.catalog_path.rename(store.root / "catalog.away")
    found = told(store, **asked)
    away.rename(store.catalog_path)
    return found


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The slides that are looked into."""
    slides: list[str] = []
    real = states.SlideLook
    monkeypatch.setattr(
        states,
        "SlideLook",
        lambda store, slide, entry: slides.append(slide) or real(store, slide, entry),
    )
    return slides


@pytest.mark.parametrize(
    ("change", "looked_at"),
    [
        (changes.nothing_happens, []),
        (changes.labels_change, ["synthetic-01"]),
        (changes.an_annotation_changes, ["synthetic-01"]),
        (changes.an_annotation_goes, ["synthetic-01"]),
        (changes.a_slide_goes, []),
        (changes.results_go, ["synthetic-02"]),
        (changes.facts_change, ["synthetic-04"]),
        (changes.a_slide_is_scanned_again, ["synthetic-05"]),
        (changes.tiles_change, ["synthetic-06"]),
        (changes.something_fails, ["synthetic-06"]),
        (changes.a_file_is_damaged, ["synthetic-06"]),
        (changes.clusters_are_named, []),
    ],
)
def test_only_what_changed_is_looked_at_and_all_is_told(
    copied: Store,
    opened: list[str],
    change: Callable[[Store], None],
    looked_at: list[str],
) -> None:
    change(copied)
    found = told(copied)
    assert opened == looked_at
    assert found == looked_for(copied)


def test_a_refit_makes_all_clusters_stale_though_no_file_of_a_slide_changed(
    copied: Store,
) -> None:
    changes.ensure_model(
        copied, changes.feature_files(copied), changes.ClusterSettings(n_clusters=(4, 5))
    )
    found = told(copied)
    assert {s.state for s in found if s.stage == "clusters"} == {"stale"}
    assert found == looked_for(copied)


def test_a_catalog_made_for_other_settings_is_not_believed(
    copied: Store,
    opened: list[str],
) -> None:
    assert {s.state for s in told(copied, tiling=OTHER) if s.stage == "tiles"} == {"stale"}
    assert len(opened) == len(copied.slide_ids())


def test_a_catalog_that_was_asked_for_more_tells_what_is_done_but_not_what_is_stale(
    copied: Store,
    opened: list[str],
) -> None:
    changes.tiles_change(copied)
    refresh(copied, tiling=TilingSettings(tile_px=256, overlap=0))
    found = told(copied)
    assert opened == ["synthetic-06"]
    assert [s.state for s in found if (s.slide, s.stage) == ("synthetic-06", "tiles")] == ["done"]
    assert found == looked_for(copied)


def test_a_damaged_catalog_only_costs_time(copied: Store, tmp_path: Path) -> None:
    expected = told(copied)
    shutil.copy(copied.catalog_path, tmp_path / "kept")
    size = copied.catalog_path.stat().st_size
    with copied.catalog_path.open("r+b") as file:
        file.write(bytes(size))
    assert told(copied) == expected
