"""What the report says beside its figures: numbers, warnings, tables and what all was made from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from html import escape
from typing import Any

from histoencoder_core import __version__
from histoencoder_core.annotate import read_evaluation
from histoencoder_core.report.facts import PURE, Facts, counted, percent, rows_of
from histoencoder_core.report.markup import (
    Cell,
    bar,
    bullets,
    chip,
    definitions,
    paragraph,
    table,
)
from histoencoder_core.report.purity_curve import Coverage
from histoencoder_core.store import Store

MOST_OF_SLIDE = 0.5
"""A cluster with more of its tiles than this on one slide may show that slide, not a tissue."""

MOST_OF_SITE = 0.9
"""A cluster with more of its tiles than this from one site or scanner may be a batch effect."""

SHARE_OF_ALL = 0.8
"""Unless that site or scanner made more of all tiles than this."""

LEAST_TILES = 20
"""Clusters of fewer tiles lie on few slides as a matter of course."""

LEAST_SLIDES = 4
"""So do the clusters of fewer slides."""

OUTSIDE = 0.1
"""A slide with a larger share of tiles outside of the training distribution is worth a look."""

MOST_ROWS = 200
"""Longer tables are cut, and say so."""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: What links point to.
        heading: Its heading, plain text.
        body: Its HTML.
    """

    anchor: str
    heading: str
    body: str


def headline(
    facts: Facts, coverage: Coverage | None, k: int, agreement: dict[str, Any] | None
) -> str:
    """The numbers that stand first, as HTML."""
    cards: list[tuple[str, str]] = []
    if coverage is not None:
        told = f"of labelled tiles lie in clusters at least {percent(PURE)} pure, at K = {k}"
        cards.append((percent(coverage.share), f"{told}. {coverage.interval}".strip()))
    cards += [
        (f"{facts.slides:,}", "slides with clusters"),
        (f"{facts.tiles:,}", "tiles in clusters"),
        (f"{facts.labelled_tiles:,}", "of them labelled"),
    ]
    if agreement is not None:
        told = (
            "agreement of clusters with labels, as normalised mutual information; adjusted Rand "
            f"index {agreement['adjusted_rand_index']:.2f}"
        )
        cards.append((f"{agreement['normalised_mutual_information']:.2f}", told))
    body = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>\n'
        for value, text in cards
    )
    note = paragraph(coverage.chance) if coverage is not None and coverage.chance else ""
    return f'<div class="cards">{body}</div>\n{note}'


_READING = """
A tile is a small square of a slide. An encoder turned each tile into numbers, and k-means put tiles
with similar numbers into K clusters, without any knowledge of labels or of where on a slide a tile
lies.

A cluster's purity is the share of its labelled tiles that carry its most frequent label. A pure
cluster is a tissue pattern that the encoder tells apart by itself.

Tiles of a slide resemble each other, so that many tiles are not many independent findings.
Intervals by slide, which come from drawing slides anew, take this into account.

Small clusters are pure by chance more often. Compare with shuffled labels, and look at the interval
of each cluster.

Purity is only as good as the labels, and says nothing about tissue that nobody labelled. Nothing in
this report is a diagnosis.
"""


def how_to_read() -> Section:
    """What purity means and what it does not."""
    texts = [" ".join(text.split()) for text in _READING.strip().split("\n\n")]
    return Section("reading", "How to read this report", bullets(texts))


def warnings_of(
    facts: Facts,
    coverage: Coverage | None,
    spread: list[dict[str, Any]],
    outside: list[dict[str, Any]],
) -> list[str]:
    """What a reader should know before looking at any figure, most important first."""
    told = []
    if facts.left_out:
        told.append(facts.left_out)
    if not facts.labelled_tiles:
        told.append("No tile with a cluster has a label, so that nothing is said about purity.")
    elif coverage is not None and coverage.p_value is None:
        told.append(
            "The interval and the comparison with shuffled labels have not been computed for the "
            "data at hand."
        )
    elif coverage is not None and (coverage.p_value or 0) > 0.05:
        told.append("Shuffled labels do about as well: the clusters tell nothing about the labels.")
    elif coverage is not None and (coverage.p_value_within or 0) > 0.05:
        told.append(
            "Labels shuffled within each slide do about as well: the clusters tell slides apart, "
            "which says nothing about the labels of their tiles."
        )
    if spread:
        told.append(
            f"{counted(len(spread), 'cluster')} may show a slide, site or scanner, not a tissue."
        )
    if outside:
        told.append(
            f"{counted(len(outside), 'slide')} may be unlike those the clusters were made from."
        )
    return told


def suspicious_clusters(store: Store, facts: Facts, k: int) -> list[dict[str, Any]]:
    """Clusters that come from few slides, or from one site or scanner more than all tiles do."""
    suspicious = []
    for row in rows_of(store, f"FROM cluster_spread({k})"):
        if row["tiles"] < LEAST_TILES:
            continue
        why = []
        if facts.slides >= LEAST_SLIDES and row["largest_slide_share"] > MOST_OF_SLIDE:
            why.append(f"{percent(row['largest_slide_share'])} on slide {row['largest_slide']}")
        for kind in ("site", "scanner"):
            share, of_all = row[f"largest_{kind}_share"], row[f"{kind}_share_of_all"]
            if share is not None and share > MOST_OF_SITE and of_all <= SHARE_OF_ALL:
                name = row[f"largest_{kind}"]
                why.append(
                    f"{percent(share)} from {kind} {name}, which has {percent(of_all)} of all tiles"
                )
        if why:
            suspicious.append({**row, "why": "; ".join(why)})
    return suspicious


def batch_effects(rows: list[dict[str, Any]], k: int) -> Section:
    """The clusters that may be batch effects."""
    if not rows:
        body = paragraph(
            f"Of the {k} clusters none of at least {LEAST_TILES} tiles has more than "
            f"{percent(MOST_OF_SLIDE)} of them on one slide, or more than {percent(MOST_OF_SITE)} "
            f"from one site or scanner that did not make most of all tiles."
        )
    else:
        body = paragraph(
            "These clusters come mostly from one slide, site or scanner. They may show how a slide "
            "was stained or scanned rather than what it is of; or a tissue that only they have."
        ) + table(
            ["Cluster", "Tiles", "Slides", "Sites", "Scanners", "What stands out"],
            [
                (chip(r["cluster"]), r["tiles"], r["slides"], r["sites"], r["scanners"], r["why"])
                for r in rows
            ],
            caption=f"Clusters at K = {k} that may be batch effects",
            most=MOST_ROWS,
        )
    return Section("batch", "Batch effects", body)


def slides_outside(store: Store, facts: Facts) -> list[dict[str, Any]]:
    """Slides that lie outside of what the cluster model was fitted on, the farthest first."""
    return rows_of(
        store,
        "FROM slide_distance AS d LEFT JOIN slides AS s USING (slide) "
        "SELECT d.slide, d.outside, s.site, s.scanner, s.stain "
        f"WHERE d.k = {max(facts.ks)} AND d.outside > {OUTSIDE} ORDER BY d.outside DESC, d.slide",
    )


def outside(rows: list[dict[str, Any]]) -> Section:
    """Those slides in a table."""
    expected = (
        "A tile is outside if it lies farther from its cluster's centre than 99 % of the tiles "
        "that the clusters were made from, so that 1 % is to be expected."
    )
    if not rows:
        body = paragraph(
            f"No slide has more than {percent(OUTSIDE)} of its tiles outside. {expected}"
        )
    else:
        body = paragraph(
            f"{expected} Another stain, another organ or a damaged scan can be the reason. Look at "
            "these slides before trusting their clusters; `histoencoder cluster --refit` makes "
            "clusters anew with them."
        ) + table(
            ["Slide", "Tiles outside", "Site", "Scanner", "Stain"],
            [(r["slide"], r["outside"], r["site"], r["scanner"], r["stain"]) for r in rows],
            caption="Slides outside of the training distribution",
            most=MOST_ROWS,
        )
    return Section("outside", "Slides unlike the others", body)


def annotation(store: Store, facts: Facts) -> Section | None:
    """How well annotation by cluster works, if that was measured."""
    told = read_evaluation(store)
    if told is None:
        return None
    if told["model"] != facts.model:
        body = paragraph(
            f"It was measured for cluster model {told['model']}, not for the current "
            f"{facts.model}. Run `histoencoder annotate` to measure it again."
        )
    elif not told["measured"]:
        body = paragraph(f"It was not measured. {told['reason']}")
    else:
        body = _accuracy(told)
    return Section("annotation", "Annotation by cluster", body)


def _accuracy(told: dict[str, Any]) -> str:
    split = {
        "slides.csv": "the slides that slides.csv marks as test",
        "patients": "slides of patients held out in turn",
    }.get(told["split_by"], "slides held out in turn")
    measured_on = f"{counted(told['tiles'], 'labelled tile')} of "
    measured_on += f"{counted(told['held_out_slides'], 'slide')}: {split}"
    items: list[tuple[str, Cell]] = [
        ("Tiles that got a label", _with_interval(told, "coverage")),
        ("Of these, right", _with_interval(told, "accuracy")),
        ("Right if all were called by the most frequent label", told["majority_accuracy"]),
        ("Mean F1 over classes", f"{told['macro_f1']:.2f}"),
        ("Measured on", measured_on),
    ]
    classes = [
        (name, row["tiles"], row["precision"], row["recall"], _number(row["f1"]))
        for name, row in told["classes"].items()
    ]
    return (
        paragraph(
            f"Clusters (K = {told['k']}) took the label of the labelled tiles in them, and slides "
            "were annotated by it. Accuracy was measured on slides that took no part in making or "
            "naming the clusters."
        )
        + definitions(items)
        + table(
            ["Class", "Labelled tiles", "Precision", "Recall", "F1"],
            classes,
            caption="By class. Recall counts tiles without an annotation as missed.",
            most=MOST_ROWS,
        )
    )


def _with_interval(told: dict[str, Any], name: str) -> str:
    interval = told[f"{name}_interval"]
    within = f" (95 % interval {_interval(*interval)})" if interval else ""
    return f"{percent(told[name], 1)}{within}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def purity(store: Store, k: int) -> Section:
    """All clusters in a table."""
    spread = {row["cluster"]: row for row in rows_of(store, f"FROM cluster_spread({k})")}
    rows = rows_of(
        store,
        f"FROM cluster_purity({k}) "
        "ORDER BY label NULLS LAST, purity DESC, labelled_tiles DESC, cluster",
    )
    cells: list[tuple[Cell, ...]] = [
        (
            chip(row["cluster"]),
            row["label"],
            bar(row["purity"]),
            _interval(row["purity_low"], row["purity_high"]) if row["labelled_tiles"] else None,
            # Of one slide, whatever is drawn is the same.
            _interval(row["bootstrap_low"], row["bootstrap_high"])
            if row["labelled_slides"] > 1
            else None,
            row["labelled_tiles"],
            row["tiles"],
            row["slides"],
            spread[row["cluster"]]["largest_slide_share"],
        )
        for row in rows
    ]
    note = paragraph(
        "The interval by tile takes tiles for independent (Wilson). The interval by slide comes "
        "from drawing slides anew (bootstrap), and takes more than a few labelled slides to mean "
        f"much. To see a cluster's tiles and slides: histoencoder show cluster {k} ID."
    )
    return Section(
        "purity",
        "All clusters",
        note
        + table(
            [
                "Cluster", "Majority label", "Purity", "95 % by tile", "95 % by slide",
                "Labelled tiles", "Tiles", "Slides", "Largest slide",
            ],
            cells,
            caption=f"Clusters at K = {k}, by majority label, the purest first",
            most=max(MOST_ROWS, k),
        ),
    )  # fmt: skip


def _interval(low: float | None, high: float | None) -> Cell:
    if low is None or high is None:
        return None
    return f"{percent(low)} to {percent(high)}"


def completeness(store: Store) -> Section:
    """What is not done, and why."""
    rows = rows_of(store, "FROM completeness ORDER BY state, slide, stage")
    fine = {"done", "input", "not due"}
    open_ends = [row for row in rows if row["state"] not in fine]
    counts = Counter((row["stage"], row["state"]) for row in rows)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    order = ("slides", "tiles", "features", "clusters", "slide_clusters", "labels", "annotations")
    stages.sort(key=lambda stage: order.index(stage) if stage in order else len(order))
    states = ("done", "input", "empty", "stale", "failed", "missing", "not due")
    body = table(
        ["Stage", *states],
        [(stage, *(counts[stage, state] or None for state in states)) for stage in stages],
        caption="Slides by stage and state",
        most=MOST_ROWS,
    )
    if open_ends:
        body += table(
            ["Slide", "Stage", "State", "Why"],
            [(r["slide"], r["stage"], r["state"], r["reason"]) for r in open_ends],
            caption="What is not done",
            most=MOST_ROWS,
        )
    else:
        body += paragraph("Everything that was asked for is done.")
    return Section("completeness", "What is done and what is not", body)


def made_from(store: Store, facts: Facts) -> Section:
    """What all was made from, and how."""
    models = rows_of(store, "FROM models WHERE current")
    items: list[tuple[str, Cell]] = [("Encoder", facts.encoder)]
    for model in models:
        ks = ", ".join(map(str, model["n_clusters"]))
        items += [
            ("Cluster model", f"{model['version']}, K = {ks}, seed {model['seed']}"),
            (
                "Fitted on",
                f"{counted(model['tiles'], 'tile')} of {counted(model['slides'], 'slide')}",
            ),
        ]
        if model["previous"]:
            items.append(
                ("Cluster numbers follow", f"model {model['previous']}, as far as they can")
            )
    for row in rows_of(store, "FROM statistics"):
        told = f"{row['replicates']} replicates, seed {row['seed']}" if row["replicates"] else None
        items.append(
            ("Bootstrap and permutations", f"{row['state']}" + (f": {told}" if told else ""))
        )
    labels = rows_of(
        store,
        "SELECT label, sum(tiles)::BIGINT AS tiles, count(DISTINCT slide) AS slides "
        "FROM cluster_counts WHERE label IS NOT NULL AND k = (SELECT max(k) FROM cluster_counts) "
        "GROUP BY label ORDER BY tiles DESC, label",
    )
    items.append(("Software", f"histoencoder-platform {__version__}"))
    body = definitions(items)
    if labels:
        body += table(
            ["Label", "Tiles", "Slides"],
            [(row["label"], row["tiles"], row["slides"]) for row in labels],
            caption="Labelled tiles in clusters",
            most=MOST_ROWS,
        )
    return Section("made-from", "What this was made from", body)
