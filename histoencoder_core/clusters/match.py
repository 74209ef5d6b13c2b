"""Numbering a new model's clusters after those of the one before.

Source: Hungarian algorithm, Kuhn (1955), on the distances between centroids.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from histoencoder_core.clusters.model import NUMBERED_AFTER, ClusterModel
from histoencoder_core.store import Stamp

SAME = 0.5
"""A cluster is the same as long as its centroid has moved by less than this share of the distance
to the nearest other centroid: less than half of it, and it is nearer to its own former place."""


def numbered_after(model: ClusterModel, previous: ClusterModel) -> ClusterModel:
    """Give clusters the numbers of those of a former model that they match.

    For each K that both have, clusters are matched one to one so that the sum of the distances
    between their centroids is least. With whitening, which every fit makes anew, the former
    centroids are first brought into the new space through that of the features.

    Args:
        model: The new model.
        previous: The one before.

    Returns:
        The new model with its clusters renumbered and the matches told; unchanged if the models
        can't be compared, as they differ in the space of their features, in how they are
        transformed, or in all K.
    """
    ks = [k for k in model.centroids if k in previous.centroids]
    if not ks or _space(model) != _space(previous):
        return model
    centroids, parts = dict(model.centroids), []
    for k in ks:
        former = previous.transform.move(previous.centroids[k], model.transform)
        gaps = cdist(former, model.centroids[k])
        _, order = linear_sum_assignment(gaps)
        centroids[k] = model.centroids[k][order]
        between = cdist(former, former)
        np.fill_diagonal(between, np.inf)
        moved, apart = gaps[np.arange(k), order], between.min(axis=1)
        relative = np.divide(moved, apart, out=np.where(moved > 0, np.inf, 0.0), where=apart > 0)
        columns = {
            "k": np.full(k, k),
            "cluster": np.arange(k),
            "previous_cluster": np.arange(k),
            "moved": moved,
            "moved_relative": relative,
            "same": relative < SAME,
        }
        parts.append(pa.table(columns, schema=model.matches.schema))
    stamp = model.stamp
    numbered = Stamp.of(
        stamp.stage,
        algorithm=stamp.algorithm,
        made_from={**stamp.made_from, NUMBERED_AFTER: previous.version},
        untrained=stamp.untrained,
    ).with_result(**stamp.result, previous=previous.version)
    return replace(model, stamp=numbered, centroids=centroids, matches=pa.concat_tables(parts))


def _space(model: ClusterModel) -> tuple[str, bool, int | None]:
    return model.space, model.settings.normalise, model.settings.whiten
