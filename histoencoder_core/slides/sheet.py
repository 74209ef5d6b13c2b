"""What is known of slides beyond their pixels: the optional ``slides.csv``."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from histoencoder_core.errors import SettingsError
from histoencoder_core.slides.register import plain_id

MPP_RANGE = (0.05, 10.0)
"""Plausible resolutions in µm/px; scanners do write others."""

TEXT_COLUMNS = ("patient", "site", "scanner", "stain", "split")
COLUMNS = ("slide", "mpp", *TEXT_COLUMNS)


@dataclass(frozen=True)
class SheetRow:
    """One slide's row.

    Attributes:
        mpp: Resolution in µm/px that overrides the slide's own.
        facts: The non-empty values of ``patient, site, scanner, stain, split``.
    """

    mpp: float | None = None
    facts: dict[str, str] = field(default_factory=dict)


_NO_ROW = SheetRow()


@dataclass(frozen=True)
class Sheet:
    """The table of slides.

    Attributes:
        path: The file, for messages; None for an empty table.
        rows: Rows by the text in the column ``slide``.
    """

    path: Path | None = None
    rows: dict[str, SheetRow] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Self:
        """Read a ``slides.csv``.

        Args:
            path: The file; None gives an empty table.

        Raises:
            SettingsError: It is missing, has no column ``slide``, unknown columns, a slide twice,
                or a µm/px that is no number within the plausible range.
        """
        if path is None:
            return cls()
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, skipinitialspace=True)
                header = [name.strip() for name in reader.fieldnames or []]
                reader.fieldnames = header
                lines = [(reader.line_num, line) for line in reader]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise SettingsError(f"{path}: the table of slides can't be read ({error}).") from error
        unknown = sorted(set(header) - set(COLUMNS))
        if "slide" not in header or unknown:
            raise SettingsError(
                f"{path}: its first line must name the columns {', '.join(COLUMNS)}; 'slide' is "
                f"required, the others are optional (unknown: {', '.join(unknown) or 'none'})."
            )
        rows: dict[str, SheetRow] = {}
        for number, line in lines:
            cells = {k: (v or "").strip() for k, v in line.items() if k in COLUMNS}
            if not cells["slide"]:
                raise SettingsError(f"{path}, line {number}: the column 'slide' is empty.")
            if cells["slide"] in rows:
                raise SettingsError(f"{path}, line {number}: {cells['slide']} is named twice.")
            facts = {name: cells[name] for name in TEXT_COLUMNS if cells.get(name)}
            mpp = _mpp(cells.get("mpp", ""), f"{path}, line {number}")
            rows[cells["slide"]] = SheetRow(mpp, facts)
        return cls(path, rows)

    def row(self, slide_id: str, *, relative: str = "") -> SheetRow:
        """The row of a slide, named by its id, its relative path, its file name or its stem.

        Where two slides have the same name, it stands for the one that has it as its id.
        """
        if not self.rows:
            return _NO_ROW
        for name in (slide_id, relative):  # most are found so, and paths take their time
            if name in self.rows:
                return self.rows[name]
        path = Path(relative)
        names = [path.name, path.stem] if slide_id == plain_id(path) else []
        return next((self.rows[name] for name in names if name in self.rows), _NO_ROW)


def plausible_mpp(value: float) -> bool:
    """Whether a resolution in µm/px can be that of a scanned slide.

    Example:
        >>> plausible_mpp(0.25), plausible_mpp(896.0)
        (True, False)
    """
    return math.isfinite(value) and MPP_RANGE[0] <= value <= MPP_RANGE[1]


def _mpp(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not plausible_mpp(value):
        raise SettingsError(
            f"{where}: mpp is {text!r}; give a number of µm/px from {MPP_RANGE[0]} to "
            f"{MPP_RANGE[1]}, with a decimal point."
        )
    return value
