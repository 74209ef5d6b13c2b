"""Turning results into what the web UI shows."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pyarrow as pa

from histoencoder_core.pictures import small_jpeg
from histoencoder_core.store import SlideFolder, Stamp

if TYPE_CHECKING:
    from histoencoder_core.report.figure import Figure

PICTURE_PX = 400
"""Pictures live in the event log, so they are small; the full ones are in the store."""

FIGURE_PX = 1000
"""Figures hold text, which must stay readable."""


def result_metadata(folder: SlideFolder, stamp: Stamp, *pictures: str) -> dict[str, Any]:
    """What a person wants to know of one slide's output.

    Args:
        folder: The slide's folder.
        stamp: Of the output.
        pictures: Names of pictures in the folder.

    Returns:
        Metadata: plain numbers are drawn over partitions and time by the UI.
    """
    shown: dict[str, Any] = {
        name: value
        for name, value in stamp.result.items()
        if value is not None and isinstance(value, (bool, int, float, str))
    }
    shown["fingerprint"] = stamp.fingerprint[:16]
    shown["recomputed"] = stamp.made_now
    if stamp.untrained:
        shown["untrained"] = dg.MetadataValue.md(
            "**Untrained encoder: these results mean nothing.**"
        )
    for name in pictures:
        picture = picture_metadata(folder, name)
        if picture is not None:
            shown[name.removesuffix(".jpeg")] = picture
    return shown


def picture_metadata(folder: SlideFolder, name: str) -> dg.MarkdownMetadataValue | None:
    """A picture of the slide's folder, small, as markdown; None if there is none."""
    return _picture(folder.file(name), PICTURE_PX, folder.slide_id)


def figure_metadata(figure: "Figure") -> dict[str, Any]:
    """A figure with what it says, or why there is none."""
    if figure.png is None or figure.svg is None:
        return {"missing": figure.missing}
    return {
        "figure": _picture(figure.png, FIGURE_PX, figure.title),
        "caption": figure.caption,
        "png": dg.MetadataValue.path(str(figure.png.resolve())),
        "svg": dg.MetadataValue.path(str(figure.svg.resolve())),
        "untrained": figure.untrained,
        "recomputed": figure.made_now,
        **{name: value for name, value in figure.numbers.items() if value is not None},
    }


def _picture(path: Path, longest: int, alt: str) -> dg.MarkdownMetadataValue | None:
    jpeg = small_jpeg(path, longest)
    if jpeg is None:
        return None
    data = base64.b64encode(jpeg).decode()
    return dg.MetadataValue.md(f"![{alt}](data:image/jpeg;base64,{data})")


def table_metadata(table: pa.Table, *, rows: int = 200) -> dg.TableMetadataValue:
    """The first rows of a table."""
    types = {"int": pa.types.is_integer, "float": pa.types.is_floating, "bool": pa.types.is_boolean}
    columns = [
        dg.TableColumn(
            field.name,
            next((name for name, matches in types.items() if matches(field.type)), "string"),
        )
        for field in table.schema
    ]
    records = [dg.TableRecord(row) for row in table.slice(0, rows).to_pylist()]
    return dg.MetadataValue.table(records, schema=dg.TableSchema(columns))
