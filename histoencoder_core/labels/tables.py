"""Reading CSV tables of labels: of tiles, or of whole slides."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from histoencoder_core.errors import LabelError

_COLUMNS: list[str] = ["slide", "tile", "x", "y", "label"]

Corner = tuple[int, int]
"""A tile's top left corner in level-0 pixels."""


@dataclass
class Told:
    """What tables say of one slide.

    Attributes:
        points: Labels by a tile's corner.
        names: Labels by a tile's name.
        slide: The label of the whole slide.
        mistake: The first thing that is wrong, for people.
    """

    points: dict[Corner, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    slide: str | None = None
    mistake: str | None = None

    def add(self, other: Told, where: str) -> None:
        """Add what another table says.

        Args:
            other: What it says.
            where: The table, for messages.
        """
        self.mistake = self.mistake or other.mistake
        for corner, label in other.points.items():
            self.add_point(corner, label, where)
        for name, label in other.names.items():
            self.add_name(name, label, where)
        if other.slide is not None:
            self.add_slide(other.slide, where)

    def add_point(self, corner: Corner, label: str, where: str) -> None:
        """Label the tile at a corner."""
        self._agree(self.points.setdefault(corner, label), label, f"the tile at {corner}", where)

    def add_name(self, name: str, label: str, where: str) -> None:
        """Label the tile of a name."""
        self._agree(self.names.setdefault(name, label), label, f"tile {name}", where)

    def add_slide(self, label: str, where: str) -> None:
        """Label the whole slide."""
        self.slide = self.slide or label
        self._agree(self.slide, label, "the slide", where)

    def _agree(self, earlier: str, label: str, what: str, where: str) -> None:
        if earlier != label:
            self.mistaken(f"{where}: labels {what} {label!r}, but another row {earlier!r}.")

    def mistaken(self, mistake: str) -> None:
        """Note what is wrong, unless something was before."""
        self.mistake = self.mistake or mistake


@dataclass(frozen=True)
class TableIndex:
    """Whom a table speaks of.

    Attributes:
        digests: Fingerprint of a slide's rows, by the name the table gives it.
        faults: Rows that tell no slide, for people.
    """

    digests: dict[str, str]
    faults: tuple[str, ...]


def index_table(path: Path) -> TableIndex:
    """Tell which slides a table labels, and what changed: rows are not looked at any closer.

    Args:
        path: A CSV file with columns ``slide, label`` and, for labels of tiles, ``x, y`` or
            ``tile``.

    Returns:
        The index; it is kept in memory while the file stays as it is.

    Raises:
        LabelError: The file can't be read, or lacks a column.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise LabelError(f"{path}: can't be read ({error}).") from error
    return _index(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)  # sensors look every few seconds
def _index(path: Path, _size: int, _mtime_ns: int) -> TableIndex:
    digests: dict[str, hashlib._Hash] = {}
    faults = []
    for number, row in _rows(path):
        if not row["slide"]:
            faults.append(f"{path}, line {number}: the column 'slide' is empty.")
            continue
        digest = digests.setdefault(row["slide"], hashlib.sha256())
        digest.update(json.dumps(row).encode())
    return TableIndex({name: it.hexdigest() for name, it in digests.items()}, tuple(faults))


def read_table(path: Path) -> dict[str, Told]:
    """Read a table of labels.

    Args:
        path: As for `index_table`.

    Returns:
        What it says, by the name it gives a slide. A row that is wrong is the mistake of its slide
        alone.

    Raises:
        LabelError: The file can't be read, or lacks a column.
    """
    found: dict[str, Told] = {}
    for number, row in _rows(path):
        if row["slide"]:
            _take(found.setdefault(row["slide"], Told()), row, f"{path}, line {number}")
    return found


def _take(told: Told, row: dict[str, str], where: str) -> None:
    """Add one row to what is said of its slide."""
    label = row["label"]
    if not label:
        told.mistaken(f"{where}: the label is empty.")
    elif row.get("tile"):
        told.add_name(row["tile"], label, where)
    elif "x" in row:
        try:
            corner = int(row["x"]), int(row["y"])
        except ValueError as error:
            told.mistaken(
                f"{where}: x and y must be a tile's top left corner in whole level-0 pixels "
                f"({error})."
            )
            return
        told.add_point(corner, label, where)
    elif "tile" in row:
        told.mistaken(f"{where}: the column 'tile' is empty.")
    else:
        told.add_slide(label, where)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a table, with the columns that count, stripped."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            missing = {"slide", "label"} - set(header)
            if len({"x", "y"} & set(header)) == 1:
                missing |= {"x", "y"} - set(header)
            if missing:
                raise LabelError(
                    f"{path}: needs the columns slide, label, and for labels of tiles x, y or "
                    f"tile; missing: {', '.join(sorted(missing))}."
                )
            columns = {name: header.index(name) for name in _COLUMNS if name in header}
            for cells in reader:
                if cells:
                    cells += [""] * (len(header) - len(cells))
                    row = {name: cells[i].strip() for name, i in columns.items()}
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{path}: can't be read ({error}).") from error
