"""A figure of the cohort: its look, its stamp, and how it is saved as PNG and SVG.

Figures are drawn with matplotlib's objects, never through pyplot, whose state all threads of a
process share. The same inputs give the same bytes.
"""

from __future__ import annotations

import json
import re
import textwrap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from PIL import Image

from histoencoder_core.colours import N_COLOURS, cluster_colour
from histoencoder_core.errors import StoreError
from histoencoder_core.report import FIGURE_ALGORITHM
from histoencoder_core.store import Stamp, Store, files
from histoencoder_core.store.stamp import KEY

Colour = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""

INK, PALE, LINE = "#1c2330", "#5b6472", "#c9ced6"
UNTRAINED = "UNTRAINED ENCODER – means nothing"

_DPI = 160
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: a figure looks the same anywhere
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a label may hold a dollar sign
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.color": PALE,
    "ytick.color": PALE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "savefig.dpi": _DPI,
    "svg.fonttype": "path",
    "svg.hashsalt": KEY,
}
_DRAWING = threading.Lock()
"""matplotlib's style is one for the whole process."""

_HATCHES = ("", "/////", "-----", "xxxxx")
_PRINT = re.compile(r'"fingerprint": "([0-9a-f]{64})"')


@dataclass(frozen=True)
class Figure:
    """A figure of the cohort, or why there is none.

    Attributes:
        name: What the files are named after, without suffix.
        title: A heading.
        caption: What is seen, and how to read it, for a pathologist; plain text.
        alt: The figure in a sentence, for those who can't see it.
        png: The PNG file; None if there is no figure.
        svg: The SVG file; None if there is no figure.
        numbers: What the figure shows, as plain values.
        missing: Why there is no figure; None if there is one.
        untrained: Whether random weights are behind it.
        photographic: Whether it is made of pictures rather than of lines and areas.
        fingerprint: Of what it was made from; None if there is no figure.
        made_now: Whether it was drawn now, rather than found up to date.
    """

    name: str
    title: str
    caption: str = ""
    alt: str = ""
    png: Path | None = None
    svg: Path | None = None
    numbers: dict[str, float | int | str | None] = field(default_factory=dict)
    missing: str | None = None
    untrained: bool = False
    photographic: bool = False
    fingerprint: str | None = None
    made_now: bool = False


def save_figure(
    store: Store,
    figure: Figure,
    *,
    subtitle: str,
    source: str,
    drawn: Any,
    draw: Callable[[], Drawing],
) -> Figure:
    """Draw a figure into ``_cohort/figures/``, unless it is there and up to date.

    Args:
        store: The store.
        figure: Name, title and texts.
        subtitle: What is seen, in a line or two; drawn under the title.
        source: What it was made from, in a line; drawn at the foot.
        drawn: All that decides the drawing beside the texts, as `json.dumps` takes it.
        draw: Gives the drawing, with a constrained layout. Called only if need be.

    Returns:
        The figure with its files.

    Raises:
        StoreError: Another program's file stands in the way.
    """
    stamp = Stamp.of(
        "figure",
        algorithm=FIGURE_ALGORITHM,
        made_from={
            "name": figure.name, "title": figure.title, "subtitle": subtitle, "source": source,
            "drawn": drawn,
        },
        untrained=figure.untrained,
    )  # fmt: skip
    png, svg = (store.figures / f"{figure.name}.{suffix}" for suffix in ("png", "svg"))
    with files.locked_to_write(png, svg):
        prints = [_print_of(path) for path in (png, svg)]
        made_now = prints != [stamp.fingerprint] * 2
        if made_now:
            for path, print_ in zip((png, svg), prints, strict=True):
                if path.exists() and print_ is None:
                    raise StoreError(
                        f"{path}: was not written by this program, so it is left alone and the "
                        f"figure {figure.name} can't be saved. Move it away."
                    )
            _write(svg, png, stamp, lambda: _dressed(draw(), figure, subtitle, source))
    return replace(figure, png=png, svg=svg, fingerprint=stamp.fingerprint, made_now=made_now)


def colour_of(cluster: int) -> Colour:
    """The colour of a cluster, as matplotlib takes it."""
    return as_colour(cluster_colour(cluster))


def hatch_of(cluster: int) -> str:
    """The hatch of a cluster, which tells it from those that share its colour.

    Example:
        >>> colour_of(3) == colour_of(35), hatch_of(3) == hatch_of(35)
        (True, False)
    """
    return _HATCHES[cluster // N_COLOURS % len(_HATCHES)]


def as_colour(rgb: Sequence[int]) -> Colour:
    """An 8-bit RGB colour as matplotlib takes it."""
    red, green, blue = (value / 255 for value in rgb)
    return red, green, blue


def ink_on(colour: Colour) -> str:
    """The text colour, dark or white, that contrasts more with a background.

    As in WCAG 2.1: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio.

    Example:
        >>> ink_on((1.0, 1.0, 1.0)), ink_on((0.0, 0.0, 0.4))
        ('#1c2330', '#ffffff')
    """
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]
    luminance = sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    # Where both contrasts are equal, given INK's own luminance of 0.017.
    return INK if (luminance + 0.05) ** 2 > 1.05 * 0.067 else "#ffffff"


def short(text: str, width: int) -> str:
    """A text in one line, cut if need be.

    Example:
        >>> short("a very long label", 12)
        'a very long…'
    """
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _write(svg: Path, png: Path, stamp: Stamp, make: Callable[[], Drawing]) -> None:
    comment = stamp.comment().decode()
    with _DRAWING, mpl.rc_context(_STYLE):
        drawing = make()
        FigureCanvasAgg(drawing)
        with files.atomic_path(svg) as path:
            metadata = {"Date": None, "Creator": None, "Description": comment}
            drawing.savefig(path, format="svg", metadata=metadata)
        drawing.set_layout_engine("none")  # all is in its place now
        with files.atomic_path(png) as path:
            drawing.savefig(path, format="png", metadata={"Software": None, KEY: comment})


def _print_of(path: Path) -> str | None:
    """The fingerprint in a PNG or an SVG; None if there is none."""
    try:
        if path.suffix == ".png":
            with Image.open(path, formats=["PNG"]) as image:
                return str(json.loads(image.info[KEY])[KEY]["fingerprint"])
        with path.open(encoding="utf-8") as opened:  # the metadata stand at its head
            found = _PRINT.search(opened.read(8192))
        return found[1] if found else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dressed(drawing: Drawing, figure: Figure, subtitle: str, source: str) -> Drawing:
    """Add a head and a foot, for which the drawing grows."""
    width, height = drawing.get_size_inches()
    lines = textwrap.wrap(subtitle, round(width * 15.5))
    banner = 0.42 if figure.untrained else 0.0
    head, foot = banner + 0.5 + 0.18 * len(lines), 0.32
    total = height + head + foot
    drawing.set_size_inches(width, total)
    engine = drawing.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, foot / total, 1, height / total))
    left = 0.12 / width
    drawing.text(
        left, 1 - (banner + 0.14) / total, figure.title, size=13, weight="bold", va="top"
    )  # fmt: skip
    drawing.text(
        left, 1 - (banner + 0.44) / total, "\n".join(lines), size=9, color=PALE, va="top",
        linespacing=1.35,
    )  # fmt: skip
    drawing.text(left, 0.1 / total, source, size=7, color=PALE, va="bottom")
    if figure.untrained:
        drawing.add_artist(
            Rectangle((0, 1 - banner / total), 1, banner / total, color="#a3161a", zorder=10)
        )
        drawing.text(
            0.5, 1 - banner / 2 / total, UNTRAINED, size=13, weight="bold", color="#ffffff",
            ha="center", va="center", zorder=11,
        )  # fmt: skip
        # The head may be cropped away; this may not.
        drawing.text(
            0.5, 0.45, "UNTRAINED", size=9 * width, weight="bold", color="#a3161a", alpha=0.16,
            rotation=30, ha="center", va="center", zorder=12,
        )  # fmt: skip
    return drawing
