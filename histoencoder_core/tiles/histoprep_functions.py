"""The functions of HistoPrep that tiles are made with.

Import this only where they are called: HistoPrep imports torch and scikit-learn, which takes
seconds.
"""

from histoencoder_core.imports import collector_off

with collector_off():
    from histoprep.functional import get_image_metrics, get_tissue_mask

__all__ = ["get_image_metrics", "get_tissue_mask"]
