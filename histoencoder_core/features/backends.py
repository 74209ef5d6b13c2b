"""Backends: what executes an encoder's network, each as a function from images to features."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Iterator

import torch

from histoencoder_core.errors import SettingsError
from histoencoder_core.features.execution import Execution
from histoencoder_core.settings import Backend

Compute = Callable[[torch.Tensor], torch.Tensor]
"""From float32 images (batch, 3, size, size) to float32 features (batch, length), on the device."""


def build(module: torch.nn.Module, execution: Execution, size: int) -> Compute:
    """Make a network ready to run.

    Args:
        module: The network.
        execution: How it is to run.
        size: Width and height in pixels of its input.

    Returns:
        A function for batches of exactly `execution.batch_size`.

    Raises:
        SettingsError: The CPU lacks the precision.
        Exception: Whatever the backend raises on a network that it can't take.
    """
    if execution.backend == "openvino":
        return _openvino(module, execution, size)
    return _pytorch(module, execution)


def versions(backend: Backend) -> dict[str, str]:
    """Versions of what a backend computes with, besides PyTorch's."""
    if backend == "openvino":
        return {"openvino": importlib.metadata.version("openvino")}
    if backend == "compile" and torch.cuda.is_available():
        return {"triton": importlib.metadata.version("triton"), "cuda": str(torch.version.cuda)}
    return {}


def _pytorch(module: torch.nn.Module, execution: Execution) -> Compute:
    device = torch.device(execution.device)
    module = module.to(device)
    if device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)
    run: Compute = module
    if execution.backend == "compile":
        # Otherwise kernels would be timed against each other, and what wins that day be taken.
        run = torch.compile(module, dynamic=False, options={"deterministic": True})

    def compute(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), _exact(), _autocast(execution):
            images = images.contiguous(memory_format=torch.channels_last)
            return run(images).float()

    return compute


def _autocast(execution: Execution) -> contextlib.AbstractContextManager[object]:
    if execution.precision == "float32":
        return contextlib.nullcontext()
    kind = execution.device.partition(":")[0]
    return torch.autocast(kind, dtype=getattr(torch, execution.precision))


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Neither rounded to TF32, which the environment can ask for, nor chosen by timing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _openvino(module: torch.nn.Module, execution: Execution, size: int) -> Compute:
    # OpenVINO reports to its makers when it is imported, through a package that it can do without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    core = openvino.Core()
    if execution.precision == "bfloat16" and "BF16" not in core.get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
        raise SettingsError("This CPU has no bfloat16 arithmetic; choose float32.")
    with torch.no_grad(), _quiet_tracing():
        # `openvino.convert_model` does the same, but reports to its makers that it was used.
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            module.cpu(), torch.zeros(execution.batch_size, 3, size, size), check_trace=False
        )
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion
        model = frontend.convert(frontend.load(decoder))
    model.reshape([execution.batch_size, 3, size, size])
    hint = {"float32": "f32", "bfloat16": "bf16"}[execution.precision]
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    )

    def compute(images: torch.Tensor) -> torch.Tensor:
        # A copy, because the next call writes to the same memory.
        return torch.from_numpy(compiled(images.numpy(), share_inputs=True)[0].copy())

    return compute


@contextlib.contextmanager
def _quiet_tracing() -> Iterator[None]:
    # Tracing warns of each assertion on a shape; shapes are fixed here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
