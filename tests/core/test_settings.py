"""Settings: what is asked for, and what of it decides results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from histoencoder_core.settings import (
    AnnotationSettings,
    ClusterSettings,
    EncoderSettings,
    LabelSettings,
    PlatformSettings,
    StageSettings,
    TilingSettings,
)

DEFAULTS: dict[type[BaseModel], dict[str, Any]] = {
    TilingSettings: {
        "mpp": 0.5,
        "tile_px": 512,
        "level": None,
        "width": None,
        "height": None,
        "overlap": 0.5,
        "max_background": 0.5,
        "max_ink": None,
        "max_blank": None,
        "max_blur": None,
        "in_bounds": False,
        "tissue": "without-ink",
        "threshold": None,
        "multiplier": 1.05,
        "sigma": 1.0,
        "max_dimension": 8192,
        "background": "bright",
        "allow_upsampling": False,
        "metrics": "overview",
    },
    EncoderSettings: {
        "name": "prostate_small",
        "num_blocks": 1,
        "avg_pool": False,
        "input_size": None,
        "precision": "auto",
        "normalise": "encoder",
        "dtype": "float32",
        "seed": 0,
    },
    ClusterSettings: {
        "n_clusters": (8, 16, 24, 32, 64, 128),
        "seed": 0,
        "batch_size": 4096,
        "sample_size": 65536,
        "max_passes": 10,
        "tolerance": 1e-4,
        "normalise": False,
        "whiten": None,
    },
    LabelSettings: {"min_share": 0.5},
    AnnotationSettings: {
        "n_clusters": None,
        "min_purity": 0.7,
        "min_labelled": 5,
        "folds": 5,
        "seed": 0,
    },
}
"""A default is left out of a fingerprint: changing one silently would pass old results for new."""


@pytest.mark.parametrize("settings", list(DEFAULTS))
def test_a_changed_default_must_raise_its_stages_algorithm(settings: type[BaseModel]) -> None:
    """If this fails, raise the ALGORITHM of the stage that uses the settings, then mend this."""
    assert settings().model_dump() == DEFAULTS[settings]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (TilingSettings(), "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
        (
            TilingSettings(mpp=0.25, background="dark"),
            "b579ece4c708f0bda57649b5ef75c1790761b40ee534794c076acfe75b92fa7d",
        ),
        (
            TilingSettings(background="dark", tile_px=512, mpp=0.25),
            "b579ece4c708f0bda57649b5ef75c1790761b40ee534794c076acfe75b92fa7d",
        ),
        (
            EncoderSettings(name="untrained:resnet18"),
            "7ada0b413d2dbc6927a328da684bc95542a6ac859a2a1f6c5056a100bcaa3150",
        ),
        (
            ClusterSettings(n_clusters=(4, 8)),
            "6d14c37ed53e04f6d929603ef154bf4b2127e5f11f282dcbb2290a8d1c0e9704",
        ),
    ],
)
def test_fingerprints_are_for_ever(settings: StageSettings, expected: str) -> None:
    """If this fails, every archive would be computed again."""
    assert settings.fingerprint == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"overlap": 1.0},
        {"overlap": -0.1},
        {"max_background": 1.1},
        {"mpp": 0},
        {"tile_px": 0},
        {"tilepx": 256},
        {"threshold": 256},
        {"background": "gray"},
        {"level": 1},
        {"height": 512},
        {"width": 512, "mpp": 0.5},
        {"width": 512, "tile_px": 512},
        {"tissue": "ink"},
        {"max_ink": 1.1},
        {"max_ink": 0.1, "background": "dark"},
        {"max_blur": 0.5},
    ],
)
def test_tilings_that_can_not_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TilingSettings(**changes)


@pytest.mark.parametrize("n_clusters", [(), (1,), (8, 4), (4, 4)])
def test_clusters_that_can_not_be(n_clusters: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        ClusterSettings(n_clusters=n_clusters)


@pytest.mark.parametrize("settings", list(DEFAULTS))
def test_settings_stay_as_they_are(settings: type[StageSettings]) -> None:
    asked = settings()
    with pytest.raises(ValidationError, match="frozen"):
        asked.seed = 1
    with pytest.raises(ValidationError, match="Extra inputs"):
        settings(nonsense=1)


def test_histopreps_defaults() -> None:
    """Those of `HistoPrep --help`."""
    asked = TilingSettings.histoprep()
    assert (asked.width, asked.height, asked.overlap, asked.max_background) == (640, None, 0, 0.75)
    assert asked.tissue == "otsu"
    assert TilingSettings.histoprep(width=512, overlap=0.5).overlap == 0.5
    with pytest.raises(ValidationError):
        TilingSettings.histoprep(mpp=0.5)


@pytest.mark.usefixtures("bare_environment")
def test_a_deployment_is_set_by_its_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = PlatformSettings()
    assert (bare.tiling, bare.encoder, bare.clusters) == (
        TilingSettings(),
        EncoderSettings(),
        ClusterSettings(),
    )
    assert bare.annotations_folder == Path("slides/annotations")
    for name, value in {
        "SLIDES": str(tmp_path),
        "TILING__TILE_PX": "256",
        "TILING__BACKGROUND": "dark",
        "ENCODER__NAME": "untrained:resnet18",
        "CLUSTERS__N_CLUSTERS": "[4, 8]",
        "WEIGHTS": "~/w",
        "SLIDES_PER_RUN": "5",
    }.items():
        monkeypatch.setenv(f"HISTOENCODER_{name}", value)
    deployed = PlatformSettings()
    assert deployed.tiling == TilingSettings(tile_px=256, background="dark")
    assert deployed.encoder.name == "untrained:resnet18"
    assert deployed.clusters.n_clusters == (4, 8)
    assert deployed.slides_per_run == 5
    assert deployed.weights_folder == Path.home() / "w"
    assert deployed.sheet_path is None
    (tmp_path / "slides.csv").touch()
    assert deployed.sheet_path == tmp_path / "slides.csv"
    monkeypatch.setenv("HISTOENCODER_TILING__TILEPX", "256")
    with pytest.raises(ValidationError, match="tilepx"):
        PlatformSettings()
