"""HistoEncoder's functional API, for notebooks and training scripts.

The functions, their arguments and their results are those of ``histoencoder.functional`` 0.1.1
(Pohjonen, 2023), on today's timm (`timm.models.xcit.Xcit`) and on Arrow tables instead of polars
frames. Known defects of 0.1.1 are not repeated; each function says which under "Unlike 0.1.1".

Example:
    >>> from histoencoder_core import functional as F
    >>> F.list_encoders()
    ['prostate_small', 'prostate_medium']
"""

from __future__ import annotations

from histoencoder_core.features.xcit import extract_features
from histoencoder_core.functional.clustering import cluster_features
from histoencoder_core.functional.extraction import yield_features
from histoencoder_core.functional.models import create_encoder, list_encoders
from histoencoder_core.functional.saving import save_features
from histoencoder_core.functional.training import (
    freeze_encoder,
    get_parameter_groups,
    update_lr,
    update_weight_decay,
)

__all__ = [
    "cluster_features",
    "create_encoder",
    "extract_features",
    "freeze_encoder",
    "get_parameter_groups",
    "list_encoders",
    "save_features",
    "update_lr",
    "update_weight_decay",
    "yield_features",
]
