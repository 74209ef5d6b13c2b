"""Features: encoders, their weights, and extraction.

Flow: `encoders` builds an encoder from its settings, with weights from `weights` (or `pathmnist`
for the demo encoder); `extraction` reads a slide's tiles, encodes them and writes
``features.parquet``.
"""

from histoencoder_core.features.encoders import Encoder, encoder_names, load_encoder
from histoencoder_core.features.extraction import extract_slide, features_stamp

__all__ = ["Encoder", "encoder_names", "extract_slide", "features_stamp", "load_encoder"]
