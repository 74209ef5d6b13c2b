"""What assets and sensors are given: the deployment, opened."""

import functools
import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from histoencoder_core.cohort import CatalogSummary, build_catalog
from histoencoder_core.settings import PlatformSettings
from histoencoder_core.slides import Arrivals, FoundSlide, Register, Sheet, find_in
from histoencoder_core.store import Store

if TYPE_CHECKING:
    from histoencoder_core.features import Runner


@functools.lru_cache(maxsize=2)
def _read_sheet(path: Path, _version: tuple[int, int, int]) -> Sheet:
    return Sheet.read(path)


@dataclass(frozen=True)
class Platform:
    """A deployment of the platform.

    Attributes:
        settings: Where things are, and what is asked of each stage.
    """

    settings: PlatformSettings

    @property
    def store(self) -> Store:
        """The store of all outputs."""
        return Store(self.settings.store)

    def sheet(self) -> Sheet:
        """The table of slides, read anew if it has changed."""
        path = self.settings.sheet_path
        if path is None:
            return Sheet()
        try:
            stat = path.stat()
        except OSError:
            return Sheet.read(path)  # which says what is wrong
        return _read_sheet(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))

    def register_slides(self) -> dict[str, FoundSlide]:
        """Find all slides and give the new ones their ids."""
        found, _ = find_in(self.settings.sources)
        return Register(self.store).assign(found)

    @functools.cached_property
    def arrivals(self) -> Arrivals:
        """The folders and buckets of slides, watched by this process."""
        return Arrivals(
            self.store, self.settings.sources, settle_seconds=self.settings.settle_seconds
        )

    def refresh_catalog(self) -> CatalogSummary:
        """Bring the catalog up to date, with what this deployment asks of each stage."""
        asked, folder = self.settings, self.settings.annotations_folder
        return build_catalog(
            self.store,
            tiling=asked.tiling,
            encoder=asked.encoder,
            annotations=folder if folder.is_dir() else None,
            labels=asked.labels,
            annotate=asked.annotate,
        )

    @functools.cached_property
    def runner(self) -> "Runner":
        """The encoder, ready to run: loaded and compiled once a process."""
        # Every run is a process of its own, and most need none of the seconds this import takes.
        from histoencoder_core.features import Runner, load_encoder

        asked = self.settings
        encoder = load_encoder(
            asked.encoder,
            weights_folder=asked.weights_folder,
            weights_url=asked.weights_mirror,
            weights_sha256=asked.weights_sha256,
        )
        return Runner(
            encoder, device=asked.device, backend=asked.backend, batch_size=asked.batch_size
        )

    def release_encoder(self) -> None:
        """Forget the encoder, and give its memory and its GPU to other runs."""
        self.__dict__.pop("runner", None)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            from histoencoder_core.features.lease import release_gpus

            gc.collect()
            torch.cuda.empty_cache()
            release_gpus()
