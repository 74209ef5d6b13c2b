"""What a file was made from, carried in the file itself.

Parquet files hold the stamp in their schema metadata, JSON files under one key, JPEG files in
their comment. A file without a stamp is an input: it is read, never rewritten or deleted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from histoencoder_core import __version__
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.store.files import read_json

KEY = "histoencoder"


class Stamp(BaseModel):
    """Provenance of one stage's output.

    Attributes:
        stage: Name of the stage.
        fingerprint: Hash of the stage, its algorithm version and `made_from`. An output is up to
            date exactly when this equals what would be made now.
        algorithm: Version of the stage's algorithm, raised only when results change.
        made_from: Fingerprints of the inputs, and the settings that bear on the result.
        software: Version of this package; decides nothing.
        untrained: Whether random weights are anywhere behind the result.
        result: Counts, durations and notes for people; decides nothing.
        made_now: Whether this run made the output, rather than finding it done. Not stored.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    fingerprint: str
    algorithm: int
    made_from: dict[str, Any]
    software: str = __version__
    untrained: bool = False
    result: dict[str, Any] = {}
    made_now: bool = Field(default=False, exclude=True)

    @classmethod
    def of(
        cls, stage: str, *, algorithm: int, made_from: dict[str, Any], untrained: bool = False
    ) -> Stamp:
        """Make the stamp that an output from these inputs carries."""
        print_ = fingerprint({"stage": stage, "algorithm": algorithm, "made_from": made_from})
        return cls(
            stage=stage,
            fingerprint=print_,
            algorithm=algorithm,
            made_from=made_from,
            untrained=untrained,
        )

    def with_result(self, **result: Any) -> Stamp:
        """The same stamp with numbers and notes about the result added."""
        return self.model_copy(update={"result": {**self.result, **result}})

    def just_made(self) -> Stamp:
        """The same stamp, saying that this run made the output."""
        return self.model_copy(update={"made_now": True})

    def on_table(self, table: pa.Table) -> pa.Table:
        """The table with this stamp in its schema metadata."""
        return table.replace_schema_metadata({KEY: self.model_dump_json()})

    def in_json(self, content: dict[str, Any]) -> dict[str, Any]:
        """The JSON object with this stamp under its key."""
        return {**content, KEY: self.model_dump(mode="json")}

    def comment(self) -> bytes:
        """The short form that fits into a JPEG comment."""
        short = {"stage": self.stage, "fingerprint": self.fingerprint, "untrained": self.untrained}
        return json.dumps({KEY: short}).encode()


def read_stamp(path: Path) -> Stamp | None:
    """Read the stamp of a parquet or JSON file.

    Args:
        path: The file.

    Returns:
        The stamp; None if the file is not there, can't be read, or is not one of ours.
    """
    try:
        if path.suffix == ".parquet":
            metadata = pq.read_schema(path).metadata or {}
            text = metadata.get(KEY.encode())
            return None if text is None else Stamp.model_validate_json(text)
        return Stamp.model_validate(read_json(path)[KEY])
    except (OSError, ValueError, KeyError, TypeError, ValidationError, pa.ArrowException):
        return None


def read_comment(path: Path) -> str | None:
    """The fingerprint in a JPEG's comment, or None if it is not one of ours."""
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            return str(json.loads(image.info["comment"])[KEY]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
