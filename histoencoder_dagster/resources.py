"""What assets and sensors are given: the deployment, opened."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from histoencoder_core.settings import PlatformSettings
from histoencoder_core.slides import FoundSlide, Register, Sheet, find_slides
from histoencoder_core.store import Store

if TYPE_CHECKING:
    from histoencoder_core.features import Encoder


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
        """The table of slides, read anew."""
        return Sheet.read(self.settings.sheet_path)

    def register_slides(self) -> dict[str, FoundSlide]:
        """Find all slides and give the new ones their ids."""
        return Register(self.store).assign(find_slides(self.settings.slides))

    def encoder(self) -> "Encoder":
        """The encoder, loaded once a process."""
        # Every run is a process of its own, and most need none of the seconds this import takes.
        from histoencoder_core.features import load_encoder

        return load_encoder(
            self.settings.encoder,
            weights_folder=self.settings.weights_folder,
            weights_url=self.settings.weights_url,
            device=self.settings.device,
        )
