"""The store's root: its slides and the cohort's files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from histoencoder_core.errors import StoreError
from histoencoder_core.store import files, layout
from histoencoder_core.store.folder import SlideFolder
from histoencoder_core.store.layout import Stage
from histoencoder_core.store.schema import ensure_schema


class Store:
    """A folder with one sub-folder a slide, and one for the cohort.

    Attributes:
        root: The folder, as an absolute path: also ``.`` has a name, which may be a slide's.
    """

    def __init__(self, root: Path | str) -> None:
        """Open a store, which need not exist yet.

        Raises:
            StoreError: It was made by a newer version of this program.
        """
        self.root = Path(root).resolve()
        ensure_schema(self.root)

    def slide(self, slide_id: str) -> SlideFolder:
        """The folder of a slide.

        Raises:
            StoreError: The id could lead out of the store.
        """
        if not layout.is_slide_id(slide_id):
            raise StoreError(
                f"{slide_id!r} can't be a slide's id: use letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit, at most 200."
            )
        return SlideFolder(self.root / slide_id)

    def slide_ids(self) -> list[str]:
        """Ids of all slides that have a folder, sorted."""
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:  # which knows what is a folder
            return sorted(e.name for e in entries if layout.is_slide_id(e.name) and e.is_dir())

    @property
    def cohort(self) -> Path:
        """The folder of the cohort's files."""
        return self.root / layout.COHORT

    @property
    def register_path(self) -> Path:
        """The register of slide ids."""
        return self.cohort / layout.REGISTER

    @property
    def contents(self) -> Path:
        """The folder of slides' contents, one small file each."""
        return self.cohort / "contents"

    @property
    def arrivals_path(self) -> Path:
        """What was last seen of files that are not slides of this store yet, or not any more."""
        return self.cohort / "arrivals.json"

    @property
    def stillness_path(self) -> Path:
        """How long files that wait have stood still."""
        return self.cohort / "stillness.json"

    @property
    def annotations_seen_path(self) -> Path:
        """What the platform last saw of annotations."""
        return self.cohort / "annotations_seen.json"

    @property
    def checks(self) -> Path:
        """What checks found in slides that have not changed since."""
        return self.cohort / "checks"

    @property
    def catalog_path(self) -> Path:
        """The published DuckDB catalog."""
        return self.cohort / "catalog.duckdb"

    @property
    def cluster_models(self) -> Path:
        """The folder of cluster models, one file a version."""
        return self.cohort / "cluster_models"

    @property
    def statistics(self) -> Path:
        """The folder of tables that SQL alone can't compute: permutations and bootstraps."""
        return self.cohort / "statistics"

    @property
    def figures(self) -> Path:
        """The folder of the cohort's figures."""
        return self.cohort / "figures"

    @property
    def report_path(self) -> Path:
        """The cohort's report, one HTML page."""
        return self.cohort / "report.html"

    @property
    def cluster_labels(self) -> Path:
        """The folder of what clusters mean, one CSV file a model and K."""
        return self.cohort / "cluster_labels"

    @property
    def cluster_labels_csv(self) -> Path:
        """What a pathologist says that clusters mean; optional, and only ever read."""
        return self.root / "cluster_labels.csv"

    @property
    def tiles_csv(self) -> Path:
        """The optional table of tile images: ``path, slide, x, y, label``."""
        return self.root / layout.TILES_CSV

    def prune(
        self, *, slides: list[str], stages: list[Stage] | None = None, dry_run: bool = False
    ) -> list[tuple[Path, int]]:
        """Remove outputs made with other settings than the current ones.

        Args:
            slides: Ids of the slides.
            stages: Only these stages' outputs; all if None.
            dry_run: Only tell what would be removed.

        Returns:
            The removed files and folders with their sizes in bytes.
        """
        removed = []
        for slide_id in slides:
            folder = self.slide(slide_id)
            if not folder.versions():
                continue
            with contextlib.nullcontext() if dry_run else folder.locked():
                removed += _prune(folder, stages, dry_run=dry_run)
        return removed


def _prune(
    folder: SlideFolder, stages: list[Stage] | None, *, dry_run: bool
) -> list[tuple[Path, int]]:
    if not dry_run:
        for stage in layout.STAGES:
            current = folder.stamp(stage)
            if current is not None:  # a killed run may have begun to make a version of it
                folder.fetch(stage, current.fingerprint)
    removed = []
    for stamp, kept in folder.versions():
        stage = next(s for s in layout.STAGES if s == stamp.stage)
        if stages is not None and stage not in stages:
            continue
        # The record last: without it, nothing tells what the others are.
        for name in (*layout.COMPANIONS[stage], layout.RECORD[stage]):
            if (kept / name).exists():
                removed.append((kept / name, _size(kept / name)))
                if not dry_run:
                    files.remove(kept / name)
        if not dry_run and not any(kept.iterdir()):
            kept.rmdir()
    return removed


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    return path.stat().st_size
