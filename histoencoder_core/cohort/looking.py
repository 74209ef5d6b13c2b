"""Looking at one slide: its files as they are now, each opened once for all who ask."""

from __future__ import annotations

from functools import cached_property

from histoencoder_core.clusters import FeatureFile, feature_file
from histoencoder_core.slides import Description, read_description
from histoencoder_core.slides.register import Entry
from histoencoder_core.store import SlideFolder, Stamp, Store
from histoencoder_core.store.layout import Stage
from histoencoder_core.tiles import TileSource, tile_source


class _Folder(SlideFolder):
    """A slide's folder whose stamps are read once."""

    def __init__(self, folder: SlideFolder) -> None:
        super().__init__(folder.path)
        self._stamps: dict[Stage, Stamp | None] = {}

    def stamp(self, stage: Stage) -> Stamp | None:
        if stage not in self._stamps:
            self._stamps[stage] = super().stamp(stage)
        return self._stamps[stage]


class _View(Store):
    """A store in which one slide's stamps are read once."""

    def __init__(self, store: Store, folder: _Folder) -> None:
        self.root = store.root
        self._folder = folder

    def slide(self, slide_id: str) -> SlideFolder:
        return self._folder if slide_id == self._folder.slide_id else super().slide(slide_id)


class SlideLook:
    """A slide's files. What is asked for is read once; a file that is damaged raises each time.

    Attributes:
        folder: The slide's folder.
        entry: The slide in the register, if it is there.
    """

    def __init__(self, store: Store, slide_id: str, entry: Entry | None) -> None:
        self.folder = _Folder(store.slide(slide_id))
        self.entry = entry
        self._store = _View(store, self.folder)

    @property
    def slide_id(self) -> str:
        """The slide's id."""
        return self.folder.slide_id

    @cached_property
    def description(self) -> Description | None:
        """What the slide is."""
        return read_description(self.folder)

    @cached_property
    def source(self) -> TileSource | None:
        """Its tiles.

        Raises:
            StoreError: They can't be used.
        """
        return tile_source(self._store, self.slide_id)

    @cached_property
    def features(self) -> FeatureFile | None:
        """Its features.

        Raises:
            StoreError: The file holds none.
        """
        return feature_file(self.folder)

    def is_outdated(self, stage: Stage) -> bool:
        """Whether a stage was made from what a stage before it gave earlier, and not now.

        Other programs' outputs, and those of stages before that are not there, tell nothing.

        Raises:
            StoreError: What it is made from can't be read.
        """
        stamp = self.folder.stamp(stage)
        if stamp is None:
            return False
        made_from = stamp.made_from
        if stage == "tiles":
            slide = self.description
            return slide is not None and made_from["slide"] != slide.content
        if stage == "features":
            return self.source is not None and made_from["tiles"] != self.source.upstream()
        if stage in ("clusters", "slide_clusters"):
            features = self.features
            return features is not None and made_from["features"] != features.fingerprint
        if stage == "annotations":
            clusters = self.folder.stamp("clusters")
            return clusters is not None and made_from["clusters"] != clusters.fingerprint
        return False
