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
        raise ClusterError(_not_comparable(store, found, counts))
    if not found:
        raise ClusterError(
            f"{store.root}: no slide has features yet. Run `histoencoder extract` first."
        )
    return found


def _not_comparable(
    store: Store, found: list[FeatureFile], counts: Counter[tuple[str, int, str]]
) -> str:
    """Say which slides' features live where, and in what one encoder's spaces differ."""
    recipes = {(file.encoder, file.length, file.space): _recipe(file) for file in found}
    values: dict[tuple[str, str], set[str | None]] = {}
    for (encoder, *_), recipe in recipes.items():
        for name in {name for other in recipes.values() for name in other} if recipe else ():
            values.setdefault((encoder, name), set()).add(recipe.get(name))
    differing = {key for key, told in values.items() if len(told) > 1}
    groups = []
    for group, count in counts.most_common():
        encoder, length, space = group
        differs = [
            f"{name} {value}"
            for name, value in recipes[group].items()
            if (encoder, name) in differing
        ]
        words = [f"slides by {encoder}", f"length {length}", *differs, f"space {space[:8]}"]
        groups.append(f"{', '.join(words)}: {count}")
    remedy = "Extract all slides with one encoder and the same options, or keep a store for each."
    if any(name == "precision" for _, name in differing):
        # Under auto, slides count as done in whatever precision they were encoded.
        remedy += (
            " Precision auto takes what is there as done, in any precision, so running it again "
            "changes nothing: set `--precision float32` (or HISTOENCODER_ENCODER__PRECISION="
            "float32) and extract again."
        )
    return f"{store.root}: holds features that can't be compared ({'; '.join(groups)}). {remedy}"


def _recipe(file: FeatureFile) -> dict[str, str]:
    """What a stamp tells about how features were made, in words; empty without a stamp."""
    made_from = dict(file.stamp.made_from["encoder"]) if file.stamp is not None else {}
    made_from.pop("name", None)
    if (weights := made_from.pop("weights_sha256", None)) is not None:
        made_from["weights"] = weights[:8]
    if isinstance(scale := made_from.get("normalisation"), dict):
        mean, std = (" ".join(map(str, scale[name])) for name in ("mean", "std"))
        made_from["normalisation"] = f"mean {mean} deviation {std}"
    return {name.replace("_", " "): str(value) for name, value in made_from.items()}
