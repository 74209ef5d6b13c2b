"""Compare what can execute an encoder on this machine: a JSON object a line, one a backend.

start_up_seconds: until the first batch is done, in a new process; compiled code may be in a cache.
images_per_second: of images that are ready on the device.
difference: largest to PyTorch's own float32 features, relative to the largest feature.
batch_difference: likewise, of the same images in batches of 1, 3 and 16 and in other places of the
    batch, to themselves in batches of 8.

ONNX Runtime is measured where it is installed, with `onnx` and `onnxscript`; the platform does not
use it. Each measure has a process of its own, and the backends take turns.

Usage: python benchmarks/backends.py [--encoder NAME] [--repeat N] [--seconds S] [--only BACKEND …]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from about import about

from histoencoder_core.features import backends, load_encoder
from histoencoder_core.features.encoders import Encoder
from histoencoder_core.features.execution import Execution
from histoencoder_core.settings import EncoderSettings

BATCH = 8
OTHER_BATCHES = (1, 3, 16)
IMAGES = 48

CHOICES = {
    "eager": ("eager", "float32"),
    "compile": ("compile", "float32"),
    "openvino": ("openvino", "float32"),
    "openvino bfloat16": ("openvino", "bfloat16"),
    "onnxruntime": None,
}

Encode = Callable[[torch.Tensor], torch.Tensor]


def built(name: str, encoder: Encoder, batch: int) -> Encode:
    """A backend for batches of one size."""
    choice = CHOICES[name]
    if choice is None:
        return _onnxruntime(encoder, batch)
    execution = Execution("cpu", choice[0], choice[1], batch)  # type: ignore[arg-type]
    return backends.build(encoder.module, execution, encoder.input_size)


def _onnxruntime(encoder: Encoder, batch: int) -> Encode:
    import onnxruntime

    size = encoder.input_size
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "encoder.onnx"
        images = (torch.zeros(batch, 3, size, size),)
        torch.onnx.export(encoder.module, images, path, dynamo=False, opset_version=17)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def measure(name: str, encoder_name: str, seconds: float) -> dict[str, Any]:
    """All figures of one backend, in this process."""
    encoder = load_encoder(EncoderSettings(name=encoder_name))
    size = encoder.input_size
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = encoder.module(images).numpy()

    def all_features(encode: Encode, order: np.ndarray, batch: int) -> np.ndarray:
        parts = [encode(images[order[i : i + batch]]) for i in range(0, IMAGES, batch)]
        features = np.empty_like(plain)
        features[order] = torch.cat(parts).numpy()
        return features

    started = time.perf_counter()
    encode = built(name, encoder, BATCH)
    encode(images[:BATCH])
    start_up = time.perf_counter() - started
    in_order = np.arange(IMAGES)
    features = all_features(encode, in_order, BATCH)
    others = [all_features(encode, in_order[::-1].copy(), BATCH)]
    others += [all_features(built(name, encoder, n), in_order, n) for n in OTHER_BATCHES]
    rates = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        started = time.perf_counter()
        encode(images[:BATCH])
        rates.append(BATCH / (time.perf_counter() - started))
    largest = float(np.abs(plain).max())
    return {
        "backend": name,
        "start_up_seconds": round(start_up, 2),
        "images_per_second": round(statistics.median(rates), 2),
        "difference": float(np.abs(features - plain).max()) / largest,
        "batch_difference": max(float(np.abs(o - features).max()) for o in others) / largest,
    }


def main() -> None:
    """Read the command line, measure in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="untrained:xcit_small_12_p16_224")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of encoding, for the rate")
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure, asked.encoder, asked.seconds)))
        return
    names = [n for n in asked.only if CHOICES[n] or importlib.util.find_spec("onnxruntime")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(asked.repeat):
        for name in names:
            command = [sys.executable, __file__, "--encoder", asked.encoder]
            command += ["--seconds", str(asked.seconds), "--measure", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    described = {
        "encoder": asked.encoder,
        "batch": BATCH,
        "repeat": asked.repeat,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **about(**({"onnxruntime": "onnxruntime"} if "onnxruntime" in names else {})),
    }
    for name, runs in found.items():
        medians = {
            key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "backend"
        }
        print(json.dumps({"backend": name, **medians, **described}))


if __name__ == "__main__":
    main()
