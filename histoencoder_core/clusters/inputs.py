"""Which slides have features, and which of them live in the same space."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from histoencoder_core.errors import ClusterError
from histoencoder_core.settings import EncoderSettings
from histoencoder_core.store import SlideFolder, Stamp, Store, layout
from histoencoder_core.store.tables import feature_length, row_count


@dataclass(frozen=True)
class FeatureFile:
    """A slide's features, ours or another program's.

    Attributes:
        slide: The slide's id.
        path: The file.
        space: Fingerprint of the space its features live in.
        encoder: Name of the encoder, as far as the file says.
        fingerprint: Of the file.
        untrained: Whether random weights made it.
        length: Length of a feature vector.
        tiles: Number of rows.
        stamp: What the file was made from; None for another program's file.
    """

    slide: str
    path: Path
    space: str
    encoder: str
    fingerprint: str
    untrained: bool
    length: int
    tiles: int
    stamp: Stamp | None


def feature_file(folder: SlideFolder) -> FeatureFile | None:
    """A slide's features, or None if it has none.

    Raises:
        StoreError: The file holds no features.
    """
    path = folder.record("features")
    if not path.exists():
        return None
    stamp = folder.stamp("features")
    length = feature_length(path)
    if stamp is None:
        # HistoEncoder's own files do not say what made them: their length is all there is.
        space, encoder, untrained = f"foreign:{length}", "unknown (another program's file)", False
        with path.open("rb") as opened:
            fingerprint = hashlib.file_digest(opened, "sha256").hexdigest()
    else:
        space, encoder = stamp.result["space"], stamp.result["encoder"]
        fingerprint, untrained = stamp.fingerprint, stamp.untrained
    return FeatureFile(
        slide=folder.slide_id,
        path=path,
        space=space,
        encoder=encoder,
        fingerprint=fingerprint,
        untrained=untrained,
        length=length,
        tiles=row_count(path),
        stamp=stamp,
    )


def made_by(stamp: Stamp, encoder: EncoderSettings) -> bool:
    """Whether features are those that an encoder's settings ask for.

    All but the weights is compared: they would have to be loaded.

    Args:
        stamp: Of the features.
        encoder: The settings.
    """
    asked = encoder.model_dump(include={"name", "num_blocks", "avg_pool", "dtype"})
    asked["input_size"] = encoder.input_size or stamp.result["native_size"]
    made_from = stamp.made_from["encoder"]
    if encoder.precision != "auto":
        asked["precision"] = encoder.precision
    if (encoder.normalise == "slide") != (made_from["normalisation"] == "slide"):
        return False
    if stamp.untrained or encoder.normalise == "slide":
        asked["seed"] = encoder.seed
    same = all(made_from.get(name) == value for name, value in asked.items())
    return same and stamp.algorithm == layout.FEATURES_ALGORITHM


def feature_files(
    store: Store,
    *,
    encoder: EncoderSettings | None = None,
    slides: Iterable[str] | None = None,
) -> list[FeatureFile]:
    """All features of a store that can be compared with each other.

    Args:
        store: The store.
        encoder: Pass over features of other encoders of ours; if None, all are taken.
        slides: Only these slides; all if None.

    Returns:
        The files, sorted by slide.

    Raises:
        ClusterError: There are no features, or some that can't be compared with each other.
        StoreError: A file holds no features.
    """
    wanted = store.slide_ids() if slides is None else sorted(slides)
    found = [file for s in wanted if (file := feature_file(store.slide(s))) is not None]
    if encoder is not None:
        found = [f for f in found if f.stamp is None or made_by(f.stamp, encoder)]
    counts = Counter((file.encoder, file.length, file.space) for file in found)
    if len(counts) > 1:
        # One encoder's spaces differ by weights, input size or blocks.
        told = "; ".join(
            f"slides by {name}, length {length}, space {space[:8]}: {n}"
            for (name, length, space), n in counts.most_common()
        )
        raise ClusterError(
            f"{store.root}: holds features that can't be compared ({told}). Extract all slides "
            "with one encoder, or keep a store for each."
        )
    if not found:
        raise ClusterError(
            f"{store.root}: no slide has features yet. Run `histoencoder extract` first."
        )
    return found
