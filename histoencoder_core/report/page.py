"""The report: figures, numbers and warnings of a cohort in one page that needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from histoencoder_core.errors import StoreError
from histoencoder_core.fingerprint import fingerprint
from histoencoder_core.report import PAGE_ALGORITHM
from histoencoder_core.report import sections as parts
from histoencoder_core.report.facts import NO_CLUSTERS, Facts, read_facts, rows_of
from histoencoder_core.report.figure import UNTRAINED, Figure
from histoencoder_core.report.markup import bullets, paragraph
from histoencoder_core.report.purity_curve import read_coverage
from histoencoder_core.report.sections import Section
from histoencoder_core.report.style import STYLE
from histoencoder_core.store import Stamp, Store, files
from histoencoder_core.store.stamp import KEY

_JPEG_QUALITY = 85
_PRINT = re.compile(rf'<meta name="{KEY}" content="([0-9a-f]{{64}})">')


def write_page(store: Store, figures: Sequence[Figure], k: int | None = None) -> Path:
    """Write ``_cohort/report.html``, unless it is there and up to date.

    The page fetches nothing: styles are inline, pictures are data URIs, and there are no scripts.
    The same inputs give the same bytes, and so there is no date in it.

    Args:
        store: The store, with a catalog.
        figures: The figures, in the order in which they are shown.
        k: Number of clusters of the numbers and tables; the model's largest if not given.

    Returns:
        The page.

    Raises:
        SettingsError: The model has no such number of clusters.
        StoreError: There is no catalog, or another program's file stands in the way.
    """
    facts = read_facts(store)
    lead, sections = _content(store, facts, figures, k)
    body = _body(store.root.name, facts, lead, sections)
    stamp = Stamp.of(
        "report",
        algorithm=PAGE_ALGORITHM,
        made_from={"content": fingerprint([store.root.name, STYLE, body])},
        untrained=facts.untrained,
    )
    path = store.report_path
    with files.locked_to_write(path):
        print_ = _print_of(path)
        if path.exists() and print_ is None:
            raise StoreError(
                f"{path}: was not written by this program, so it is left alone and the report "
                "can't be saved. Move it away."
            )
        if print_ != stamp.fingerprint:
            with files.atomic_path(path) as temporary:
                temporary.write_text(_page(store.root.name, body, stamp), "utf-8")
    return path


def _content(
    store: Store, facts: Facts, figures: Sequence[Figure], k: int | None
) -> tuple[str, list[Section]]:
    """What stands before the first heading, as HTML, and the sections after it."""
    ending = [parts.completeness(store), parts.made_from(store, facts)]
    if not facts.ks:
        return paragraph(NO_CLUSTERS), ending
    k = facts.k(k, readable=False)
    coverage = read_coverage(store, k) if facts.labelled_tiles else None
    agreement = next(iter(rows_of(store, f"FROM agreement({k})")), None) if coverage else None
    spread, outside = parts.suspicious_clusters(store, facts, k), parts.slides_outside(store, facts)
    lead = parts.headline(facts, coverage, k, agreement)
    told = parts.warnings_of(facts, coverage, spread, outside)
    if told:
        lead += f'<section class="watch"><h2>To bear in mind</h2>{bullets(told)}</section>\n'
    annotation = parts.annotation(store, facts)
    return lead, [
        parts.how_to_read(),
        Section("figures", "Figures", "".join(map(_figure, figures))),
        parts.batch_effects(spread, k),
        parts.outside(outside),
        *([annotation] if annotation is not None else []),
        parts.purity(store, k),
        *ending,
    ]


def _figure(figure: Figure) -> str:
    if figure.png is None or figure.svg is None:
        return (
            f'<h3>{escape(figure.title)}</h3>\n<p class="none">{escape(figure.missing or "")}</p>\n'
        )
    return (
        # Those who see the picture read the heading in it.
        f'<h3 class="unseen">{escape(figure.title)}</h3>\n<figure>'
        f'<img alt="{escape(figure.alt)}" src="{_data_uri(figure)}">\n'
        f"<figcaption>{escape(figure.caption)}<small>Files: figures/{figure.png.name}, "
        f"figures/{figure.svg.name}</small></figcaption></figure>\n"
    )


def _data_uri(figure: Figure) -> str:
    """A figure's picture: lines as they are, photographs as a JPEG, a tenth of the size."""
    assert figure.png is not None
    assert figure.svg is not None
    if figure.photographic:
        buffer = io.BytesIO()
        with Image.open(figure.png, formats=["PNG"]) as image:
            image.convert("RGB").save(
                buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True
            )
        kind, content = "image/jpeg", buffer.getvalue()
    else:
        kind, content = "image/svg+xml", figure.svg.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _body(name: str, facts: Facts, lead: str, sections: Sequence[Section]) -> str:
    banner = f'<div class="banner" role="alert">{escape(UNTRAINED)}</div>\n'
    links = "".join(
        f'<li><a href="#{section.anchor}">{escape(section.heading)}</a></li>'
        for section in sections
    )
    body = "".join(
        f'<section id="{section.anchor}"><h2>{escape(section.heading)}</h2>\n'
        f"{section.body}</section>\n"
        for section in sections
    )
    model = f"Cluster model {facts.model}" if facts.model else "No cluster model"
    encoder = f" on features of {facts.encoder}" if facts.encoder else ""
    return (
        f"{banner if facts.untrained else ''}"
        f'<div class="page">\n<header><p class="kicker">Cohort report</p>\n'
        f"<h1>{escape(name)}</h1>\n"
        f'<p class="lead">{escape(model + encoder)}.</p>\n'
        f'<nav aria-label="Contents"><ol>{links}</ol></nav></header>\n'
        f"<main>\n{lead}{body}</main>\n</div>\n"
    )


def _page(name: str, body: str, stamp: Stamp) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="{KEY}" content="{stamp.fingerprint}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} – cohort report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def _print_of(path: Path) -> str | None:
    """The fingerprint in a page's head; None if it is not there or not ours."""
    try:
        with path.open(encoding="utf-8") as opened:
            found = _PRINT.search(opened.read(4096))
    except (OSError, ValueError):
        return None
    return found[1] if found else None
