"""Getting encoder weights: a local file, the cache, a mirror, or the published address."""

from __future__ import annotations

import base64
import hashlib
import http.client
import logging
import shutil
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from histoencoder_core.errors import WeightsError, without_credentials
from histoencoder_core.pip_wheel import sha256
from histoencoder_core.store.files import atomic_path, locked_to_write

log = logging.getLogger(__name__)

PUBLISHED = {
    "prostate_small": "https://dl.dropboxusercontent.com/s/tbff9wslc8p7ie3/prostate_small.pth?dl=0",
    "prostate_medium": "https://dl.dropboxusercontent.com/s/k1fr09x5auki8sp/prostate_medium.pth?dl=0",
}
"""Addresses that HistoEncoder 0.1.1 published its weights at."""

TIMEOUT_SECONDS = 30
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def prostate_weights(
    name: str, *, folder: Path, mirror: str | None = None, expected_sha256: str | None = None
) -> Path:
    """Find or fetch the weights of a HistoEncoder model.

    Args:
        name: ``prostate_small`` or ``prostate_medium``.
        folder: Folder of weights; what is fetched is kept there.
        mirror: Address under which ``<name>.pth`` is tried before the published one. It may hold
            ``user:password@``.
        expected_sha256: SHA-256 of the file, if another one is to be refused.

    Returns:
        The path of the weights.

    Raises:
        WeightsError: They are nowhere to be had, and the message says what to put where; or what
            is at hand is another file.
    """
    local = local_weights(name, folder)
    if local is not None:
        check_sha256(local, expected_sha256)
        return local
    target = folder / f"{name}.pth"
    addresses = [f"{mirror.rstrip('/')}/{name}.pth"] if mirror else []
    addresses.append(PUBLISHED[name])
    failures = []
    for address in addresses:
        try:
            _download(address, target, expected_sha256)
        except (OSError, http.client.HTTPException, ValueError, WeightsError) as error:
            failures.append(without_credentials(f"{address}: {error}"))
        else:
            return target
    raise WeightsError(
        f"The weights of {name} are not at hand and could not be fetched ({'; '.join(failures)}). "
        f"Fetch {PUBLISHED[name]} on a machine with network access and put the file at "
        f"{target}, or name a mirror in HISTOENCODER_WEIGHTS_URL, or another folder of weights "
        "in HISTOENCODER_WEIGHTS."
    )


def local_weights(name: str, folder: Path) -> Path | None:
    """The file of an encoder's weights in a folder, if it is there.

    Args:
        name: The encoder's name; characters that no file name has are written as ``_``.
        folder: The folder of weights.
    """
    stem = file_stem(name)
    found = (folder / f"{stem}{suffix}" for suffix in _SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def check_sha256(path: Path, expected: str | None) -> None:
    """Make sure that a file is the expected one, if one is expected.

    Args:
        path: The file.
        expected: Its SHA-256 in 64 hexadecimal digits; any file will do if None.

    Raises:
        WeightsError: It is another file.
    """
    if expected is not None and (found := sha256(path)) != expected:
        raise WeightsError(
            f"{path}: is not the file of weights that is expected: its SHA-256 is {found}, not "
            f"{expected}. Remove it, or correct HISTOENCODER_WEIGHTS_SHA256."
        )


def file_stem(name: str) -> str:
    """The file name, without suffix, that an encoder's weights have in the folder of weights.

    Example:
        >>> file_stem("timm:vit_small_patch16_224.dino")
        'timm_vit_small_patch16_224.dino'
    """
    return name.replace(":", "_").replace("/", "_")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Load a state dict without executing anything that a file may hold.

    Args:
        path: A ``.safetensors`` or a PyTorch file; a dict under ``state_dict`` or ``model`` is
            looked into.

    Raises:
        WeightsError: The file is damaged or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch goes on for a page, with advice that would let a file run code.
        problem = str(error).partition(". ")[0].partition("\n")[0]
        raise WeightsError(
            f"{path}: can't be loaded as weights ({type(error).__name__}: {problem}). Remove the "
            "file and fetch it again."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise WeightsError(f"{path}: holds something else than a state dict of tensors.")
    return dict(content)


def load_into(module: torch.nn.Module, path: Path, *, ignore: tuple[str, ...] = ()) -> None:
    """Load weights into a module, exactly.

    Args:
        module: The module.
        path: The weights.
        ignore: Beginnings of names that the file may hold beyond the module's, such as a
            classifier. What the module has is loaded, whatever its name.

    Raises:
        WeightsError: A weight is missing, has another shape, or is unknown.
    """
    content = read_state_dict(path)
    wanted = module.state_dict().keys()
    kept = {
        name: value
        for name, value in content.items()
        if name in wanted or not name.startswith(ignore or "\0")
    }
    try:
        module.load_state_dict(kept)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:400]
        raise WeightsError(f"{path}: does not fit the encoder. {first}") from error


def state_dict_sha256(module: torch.nn.Module) -> str:
    """Hash a module's weights, whatever file they came in.

    Returns:
        The SHA-256 over names, types, shapes and values of all parameters and buffers.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _download(address: str, target: Path, expected: str | None) -> None:
    request = _request(address)
    with locked_to_write(target):
        if target.is_file():  # another process was faster
            check_sha256(target, expected)
            return
        log.info("fetching %s", without_credentials(address))
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response,  # noqa: S310
            atomic_path(target) as temporary,
        ):
            if response.headers.get_content_type() == "text/html":
                raise OSError("the answer is a web page, not a file of weights")
            with temporary.open("wb") as file:
                shutil.copyfileobj(response, file)
            size, announced = temporary.stat().st_size, response.headers.get("Content-Length")
            if announced is not None and size != int(announced):
                raise OSError(f"got {size} of {announced} bytes")
            check_sha256(temporary, expected)


def _request(address: str) -> urllib.request.Request:
    """Ask for an address whose user and password go into a header."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in {"http", "https", "file"}:
        raise ValueError("not an http, https or file address")
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl())  # noqa: S310
    if user:
        pair = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        # A redirect may lead to another host, which must not get the password.
        request.add_unredirected_header("Authorization", f"Basic {pair}")
    return request
