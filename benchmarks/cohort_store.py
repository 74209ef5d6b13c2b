"""Write the store of a large cohort as the stages would, without slides or an encoder behind it.

Every file has the schema and the stamp that its stage gives it, so nothing is stale. What is left
out costs the catalog nothing: pictures, and all but four numbers of each feature vector.
"""

from __future__ import annotations

import functools
import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from histoencoder_core.clusters import (
    ClusterModel,
    clusters_stamp,
    current_model,
    feature_file,
    feature_files,
    save_model,
)
from histoencoder_core.clusters.fit import fit_clusters
from histoencoder_core.labels import Annotations, labels_stamp
from histoencoder_core.settings import ClusterSettings, LabelSettings, TilingSettings
from histoencoder_core.slides import Description
from histoencoder_core.store import SlideFolder, Stamp, Store, files, layout
from histoencoder_core.store.tables import (
    cluster_column,
    distance_column,
    feature_list,
    key_table,
    tile_name,
)
from histoencoder_core.tiles import tile_source, tiles_stamp
from histoencoder_core.tiles.quality import METRICS

LABELS = ("benign", "carcinoma", "adipose", "lymphocytes", "mucus", "stroma")
TILE_PX, LENGTH = 512, 4
TILING = TilingSettings(tile_px=TILE_PX, overlap=0)
ENCODER: dict[str, Any] = {
    "name": "benchmark", "num_blocks": 1, "avg_pool": False, "dtype": "float32",
    "input_size": 224, "precision": "float32", "normalisation": {"mean": [0.5], "std": [0.2]},
}  # fmt: skip


@dataclass(frozen=True)
class Cohort:
    """What is written.

    Attributes:
        folder: Where: ``store``, ``slides`` and ``annotations`` are made in it.
        slides: Number of slides.
        tiles: Tiles of a slide, on average; the numbers vary by a half.
        n_clusters: The numbers of clusters.
        seed: Seed of everything drawn.
    """

    folder: Path
    slides: int
    tiles: int
    n_clusters: tuple[int, ...]
    seed: int = 0

    @property
    def store(self) -> Store:
        """The store."""
        return Store(self.folder / "store")

    @property
    def annotations(self) -> Path:
        """The folder of annotations."""
        return self.folder / "annotations"


def slide_name(number: int) -> str:
    """The id of a slide."""
    return f"cohort-slide-{number:05d}"


def write_cohort(cohort: Cohort, *, processes: int = 2) -> int:
    """Write a cohort with everything done, and give its number of tiles."""
    for folder in (cohort.store.cohort, cohort.annotations, cohort.folder / "slides"):
        folder.mkdir(parents=True, exist_ok=True)
    numbers = range(cohort.slides)
    register(cohort, cohort.slides)
    with ProcessPoolExecutor(processes) as pool:
        tiles = sum(pool.map(partial(write_slide, cohort), numbers, chunksize=16))
        # Which numbers of clusters there are is the model's; which tile is in which is drawn.
        enough = 2 * max(cohort.n_clusters) // max(1, cohort.tiles // 2) + 1
        inputs = feature_files(cohort.store, slides=[slide_name(n) for n in numbers[:enough]])
        save_model(
            cohort.store, fit_clusters(inputs, ClusterSettings(n_clusters=cohort.n_clusters))
        )
        list(pool.map(partial(write_clusters, cohort, _model(cohort)), numbers, chunksize=16))
    return tiles


def add_slide(cohort: Cohort, number: int) -> None:
    """Write one more slide, with everything done."""
    register(cohort, number + 1)
    write_slide(cohort, number)
    write_clusters(cohort, _model(cohort), number)


def register(cohort: Cohort, slides: int) -> None:
    """Register so many slides."""
    entries = {slide_name(n): {"path": str(_file(cohort, n)), "relative": f"{slide_name(n)}.tiff"}
               for n in range(slides)}  # fmt: skip
    files.write_json(cohort.store.register_path, {"version": 1, "slides": entries})


def write_slide(cohort: Cohort, number: int) -> int:
    """Write a slide's description, tiles, features and annotation; give its number of tiles."""
    rng = np.random.default_rng([cohort.seed, number])
    folder = cohort.store.slide(slide_name(number))
    folder.path.mkdir(parents=True, exist_ok=True)
    description = _describe(cohort, folder, number)
    keys = _write_tiles(folder, description, rng, cohort.tiles)
    source = tile_source(cohort.store, folder.slide_id)
    assert source is not None
    stamp = Stamp.of(
        "features",
        algorithm=layout.FEATURES_ALGORITHM,
        made_from={"tiles": source.upstream(), "encoder": ENCODER},
    ).with_result(
        space="benchmark", encoder="benchmark", native_size=224, tiles=keys.num_rows, unreadable=0
    )
    features = rng.random((keys.num_rows, LENGTH), np.float32)
    table = keys.append_column("features", feature_list(features, "float32"))
    table = table.append_column("unreadable", pa.nulls(keys.num_rows, pa.string()))
    _write(folder.record("features"), table, stamp)
    _annotate(cohort, folder.slide_id)
    return keys.num_rows


def write_clusters(cohort: Cohort, model: ClusterModel, number: int) -> None:
    """Write a slide's clusters, and labels that agree with them more or less.

    A slide is a mixture of some of the finest clusters. Each of these stands for one label, more
    or less purely; a coarser clustering joins neighbours.
    """
    rng = np.random.default_rng([cohort.seed, number, 1])
    folder = cohort.store.slide(slide_name(number))
    source = tile_source(cohort.store, folder.slide_id)
    features = feature_file(folder)
    assert source is not None
    assert features is not None
    keys, count = source.keys, source.keys.num_rows
    finest = max(cohort.n_clusters)
    mixture = rng.gamma(0.25, size=finest) + 1e-9
    fine = rng.choice(finest, count, p=mixture / mixture.sum())
    table = keys
    for k in cohort.n_clusters:
        clusters = pa.array(fine * k // finest, pa.int32())
        table = table.append_column(cluster_column(k), clusters)
        distance = rng.gamma(4, size=count).astype(np.float32)
        table = table.append_column(distance_column(k), pa.array(distance))
    version = pa.array([model.version] * count, pa.string()).dictionary_encode()
    table = table.append_column("model", version)
    stamp = clusters_stamp(features, model).with_result(
        tiles=count, n_clusters=list(cohort.n_clusters), outside=0.01, outside_k=finest
    )
    _write(folder.record("clusters"), table, stamp)
    purities = np.random.default_rng(cohort.seed).beta(6, 0.8, finest)
    labels = fine * len(LABELS) // finest
    other = rng.random(count) > purities[fine]
    labels = np.where(other, rng.integers(len(LABELS), size=count), labels)
    annotation = _said(cohort, max(number + 1, cohort.slides)).of(folder.slide_id)
    assert annotation is not None
    names = [LABELS[label] for label in labels]
    table = keys.append_column("label", pa.array(names))
    table = table.append_column("share", pa.array(rng.uniform(0.5, 1, count), pa.float32()))
    stamp = labels_stamp(folder, source, annotation, LabelSettings()).with_result(
        tiles=count,
        labelled=count,
        source=annotation.source,
        seen={"signature": annotation.signature},
    )
    _write(folder.record("labels"), table, stamp)


@functools.lru_cache(maxsize=1)
def _said(cohort: Cohort, slides: int) -> Annotations:  # noqa: ARG001 - so that more are found
    return Annotations(cohort.store, cohort.annotations)


def _model(cohort: Cohort) -> ClusterModel:
    model = current_model(cohort.store)
    assert model is not None
    return model


def _annotate(cohort: Cohort, slide_id: str) -> None:
    """An outline, so that there is an annotation to look for; what labels say is drawn instead."""
    corners = [[0, 0], [100_000, 0], [100_000, 80_000], [0, 80_000], [0, 0]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [corners]},
        "properties": {"classification": {"name": LABELS[0]}},
    }
    content = {"type": "FeatureCollection", "features": [feature]}
    (cohort.annotations / f"{slide_id}.geojson").write_text(json.dumps(content))


def _file(cohort: Cohort, number: int) -> Path:
    return cohort.folder / "slides" / f"{slide_name(number)}.tiff"


def _describe(cohort: Cohort, folder: SlideFolder, number: int) -> Description:
    path = _file(cohort, number)
    path.write_bytes(b"no pixels")
    stat = path.stat()
    facts = {
        "patient": f"patient-{number // 2}",
        "site": f"site-{number % 7}",
        "scanner": f"scanner-{number % 3}",
    }
    description = Description(
        slide=folder.slide_id,
        path=str(path),
        relative_path=path.name,
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        content=hashlib.sha256(folder.slide_id.encode()).hexdigest(),
        sample=hashlib.sha256(folder.slide_id.encode()).hexdigest(),
        whole=None,
        backend="OPENSLIDE",
        vendor="benchmark",
        objective_power=20.0,
        width=100_000,
        height=80_000,
        levels=[{"width": 100_000, "height": 80_000, "downsample": 1.0}],
        mpp_x=0.5,
        mpp_y=0.5,
        mpp_source="slide",
        mpp_problem=None,
        facts=facts,
    )
    made_from = {"slide": description.content, "sheet": {"mpp": None, "facts": facts}}
    stamp = Stamp.of("slides", algorithm=1, made_from=made_from)
    files.write_json(folder.record("slides"), stamp.in_json(asdict(description)))
    return description


def _write_tiles(
    folder: SlideFolder, description: Description, rng: np.random.Generator, tiles: int
) -> pa.Table:
    count = int(rng.integers(max(1, tiles // 2), tiles + tiles // 2 + 1))
    columns = description.width // TILE_PX
    grid = np.sort(rng.choice(columns * (description.height // TILE_PX), count, replace=False))
    places = [(TILE_PX * (i % columns), TILE_PX * (i // columns), TILE_PX, TILE_PX)
              for i in grid.tolist()]  # fmt: skip
    keys = key_table([tile_name(*place) for place in places], places)
    table = keys.append_column("level", pa.array([0] * count, pa.int32()))
    for name in ("mpp_x", "mpp_y"):
        table = table.append_column(name, pa.array([0.5] * count, pa.float64()))
    for name in ("background", "ink", "blank", *METRICS):
        table = table.append_column(name, pa.array(rng.random(count, np.float32)))
    stamp = tiles_stamp(description, TILING).with_result(tiles=count)
    _write(folder.record("tiles"), table, stamp)
    return keys


def _write(path: Path, table: pa.Table, stamp: Stamp) -> None:
    """As a stage does, but without waiting for the disk."""
    pq.write_table(stamp.on_table(table), path, compression="zstd")
