"""Running an encoder on batches of tiles."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from histoencoder_core.errors import HistoEncoderError, SettingsError, WeightsError
from histoencoder_core.features import backends
from histoencoder_core.features.encoders import Encoder
from histoencoder_core.features.execution import choose_execution
from histoencoder_core.features.images import Normalisation, normalised
from histoencoder_core.features.lease import lease_gpu
from histoencoder_core.settings import Backend

log = logging.getLogger(__name__)

PARITY = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference to PyTorch in float32, relative to the largest feature, that a backend may
have. docs/performance.md gives what was measured."""

_AHEAD = 2

_TOO_LITTLE_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
)
"""How CUDA's libraries say it, where PyTorch has no type for it."""


class Batch:
    """A batch that the encoder has been given; on a GPU it may still be computing.

    Attributes:
        count: Number of tiles.
        done_at: When it was seen to be computed, by `time.perf_counter`.
    """

    def __init__(self, features: torch.Tensor, count: int, done: torch.cuda.Event | None) -> None:
        self.count = count
        self.done_at = time.perf_counter()
        self._features, self._done = features, done

    def wait(self) -> None:
        """Wait until it is computed."""
        if self._done is not None:
            self._done.synchronize()
            self.done_at = time.perf_counter()
            # Page-locked memory is dear: a slide's features wait elsewhere to be written.
            self._features, self._done = self._features.clone(), None

    def features(self) -> np.ndarray:
        """The features, float32 of shape (count, length), once they are computed."""
        self.wait()
        return self._features[: self.count].numpy()


class Prepared:
    """Tiles that are on the encoder's device, resized and normalised.

    Attributes:
        images: float32 tensor of shape (batch size, 3, size, size).
        count: Number of tiles; what follows them only fills the batch.
        ready: On a GPU, when `images` are there.
    """

    def __init__(self, images: torch.Tensor, count: int, ready: torch.cuda.Event | None) -> None:
        self.images, self.count, self.ready = images, count, ready


class Runner:
    """An encoder that is ready to run.

    `prepare` and `run` may be called from two threads, so that the next batch travels while one is
    computed.

    Attributes:
        encoder: The encoder.
        execution: How it is run. The batch size shrinks when a GPU runs out of memory.
        start_up_seconds: Time that compiling took; 0 before.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        device: str = "auto",
        backend: Literal["auto", Backend] = "auto",
        batch_size: int | None = None,
    ) -> None:
        """Choose what is not given. The encoder is compiled when it first runs.

        Args:
            encoder: The encoder.
            device: See `choose_execution`, also of the others.
            backend: If ``auto`` and the fast backend can't take the encoder, or its features differ
                from PyTorch's by more than `PARITY`, PyTorch runs it as it is.
            batch_size: Tiles a forward pass.

        Raises:
            SettingsError: There is no such GPU, or the device can't do what is asked.
        """
        self.encoder = encoder
        self.execution = choose_execution(
            encoder, device=device, backend=backend, batch_size=batch_size
        )
        self._running: deque[Batch] = deque()
        self._may_fall_back = backend == "auto"
        self.start_up_seconds = 0.0
        self._compute: backends.Compute | None = None
        self._fallback: str | None = None

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the encoder runs. A GPU is leased when this is first asked: when work begins."""
        kind, _, number = self.execution.device.partition(":")
        if kind == "cuda":
            index = lease_gpu([int(number)] if number else None)
            self.execution = replace(self.execution, device=f"cuda:{index}")
        return torch.device(self.execution.device)

    @functools.cached_property
    def _copies(self) -> torch.cuda.Stream | None:
        """On a GPU, the stream on which tiles travel."""
        if self.device.type == "cpu":
            return None
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def normalisation(self) -> Normalisation:
        """The encoder's own."""
        return Normalisation(self.encoder.mean, self.encoder.std)

    @property
    def description(self) -> dict[str, Any]:
        """How features are made, for a stamp's result and for people."""
        chosen = self.execution
        return {
            "device": chosen.device,
            "processor": _processor(self.device),
            "backend": chosen.backend,
            "precision": chosen.precision,
            "batch_size": chosen.batch_size,
            "start_up_seconds": round(self.start_up_seconds, 2),
            "torch": torch.__version__,
            **backends.versions(chosen.backend),
            **({"fallback": self._fallback} if self._fallback else {}),
        }

    def prepare(
        self, tiles: Sequence[np.ndarray], normalisation: Normalisation | None = None
    ) -> Prepared:
        """Bring tiles to the device, resized and normalised.

        Args:
            tiles: At most a batch of uint8 arrays of shape (height, width, 3), of any sizes.
            normalisation: Instead of the encoder's own.

        Raises:
            torch.OutOfMemoryError: The GPU's memory does not suffice.
        """
        if self._copies is None:
            return Prepared(self._images(tiles, normalisation), len(tiles), None)
        with _memory_errors_as_one(), torch.cuda.stream(self._copies):
            images = self._images(tiles, normalisation)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._copies)
        return Prepared(images, len(tiles), ready)

    def warm_up(self) -> backends.Compute:
        """Compile the encoder, unless that is done. `run` would do it too.

        Raises:
            torch.OutOfMemoryError: The GPU's memory does not suffice.
            SettingsError: The backend that was asked for can't run the encoder.
            WeightsError: The encoder's features are not finite.
        """
        if self._compute is None:
            device = self.device  # first, as waiting for a GPU's lease is no start-up
            started = time.perf_counter()
            self._compute = self._checked()
            self.start_up_seconds = time.perf_counter() - started
            log.info("%s is ready on %s", self.encoder.settings.name, device)
        return self._compute

    def run(self, prepared: Prepared) -> Batch:
        """Encode a batch.

        On a GPU this returns at once, unless two batches are waiting already.

        Raises:
            torch.OutOfMemoryError: The GPU's memory does not suffice.
            SettingsError: The backend that was asked for can't run the encoder.
        """
        compute = self.warm_up()
        with _memory_errors_as_one():
            return self._run(compute, prepared)

    def _run(self, compute: backends.Compute, prepared: Prepared) -> Batch:
        if prepared.ready is None:
            return Batch(compute(prepared.images), prepared.count, None)
        while len(self._running) >= _AHEAD:
            self._running.popleft().wait()
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(prepared.ready)
        prepared.images.record_stream(stream)
        features = compute(prepared.images)
        received = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        received.copy_(features, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(stream)
        batch = Batch(received, prepared.count, done)
        self._running.append(batch)
        return batch

    def encode(self, tiles: Sequence[np.ndarray]) -> np.ndarray:
        """Encode any number of tiles.

        Args:
            tiles: uint8 arrays of shape (height, width, 3), of any sizes.

        Returns:
            float32 array of shape (tiles, length).
        """
        size = self.execution.batch_size
        parts = [tiles[start : start + size] for start in range(0, len(tiles), size)]
        batches = [self.run(self.prepare(part)) for part in parts]
        return np.concatenate(
            [np.empty((0, self.encoder.length), np.float32), *(b.features() for b in batches)]
        )

    def halve(self) -> None:
        """Go on with half the batch size: the device's memory did not suffice.

        Raises:
            HistoEncoderError: Batches hold one tile already.
        """
        if self.execution.batch_size == 1:
            raise HistoEncoderError(
                f"{self.execution.device} has too little memory for one tile of "
                f"{self.encoder.settings.name}. Free some, choose a smaller input size, or use "
                "the CPU."
            )
        smaller = self.execution.batch_size // 2
        log.warning("%s: out of memory; batches of %d from now on", self.device, smaller)
        self.execution = replace(self.execution, batch_size=smaller)
        self._running.clear()
        self._compute = None
        if self.device.type == "cuda":
            gc.collect()  # what an error's traceback held
            torch.cuda.empty_cache()

    def _images(
        self, tiles: Sequence[np.ndarray], normalisation: Normalisation | None
    ) -> torch.Tensor:
        size = self.encoder.input_size
        images = normalised(
            tiles,
            size=size,
            normalisation=normalisation or self.normalisation,
            device=self.device,
        )
        missing = self.execution.batch_size - len(tiles)
        if missing == 0:
            return images
        return torch.cat([images, images.new_zeros(missing, 3, size, size)])

    def _checked(self) -> backends.Compute:
        """The backend's function, after a comparison with plain PyTorch in float32."""
        chosen, size = self.execution, self.encoder.input_size
        plain = replace(chosen, backend="eager", precision="float32", batch_size=2)
        seeded = torch.Generator().manual_seed(0)
        probe = torch.randn(2, 3, size, size, generator=seeded).to(self.device)
        wanted = backends.build(self.encoder.module, plain, size)(probe)
        if not wanted.isfinite().all():
            raise WeightsError(
                f"{self.encoder.settings.name} gives features that are not finite, also in "
                "float32. Its weights are damaged: fetch them again."
            )
        filled = torch.cat([probe] * (chosen.batch_size // 2 + 1))[: chosen.batch_size]
        try:
            with _memory_errors_as_one():
                compute = backends.build(self.encoder.module, chosen, size)
                got = compute(filled)[:2]
        except (torch.OutOfMemoryError, SettingsError):
            raise
        except Exception as error:  # noqa: BLE001 - of a backend, on what it can't take
            problem = f"can't run {self.encoder.settings.name} ({type(error).__name__}: {error})"
        else:
            wanted = wanted[: len(got)]
            difference = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
            if difference <= PARITY[chosen.precision]:
                return compute
            problem = f"differs from PyTorch by {difference:.1g} of the largest feature"
        if chosen.backend == "eager" or not self._may_fall_back:
            raise SettingsError(
                f"The backend {chosen.backend} {problem}. Choose another, or another precision."
            )
        log.warning("The backend %s %s; PyTorch runs it as it is.", chosen.backend, problem)
        self.execution = replace(chosen, backend="eager")
        self._fallback = f"{chosen.backend} {problem}"
        return self._checked()


@contextlib.contextmanager
def _memory_errors_as_one() -> Iterator[None]:
    """Raise every kind of error that means too little memory as `torch.OutOfMemoryError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, torch.OutOfMemoryError) or any(
                told in str(cause) for told in _TOO_LITTLE_MEMORY
            ):
                raise torch.OutOfMemoryError(str(error)) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).name)
    return torch.backends.cpu.get_cpu_capability()
