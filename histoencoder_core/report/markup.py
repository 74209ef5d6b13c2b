"""Small pieces of HTML, in which all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from matplotlib.colors import to_hex

from histoencoder_core.report.facts import percent
from histoencoder_core.report.figure import colour_of, ink_on


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Cell = str | int | float | Html | None
"""What stands in a table; a float is a share."""


def html_of(value: Cell) -> str:
    r"""A value as HTML.

    Example:
        >>> html_of("<b>&"), html_of(Html("<b>x</b>")), html_of(0.5), html_of(1200), html_of(None)
        ('&lt;b&gt;&amp;', '<b>x</b>', '50\xa0%', '1,200', '–')
    """
    if isinstance(value, Html):
        return value
    if isinstance(value, float):
        return escape(percent(value, 1 if 0 < value < 0.1 else 0))
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else escape(value)


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>\n"


def bullets(texts: Iterable[Cell]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{html_of(text)}</li>\n" for text in texts) + "</ul>\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell]], *, caption: str, most: int) -> str:
    """A table.

    Args:
        heads: Headings of its columns.
        rows: Its rows; numbers are set flush right.
        caption: What it shows.
        most: Rows shown; how many more there are is told.
    """
    all_rows = list(rows)
    shown = all_rows[:most]
    if len(all_rows) > most:
        caption += f" (the first {most} of {len(all_rows)})"
    numeric = [
        all(row[i] is None or isinstance(row[i], (int, float)) for row in shown)
        for i in range(len(heads))
    ]
    classes = [' class="number"' if flag else "" for flag in numeric]
    head = "".join(
        f'<th scope="col"{name}>{escape(text)}</th>'
        for text, name in zip(heads, classes, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{name}>{html_of(cell)}</td>" for cell, name in zip(row, classes, strict=True)
        )
        + "</tr>\n"
        for row in shown
    )
    return (
        f'<div class="table"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def definitions(items: Iterable[tuple[str, Cell]]) -> str:
    """Names and values."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{html_of(value)}</dd>\n" for name, value in items)
    return f"<dl>{rows}</dl>\n"


def chip(cluster: int) -> Html:
    """A cluster's number on its colour."""
    colour = colour_of(cluster)
    style = f"background:{to_hex(colour)};color:{ink_on(colour)}"
    return Html(f'<span class="chip" style="{style}">{int(cluster)}</span>')


def bar(share: float | None) -> Html | None:
    """A share as a bar with its number."""
    if share is None:
        return None
    width = f"width:{100 * share:.1f}%"
    return Html(f'<span class="bar"><i style="{width}"></i></span>{escape(percent(share))}')
