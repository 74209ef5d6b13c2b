"""How well clusters annotate, measured on slides that neither made nor named them.

Slides are split into folds by patient where ``slides.csv`` tells the patient, else by slide. For
each fold a cluster model is fitted and its clusters are named on the other slides alone; then the
fold's labelled tiles are annotated and compared with their labels (k-fold cross-validation; Stone,
"Cross-validatory choice and assessment of statistical predictions", 1974). Intervals are over
patients or slides, not over tiles, which are not independent.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from histoencoder_core.annotate import scores
from histoencoder_core.annotate.mapping import label_for
from histoencoder_core.annotate.scores import Ints
from histoencoder_core.clusters import ClusterModel, FeatureFile, current_model, feature_file
from histoencoder_core.clusters.naming import annotation_k
from histoencoder_core.cohort import run_sql
from histoencoder_core.errors import ClusterError
from histoencoder_core.settings import AnnotationSettings, ClusterSettings
from histoencoder_core.store import Stamp, Store, files
from histoencoder_core.store.stamp import read_stamp
from histoencoder_core.store.tables import iter_features, read_keys, read_table

ALGORITHM = 1


@dataclass(frozen=True)
class _Slide:
    """A slide that takes part.

    Attributes:
        file: Its features.
        group: Its patient, or itself: what is held out as a whole.
        patient: Whether the group is a patient.
        test: Whether ``slides.csv`` says that it is of the test split.
        labels: Fingerprint of its labels; None if it has none.
    """

    file: FeatureFile
    group: str
    patient: bool
    test: bool
    labels: str | None


@dataclass(frozen=True)
class _Labelled:
    """The labelled tiles of a slide.

    Attributes:
        rows: int64 array of shape (tiles,), their rows in the features; -1 for a tile without any.
        truth: int64 array of shape (tiles,), their labels' places among all labels.
    """

    rows: Ints
    truth: Ints


@dataclass(frozen=True)
class _Cohort:
    """What is measured on, and how.

    Attributes:
        model: The current model.
        k: Its K that annotates.
        slides: By name, all slides that take part.
        labels: All labels in alphabetical order.
        labelled: By name, the slides with labelled tiles.
        settings: When clusters abstain, folds, seed.
        fit: Fits a model on features.
    """

    model: ClusterModel
    k: int
    slides: dict[str, _Slide]
    labels: list[str]
    labelled: dict[str, _Labelled]
    settings: AnnotationSettings
    fit: Callable[[list[FeatureFile], ClusterSettings], ClusterModel]


@dataclass(frozen=True)
class _Fold:
    """What was measured on one fold.

    Attributes:
        tables: By slide, the table of counts that `scores` describes.
        majority: Place of the most frequent label among the tiles that named the clusters.
        fitted: Number of slides that the clusters were fitted on.
        named: Number of labelled slides that named them.
        named_clusters: Number of clusters that got a label.
    """

    tables: dict[str, Ints]
    majority: int
    fitted: int
    named: int
    named_clusters: int


def evaluation_path(store: Store) -> Path:
    """The file of what was measured."""
    return store.cohort / "evaluation.json"


def read_evaluation(store: Store) -> dict[str, Any] | None:
    """What was measured last; None before that. See `ensure_evaluation` for its content."""
    path = evaluation_path(store)
    if read_stamp(path) is None:
        return None
    content: dict[str, Any] = files.read_json(path)
    return content


def ensure_evaluation(
    store: Store,
    settings: AnnotationSettings,
    *,
    memory_gb: float = 2.0,
    device: str = "cpu",
) -> tuple[dict[str, Any], bool]:
    """Measure how well the current model's clusters annotate, unless that is done already.

    The cluster model of a fold is fitted with the current model's settings on the slides that the
    current model saw, less the held-out ones. Labelled slides of a split ``test`` in ``slides.csv``
    are the one held-out part if there are any, else labelled slides are split into folds. The other
    slides of a held-out patient are left out of everything.

    Args:
        store: The store, with a catalog.
        settings: Which K, when clusters abstain, folds, seed.
        memory_gb: See `fit_clusters`.
        device: See `fit_clusters`.

    Returns:
        The content of ``evaluation.json``, and whether it was measured now. If ``measured`` is
        false, ``reason`` says why. Else, pooled over the held-out tiles: ``coverage``, the share of
        labelled tiles that got a label; ``accuracy``, the share of those whose label is right, and
        ``majority_accuracy``, the same if all were called by the label most frequent in the slides
        that named the clusters; intervals of the first two; for each class its tiles, ``precision``
        among those called so, ``recall`` among all of the class, also those without an annotation,
        and ``f1``; ``macro_f1``, the mean of the latter; ``confusion``; and the numbers of each
        fold and of each slide.

    Raises:
        ClusterError: There is no model, or the features do not fit it.
        SettingsError: The model has no such K.
        StoreError: There is no catalog, or a slide's files can't be read.
    """
    model = current_model(store)
    if model is None:
        raise ClusterError(
            f"{store.root}: has no cluster model yet; run `histoencoder cluster` first."
        )
    k = annotation_k(store, model, settings)
    slides = _slides(store, model)
    stamp = Stamp.of(
        "evaluation",
        algorithm=ALGORITHM,
        made_from={
            "model": model.version,
            "k": k,
            "settings": settings.model_dump(mode="json", exclude={"n_clusters"}),
            "slides": {
                name: [slide.file.fingerprint, slide.labels, slide.group, slide.test]
                for name, slide in slides.items()
            },
        },
        untrained=model.untrained,
    )
    with files.locked_to_write(evaluation_path(store)):
        before = read_stamp(evaluation_path(store))
        if before is not None and before.fingerprint == stamp.fingerprint:
            return files.read_json(evaluation_path(store)), False
        from histoencoder_core.clusters.fit import fit_clusters  # torch takes seconds to import

        names, labelled = _labelled(store, slides)
        fit = functools.partial(fit_clusters, memory_gb=memory_gb, device=device)
        cohort = _Cohort(model, k, slides, names, labelled, settings, fit)
        content = {
            "model": model.version,
            "k": k,
            "untrained": model.untrained,
            "seed": settings.seed,
            **_measure(cohort),
        }
        content = stamp.in_json(content)
        files.write_json(evaluation_path(store), content)
        return content, True


def split_groups(tiles: Mapping[str, int], folds: int, *, seed: int) -> list[list[str]]:
    """Split groups into folds of about equal numbers of tiles.

    Args:
        tiles: Labelled tiles by group.
        folds: Number of folds; fewer if there are fewer groups.
        seed: Decides which groups come together.

    Returns:
        The groups of each fold.

    Example:
        >>> [sorted(fold) for fold in split_groups({"a": 9, "b": 4, "c": 4}, 2, seed=0)]
        [['b', 'c'], ['a']]
    """
    names = sorted(tiles)
    split: list[list[str]] = [[] for _ in range(min(folds, len(names)))]
    sizes = [0] * len(split)
    for i in np.random.default_rng(seed).permutation(len(names)):
        lightest = sizes.index(min(sizes))
        split[lightest].append(names[i])
        sizes[lightest] += tiles[names[i]]
    return split


def _slides(store: Store, model: ClusterModel) -> dict[str, _Slide]:
    """The slides that the model saw and those that are labelled, with features in its space."""
    labelled = set(run_sql(store, "SELECT DISTINCT slide FROM labels").column("slide").to_pylist())
    facts = {
        row["slide"]: row
        for row in run_sql(store, "SELECT slide, patient, split FROM slides").to_pylist()
    }
    slides = {}
    for name in sorted({*model.stamp.made_from["features"], *labelled}):
        file = feature_file(store.slide(name))
        if file is None or file.space != model.space:
            continue
        told = facts.get(name, {})
        labels = store.slide(name).stamp("labels") if name in labelled else None
        patient = told.get("patient")
        slides[name] = _Slide(
            file=file,
            group=f"slide {name}" if patient is None else f"patient {patient}",
            patient=patient is not None,
            test=(told.get("split") or "").casefold() == "test",
            labels=None if labels is None else labels.fingerprint,
        )
    return slides


def _measure(cohort: _Cohort) -> dict[str, Any]:
    slides, labelled, settings = cohort.slides, cohort.labelled, cohort.settings
    tiles: Counter[str] = Counter()
    for name, of_slide in labelled.items():
        tiles[slides[name].group] += len(of_slide.truth)
    test = [name for name in labelled if slides[name].test]
    if test:
        parts = [sorted({slides[name].group for name in test})]
    else:
        parts = split_groups(tiles, settings.folds, seed=settings.seed)
    units = "patients" if any(slides[name].patient for name in labelled) else "slides"
    split_by = "slides.csv" if test else units
    if len(tiles) < 2 or len(parts[0]) == len(tiles):
        reason = (
            f"Needs labelled {units} both to name clusters and to measure on; there are "
            f"{len(tiles)}{', all of the test split' if test else ''}."
        )
        return {"measured": False, "reason": reason, "split_by": split_by}
    folds = []
    for part in parts:
        held = {name for name, slide in slides.items() if slide.group in part}
        try:
            folds.append(_fold(cohort, held, [n for n in test or labelled if n in held]))
        except ClusterError as error:
            reason = f"A fold can't be fitted. {error}"
            return {"measured": False, "reason": reason, "split_by": split_by}
    return {"measured": True, "reason": None, "split_by": split_by, **_pooled(cohort, folds)}


def _labelled(store: Store, slides: dict[str, _Slide]) -> tuple[list[str], dict[str, _Labelled]]:
    """All labels in alphabetical order, and the labelled tiles of each slide that has some."""
    tables = {}
    for name, slide in slides.items():
        if slide.labels is not None:
            table = read_table(store.slide(name).record("labels"), ["tile", "label"]).drop_null()
            if table.num_rows:
                tables[name] = table
    names = sorted(
        {x for table in tables.values() for x in table.column("label").unique().to_pylist()}
    )
    labelled = {}
    for name, table in tables.items():
        tiles = read_keys(slides[name].file.path).column("tile").combine_chunks()
        rows = pc.index_in(table.column("tile"), value_set=tiles)
        truth = pc.index_in(table.column("label"), value_set=pa.array(names, pa.string()))
        labelled[name] = _Labelled(
            rows.fill_null(-1).to_numpy().astype(np.int64), truth.to_numpy().astype(np.int64)
        )
    return names, labelled


def _fold(cohort: _Cohort, held: set[str], measured_on: list[str]) -> _Fold:
    """Fit and name clusters without the held-out slides, then annotate those to measure on."""
    slides, labelled, k, count = cohort.slides, cohort.labelled, cohort.k, len(cohort.labels)
    seen = cohort.model.stamp.made_from["features"]
    inputs = [slide.file for name, slide in slides.items() if name in seen and name not in held]
    one_k = cohort.model.settings.model_copy(update={"n_clusters": (k,)})
    model = cohort.fit(inputs, one_k) if inputs else None
    if model is None or k not in model.centroids:
        raise ClusterError(f"Without the held-out slides, there are too few tiles for K = {k}.")
    naming = [name for name in labelled if name not in held]
    # What lies in no cluster comes last, and abstains.
    found = np.zeros((k + 1, count), np.int64)
    for name in naming:
        clusters = _clusters(model, k, slides[name].file, labelled[name].rows)
        np.add.at(found, (clusters, labelled[name].truth), 1)
    meaning = np.array([*_meaning(found[:k], cohort.labels, cohort.settings), count])
    tables = {}
    for name in measured_on:
        said = meaning[_clusters(model, k, slides[name].file, labelled[name].rows)]
        tables[name] = np.zeros((count, count + 1), np.int64)
        np.add.at(tables[name], (labelled[name].truth, said), 1)
    return _Fold(
        tables=tables,
        majority=int(found.sum(axis=0).argmax()),
        fitted=len(inputs),
        named=len(naming),
        named_clusters=int((meaning < count).sum()),
    )


def _clusters(model: ClusterModel, k: int, file: FeatureFile, rows: Ints) -> Ints:
    """The clusters of some of a slide's tiles; -1, the last place, for one without features."""
    clusters: Ints = np.full(len(rows), -1, np.int64)
    first = 0
    for chunk in iter_features(file.path):
        here = (rows >= first) & (rows < first + len(chunk))
        if here.any():
            clusters[here], _ = model.assign(chunk[rows[here] - first])[k]
        first += len(chunk)
    return clusters


def _meaning(counts: Ints, names: list[str], settings: AnnotationSettings) -> list[int]:
    """The place of each cluster's label among the names; one after the last if it abstains."""
    meaning = []
    for of_cluster in counts:
        labelled, most = int(of_cluster.sum()), int(of_cluster.argmax())
        purity = of_cluster[most] / labelled if labelled else None
        majority = names[most] if labelled else None
        label = label_for(majority, purity=purity, labelled=labelled, settings=settings)
        meaning.append(len(names) if label is None else most)
    return meaning


def _pooled(cohort: _Cohort, folds: list[_Fold]) -> dict[str, Any]:
    """The numbers over all folds, of each class, of each fold and of each slide."""
    by_slide = {name: table for fold in folds for name, table in fold.tables.items()}
    table = _total(by_slide.values())
    groups: dict[str, list[Ints]] = {}
    for name, of_slide in by_slide.items():
        groups.setdefault(cohort.slides[name].group, []).append(of_slide)
    ends = scores.intervals(
        [_total(of_group) for of_group in groups.values()], seed=cohort.settings.seed
    )
    classes = {label: scores.of_class(table, i) for i, label in enumerate(cohort.labels)}
    return {
        **scores.overall(table),
        "accuracy_interval": ends["accuracy"],
        "coverage_interval": ends["coverage"],
        "majority_accuracy": _majority_accuracy(folds),
        "macro_f1": float(np.mean([told["f1"] for told in classes.values() if told["tiles"]])),
        "held_out_slides": len(by_slide),
        "held_out_groups": len(groups),
        "classes": classes,
        "confusion": {
            "labels": cohort.labels,
            "annotations": [*cohort.labels, None],
            "tiles": table.tolist(),
        },
        "folds": [
            {
                "held_out": sorted(fold.tables),
                "fitted_on": fold.fitted,
                "named_on": fold.named,
                "named_clusters": fold.named_clusters,
                **scores.overall(_total(fold.tables.values())),
                "majority_accuracy": _majority_accuracy([fold]),
            }
            for fold in folds
        ],
        "slides": {name: scores.overall(by_slide[name]) for name in sorted(by_slide)},
    }


def _total(tables: Iterable[Ints]) -> Ints:
    total: Ints = np.sum(list(tables), axis=0)
    return total


def _majority_accuracy(folds: list[_Fold]) -> float | None:
    """Accuracy if every tile that is called something were called by the most frequent label."""
    parts = [(fold.majority, table[:, :-1]) for fold in folds for table in fold.tables.values()]
    right = sum(int(called[majority].sum()) for majority, called in parts)
    return scores.ratio(right, sum(int(called.sum()) for _, called in parts))
