"""What clusters mean: a table of labels by cluster, derived from labelled slides or edited.

``<store>/_cohort/cluster_labels/<version>-k<K>.csv`` is derived (see `annotate.mapping`). A copy of
it in ``<store>/cluster_labels.csv``, which is never written, is what a pathologist says.
``last.json`` beside the derived tables tells which K was derived last.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from histoencoder_core.clusters.model import ClusterModel, current_model
from histoencoder_core.errors import LabelError, SettingsError
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.settings import AnnotationSettings
from histoencoder_core.store import Stamp, Store, files

ANNOTATIONS_ALGORITHM = 1
"""Version of the annotations stage's algorithm; here so that completeness can be told."""

REQUIRED = ("model", "k", "cluster", "label")
"""Columns that an edited table must have."""

COLUMNS = (*REQUIRED, "majority", "purity", "labelled_tiles", "tiles", "slides")
"""Columns of a derived table, so that a copy of it can be edited."""

# Spreadsheets take a version of digits alone, or with one "e", for a number and round it.
_MODEL_PREFIX = "model-"


@dataclass(frozen=True)
class NamedCluster:
    """One cluster's row of a derived table.

    Attributes:
        cluster: Its number.
        label: What it is taken to be; None if it abstains.
        majority: The most frequent label of its labelled tiles; None if none is labelled.
        purity: The share of its labelled tiles that carry it.
        labelled_tiles: Number of its labelled tiles.
        tiles: Number of its tiles.
        slides: Number of slides they lie on.
    """

    cluster: int
    label: str | None
    majority: str | None
    purity: float | None
    labelled_tiles: int
    tiles: int
    slides: int


@dataclass(frozen=True)
class ClusterLabels:
    """What each cluster of one K of a model is taken to be.

    Attributes:
        model: Version of the model.
        k: Number of clusters.
        labels: By cluster, its label; None if it abstains.
        source: ``derived`` from labelled slides, or ``edited`` by a person in part or whole.
        purity: By cluster, the share of its labelled tiles that carry its label, where known.
    """

    model: str
    k: int
    labels: dict[int, str | None]
    source: Literal["derived", "edited"] = "derived"
    purity: dict[int, float] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of what each cluster is taken to be.

        Purity is a note and not part of it: it moves with every slide that is labelled, and slides
        are annotated anew only when a cluster's label has changed.
        """
        named = {str(cluster): label for cluster, label in sorted(self.labels.items())}
        return fingerprint({"model": self.model, "k": self.k, "labels": named})

    @property
    def names(self) -> list[str]:
        """The labels that some cluster has, in alphabetical order."""
        return sorted({label for label in self.labels.values() if label is not None})


def annotations_stamp(clusters: Stamp, labels: ClusterLabels) -> Stamp:
    """The stamp that a slide's annotations carry.

    Args:
        clusters: The stamp of the slide's ``clusters.parquet``.
        labels: What its clusters mean.
    """
    return Stamp.of(
        "annotations",
        algorithm=ANNOTATIONS_ALGORITHM,
        made_from={"clusters": clusters.fingerprint, "cluster_labels": labels.fingerprint},
        untrained=clusters.untrained,
    ).with_result(model=labels.model, k=labels.k, source=labels.source)


def annotation_k(store: Store, model: ClusterModel, settings: AnnotationSettings) -> int:
    """The K whose clusters annotate: that of an edited table that fits, else the one asked for.

    Raises:
        SettingsError: The model has no such K.
    """
    if store.cluster_labels_csv.is_file():
        # One that does not fit is refused where it is used; the derived table that is to replace
        # it must still be made.
        with contextlib.suppress(LabelError):
            return _read_edited(store, model, settings).k
    if settings.n_clusters is None:
        return max(model.centroids)
    if settings.n_clusters not in model.centroids:
        raise SettingsError(
            f"Annotation is asked for with K = {settings.n_clusters}, which cluster model "
            f"{model.version} does not have; it has {_listed(model)}."
        )
    return settings.n_clusters


def derived_path(store: Store, model: str, k: int) -> Path:
    """The file of the labels derived for a model's version and K."""
    return store.cluster_labels / f"{model}-k{k}.csv"


def write_derived(store: Store, model: str, k: int, rows: list[NamedCluster]) -> Path:
    """Write the table of what clusters mean as derived from labelled slides.

    Args:
        store: The store.
        model: Version of the model.
        k: Number of clusters.
        rows: One a cluster, in order.

    Returns:
        The file, which is left alone if it says so already.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in rows:
        purity = "" if row.purity is None else f"{row.purity:.4f}"
        counts = (row.labelled_tiles, row.tiles, row.slides)
        told = (row.cluster, row.label or "", row.majority or "", purity, *counts)
        writer.writerow((f"{_MODEL_PREFIX}{model}", k, *told))
    # Without the mark at its beginning, Excel takes UTF-8 for another encoding.
    content = text.getvalue().encode("utf-8-sig")
    path = derived_path(store, model, k)
    with files.locked_to_write(store.cluster_labels):
        if not path.is_file() or path.read_bytes() != content:
            with files.atomic_path(path) as temporary:
                temporary.write_bytes(content)
        if _last_k(store, model) != k:
            files.write_json(_last_path(store), {"model": model, "k": k})
    return path


def current_cluster_labels(
    store: Store, settings: AnnotationSettings | None
) -> ClusterLabels | None:
    """What the clusters of the current model mean.

    Rows of the edited table win; an empty label makes a cluster abstain. Clusters that the edited
    table does not list keep the derived label.

    Args:
        store: The store.
        settings: Which K is asked for; if None, the one whose table was derived last.

    Returns:
        The labels; None if there is no model, or neither a derived nor an edited table for it.

    Raises:
        LabelError: The edited table does not fit the current model, or can't be read.
        SettingsError: The model has no such K.
        ClusterError: The current model's file is damaged.
    """
    model = current_model(store)
    if model is None:
        return None
    asked = AnnotationSettings() if settings is None else settings
    edited = _read_edited(store, model, asked) if store.cluster_labels_csv.is_file() else None
    last = _last_k(store, model.version) if settings is None else None
    k = edited.k if edited is not None else last or annotation_k(store, model, asked)
    path = derived_path(store, model.version, k)
    derived = _read(path) if path.is_file() else None
    if edited is None and derived is None:
        return None
    tables = [table for table in (derived, edited) if table is not None]
    labels: dict[int, str | None] = dict.fromkeys(range(k))
    for table in tables:
        labels |= table.labels
    majority = {} if derived is None else derived.purity_of
    purity = {
        cluster: majority[cluster, label]
        for cluster, label in labels.items()
        if label is not None and (cluster, label) in majority
    }
    source: Literal["derived", "edited"] = "derived" if edited is None else "edited"
    return ClusterLabels(model.version, k, labels, source, purity)


def _last_path(store: Store) -> Path:
    return store.cluster_labels / "last.json"


def _last_k(store: Store, model: str) -> int | None:
    """The K of a model whose table was derived last, if it is known."""
    try:
        told = files.read_json(_last_path(store))
        return int(told["k"]) if told["model"] == model else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class _Table:
    """What one file says; `purity_of` is by cluster and its most frequent label."""

    model: str
    k: int
    labels: dict[int, str | None]
    purity_of: dict[tuple[int, str], float]
    first_line: int


def _read_edited(store: Store, model: ClusterModel, settings: AnnotationSettings) -> _Table:
    """Read what a pathologist says, and check that it is said of the current model."""
    path = store.cluster_labels_csv
    table = _read(path)
    where = f"{path}, line {table.first_line}"
    again = (
        f"`histoencoder annotate` writes the current table into {store.cluster_labels}: edit a "
        "copy of that, or move this file away."
    )
    if table.model != model.version:
        raise LabelError(
            f"{where}: names clusters of model {table.model!r}, but the current model is "
            f"{model.version}, whose clusters may have moved or changed numbers (the catalog's "
            f"table cluster_matches tells). {again}"
        )
    if table.k not in model.centroids:
        raise LabelError(
            f"{where}: k is {table.k}, but model {model.version} has only K = {_listed(model)}. "
            f"{again}"
        )
    if settings.n_clusters not in {None, table.k}:
        raise LabelError(
            f"{where}: k is {table.k}, but annotation is asked for with K = "
            f"{settings.n_clusters}. Ask for {table.k} (`histoencoder annotate -n {table.k}` or "
            f"HISTOENCODER_ANNOTATE__N_CLUSTERS={table.k}), or move this file away."
        )
    return table


def _read(path: Path) -> _Table:
    """Read a table, derived or edited.

    Raises:
        LabelError: It can't be read, or says something of a cluster that can't be.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(
            f"{path}: can't be read as text in UTF-8 ({error}). In a spreadsheet program, save it "
            "as 'CSV UTF-8'."
        ) from error
    labels: dict[int, str | None] = {}
    purity_of: dict[tuple[int, str], float] = {}
    head: tuple[str, int] | None = None
    first_line = 0
    for number, cells in _rows(path, text):
        where = f"{path}, line {number}"
        said = cells["model"].removeprefix(_MODEL_PREFIX), _number(cells["k"], "k", where)
        if head is None:
            head, first_line = said, number
        elif said != head:
            raise LabelError(
                f"{where}: is of model {said[0]!r} and K = {said[1]}, but the lines above are of "
                f"{head[0]!r} and K = {head[1]}. Keep the lines of one model and K."
            )
        cluster = _number(cells["cluster"], "cluster", where)
        if cluster >= head[1]:
            raise LabelError(
                f"{where}: there is no cluster {cluster}; with K = {head[1]} they are 0 to "
                f"{head[1] - 1}."
            )
        if cluster in labels:
            raise LabelError(f"{where}: cluster {cluster} is named twice. Keep one of the lines.")
        labels[cluster] = cells["label"] or None
        if cells.get("majority") and (share := _share(cells.get("purity", ""))) is not None:
            purity_of[cluster, cells["majority"]] = share
    if head is None:
        raise LabelError(f"{path}: names no cluster. Fill it in, or move it away.")
    return _Table(*head, labels, purity_of, first_line)


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines that say something, with their numbers."""
    # Where a comma is the decimal mark, spreadsheets write semicolons between the cells.
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = [name.strip().lower() for name in reader.fieldnames or []]
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            raise LabelError(
                f"{path}: its first line must name the columns {', '.join(REQUIRED)}; missing: "
                f"{', '.join(missing)}. Begin with a copy of the derived table."
            )
        reader.fieldnames = names
        for line in reader:
            cells = {name: (line[name] or "").strip() for name in names if name in COLUMNS}
            if any(cells.values()):
                yield reader.line_num, cells
    except csv.Error as error:
        raise LabelError(f"{path}: can't be read as CSV ({error}).") from error


def _number(text: str, name: str, where: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise LabelError(f"{where}: {name} is {text!r}; give a whole number.")
    return int(text)


def _share(text: str) -> float | None:
    """A purity, which is only a note: one that can't be read is not known."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def _listed(model: ClusterModel) -> str:
    return ", ".join(map(str, sorted(model.centroids)))
