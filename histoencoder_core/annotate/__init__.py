"""Annotation by cluster: what clusters mean, slides annotated by it, and how well that works.

Flow: `mapping` names clusters after the labelled tiles in them, `slide` annotates one slide with
those names and writes GeoJSON that QuPath opens, `evaluation` measures the whole path on slides
held out from the clusters and their names.
"""

from histoencoder_core.annotate.evaluation import ensure_evaluation, read_evaluation
from histoencoder_core.annotate.mapping import derive_labels
from histoencoder_core.annotate.slide import annotate_slide

__all__ = ["annotate_slide", "derive_labels", "ensure_evaluation", "read_evaluation"]
