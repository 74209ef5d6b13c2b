"""What can go wrong, by the remedy it needs.

Every message names the file, says what is wrong with it, and what to do. Every failure is of a
kind: one word that a technician can search for, which tells whether trying again later may help.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class FailureKind:
    """A class of failures.

    Attributes:
        transient: Whether the same input may succeed later, once its surroundings are mended: it is
            then tried again by itself, ever more rarely.
        remedy: What a technician can do about it.
    """

    transient: bool
    remedy: str


KINDS: dict[str, FailureKind] = {
    # The slide
    "unreadable": FailureKind(transient=False, remedy="Copy the file again, or scan again."),
    "truncated": FailureKind(transient=False, remedy="The copy was cut short: copy it again."),
    "unsupported": FailureKind(transient=False, remedy="Export it as a tiled, pyramidal TIFF."),
    "no-mpp": FailureKind(transient=False, remedy="State its mpp in slides.csv."),
    "implausible-mpp": FailureKind(transient=False, remedy="State its mpp in slides.csv."),
    "too-fine": FailureKind(transient=False, remedy="Ask for coarser tiles, or scan finer."),
    "too-small": FailureKind(transient=False, remedy="Ask for smaller tiles."),
    "dark-background": FailureKind(
        transient=False, remedy="Ask for background = dark if it is fluorescence."
    ),
    "unreadable-tiles": FailureKind(
        transient=False, remedy="Many of its tiles are damaged: copy the file again, or scan again."
    ),
    "no-tiles": FailureKind(transient=False, remedy="Cut its tiles first."),
    "crash": FailureKind(
        transient=False, remedy="It crashes the reader: copy it again, or export it."
    ),
    # Its surroundings
    "missing": FailureKind(transient=True, remedy="Mount the folder of slides, or bring it back."),
    "changing": FailureKind(transient=True, remedy="Wait until it is written; it is tried again."),
    "time-limit": FailureKind(transient=True, remedy="Is the file server slow? Else export it."),
    "out-of-memory": FailureKind(transient=True, remedy="Run fewer things at once."),
    "out-of-disk": FailureKind(transient=True, remedy="Free space in the store."),
    "read-only": FailureKind(transient=True, remedy="Make the store writable."),
    "weights-missing": FailureKind(transient=True, remedy="Bring the weights; docs/encoders.md."),
    "input-output": FailureKind(transient=True, remedy="Look at the disk or the file server."),
    # What was asked of it
    "settings": FailureKind(transient=False, remedy="Change the settings that the reason names."),
    "store": FailureKind(transient=False, remedy="Move the file away that the reason names."),
    "labels": FailureKind(transient=False, remedy="Mend the annotation that the reason names."),
    "clusters": FailureKind(transient=False, remedy="Do what the reason says."),
    "encoder": FailureKind(transient=False, remedy="Check the weights; try float32."),
    "unexpected": FailureKind(transient=False, remedy="A fault of this program: please report it."),
}
"""All kinds of failures by name. No tissue is none of them, but a result with a reason."""


NOTHING_FOUND = 3
"""Exit code of a program that was run to find something, and found nothing."""


class HistoEncoderError(Exception):
    """Base of every error that a user can act on.

    Attributes:
        kind: One of `KINDS`.
    """

    kind: str = "encoder"


class SettingsError(HistoEncoderError):
    """Settings that contradict each other or can't be met."""

    kind = "settings"


class StoreError(HistoEncoderError):
    """A file of the store that can't be used as it is."""

    kind = "store"


class WeightsError(HistoEncoderError):
    """An encoder whose weights can't be had or don't fit."""

    kind = "weights-missing"


class LabelError(HistoEncoderError):
    """An annotation file that can't be read as labels."""

    kind = "labels"


class ClusterError(HistoEncoderError):
    """Features that can't be clustered together."""

    kind = "clusters"


class SlideError(HistoEncoderError):
    """A slide that can't be processed.

    Attributes:
        kind: The class of the failure, one of `KINDS`.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


_BY_ERRNO: dict[int | None, str] = {
    errno.ENOSPC: "out-of-disk",
    errno.EDQUOT: "out-of-disk",
    errno.EROFS: "read-only",
    errno.ENOMEM: "out-of-memory",
}


def kind_of(error: BaseException) -> str:
    """The kind of a failure, whatever raised it.

    Args:
        error: An error of ours, of Python's or of a library's.

    Returns:
        A name in `KINDS`.

    Example:
        >>> kind_of(OSError(errno.ENOSPC, "No space left on device"))
        'out-of-disk'
        >>> kind_of(ZeroDivisionError())
        'unexpected'
    """
    if isinstance(error, HistoEncoderError):
        return error.kind
    # PyTorch's `OutOfMemoryError` is no `MemoryError`, and importing it takes seconds.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out-of-memory"
    if isinstance(error, TimeoutError):
        return "time-limit"
    if isinstance(error, OSError):
        return _BY_ERRNO.get(error.errno, "input-output")
    # DuckDB's errors are none of the operating system's, but quote them.
    told = str(error)
    quoted = (kind for number, kind in _BY_ERRNO.items() if number and os.strerror(number) in told)
    return next(quoted, "unexpected")


_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables whose values are never told."""


def without_credentials(text: str) -> str:
    """A text in which no address holds credentials, for logs and messages.

    What stands before the ``@`` of an address goes, and so does what follows its ``?``, where
    signed addresses have their signature; and the token of the hub, wherever it stands.

    Example:
        >>> without_credentials("https://me:pass@mirror/w.pth?sig=abc: HTTP Error 404")
        'https://mirror/w.pth: HTTP Error 404'
    """
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    text = re.sub(r"//[^/\s]*@", "//", text)
    return re.sub(r"(//[^\s?'\"]*)\?[^\s:'\"]*", r"\1", text)
