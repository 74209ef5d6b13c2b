"""Figures and the report: their numbers, their colours, and when they are made anew."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cohorts import Truth, copy_of, truth_of
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.spatial.distance import cdist
from test_cli import program  # noqa: F401 - a fixture
from test_clusters import cluster, write_cohort, write_labels

from histoencoder_core.annotate import ensure_evaluation
from histoencoder_core.clusters import assign_slide
from histoencoder_core.cohort import publish_catalog, run_sql
from histoencoder_core.colours import N_COLOURS, cluster_colour
from histoencoder_core.errors import SettingsError, StoreError
from histoencoder_core.report import FIGURES
from histoencoder_core.report import figure as saving
from histoencoder_core.report import montages as montages_module
from histoencoder_core.report.composition import by_similarity, composition
from histoencoder_core.report.draw import DRAW, draw_figures, write_report
from histoencoder_core.report.facts import read_facts
from histoencoder_core.report.figure import Figure
from histoencoder_core.report.heat_map import heat_map, read_shares
from histoencoder_core.report.markup import html_of, table
from histoencoder_core.report.page import write_page
from histoencoder_core.report.purity_curve import purity_curve
from histoencoder_core.report.sections import suspicious_clusters
from histoencoder_core.report.umap_map import COORDINATES, neighbours_agree, umap_by_slide
from histoencoder_core.settings import AnnotationSettings
from histoencoder_core.store import Store

NASTY = '<b>& "it\'s" $x_1$'


class Drawn:
    """A cohort with its figures, and the drawings they were saved from, by name."""

    def __init__(
        self, store: Store, figures: dict[str, Figure], drawings: dict[str, Drawing]
    ) -> None:
        self.store, self.figures, self.drawings = store, figures, drawings


@pytest.fixture(scope="module")
def drawn(cohort_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    with pytest.MonkeyPatch.context() as patch:
        drawings = capture(patch)
        store = copy_of(cohort_store, tmp_path_factory.mktemp("drawn") / "store")
        figures = draw_figures(store)
    return Drawn(store, {figure.name: figure for figure in figures}, drawings)


def capture(patch: pytest.MonkeyPatch) -> dict[str, Drawing]:
    """Drawings by name, from now on."""
    drawings: dict[str, Drawing] = {}
    write = saving._write

    def keep(svg: Path, png: Path, stamp: Any, make: Callable[[], Drawing]) -> None:
        def made() -> Drawing:
            drawings[png.stem] = make()
            return drawings[png.stem]

        write(svg, png, stamp, made)

    patch.setattr(saving, "_write", keep)
    return drawings


@pytest.fixture(scope="module")
def truth(cohort_store: Store) -> Truth:
    return truth_of(cohort_store)


def texts(drawing: Drawing) -> list[str]:
    return [text.get_text() for text in drawing.findobj(lambda a: hasattr(a, "get_text"))]


# Numbers -----------------------------------------------------------------------------------------


def test_purity_curve_prints_the_catalogs_numbers(drawn: Drawn, truth: Truth) -> None:
    numbers = drawn.figures["purity_curve_k16"].numbers
    [at] = run_sql(drawn.store, "FROM coverage_at(16, 0.9)").to_pylist()
    null = {r["scheme"]: r for r in run_sql(drawn.store, "FROM coverage_null(16, 0.9)").to_pylist()}
    assert numbers["coverage_share"] == at["coverage"]
    assert (numbers["coverage_low"], numbers["coverage_high"]) == (at["low"], at["high"])
    assert numbers["coverage_p_value_within"] == null["within_slides"]["p_value"]
    # By hand from the slides' own files.
    _, clusters, labels = truth.labelled(16)
    pure = dict.fromkeys(set(labels), 0)
    for number in set(clusters):
        names, counts = np.unique(labels[clusters == number], return_counts=True)
        if counts.max() / counts.sum() >= 0.9:
            pure[names[counts.argmax()]] += counts.sum()
    shares = {k.removeprefix("share "): v for k, v in numbers.items() if k.startswith("share ")}
    assert shares == {label: pytest.approx(pure[label] / len(labels)) for label in shares}
    assert sum(shares.values()) == pytest.approx(sum(pure.values()) / len(labels))
    assert numbers["coverage_share"] == pytest.approx(sum(shares.values()))
    printed = texts(drawn.drawings["purity_curve_k16"])
    assert f"{100 * at['coverage']:.1f}\u00a0%" in printed


def test_curves_are_steps_that_add_up_to_all_labelled_tiles(drawn: Drawn) -> None:
    curves = drawn.drawings["purity_curve_k16"].axes[0]
    *by_label, all_clusters = [
        patch.get_data() for patch in curves.patches if hasattr(patch, "get_data")
    ]
    assert all_clusters.edges[[0, -1]].tolist() == pytest.approx([0, 1])
    assert (np.diff(all_clusters.values) <= 0).all()
    assert sum(curve.edges[-1] for curve in by_label) == pytest.approx(1)
    tables = run_sql(
        drawn.store, "FROM cluster_purity(16) WHERE labelled_tiles > 0 ORDER BY purity DESC"
    )
    assert all_clusters.values == pytest.approx(tables.column("purity").to_pylist())


def test_heat_map_holds_each_clusters_shares(drawn: Drawn, truth: Truth) -> None:
    shares = read_shares(drawn.store, 16)
    _, clusters, labels = truth.labelled(16)
    assert set(shares) == set(clusters.tolist())
    for number, of_cluster in shares.items():
        own = labels[clusters == number]
        assert of_cluster == {n: pytest.approx((own == n).mean()) for n in np.unique(own)}
    mesh = drawn.drawings["heat_map_k16"].axes[1].collections[0]
    assert np.allclose(mesh.get_array().sum(axis=0), 1)  # a column adds up to 100 %


def test_composition_bars_are_the_slides_shares(drawn: Drawn, truth: Truth) -> None:
    axes = drawn.drawings["composition_k16"].axes[0]
    slides = [label.get_text() for label in axes.get_xticklabels()]
    assert sorted(slides) == sorted(set(truth.slides))
    for bars in axes.containers:
        cluster = next(c for c in range(16) if rgb(bars[0].get_facecolor()) == cluster_colour(c))
        for slide, bar in zip(slides, bars, strict=True):
            share = (truth.clusters[16][truth.slides == slide] == cluster).mean()
            assert bar.get_height() == pytest.approx(share)


def test_slides_that_are_alike_stand_side_by_side() -> None:
    shares = np.random.default_rng(3).dirichlet([0.4] * 5, 7)
    steps = cdist(np.sqrt(shares), np.sqrt(shares))

    def length(order: tuple[int, ...] | list[int]) -> float:
        return sum(steps[a, b] for a, b in itertools.pairwise(order))

    lengths = sorted(map(length, itertools.permutations(range(7))))
    # The tree allows 2^6 of the 5040 orders; the best of these is among the best of all.
    assert length(by_similarity(shares)) <= lengths[len(lengths) // 50]


def test_neighbours_agree_as_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    places = rng.normal(size=(60, 2)).astype(np.float32)
    kinds = [None if i % 7 == 0 else "ab"[int(places[i, 0] > 0)] for i in range(60)]
    known = [i for i in range(60) if kinds[i] is not None]
    agree, chance = [], []
    for i in known:
        others = [j for j in known if j != i]
        others.sort(key=lambda j: float(np.hypot(*(places[i] - places[j]))))
        agree += [kinds[j] == kinds[i] for j in others[:15]]
        chance += [kinds[j] == kinds[i] for j in others]
    same, mixed = neighbours_agree(places, kinds)
    assert (same, mixed) == (pytest.approx(np.mean(agree)), pytest.approx(np.mean(chance)))


# Colours -----------------------------------------------------------------------------------------


def rgb(colour: Any) -> tuple[int, ...]:
    return tuple(round(255 * float(value)) for value in colour[:3])


def numbered(axes: Axes) -> Iterator[tuple[int, Rectangle]]:
    """Each number that stands in a coloured rectangle, with the rectangle."""
    boxes = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_fill()]
    for text in axes.texts:
        if text.get_text().isdigit():
            x, y = text.get_position()
            for box in boxes:
                (left, top), width, height = box.get_xy(), box.get_width(), box.get_height()
                if left <= x <= left + width and top <= y <= top + height and width:
                    yield int(text.get_text()), box


@pytest.mark.parametrize(
    "name",
    ["heat_map_k16", "montages_k16", "overlays_k16", "composition_k16", "umap_by_cluster_k16"],
)
def test_a_cluster_has_its_colour_in_every_figure(drawn: Drawn, name: str) -> None:
    found = [pair for axes in drawn.drawings[name].axes for pair in numbered(axes)]
    assert {number for number, _ in found} == set(range(16))
    assert all(rgb(box.get_facecolor()) == cluster_colour(number) for number, box in found)


def test_points_on_the_map_have_their_clusters_colour(drawn: Drawn, truth: Truth) -> None:
    plane = drawn.drawings["umap_by_cluster_k16"].axes[0]
    points = [c for c in plane.collections if isinstance(c, PathCollection)][-1]
    places = {}
    for row in pq.read_table(drawn.store.figures / COORDINATES).to_pylist():
        places[row["umap_1"], row["umap_2"]] = row["slide"], row["tile"]
    clusters = run_sql(drawn.store, "SELECT slide, tile, cluster FROM clusters WHERE k = 16")
    known = {(r["slide"], r["tile"]): r["cluster"] for r in clusters.to_pylist()}
    offsets = points.get_offsets().data.astype(np.float32).tolist()
    assert len(offsets) == len(truth.slides)
    for offset, colour in zip(offsets, points.get_facecolors(), strict=True):
        assert rgb(colour) == cluster_colour(known[places[tuple(offset)]])


def test_colours_are_told_apart_by_colour_blind_eyes() -> None:
    # Machado, Oliveira and Fernandes (2009), for all three kinds of cones and without one.
    eyes = {
        "normal": np.eye(3),
        "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
        "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    }  # fmt: skip
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    colours = np.array([cluster_colour(i) for i in range(N_COLOURS)]) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    for seen in eyes.values():
        relative = np.clip(linear @ np.array(seen).T, 0, 1) @ xyz.T / xyz.sum(axis=1)
        f = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
        lab = np.stack(
            [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
        )
        apart = cdist(lab, lab)[np.triu_indices(N_COLOURS, 1)]
        assert apart.min() > 12


# Files -------------------------------------------------------------------------------------------


def test_every_figure_is_stamped_and_says_what_it_is(drawn: Drawn) -> None:
    assert list(DRAW) == list(FIGURES)
    assert [figure.missing for figure in drawn.figures.values()] == [None] * len(FIGURES)
    for name, figure in drawn.figures.items():
        assert figure.png is not None
        assert figure.svg is not None
        with Image.open(figure.png) as image:
            stamp = json.loads(image.text["histoencoder"])["histoencoder"]
        assert stamp == {"stage": "figure", "fingerprint": figure.fingerprint, "untrained": True}
        assert f'"fingerprint": "{figure.fingerprint}"' in figure.svg.read_text("utf-8")
        assert re.search(r"<dc:date>", figure.svg.read_text("utf-8")) is None
        # The fixture's encoder is untrained.
        assert {"UNTRAINED ENCODER – means nothing", "UNTRAINED"} <= {*texts(drawn.drawings[name])}
        assert min(len(figure.caption), len(figure.alt)) > 60


def test_the_same_inputs_give_the_same_bytes(
    drawn: Drawn, cohort_store: Store, tmp_path: Path
) -> None:
    again = copy_of(cohort_store, tmp_path / "store")
    for figure in draw_figures(again):
        first = drawn.figures[figure.name]
        assert figure.fingerprint == first.fingerprint
        for one, other in ((figure.png, first.png), (figure.svg, first.svg)):
            assert one is not None
            assert other is not None
            assert one.read_bytes() == other.read_bytes()
    paths = [store.figures / COORDINATES for store in (again, drawn.store)]
    assert pq.read_table(paths[0]).equals(pq.read_table(paths[1]))


def test_only_what_has_changed_is_made_anew(drawn: Drawn, tmp_path: Path) -> None:
    store = copy_of(drawn.store, tmp_path / "store")
    assert not any(figure.made_now for figure in draw_figures(store))
    before = (store.figures / COORDINATES).stat().st_mtime_ns
    labelled = next(s for s in store.slide_ids() if store.slide(s).record("labels").exists())
    store.slide(labelled).record("labels").unlink()
    publish_catalog(store)
    made = {figure.name for figure in draw_figures(store) if figure.made_now}
    assert {"purity_curve_k16", "heat_map_k16", "umap_by_label"} <= made
    assert "umap_by_slide" not in made
    assert (store.figures / COORDINATES).stat().st_mtime_ns == before
    assert not any(figure.made_now for figure in draw_figures(store))


def test_a_foreign_file_is_left_alone(drawn: Drawn, tmp_path: Path) -> None:
    store = copy_of(drawn.store, tmp_path / "store")
    mine = store.figures / "purity_curve_k16.png"
    Image.new("RGB", (4, 4)).save(mine)
    kept = mine.read_bytes()
    with pytest.raises(StoreError, match="not written by this program"):
        purity_curve(store)
    assert mine.read_bytes() == kept
    store.report_path.write_text("<html>my own notes</html>")
    mine.unlink()
    with pytest.raises(StoreError, match="report can't be saved"):
        write_report(store)


def test_k_is_the_largest_for_purity_and_one_people_can_read_for_pictures(drawn: Drawn) -> None:
    facts = read_facts(drawn.store)
    assert facts.k(None, readable=False) == facts.k(None, readable=True) == 16
    larger = type(facts)(**{**vars(facts), "ks": (8, 24, 32, 128)})
    assert (larger.k(None, readable=False), larger.k(None, readable=True)) == (128, 24)
    assert type(facts)(**{**vars(facts), "ks": (64, 128)}).k(None, readable=True) == 64
    with pytest.raises(SettingsError, match=r"no 5 clusters, but 4, 8, 16.*--refit -n 5"):
        heat_map(drawn.store, 5)


# Other cohorts -----------------------------------------------------------------------------------


def toy(store: Store, *, slides: int = 4, tiles: int = 40, labels: bool = True) -> Store:
    """Blobs on slides without pictures, with a label that HTML and mathtext would trip over."""
    truths = np.split(
        write_cohort(store, slides, 4, tiles),
        np.cumsum([tiles + 10 * i for i in range(slides - 1)]),
    )
    model = cluster(store, n_clusters=(2, 4))
    for i, truth in enumerate(truths):
        assign_slide(store.slide(f"slide-{i}"), model)
        if labels:
            write_labels(store, f"slide-{i}", [NASTY if t == 0 else f"class {t}" for t in truth])
    publish_catalog(store)
    return store


def test_a_cohort_without_labels_or_pictures_has_what_it_can_have(store: Store) -> None:
    toy(store, labels=False)
    figures = {figure.name: figure for figure in draw_figures(store)}
    for name in ("purity_curve_k4", "heat_map_k4", "umap_by_label"):
        assert figures[name].png is None
        assert "histoencoder label" in (figures[name].missing or "")
    assert "can be read" in (figures["montages_k4"].missing or "")
    for name in ("composition_k4", "umap_by_cluster_k4", "umap_by_slide", "overlays_k4"):
        assert figures[name].png is not None
    page = parsed(write_report(store))
    assert "No tile with a cluster has a label" in page.text


def test_too_few_tiles_make_no_map(store: Store) -> None:
    toy(store, slides=2, tiles=10)
    assert umap_by_slide(store).missing == "There are only 30 tiles; a map needs 50."
    assert not (store.figures / COORDINATES).exists()


def test_a_cohort_without_clusters_has_a_page_that_says_so(store: Store) -> None:
    write_cohort(store, 2, 3, 20)
    publish_catalog(store)
    assert all("histoencoder cluster" in (f.missing or "") for f in draw_figures(store))
    assert "No slide is assigned to clusters yet" in parsed(write_report(store)).text


def test_slides_that_are_not_counted_are_told(store: Store) -> None:
    toy(store)
    store.slide("slide-1").record_failure("clusters", StoreError("the disk is <full>"))
    publish_catalog(store)
    told = "Not counted: 1 slide without current clusters (1 failed)."
    assert told in composition(store).caption
    page = parsed(write_report(store))
    assert told in page.text
    assert "the disk is <full>" in page.text


def test_many_slides_are_sampled_and_more_clusters_than_colours_are_told_apart(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cohort(store, 62, 4, 12)
    model = cluster(store, n_clusters=(40,))
    for slide in store.slide_ids():
        assign_slide(store.slide(slide), model)
    publish_catalog(store)
    drawings = capture(monkeypatch)
    figure = composition(store)
    assert (figure.numbers["slides"], figure.numbers["drawn"]) == (62, 60)
    assert "60 of 62 slides" in figure.caption
    looks: dict[Any, int] = {}
    for number, box in numbered(drawings["composition_k40"].axes[1]):
        assert looks.setdefault((rgb(box.get_facecolor()), box.get_hatch()), number) == number
    assert len(looks) == 40


def test_of_many_clusters_the_largest_are_shown(
    drawn: Drawn, truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(montages_module, "MOST_CLUSTERS", 5)
    drawings = capture(monkeypatch)
    figure = montages_module.montages(copy_of(drawn.store, tmp_path / "store"))
    assert "Shown are the 5 clusters of 16 that have the most tiles." in figure.caption
    shown = [number for number, _ in numbered(drawings[figure.name].axes[0])]
    sizes = np.bincount(truth.clusters[16], minlength=16)
    assert sizes[shown].sum() == np.sort(sizes)[-5:].sum()


# The page ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would fetch, run and show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._silent = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def parsed(path: Path) -> Page:
    return Page(path.read_text("utf-8"))


def test_the_page_needs_nothing_but_itself(drawn: Drawn) -> None:
    html = write_report(drawn.store).read_text("utf-8")
    page = Page(html)
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        assert not any(name.startswith("on") for name in attrs)
        if "src" in attrs:
            assert (attrs["src"] or "").startswith(
                ("data:image/svg+xml;base64,", "data:image/jpeg;base64,")
            )
            assert attrs.get("alt")
        if "href" in attrs:
            assert (attrs["href"] or "#")[1:] in anchors
    assert "url(" not in html
    assert sum(tag == "img" for tag, _ in page.tags) == len(DRAW)
    assert "UNTRAINED ENCODER – means nothing" in page.text
    # What an embedded drawing refers to lies within it.
    for figure in drawn.figures.values():
        assert figure.svg is not None
        links = re.findall(r'(?:xlink:)?href="([^"]{0,20})', figure.svg.read_text("utf-8"))
        assert all(link.startswith(("#", "data:")) for link in links)


def test_the_page_tells_the_catalogs_numbers(drawn: Drawn) -> None:
    page = parsed(write_report(drawn.store))
    [at] = run_sql(drawn.store, "FROM coverage_at(16, 0.9)").to_pylist()
    assert f"{100 * at['coverage']:.0f} % of labelled tiles lie in clusters" in page.text
    [agreement] = run_sql(drawn.store, "FROM agreement(16)").to_pylist()
    assert f"{agreement['normalised_mutual_information']:.2f} agreement" in page.text
    rows = run_sql(drawn.store, "FROM cluster_purity(16)").to_pylist()
    chips = [attrs for tag, attrs in page.tags if tag == "span" and attrs.get("class") == "chip"]
    assert len(chips) >= len(rows) == 16
    [model] = run_sql(drawn.store, "FROM model").to_pylist()
    assert model["version"] in page.text


def test_the_page_tells_how_right_annotation_is(cohort_store: Store, tmp_path: Path) -> None:
    store = copy_of(cohort_store, tmp_path / "store")
    measured, _ = ensure_evaluation(store, AnnotationSettings())
    path = write_page(store, [])
    accuracy = f"{100 * measured['accuracy']:.1f} %"
    assert f"Of these, right {accuracy}" in parsed(path).text
    assert all(name in parsed(path).text for name in measured["classes"])


def test_clusters_of_one_slide_or_scanner_are_told(drawn: Drawn, truth: Truth) -> None:
    facts = read_facts(drawn.store)
    told = {row["cluster"]: row["why"] for row in suspicious_clusters(drawn.store, facts, 16)}
    scanner = {
        row["slide"]: row["scanner"]
        for row in run_sql(drawn.store, "SELECT slide, scanner FROM slides").to_pylist()
    }
    scanners = np.array([scanner[slide] for slide in truth.slides])
    assert told
    for cluster_id in range(16):
        own = truth.clusters[16] == cluster_id
        _, tiles = np.unique(truth.slides[own], return_counts=True)
        names, of_scanner = np.unique(scanners[own], return_counts=True)
        of_all = (scanners == names[of_scanner.argmax()]).mean()
        one_slide = tiles.max() / own.sum() > 0.5
        one_scanner = of_scanner.max() / own.sum() > 0.9 and of_all <= 0.8
        enough = own.sum() >= 20
        assert ("on slide" in told.get(cluster_id, "")) == (one_slide and enough)
        assert ("from scanner" in told.get(cluster_id, "")) == (one_scanner and enough)


def test_an_unchanged_page_is_not_written_again(drawn: Drawn) -> None:
    first = write_report(drawn.store).stat().st_mtime_ns
    assert write_report(drawn.store).stat().st_mtime_ns == first


def test_labels_are_text_wherever_they_come_from(store: Store) -> None:
    toy(store)
    path = write_report(store)
    html = path.read_text("utf-8")
    assert "<b>& " not in html
    assert NASTY in parsed(path).text
    assert html_of(NASTY) in html
    assert NASTY not in table([NASTY], [[NASTY]], caption=NASTY, most=1)


def test_the_command_draws_and_says_where(
    drawn: Drawn,
    program: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    store = copy_of(drawn.store, tmp_path / "store")
    code, said, _ = program("report", "-i", store.root, "-n", 8)
    assert code == 0
    assert str(store.figures / "purity_curve_k8.png") in said
    assert "umap_by_slide.png, .svg  (up to date)" in said
    assert said.splitlines()[-1] == str(store.report_path)
