"""One slide's folder: what is in it, what it was made from, and how it changes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from histoencoder_core.errors import HistoEncoderError, StoreError, kind_of
from histoencoder_core.store import files, layout
from histoencoder_core.store.layout import Stage
from histoencoder_core.store.stamp import Stamp, read_comment, read_stamp
from histoencoder_core.store.tables import ROW_GROUP

log = logging.getLogger(__name__)

JPEG_QUALITY = 85


class SlideFolder:
    """The folder of one slide in the store.

    Attributes:
        path: The folder, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def slide_id(self) -> str:
        """The slide's id: the folder's name."""
        return self.path.name

    def file(self, name: str) -> Path:
        """The path of a file in this folder, one of the names in `layout`."""
        return self.path / name

    def record(self, stage: Stage) -> Path:
        """The file that carries a stage's fingerprint."""
        return self.path / layout.RECORD[stage]

    def stamp(self, stage: Stage) -> Stamp | None:
        """What a stage's output was made from; None if it is missing or foreign."""
        return read_stamp(self.record(stage))

    def is_foreign(self, stage: Stage) -> bool:
        """Whether a stage's output is here but was made by another program."""
        return self.record(stage).exists() and self.stamp(stage) is None

    @contextlib.contextmanager
    def locked(self, *, given_up: Callable[[], bool] | None = None) -> Iterator[None]:
        """Keep every other process, and thread, from changing this slide's outputs.

        A stage takes the lock before it looks whether it is done, and releases it when its files
        are in place or its failure is recorded. So of two that do the same slide one works, and the
        other waits and finds it done. Reading needs no lock.

        What a killed process left is removed: nobody else can be writing here.

        Args:
            given_up: Asked again and again while another process has the lock.

        Raises:
            filelock.Timeout: Waiting was given up.
            OSError: The lock's file can't be written.
            StoreError: The folder is a link, which leads out of the store.
        """
        self._refuse_links()
        with files.locked(self.file(layout.LOCK), given_up=given_up) as held:
            if held:
                for folder in (self.path, *self.path.glob(f"{layout.VERSIONS}/*/")):
                    files.sweep(folder)
            yield

    def fetch(self, stage: Stage, fingerprint: str) -> bool:
        """Make an output current if it was ever made. The lock must be held.

        Args:
            stage: The stage.
            fingerprint: Of the output asked for.

        Returns:
            Whether the stage is now done: its files have the fingerprint, or had it earlier and
            were brought back from ``versions/``.
        """
        current, kept = self.stamp(stage), self._version(fingerprint)
        if current is not None and current.fingerprint == fingerprint:
            if (kept / layout.RECORD[stage]).exists():
                self._undo_retiring(stage, current)
            return True
        stamp = read_stamp(kept / layout.RECORD[stage])
        if stamp is None or stamp.fingerprint != fingerprint:
            return False
        self.refuse_foreign(stage)
        for name in layout.COMPANIONS[stage]:
            # A run that was killed while it brought this output back had come so far.
            if not (kept / name).exists() and _print_of(self.file(name)) == fingerprint:
                self.file(name).replace(kept / name)
        self._replace(stage, kept)
        with contextlib.suppress(OSError):
            kept.rmdir()
        return True

    @contextlib.contextmanager
    def writing(self, stage: Stage) -> Iterator[StageWriter]:
        """Write a stage's files: companions into a waiting room, then all into place.

        The lock must be held. The output that was current before is kept under
        ``versions/<fingerprint>/``. If the block raises, nothing has changed.

        Raises:
            StoreError: A file that is not ours stands in the way, or no record was written.
        """
        self.refuse_foreign(stage)
        self.path.mkdir(parents=True, exist_ok=True)
        room = files.temporary_name(self.path / stage)
        room.mkdir()
        try:
            writer = StageWriter(stage, room)
            yield writer
            if not (room / layout.RECORD[stage]).exists():
                raise StoreError(f"{self.record(stage)}: the stage wrote no record.")
            self._replace(stage, room)
            files.flush(self.path)
        finally:
            files.remove(room)
        self.clear_failure(stage)

    def withdraw(self, stage: Stage) -> None:
        """Take a stage's output away: what it was made from is gone. The lock must be held.

        It is kept under ``versions/<fingerprint>/``, from where `fetch` brings it back. What
        another program made is left alone.
        """
        if self.stamp(stage) is not None:
            self._retire(stage, successor=None)
            files.remove(self.record(stage))
            if stage == "slides":
                files.remove(self.file(layout.THUMBNAIL))
        self.clear_failure(stage)

    def versions(self) -> list[tuple[Stamp, Path]]:
        """Outputs made with other settings, with the folders that keep them."""
        found = []
        for kept in sorted((self.path / layout.VERSIONS).glob("*/")):
            stamps = [read_stamp(kept / name) for name in layout.RECORD.values()]
            found += [(stamp, kept) for stamp in stamps if stamp is not None]
        return found

    def failures(self) -> dict[str, dict[str, Any]]:
        """Stages that failed on this slide: ``{stage: {kind, reason, inputs, attempts, at}}``.

        ``kind`` is one of `errors.KINDS`, ``attempts`` how often the same inputs failed in a row,
        ``at`` when they last did, in seconds since 1970.
        """
        try:
            content = files.read_json(self.file(layout.FAILURES))
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def duplicate(self) -> dict[str, Any] | None:
        """What is known of a slide that has the content of another, ``of``, and is never computed.

        Beside the other's id it tells what was looked at: ``path, relative_path, size, mtime_ns,
        sheet``.
        """
        try:
            content = files.read_json(self.file(layout.DUPLICATE))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) and "of" in content else None

    def record_failure(self, stage: Stage, error: Exception, *, inputs: Any = None) -> None:
        """Remember why a stage failed, for ``status``, the catalog, and whoever tries again.

        The lock must be held: the failures of all stages are in one file.

        Args:
            stage: The stage that failed.
            error: What it raised.
            inputs: What it was given, so that the same inputs are not tried over and over.
        """
        # An error of ours explains itself; any other needs its type to be understood.
        known = isinstance(error, HistoEncoderError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        before = self.failures().get(stage, {})
        again = before.get("inputs") == inputs
        entry = {
            "kind": kind_of(error),
            "reason": reason,
            "inputs": inputs,
            "attempts": before.get("attempts", 1) + 1 if again and before else 1,
            "at": round(time.time(), 3),
        }
        try:
            if self.path.is_symlink():
                raise OSError("its folder is a link")
            files.write_json(self.file(layout.FAILURES), {**self.failures(), stage: entry})
        except OSError as lost:  # such as a full disk, which may be the very failure
            log.warning("%s: its failure can't be written down (%s): %s", self.path, lost, reason)

    def clear_failure(self, stage: Stage) -> None:
        """Forget a stage's failure: it succeeded. The lock must be held."""
        failures = self.failures()
        if failures.pop(stage, None) is None:
            return
        if failures:
            files.write_json(self.file(layout.FAILURES), failures)
        else:
            files.remove(self.file(layout.FAILURES))

    def _version(self, fingerprint: str) -> Path:
        return self.path / layout.VERSIONS / fingerprint[:16]

    def _replace(self, stage: Stage, source: Path) -> None:
        """Put the files of a stage that lie in another folder into place, the record last."""
        new = read_stamp(source / layout.RECORD[stage])
        self._retire(stage, successor=new.fingerprint if new else None)
        for name in layout.COMPANIONS[stage]:
            # What is still there belongs to no record, but to a run that was killed.
            if self.file(name).is_dir() or not (source / name).exists():
                files.remove(self.file(name))
            if (source / name).exists():
                (source / name).replace(self.file(name))
        (source / layout.RECORD[stage]).replace(self.record(stage))

    def _retire(self, stage: Stage, *, successor: str | None) -> None:
        """Keep the current output as a version, unless the next one is the same made again."""
        stamp = self.stamp(stage)
        if stamp is None or stage == "slides":  # a description is cheap and follows the slide
            return
        again = stamp.fingerprint == successor
        kept = self._version(stamp.fingerprint)
        if not again:
            files.link_or_copy(self.record(stage), kept / layout.RECORD[stage])
        if layout.TILES in layout.COMPANIONS[stage] and self.file(layout.TILES).exists():
            # A folder can't be replaced in one step together with its table: drop the table first.
            files.remove(self.record(stage))
        for name in layout.COMPANIONS[stage]:
            if not again and _print_of(self.file(name)) == stamp.fingerprint:
                files.remove(kept / name)
                self.file(name).replace(kept / name)

    def _undo_retiring(self, stage: Stage, stamp: Stamp) -> None:
        """Take back what a run that was killed did to put another output in place of this one."""
        kept = self._version(stamp.fingerprint)
        for name in layout.COMPANIONS[stage]:
            if _print_of(self.file(name)) not in {None, stamp.fingerprint}:
                files.remove(self.file(name))
            if (kept / name).exists():
                files.remove(self.file(name))
                (kept / name).replace(self.file(name))
        files.remove(kept / layout.RECORD[stage])
        with contextlib.suppress(OSError):
            kept.rmdir()

    def refuse_foreign(self, stage: Stage) -> None:
        """Make sure that no other program's files stand where a stage would write.

        Raises:
            StoreError: Some do, and the message names the first; or the folder is a link, which
                leads out of the store.
        """
        self._refuse_links()
        names = (layout.RECORD[stage], *layout.COMPANIONS[stage])
        for name in names:
            path = self.file(name)
            if path.exists() and not self.is_ours(path):
                raise StoreError(
                    f"{path}: was not written by this program, so it is left alone and the "
                    f"{stage} of {self.slide_id} can't be written. Move it away, or choose "
                    "another store."
                )

    def _refuse_links(self) -> None:
        for path in (self.path, self.path / layout.VERSIONS):
            if path.is_symlink():
                raise StoreError(
                    f"{path}: is a link, and what is written there would land elsewhere. Put a "
                    "folder in its place."
                )

    def is_ours(self, path: Path) -> bool:
        """Whether a file or folder that has the name of a stage's output was written by us."""
        if path.is_dir():
            return not any(path.iterdir()) or _print_of(path) is not None
        if path.suffix == ".jpeg":
            return _print_of(path) is not None
        return read_stamp(path) is not None


def _print_of(path: Path) -> str | None:
    """The fingerprint in a companion, or in the first one of a folder; None if it is not ours."""
    if path.is_dir():
        path = min(path.iterdir(), default=path)
    if path.suffix == ".geojson":
        stamp = read_stamp(path)
        return None if stamp is None else stamp.fingerprint
    return read_comment(path)


def _encodings(schema: pa.Schema) -> dict[str, list[str]]:
    """How columns are encoded: numbers of features never repeat, so a dictionary only costs.

    With their bytes apart they are a seventh smaller than as they are, and read twice as fast as
    from a dictionary.
    """
    lists = {f.name: f.type.value_type for f in schema if pa.types.is_fixed_size_list(f.type)}
    return {
        "use_dictionary": [name for name in schema.names if name not in lists],
        "use_byte_stream_split": [
            f"{name}.list.element" for name, kind in lists.items() if pa.types.is_float32(kind)
        ],
    }


class StageWriter:
    """Writes one stage's files into a waiting room inside the slide's folder."""

    def __init__(self, stage: Stage, room: Path) -> None:
        self._stage = stage
        self._room = room

    def table(self, table: pa.Table, stamp: Stamp) -> None:
        """Write the stage's record as a parquet file."""
        path = self._room / layout.RECORD[self._stage]
        pq.write_table(
            stamp.on_table(table),
            path,
            compression="zstd",
            row_group_size=ROW_GROUP,
            **_encodings(table.schema),
        )
        files.flush(path)

    def json(self, content: dict[str, Any], stamp: Stamp) -> None:
        """Write the stage's record as a JSON file."""
        files.write_json(self._room / layout.RECORD[self._stage], stamp.in_json(content))

    def geojson(self, name: str, features: list[dict[str, Any]], stamp: Stamp) -> None:
        """Write a companion as a stamped GeoJSON FeatureCollection."""
        content = {"type": "FeatureCollection", "features": features}
        # On a slide of many tiles, a line for each number would make it several times as large.
        files.write_json(self._room / name, stamp.in_json(content), indent=None)

    def image(self, name: str, pixels: np.ndarray, stamp: Stamp) -> None:
        """Write an uint8 array of shape (height, width[, 3]) as a stamped JPEG."""
        path = self._room / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(
            path, format="JPEG", quality=JPEG_QUALITY, comment=stamp.comment()
        )
        if path.parent == self._room:
            files.flush(path)
