"""How an encoder is executed: device, backend, precision and batch size, by fixed rules.

Nothing is timed to decide: the same settings on the same kind of machine always give the same
choice, and so the same features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from histoencoder_core.errors import SettingsError
from histoencoder_core.features.encoders import Encoder
from histoencoder_core.settings import Backend, Precision

CPU_BATCH, GPU_BATCH = 8, 256


@dataclass(frozen=True)
class Execution:
    """How an encoder is executed.

    Attributes:
        device: ``cpu``, ``cuda:N``, or ``cuda`` for any GPU that is free when work begins.
        backend: What executes it.
        precision: Of its arithmetic.
        batch_size: Tiles a forward pass; a last, smaller batch is filled up.
    """

    device: str
    backend: Backend
    precision: Precision
    batch_size: int


def choose_execution(
    encoder: Encoder,
    *,
    device: str = "auto",
    backend: Literal["auto", Backend] = "auto",
    batch_size: int | None = None,
) -> Execution:
    """Choose what is not given.

    On a CPU: OpenVINO, float32, batches of 8. OpenVINO was the fastest backend in parity (see
    docs/performance.md), and its results depend neither on the batch nor on the number of threads.
    On a GPU: PyTorch's compiler, the encoder's `gpu_precision` if the GPU has it, else float32, and
    batches of 256.

    Args:
        encoder: The encoder; its settings may fix the precision.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: ``auto`` or a backend.
        batch_size: Tiles a forward pass.

    Raises:
        SettingsError: There is no such GPU, or the device can't do what is asked.
    """
    gpu = on_gpu(device)
    chosen: Backend = ("compile" if gpu else "openvino") if backend == "auto" else backend
    if gpu and chosen == "openvino":
        raise SettingsError("The backend openvino is for CPUs; on a GPU choose compile or eager.")
    precision = encoder.settings.precision
    if precision == "auto":
        precision = _gpu_precision(encoder) if gpu else "float32"
    elif precision == "float16" and not gpu:
        raise SettingsError(
            "float16 arithmetic needs a GPU. Choose float32 or bfloat16; to store features as "
            "float16 set dtype (--float16)."
        )
    return Execution(
        device=("cuda" if device == "auto" else device) if gpu else "cpu",
        backend=chosen,
        precision=precision,
        batch_size=batch_size or (GPU_BATCH if gpu else CPU_BATCH),
    )


def on_gpu(device: str) -> bool:
    """Whether a device is a GPU; ``auto`` is one where there is one.

    Raises:
        SettingsError: There is no such GPU.
    """
    if device in {"auto", "cpu"}:
        return device == "auto" and torch.cuda.is_available()
    if not torch.cuda.is_available():
        raise SettingsError(f"Device {device} was asked for, but PyTorch finds no GPU here.")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise SettingsError(f"There is no {device}: PyTorch finds {count} GPUs here.")
    return True


def _gpu_precision(encoder: Encoder) -> Precision:
    if encoder.gpu_precision == "bfloat16" and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        return "float32"
    return encoder.gpu_precision
