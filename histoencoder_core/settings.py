"""What is asked of the platform: frozen settings with fingerprints, and deployment values.

The stage settings (`TilingSettings`, `EncoderSettings`, `ClusterSettings`, `LabelSettings`,
`AnnotationSettings`) decide results and so are part of every output's fingerprint.
`PlatformSettings` says where things are on one deployment; it is read from environment variables
with the prefix ``HISTOENCODER_`` (nested values with two underscores:
``HISTOENCODER_TILING__TILE_PX=256``) and decides no result.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from histoencoder_core.buckets import Bucket, as_bucket_url
from histoencoder_core.fingerprint import fingerprint

Precision = Literal["float32", "float16", "bfloat16"]
"""Types that an encoder can compute in."""

Backend = Literal["eager", "compile", "openvino"]
"""What executes an encoder: PyTorch as it is, PyTorch's compiler, or OpenVINO."""

N_CLUSTERS = (8, 16, 24, 32, 64, 128)
"""The numbers of clusters that HistoEncoder's command line computes by default."""


class StageSettings(BaseModel):
    """Base of settings that decide a stage's results."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def fingerprint(self) -> str:
        """Hash of all that differs from the defaults.

        Leaving defaults out lets a later version add a setting without making an archive due
        again. A default that changes meaning must raise its stage's ``ALGORITHM`` instead.
        """
        return fingerprint(self.model_dump(mode="json", exclude_defaults=True))


class TilingSettings(StageSettings):
    """How a slide is cut into tiles.

    Tiles are asked for in one of two ways. Physical: `tile_px` pixels at `mpp` µm/px, whatever the
    slide's own resolution. HistoPrep's: `width` × `height` level-0 pixels read at pyramid `level`.
    Setting `width` chooses HistoPrep's way. Its command line's defaults come with
    `TilingSettings.histoprep`.

    Attributes:
        mpp: Resolution of a tile in µm/px (physical way).
        tile_px: Width and height of a tile in pixels at `mpp` (physical way).
        level: Pyramid level to read from; negative counts from the coarsest (HistoPrep's way).
        width: Tile width in level-0 pixels (HistoPrep's way).
        height: Tile height in level-0 pixels; `width` if not given (HistoPrep's way).
        overlap: Share of a tile's width that it has in common with its neighbour, in [0, 1).
        max_background: Largest share of background, ink included, in a kept tile.
        max_ink: Largest share of ink in a kept tile; any if not given.
        max_blank: Largest share of a kept tile that is neither tissue nor ink; any if not given.
        max_blur: Largest blur of a kept tile (see `tiles.quality`); any if not given. It needs
            ``metrics="tile"``: what is out of focus does not show on an overview.
        in_bounds: Leave out tiles that reach beyond the slide's border.
        tissue: How tissue is told from what is not: ``without-ink`` by HistoPrep's method after ink
            of pens and dye is left out (see `tiles.ink`); ``otsu`` by HistoPrep's method alone, to
            which ink is tissue. Stains with blue, green or black of their own beside pink, such as
            Giemsa's, need the latter.
        threshold: Grey value in [0, 255] below which a pixel is tissue; Otsu's if not given.
        multiplier: Factor on Otsu's threshold.
        sigma: Standard deviation in pixels of the blur before thresholding.
        max_dimension: Largest width or height in pixels of the image tissue is looked for in.
        background: ``bright`` for brightfield; ``dark`` for fluorescence, whose grey values are
            inverted before thresholding. A slide that is the other kind is refused.
        allow_upsampling: Accept a request finer than the slide's own resolution.
        metrics: Where the quality metrics are measured: on the ``overview`` in which tissue was
            looked for, or on every ``tile`` at its own resolution (reads the whole slide again).
    """

    mpp: float = Field(default=0.5, gt=0)
    tile_px: int = Field(default=512, ge=8, le=8192)
    level: int | None = None
    width: int | None = Field(default=None, ge=8, le=65536)
    height: int | None = Field(default=None, ge=8, le=65536)
    overlap: float = Field(default=0.5, ge=0, lt=1)
    max_background: float = Field(default=0.5, ge=0, le=1)
    max_ink: float | None = Field(default=None, ge=0, le=1)
    max_blank: float | None = Field(default=None, ge=0, le=1)
    max_blur: float | None = Field(default=None, ge=0, le=1)
    in_bounds: bool = False
    tissue: Literal["without-ink", "otsu"] = "without-ink"
    threshold: int | None = Field(default=None, ge=0, le=255)
    multiplier: float = Field(default=1.05, gt=0)
    sigma: float = Field(default=1.0, ge=0)
    max_dimension: int = Field(default=8192, ge=64, le=16384)
    background: Literal["bright", "dark"] = "bright"
    allow_upsampling: bool = False
    metrics: Literal["overview", "tile"] = "overview"

    @model_validator(mode="after")
    def _one_way_to_ask(self) -> Self:
        if self.width is None and (self.level is not None or self.height is not None):
            raise ValueError("level and height need width: they are HistoPrep's way to ask")
        if self.width is not None and self.model_fields_set & {"mpp", "tile_px"}:
            raise ValueError("ask for tiles either by mpp and tile_px or by width, not by both")
        return self

    @model_validator(mode="after")
    def _filters_have_what_they_filter(self) -> Self:
        if self.max_blur is not None and self.metrics != "tile":
            raise ValueError("max_blur needs metrics = tile: an overview does not show focus")
        if self.max_ink is not None and self.background == "dark":
            raise ValueError("max_ink needs background = bright: on a dark one there is no ink")
        return self

    @classmethod
    def histoprep(cls, *, width: int = 640, **changes: Any) -> TilingSettings:
        """HistoPrep's way to ask, with the defaults of HistoPrep's command line.

        Example:
            >>> TilingSettings.histoprep(width=512).max_background
            0.75
        """
        defaults = {"width": width, "overlap": 0.0, "max_background": 0.75, "tissue": "otsu"}
        return cls(**{**defaults, **changes})


class EncoderSettings(StageSettings):
    """Which encoder turns a tile into a feature vector, and which of its outputs are kept.

    Attributes:
        name: ``prostate_small``, ``prostate_medium``, ``pathmnist_densenet121``, ``timm:<name>``,
            ``hf-hub:<org>/<name>`` or ``untrained:<timm name>``.
        num_blocks: Number of last attention blocks whose class tokens are joined (XCiT only).
        avg_pool: Append the mean of the last block's patch tokens (XCiT only).
        input_size: Width and height in pixels of the encoder's input; the encoder's own if not
            given.
        precision: Of the encoder's arithmetic. ``auto`` is float32 on a CPU, and on a GPU float16
            or bfloat16, as suits the encoder. Features of different precisions are never clustered
            together, so set it for a cohort that is encoded on both.
        normalise: ``encoder`` for the mean and standard deviation that the encoder was trained
            with. ``slide`` estimates them from 1,000 random tiles of each slide, as HistoEncoder
            0.1.1 did: the same tile then has other features on another slide.
        dtype: Type of the stored features.
        seed: Seed of the random weights of an ``untrained:`` encoder, and of the tiles that
            ``normalise="slide"`` draws.
    """

    name: str = "prostate_small"
    num_blocks: int = Field(default=1, ge=1)
    avg_pool: bool = False
    input_size: int | None = Field(default=None, ge=16, le=2048)
    precision: Literal["auto", Precision] = "auto"
    normalise: Literal["encoder", "slide"] = "encoder"
    dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0


class ClusterSettings(StageSettings):
    """How the cohort's features are clustered.

    Attributes:
        n_clusters: Numbers of clusters K, one k-means model each.
        seed: Seed of the sample, of k-means++ and of the order of the data.
        batch_size: Tiles a mini-batch step.
        sample_size: Tiles in the sample, drawn evenly over slides, that the centroids start from.
        max_passes: Largest number of passes over the data.
        tolerance: A pass that moves the centroids by less, relative to the spread of the features,
            is the last.
        normalise: Scale every feature vector to length 1 first, so that only its direction counts.
        whiten: Project feature vectors on so many principal components of equal variance first;
            not at all if not given.
    """

    n_clusters: tuple[int, ...] = N_CLUSTERS
    seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=4096, ge=1)
    sample_size: int = Field(default=65536, ge=1)
    max_passes: int = Field(default=10, ge=1)
    tolerance: float = Field(default=1e-4, ge=0)
    normalise: bool = False
    whiten: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _sensible_k(self) -> Self:
        if not self.n_clusters or min(self.n_clusters) < 2:
            raise ValueError("n_clusters needs at least one number, each 2 or more")
        if sorted(set(self.n_clusters)) != list(self.n_clusters):
            raise ValueError("n_clusters must rise and hold each number once")
        return self


class LabelSettings(StageSettings):
    """When a tile takes the label of an annotation that meets it.

    Attributes:
        min_share: A tile's label is the class that covers at least this share of its tissue, else
            it has none.
    """

    min_share: float = Field(default=0.5, gt=0, le=1)


class AnnotationSettings(StageSettings):
    """How clusters of known label annotate slides, and how well that works is measured.

    Attributes:
        n_clusters: The K whose clusters are used; the model's largest if not given.
        min_purity: A cluster takes the label of its labelled tiles only if at least this share of
            them carry it; else it abstains.
        min_labelled: A cluster of fewer labelled tiles abstains.
        folds: Parts that labelled slides are split into; each is held out once to measure accuracy.
        seed: Seed of the split.
    """

    n_clusters: int | None = Field(default=None, ge=2)
    min_purity: float = Field(default=0.7, gt=0, le=1)
    min_labelled: int = Field(default=5, ge=1)
    folds: int = Field(default=5, ge=2)
    seed: int = Field(default=0, ge=0)


class PlatformSettings(BaseSettings):
    """Where things are on this deployment, and what it asks of each stage.

    Attributes:
        slides: Folders that scanners write to, searched with their sub-folders, or prefixes of
            buckets such as ``s3://hospital/scans``: one, or several as a JSON list. The first holds
            ``slides.csv`` and ``annotations``.
        store: Folder of all outputs.
        annotations: Folder of GeoJSON, mask and CSV annotations; ``<slides>/annotations`` if not
            given.
        sheet: The ``slides.csv``; ``<slides>/slides.csv`` if not given and there.
        bucket_copies: Folder of the copies of slides that lie in buckets.
        bucket_copies_gb: What these copies may take, in GB (10⁹ bytes). Those that were not used
            for longest make room for others.
        weights: Folder of encoder weights, also the download cache.
        weights_url: Mirror to fetch weights from before their published address; may hold a
            ``user:password@``, which is never told.
        weights_sha256: SHA-256 of the encoder's file of weights; any other file is refused.
        device: ``cpu``, ``cuda`` for any free GPU, ``cuda:N`` for one of them, or ``auto`` for a
            GPU where there is one.
        backend: What executes the encoder; ``auto`` is OpenVINO on a CPU and PyTorch's compiler on
            a GPU.
        batch_size: Tiles a forward pass; by default as suits the device.
        readers: Threads that read tiles; by default one a CPU core.
        reader_seconds: Time that the process which decodes a slide may take for one answer.
        reader_memory_gb: Memory in GB (10⁹ bytes) that this process may take.
        slides_per_run: Slides a Dagster run.
        runs_in_flight: Runs that begin with the same stage that may be queued or running at once
            before more are asked for; what waits stays owed.
        newest_first: Take up the slides that were scanned last first, not the oldest.
        settle_seconds: A file must have been left alone for so long before it counts as scanned.
        tick_seconds: Time between two looks of Dagster's sensors at what is new and what is due.
        first_fit_slides: Slides with features that call for the cohort's first cluster model.
        cluster_memory_gb: Memory in GB (10⁹ bytes) that fitting a cluster model may take.
    """

    model_config = SettingsConfigDict(
        env_prefix="HISTOENCODER_",
        env_nested_delimiter="__",
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,  # it may hold a password
    )

    slides: Annotated[tuple[Path | str, ...], NoDecode] = Field(
        default=(Path("slides"),), min_length=1
    )
    store: Path = Path("store")
    annotations: Path | None = None
    sheet: Path | None = None
    bucket_copies: Path = Path("~/.cache/histoencoder/buckets")
    bucket_copies_gb: float = Field(default=100.0, gt=0)
    weights: Path = Path("~/.cache/histoencoder")
    weights_url: SecretStr | None = None
    weights_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    backend: Literal["auto", Backend] = "auto"
    batch_size: int | None = Field(default=None, ge=1)
    readers: int | None = Field(default=None, ge=1)
    reader_seconds: float = Field(default=120.0, gt=0)
    reader_memory_gb: float = Field(default=4.0, gt=0)
    slides_per_run: int = Field(default=25, ge=1)
    runs_in_flight: int = Field(default=4, ge=1)
    newest_first: bool = False
    settle_seconds: float = Field(default=60.0, ge=0)
    tick_seconds: int = Field(default=15, ge=1)
    first_fit_slides: int = Field(default=10, ge=1)
    cluster_memory_gb: float = Field(default=2.0, ge=1)
    tiling: TilingSettings = TilingSettings()
    encoder: EncoderSettings = EncoderSettings()
    clusters: ClusterSettings = ClusterSettings()
    labels: LabelSettings = LabelSettings()
    annotate: AnnotationSettings = AnnotationSettings()

    @field_validator("slides", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """A single folder needs no JSON around it."""
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = json.loads(value)
        several = [value] if isinstance(value, str | Path) else value
        return [as_bucket_url(one) or Path(one) if isinstance(one, str) else one for one in several]

    @property
    def sources(self) -> tuple[Path | Bucket, ...]:
        """Where slides are looked for."""
        folder = self.bucket_copies.expanduser().absolute()
        max_bytes = int(self.bucket_copies_gb * 1e9)
        return tuple(
            Bucket(one, folder=folder, max_bytes=max_bytes) if isinstance(one, str) else one
            for one in self.slides
        )

    @property
    def _first_folder(self) -> Path:
        """What holds ``slides.csv`` and ``annotations`` unless they are elsewhere."""
        first = self.sources[0]
        return first.listed if isinstance(first, Bucket) else first

    @property
    def annotations_folder(self) -> Path:
        """The folder of annotations, whether or not it exists."""
        return self.annotations or self._first_folder / "annotations"

    @property
    def sheet_path(self) -> Path | None:
        """The ``slides.csv`` in use, if there is one."""
        if self.sheet is not None:
            return self.sheet
        beside = self._first_folder / "slides.csv"
        return beside if beside.is_file() else None

    @property
    def weights_mirror(self) -> str | None:
        """The mirror's address, with its password."""
        return None if self.weights_url is None else self.weights_url.get_secret_value()

    @property
    def weights_folder(self) -> Path:
        """The folder of encoder weights, with ``~`` resolved."""
        return self.weights.expanduser()
