"""A map of the features: tiles that look alike to the encoder lie side by side.

McInnes et al., "UMAP: Uniform Manifold Approximation and Projection for Dimension Reduction"
(2018), https://arxiv.org/abs/1802.03426.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.patheffects import withStroke

from histoencoder_core.clusters import ClusterModel, FeatureFile, current_model, feature_file
from histoencoder_core.clusters.reading import share_of
from histoencoder_core.colours import cluster_colour, label_colours
from histoencoder_core.report.facts import (
    NO_CLUSTERS,
    NO_LABELS,
    counted,
    percent,
    read_facts,
    rows_of,
)
from histoencoder_core.report.figure import (
    INK,
    PALE,
    Colour,
    Figure,
    as_colour,
    colour_of,
    save_figure,
    short,
)
from histoencoder_core.report.legends import (
    ROW_INCHES,
    draw_key,
    groups_of,
    key_rows,
    read_clusters,
)
from histoencoder_core.store import Stamp, Store, files
from histoencoder_core.store.stamp import read_stamp
from histoencoder_core.store.tables import iter_features, read_keys, read_table

ALGORITHM = 1

MOST_TILES = 20_000
MOST_SLIDES = 1_000
"""Slides that the sample is drawn from: each has to be read."""

LEAST_TILES = 50
"""Fewer tiles make no map: UMAP's neighbourhoods of 15 would be a good part of all."""

NEIGHBOURS = 15
SEED = 0

MOST_NAMED = 24
"""More slides are not listed beside the map: their colours repeat."""

_ROOM = 0.025
"""Least distance of two numbers on the map, as a share of its extent."""

COORDINATES = "umap.parquet"

By = Literal["label", "cluster", "slide"]

_TITLES: dict[By, str] = {
    "label": "Do tiles that look alike have the same label?",
    "cluster": "Where do the clusters lie?",
    "slide": "Do the slides mix?",
}
_UNLABELLED: Colour = (0.86, 0.87, 0.89)


@dataclass(frozen=True)
class _Map:
    """The sampled tiles on the map, in the order in which they are drawn.

    Attributes:
        slides: Ids of their slides.
        labels: Their labels; None where there is none.
        clusters: int64 array of shape (tiles,).
        places: float32 array of shape (tiles, 2).
        stamp: Of the coordinates.
    """

    slides: list[str]
    labels: list[str | None]
    clusters: npt.NDArray[np.int64]
    places: npt.NDArray[np.float32]
    stamp: Stamp


def umap_by_label(store: Store, k: int | None = None) -> Figure:
    """Draw a map of the tiles by UMAP, coloured by label.

    See `_umap`.
    """
    return _umap(store, "label", k)


def umap_by_cluster(store: Store, k: int | None = None) -> Figure:
    """Draw a map of the tiles by UMAP, coloured by cluster.

    See `_umap`.
    """
    return _umap(store, "cluster", k)


def umap_by_slide(store: Store, k: int | None = None) -> Figure:
    """Draw a map of the tiles by UMAP, coloured by slide.

    See `_umap`.
    """
    return _umap(store, "slide", k)


def fit_umap(store: Store, slides: Sequence[str], model: ClusterModel) -> Stamp:
    """Lay a sample of tiles out on a plane, unless that is done already.

    The sample is drawn evenly over slides, and the coordinates are kept in
    ``_cohort/figures/umap.parquet``: ``slide, tile``, ``umap_1, umap_2`` (float32, without unit).
    The same features give the same coordinates with the same versions of umap-learn and numba.

    Args:
        store: The store.
        slides: Ids of the slides, all with features in the model's space.
        model: The cluster model, whose transformation comes first: the map then shows the distances
            that the clusters were made by.

    Returns:
        The stamp of the coordinates.
    """
    path = store.figures / COORDINATES
    inputs = _inputs(store, slides)
    stamp = Stamp.of(
        "umap",
        algorithm=ALGORITHM,
        made_from={
            "features": {file.slide: file.fingerprint for file in inputs},
            "normalise": model.settings.normalise,
            # Whitening is fitted with the model.
            "whiten": model.version if model.settings.whiten else None,
            "seed": SEED,
        },
        untrained=model.untrained,
    )
    with files.locked_to_write(path):
        found = read_stamp(path)
        if found is not None and found.fingerprint == stamp.fingerprint:
            return found
        import torch  # takes seconds

        names, features = _sample(inputs)
        places = _laid_out(model.transform.apply(torch.from_numpy(features)).numpy())
        table = pa.table(
            {
                "slide": pa.array([slide for slide, _ in names], pa.string()),
                "tile": pa.array([tile for _, tile in names], pa.string()),
                "umap_1": pa.array(places[:, 0]),
                "umap_2": pa.array(places[:, 1]),
            }
        )
        stamp = stamp.with_result(tiles=len(places), slides=len(inputs))
        with files.atomic_path(path) as temporary:
            pq.write_table(stamp.on_table(table), temporary, compression="zstd")
        return stamp


def _umap(store: Store, by: By, k: int | None) -> Figure:
    """Draw the map of a sample of tiles.

    Args:
        store: The store, with a catalog.
        by: What decides a tile's colour.
        k: Number of clusters; the model's largest that can be read if not given.

    Returns:
        The figure. Its numbers tell how often neighbours on the map are of one kind, and how often
        they would be if all were mixed.

    Raises:
        SettingsError: The model has no such number of clusters.
        StoreError: There is no catalog, or another program's file stands in the way.
    """
    name, title = f"umap_by_{by}", _TITLES[by]
    facts = read_facts(store)
    model = current_model(store)
    if not facts.ks or model is None:
        return Figure(name, title, missing=NO_CLUSTERS)
    k = facts.k(k, readable=True)
    if by == "cluster":
        name = f"{name}_k{k}"
    if by == "label" and not facts.labelled_tiles:
        return Figure(name, title, missing=NO_LABELS, untrained=facts.untrained)
    if facts.tiles < LEAST_TILES:
        return Figure(
            name,
            title,
            missing=f"There are only {counted(facts.tiles, 'tile')}; a map needs {LEAST_TILES}.",
            untrained=facts.untrained,
        )
    shown = _read_map(store, model, k)
    kinds: list[Any] = {"label": shown.labels, "cluster": shown.clusters.tolist(),
                        "slide": shown.slides}[by]  # fmt: skip
    same, mixed = neighbours_agree(shown.places, kinds)
    tiles, slides = counted(len(kinds), "tile"), counted(len(set(shown.slides)), "slide")
    subtitle = {
        "label": f"Of a labelled tile's nearest labelled tiles on the map, {percent(same)} have "
        f"its label; {percent(mixed)} would if labels were spread at random.",
        "cluster": f"{k} clusters; numbers stand at the clusters' middles where there is room.",
        "slide": f"Of a tile's nearest tiles on the map, {percent(same)} are of its own slide; "
        f"{percent(mixed)} would be if slides mixed fully.",
    }[by]
    caption = (
        f"Each point is a tile: {tiles} drawn evenly from {slides}. Tiles that look alike to the "
        "encoder lie close to each other. Only nearness counts on such a map: the axes have no "
        "unit, and neither the size of an island nor the gap between two means anything. "
        f"{_READING[by]} {facts.left_out}"
    ).strip()
    if by == "slide" and len(set(kinds)) > MOST_NAMED:
        caption += " There are more slides than colours, so that several slides share one."
    figure = Figure(
        name=name,
        title=title,
        caption=caption,
        alt=f"Map of {tiles} by UMAP, coloured by {by}. {subtitle}",
        numbers={"tiles": len(kinds), "neighbours_same": same, "neighbours_same_if_mixed": mixed},
        untrained=facts.untrained,
    )
    groups = groups_of(read_clusters(store, k)) if by == "cluster" else []
    source = facts.source(k) if by == "cluster" else facts.source(k).replace(f", K = {k}", "")
    return save_figure(
        store,
        figure,
        subtitle=subtitle,
        source=f"{source}  ·  UMAP of {tiles}",
        drawn=[shown.stamp.fingerprint, hashlib.sha256(repr(kinds).encode()).hexdigest(), groups],
        draw=lambda: _draw(shown, by, kinds, groups),
    )


_READING: dict[By, str] = {
    "label": "Islands of one colour are tissues that the encoder tells apart by itself. Grey tiles "
    "have no label.",
    "cluster": "Clusters were made from all features, not from this map, so a cluster may lie in "
    "two places on it.",
    "slide": "Islands of a single slide are a warning: stain, scanner or site may count for more "
    "than tissue. They are no proof, since a slide may hold tissue that no other has.",
}


def neighbours_agree(
    places: npt.NDArray[np.float32], kinds: Sequence[Any]
) -> tuple[float | None, float | None]:
    """How often a tile's 15 nearest on the map are of its kind, and how often by chance.

    Args:
        places: float32 array of shape (tiles, 2).
        kinds: A kind for each tile; tiles without one (None) are left out.

    Returns:
        The mean share among neighbours, and the share if kinds were spread at random; None if there
        are not enough tiles.
    """
    from scipy.spatial import KDTree  # takes half a second to import

    known = np.array([kind is not None for kind in kinds], bool)
    numbers = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    of_kind = np.array([numbers[kind] for kind in kinds])[known]
    count = len(of_kind)
    if count <= NEIGHBOURS:
        return None, None
    _, nearest = KDTree(places[known]).query(places[known], k=NEIGHBOURS + 1)
    # The nearest of all is the tile itself, or one that lies at the same place.
    others = nearest[:, 1:]
    same = float((of_kind[others] == of_kind[:, None]).mean())
    sizes = np.bincount(of_kind).astype(float)
    return same, float((sizes * (sizes - 1)).sum() / (count * (count - 1)))


def _inputs(store: Store, slides: Sequence[str]) -> list[FeatureFile]:
    """The features that the sample is drawn from: of all slides, or of enough taken evenly."""
    rows = np.linspace(0, len(slides) - 1, min(len(slides), MOST_SLIDES)).round().astype(int)
    found = (feature_file(store.slide(slides[row])) for row in rows)
    return [file for file in found if file is not None]


def _sample(inputs: list[FeatureFile]) -> tuple[list[tuple[str, str]], npt.NDArray[np.float32]]:
    """Slide, tile and features of a sample drawn evenly over slides."""
    # The share is rounded up, by less than a tile a slide.
    share = share_of([file.tiles for file in inputs], MOST_TILES - len(inputs))
    names: list[tuple[str, str]] = []
    drawn = []
    for file in inputs:
        digits = int.from_bytes(hashlib.sha256(file.slide.encode()).digest())
        rng = np.random.default_rng([SEED, digits])
        chosen = np.sort(rng.choice(file.tiles, min(file.tiles, share), replace=False))
        tiles = read_keys(file.path).column("tile").to_pylist()
        first = 0
        for rows in iter_features(file.path):
            here = chosen[(chosen >= first) & (chosen < first + len(rows))]
            picked = rows[here - first]
            readable = np.isfinite(picked).all(axis=1)
            drawn.append(picked[readable])
            names += [(file.slide, tiles[row]) for row in here[readable]]
            first += len(rows)
    return names, np.concatenate(drawn)


def _laid_out(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Coordinates, an array of shape (tiles, 2), by UMAP with a fixed seed and one thread."""
    from umap import UMAP  # compiles itself, which takes seconds

    with warnings.catch_warnings():
        # Graphs in several parts are usual; UMAP then places each part by itself.
        warnings.filterwarnings("ignore", message=".*not fully connected.*")
        warnings.filterwarnings("ignore", message=".*[Ss]pectral initiali[sz]ation failed.*")
        model = UMAP(n_neighbors=min(NEIGHBOURS, len(features) - 1), random_state=SEED, n_jobs=1)
        return np.asarray(model.fit_transform(features), np.float32)


def _read_map(store: Store, model: ClusterModel, k: int) -> _Map:
    slides = [
        row["slide"]
        for row in rows_of(store, "SELECT DISTINCT slide FROM cluster_counts ORDER BY slide")
    ]
    stamp = fit_umap(store, slides, model)
    table = read_table(store.figures / COORDINATES)
    names = list(
        zip(table.column("slide").to_pylist(), table.column("tile").to_pylist(), strict=True)
    )
    known = _told(store, names, k)
    rows = [row for row, name in enumerate(names) if name in known]
    # Drawn in the order of their slides, the last slides would hide the first.
    rows = np.random.default_rng(SEED).permutation(rows).tolist()
    places = np.stack([table.column(name).to_numpy() for name in ("umap_1", "umap_2")], axis=1)
    return _Map(
        slides=[names[row][0] for row in rows],
        labels=[known[names[row]][1] for row in rows],
        clusters=np.array([known[names[row]][0] for row in rows], np.int64),
        places=places[rows],
        stamp=stamp,
    )


def _told(
    store: Store, names: list[tuple[str, str]], k: int
) -> dict[tuple[str, str], tuple[int, str | None]]:
    """Cluster and label of tiles, by slide and tile."""
    # One text each: a list of 20,000 constants takes DuckDB long to parse.
    slides, tiles = (
        "string_split('" + "\n".join(column).replace("'", "''") + "', chr(10))"
        for column in zip(*names, strict=True)
    )
    rows = rows_of(
        store,
        f"WITH wanted AS (SELECT unnest({slides}) AS slide, unnest({tiles}) AS tile) "  # noqa: S608
        "SELECT slide, tile, cluster, label FROM clusters JOIN wanted USING (slide, tile) "
        f"WHERE k = {k} AND current",
    )
    return {(row["slide"], row["tile"]): (row["cluster"], row["label"]) for row in rows}


def _draw(shown: _Map, by: By, kinds: list[Any], groups: list[tuple[str, list[int]]]) -> Drawing:
    drawing = Drawing(figsize=(10.4, 7), layout="constrained")
    plane, key = drawing.subplots(1, 2, width_ratios=[7.6, 2.2])
    counts = Counter(kinds)
    if by == "cluster":
        colours = {kind: colour_of(kind) for kind in counts}
    elif by == "label":
        labels = label_colours(kind for kind in counts if kind is not None)
        colours = {label: as_colour(rgb) for label, rgb in labels.items()}
    else:
        ordered = sorted(counts)
        colours = {slide: as_colour(cluster_colour(i)) for i, slide in enumerate(ordered)}
    size = float(np.clip(30_000 / len(kinds), 3, 40))
    places = shown.places
    without = np.array([kind is None for kind in kinds], bool)
    style: dict[str, Any] = {"s": size, "linewidths": 0, "rasterized": True}
    plane.scatter(*places[without].T, color=_UNLABELLED, **style)
    shades = np.array([colours[kind] for kind in kinds if kind is not None]).reshape(-1, 3)
    plane.scatter(*places[~without].T, c=shades, alpha=0.85, **style)
    plane.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    plane.spines[:].set_visible(False)
    plane.set_aspect("equal", adjustable="datalim")
    for label in (plane.xaxis.label, plane.yaxis.label):
        label.set(color=PALE, size=8)
    if by == "cluster":
        _number(plane, shown)
        draw_key(key, groups, rows=max(7 / ROW_INCHES, key_rows(groups)))
        return drawing
    named = [kind for kind, _ in counts.most_common() if kind is not None]
    if by == "slide":
        named = sorted(named) if len(named) <= MOST_NAMED else []
    entries = [(colours[kind], short(kind, 24), counts[kind]) for kind in named[:MOST_NAMED]]
    if None in counts:
        entries.append((_UNLABELLED, "no label", counts[None]))
    _list(key, entries)
    if not entries:
        told = f"{len(counts):,} slides, more than there\nare colours: some share one"
        key.text(0, 0.6, told, size=8, color=PALE, va="top")
    return drawing


def _number(axes: Axes, shown: _Map) -> None:
    """Write clusters' numbers, each at the tile nearest to the cluster's middle.

    Where two would overlap, the larger cluster has its number written.
    """
    room = _ROOM * float(np.ptp(shown.places, axis=0).max())
    taken = np.empty((0, 2), np.float32)
    for cluster, _ in Counter(shown.clusters.tolist()).most_common():
        own = shown.places[shown.clusters == cluster]
        middle = own[np.linalg.norm(own - np.median(own, axis=0), axis=1).argmin()]
        if (np.linalg.norm(taken - middle, axis=1) < room).any():
            continue
        taken = np.vstack([taken, middle])
        axes.text(
            float(middle[0]), float(middle[1]), str(cluster), size=8, weight="bold",
            ha="center", va="center", color=INK,
            path_effects=[withStroke(linewidth=2.2, foreground="#ffffff")],
        )  # fmt: skip


def _list(axes: Axes, entries: list[tuple[Colour, str, int]]) -> None:
    """Colours with their names and numbers of tiles."""
    axes.set(xlim=(0, 1), ylim=(7 / ROW_INCHES, 0))
    axes.axis("off")
    if entries:
        axes.text(1, 0.6, "tiles", size=8, color=PALE, va="center", ha="right")
    for i, (colour, name, count) in enumerate(entries):
        y = 1.6 + i
        axes.plot(0.05, y, "o", color=colour, ms=8)
        axes.text(0.13, y, name, size=8.5, va="center")
        axes.text(1, y, f"{count:,}", size=8, color=PALE, va="center", ha="right")
