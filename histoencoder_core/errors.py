"""What can go wrong, by the remedy it needs.

Every message names the file, says what is wrong with it, and what to do.
"""

from __future__ import annotations


class HistoEncoderError(Exception):
    """Base of every error that a user can act on."""


class SettingsError(HistoEncoderError):
    """Settings that contradict each other or can't be met."""


class StoreError(HistoEncoderError):
    """A file of the store that can't be used as it is."""


class WeightsError(HistoEncoderError):
    """An encoder whose weights can't be had or don't fit."""


class LabelError(HistoEncoderError):
    """An annotation file that can't be read as labels."""


class ClusterError(HistoEncoderError):
    """Features that can't be clustered together."""


class SlideError(HistoEncoderError):
    """A slide that can't be processed.

    Attributes:
        kind: The class of the failure, one word a technician can search for: ``missing``,
            ``unreadable``, ``unsupported``, ``no-mpp``, ``implausible-mpp``, ``too-fine``,
            ``dark-background``, ``too-small``, ``no-tiles`` or ``unreadable-tiles``.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind
