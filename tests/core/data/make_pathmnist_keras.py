"""Make ``pathmnist_keras.npz``: what Keras' own DenseNet121 computes with Capricorn's weights.

Run it where Keras 3 is installed (``pip install keras torch h5py``; not a dependency of the
project), with the weights that `histoencoder_core.features.pathmnist.fetch_capricorn` provides::

    KERAS_BACKEND=torch python tests/core/data/make_pathmnist_keras.py capricorn-0.1.weights.h5

The fixture was made with Keras 3.15.1 on the CPU. Keras 3.8.0, which wrote the published file,
computes the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

FIXTURE = Path(__file__).with_name("pathmnist_keras.npz")


def example_images() -> np.ndarray:
    """Two images that any machine can make: (2, 224, 224, 3) float32 in [0, 1].

    One is noise. One is smooth but has neither mirror nor rotation symmetry, and different
    channels, so that swapped axes or channels show.
    """
    noise = np.random.default_rng(121).random((224, 224, 3), dtype=np.float32)
    y, x = np.mgrid[0:224, 0:224] / 223.0
    waves = np.stack([np.sin(9 * x + 4 * y * y), np.cos(17 * y + 3 * x * y), x * x - y], axis=-1)
    return np.stack([noise, (0.5 + 0.5 * waves).astype(np.float32)])


def keras_features(weights: Path, images: np.ndarray) -> np.ndarray:
    """Compute Keras' pooled features: (n, 1024) float32 for (n, 224, 224, 3) images."""
    import keras

    backbone = keras.applications.DenseNet121(
        include_top=False, weights=None, input_shape=images.shape[1:]
    )
    pool = keras.layers.GlobalAveragePooling2D()
    head = [keras.layers.Dropout(0.2), keras.layers.Dense(24, activation="softmax")]
    inputs = keras.Input(images.shape[1:])
    keras.Sequential([inputs, backbone, pool, *head]).load_weights(weights)
    return np.asarray(keras.Sequential([inputs, backbone, pool]).predict(images, verbose=0))


if __name__ == "__main__":
    pixels = example_images()
    np.savez(
        FIXTURE,
        features=keras_features(Path(sys.argv[1]), pixels),
        image_means=pixels.mean(axis=(1, 2), dtype=np.float64),
    )
