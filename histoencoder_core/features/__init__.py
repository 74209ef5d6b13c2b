"""Features: encoders, their weights, how they are run, and extraction.

Flow: `encoders` builds an encoder from its settings, with weights from `weights` (or `pathmnist`
for the demo encoder). `execution` chooses device, backend, precision and batch size, `lease` a free
GPU; `runner` runs the encoder so, through one of the `backends`, on `images` that were resized and
normalised. `extraction` takes slides through `reading`, encoding and writing: the slide's tiles
come in, ``features.parquet`` goes out.
"""

from histoencoder_core.imports import collector_off

with collector_off():
    from histoencoder_core.features.encoders import Encoder, encoder_names, load_encoder
    from histoencoder_core.features.extraction import extract_slides, features_stamp
    from histoencoder_core.features.runner import Runner

__all__ = [
    "Encoder",
    "Runner",
    "encoder_names",
    "extract_slides",
    "features_stamp",
    "load_encoder",
]
