"""An index of all tiles, for cohorts that are too large to look at every tile.

FAISS's inverted file with a scalar quantiser (Douze et al., "The Faiss library", 2024): tiles are
parted by k-means into lists of like direction, a query looks into the lists nearest to it only,
and a vector takes a byte a number. The index is kept in ``<store>/_cohort/index/``, is read from
the disk list by list, and follows the slides: those that are new or changed are added, those that
are gone are removed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from histoencoder_core.clusters import FeatureFile
from histoencoder_core.errors import SettingsError
from histoencoder_core.similar.exact import Floats, Ints, read_rows
from histoencoder_core.store import Stamp, Store
from histoencoder_core.store.files import atomic_path, locked_to_write, remove
from histoencoder_core.store.stamp import read_stamp
from histoencoder_core.store.tables import iter_features, read_table

log = logging.getLogger(__name__)

ALGORITHM = 1

PROBES = 64
"""Lists that a query looks into."""

SAMPLE_A_LIST = 64
"""Tiles that a list's place is learnt from; FAISS advises against fewer than 39."""

OUTGROWN = 2
"""An index that has become so many times as large as when it was learnt is learnt anew."""

_RECORD = "index.parquet"


@dataclass(frozen=True)
class TileIndex:
    """An open index.

    Attributes:
        library: FAISS's index.
        first: The number of each slide's first tile in the index, in rising order.
        file: Which of the feature files each of those slides is.
        tiles: By feature file that has tiles, the numbers they have in the index.
    """

    library: Any
    first: Ints
    file: Ints
    tiles: dict[int, range]

    def candidates(self, query: Floats, count: int, *, but: int | None = None) -> tuple[Ints, Ints]:
        """Tiles that are probably the nearest.

        Args:
            query: float32 array of shape (length,), of length 1.
            count: Number of tiles.
            but: A feature file whose tiles are left out.

        Returns:
            Which file each tile is in, and its row there.
        """
        import faiss

        how: dict[str, Any] = {"nprobe": PROBES}
        if but is not None:
            own = self.tiles[but]
            # FAISS does not keep the inner selector alive.
            inner = faiss.IDSelectorRange(own.start, own.stop)
            how["sel"] = faiss.IDSelectorNot(inner)
        _, found = self.library.search(query[None], count, params=faiss.SearchParametersIVF(**how))
        numbers = found[0][found[0] >= 0]
        slide = np.searchsorted(self.first, numbers, side="right") - 1
        return self.file[slide], numbers - self.first[slide]


def tile_index(
    store: Store, files: Sequence[FeatureFile], *, tell: Callable[[str], None] = log.info
) -> TileIndex:
    """Open the index of these features, after making it or bringing it up to date if need be.

    Args:
        store: The store.
        files: Features of one space.
        tell: Is told when the index is made, which takes minutes for millions of tiles.

    Raises:
        SettingsError: The index library is not installed.
    """
    _require_faiss(sum(file.tiles for file in files))
    stamp = _stamp(files)
    index = _opened(store, stamp, files)
    if index is not None:
        return index
    folder = index_folder(store)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_to_write(folder):
        # Another process may have made it meanwhile.
        index = _opened(store, stamp, files)
        if index is None:
            _make(store, stamp, files, tell)
            index = _opened(store, stamp, files)
    assert index is not None
    return index


def index_folder(store: Store) -> Path:
    """The folder of the index."""
    return store.cohort / "index"


def slides_in_index(store: Store) -> set[str]:
    """Ids of the slides whose tiles are in the index; none if there is no index."""
    stamp = read_stamp(index_folder(store) / _RECORD)
    return set() if stamp is None else set(stamp.made_from["features"])


def _require_faiss(tiles: int) -> None:
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"{tiles:,} tiles are too many to look at each. Install the index library: "
            "pip install 'histoencoder-platform[index]' (FAISS)."
        ) from error


def _stamp(files: Sequence[FeatureFile]) -> Stamp:
    return Stamp.of(
        "index",
        algorithm=ALGORITHM,
        made_from={
            "space": files[0].space,
            "features": {file.slide: file.fingerprint for file in files},
        },
        untrained=any(file.untrained for file in files),
    )


def _opened(store: Store, stamp: Stamp, files: Sequence[FeatureFile]) -> TileIndex | None:
    """The index at hand; None if there is none of these features."""
    record = index_folder(store) / _RECORD
    present = read_stamp(record)
    if present is None or present.fingerprint != stamp.fingerprint:
        return None
    import faiss

    try:
        library = faiss.read_index(str(_path(store, stamp)), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        log.warning("%s: can't be read, so it is made anew (%s)", _path(store, stamp), error)
        return None
    table = read_table(record).sort_by("first")
    # A slide without tiles has the number of the next one's first.
    table = table.filter(pc.field("tiles") > 0)
    numbers = {file.slide: i for i, file in enumerate(files)}
    of_slide = np.array([numbers[slide] for slide in table.column("slide").to_pylist()], np.int64)
    first, tiles = (table.column(name).to_numpy() for name in ("first", "tiles"))
    ranges = {
        n: range(start, start + size)
        for n, start, size in zip(of_slide.tolist(), first.tolist(), tiles.tolist(), strict=True)
    }
    return TileIndex(library, first, of_slide, ranges)


def _path(store: Store, stamp: Stamp) -> Path:
    return index_folder(store) / f"{stamp.fingerprint[:12]}.faiss"


def _make(
    store: Store, stamp: Stamp, files: Sequence[FeatureFile], tell: Callable[[str], None]
) -> None:
    """Write an index of these features: the one at hand with what has changed, or a new one."""
    import faiss

    started = time.perf_counter()
    tiles = sum(file.tiles for file in files)
    record = index_folder(store) / _RECORD
    library, kept, learnt = _kept(store, files)
    if library is None:
        tell(f"Making the index of {tiles:,} tiles, once; this takes minutes for millions.")
        library, kept, learnt = _learnt(files), {}, tiles
    missing = [file for file in files if file.slide not in kept]
    first = max((numbers.stop for numbers in kept.values()), default=0)
    for file in missing:
        kept[file.slide] = range(first, first + file.tiles)
        _add(library, file, first)
        first += file.tiles
    tell(f"Slides added to the index of tiles: {len(missing)}.")
    path = _path(store, stamp)
    with atomic_path(path) as temporary:
        faiss.write_index(library, str(temporary))
    table = pa.table(
        {
            "slide": [file.slide for file in files],
            "fingerprint": [file.fingerprint for file in files],
            "first": pa.array([kept[file.slide].start for file in files], pa.int64()),
            "tiles": pa.array([file.tiles for file in files], pa.int64()),
        }
    )
    result = {
        "slides": len(files),
        "tiles": tiles,
        "learnt_from": learnt,
        "lists": library.nlist,
        "seconds": round(time.perf_counter() - started, 3),
    }
    with atomic_path(record) as temporary:
        pq.write_table(stamp.with_result(**result).on_table(table), temporary, compression="zstd")
    for other in index_folder(store).glob("*.faiss"):
        if other != path:
            remove(other)


def _kept(store: Store, files: Sequence[FeatureFile]) -> tuple[Any, dict[str, range], int]:
    """The index at hand without the slides that are gone or changed; None if it will not do.

    Returns:
        FAISS's index, the numbers of tiles by slide, and how many tiles there were when it was
        learnt.
    """
    import faiss

    nothing: tuple[Any, dict[str, range], int] = (None, {}, 0)
    record = index_folder(store) / _RECORD
    stamp = read_stamp(record)
    if (
        stamp is None
        or stamp.algorithm != ALGORITHM
        or stamp.made_from["space"] != files[0].space
        or sum(file.tiles for file in files) > OUTGROWN * stamp.result["learnt_from"]
    ):
        return nothing
    try:
        library = faiss.read_index(str(_path(store, stamp)))
    except RuntimeError:
        return nothing
    wanted = {file.slide: file.fingerprint for file in files}
    kept = {}
    for row in read_table(record).to_pylist():
        tiles = range(row["first"], row["first"] + row["tiles"])
        if wanted.get(row["slide"]) == row["fingerprint"]:
            kept[row["slide"]] = tiles
        else:
            library.remove_ids(faiss.IDSelectorRange(tiles.start, tiles.stop))
    return library, kept, stamp.result["learnt_from"]


def _learnt(files: Sequence[FeatureFile]) -> Any:
    """An empty index whose lists suit a sample drawn evenly over slides."""
    import faiss

    tiles = sum(file.tiles for file in files)
    lists = max(1, math.isqrt(tiles))
    sample = _sample(files, SAMPLE_A_LIST * lists)
    # Little is left of a sample whose tiles are mostly unreadable.
    lists = max(1, min(lists, len(sample)))
    length = files[0].length
    library = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(length),
        length,
        lists,
        faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
    )
    library.cp.spherical = True
    library.train(sample)
    return library


def _sample(files: Sequence[FeatureFile], wanted: int) -> Floats:
    """Directions of tiles, as many of each slide as of another, or all it has."""
    share = -(-wanted // len(files))
    while sum(min(file.tiles, share) for file in files) < min(
        wanted, sum(file.tiles for file in files)
    ):
        share *= 2

    def drawn(number: int) -> Floats:
        file = files[number]
        rng = np.random.default_rng(number)
        rows = np.sort(rng.choice(file.tiles, min(file.tiles, share), replace=False))
        directions, _ = _directions(read_rows(file, rows))
        return directions

    with ThreadPoolExecutor() as pool:
        return np.concatenate(list(pool.map(drawn, range(len(files)))))


def _add(library: Any, file: FeatureFile, first: int) -> None:
    for chunk in iter_features(file.path):
        directions, rows = _directions(chunk)
        library.add_with_ids(directions, rows + first)
        first += len(chunk)


def _directions(features: Floats) -> tuple[Floats, Ints]:
    """Features scaled to length 1, of those tiles that have a direction, and their rows."""
    lengths = np.linalg.norm(features, axis=1)
    rows = np.flatnonzero(np.isfinite(lengths) & (lengths > 0))
    return features[rows] / lengths[rows, None], rows
