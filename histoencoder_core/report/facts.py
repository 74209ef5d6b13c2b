"""What every figure and the page need to know of the cohort, from the catalog."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from histoencoder_core.clusters.assign import PICTURE_K
from histoencoder_core.cohort import run_sql
from histoencoder_core.errors import SettingsError
from histoencoder_core.store import Store

PURE = 0.9
"""The purity that HistoEncoder counts a cluster as pure from."""

NO_CLUSTERS = "No slide is assigned to clusters yet. Run `histoencoder cluster`."
NO_LABELS = (
    "No tile has both a label and a cluster, so nothing can be said about labels. Annotate some "
    "slides and run `histoencoder label`."
)


@dataclass(frozen=True)
class Facts:
    """The cohort in short.

    Attributes:
        ks: Numbers of clusters of the current model, rising; empty if no slide is assigned.
        model: Version of the current cluster model.
        encoder: Name of the encoder behind it.
        untrained: Whether that encoder is untrained.
        slides: Number of slides that are assigned with the current model.
        tiles: Number of their tiles.
        labelled_tiles: How many of these tiles have a label.
        states: Number of slides by the state of their clusters.
    """

    ks: tuple[int, ...]
    model: str | None
    encoder: str | None
    untrained: bool
    slides: int
    tiles: int
    labelled_tiles: int
    states: dict[str, int]

    def k(self, asked: int | None, *, readable: bool) -> int:
        """The number of clusters that a figure shows.

        Args:
            asked: What the user asks for, if anything.
            readable: Choose as many clusters as a person can tell apart, rather than all there are.

        Raises:
            SettingsError: The model has no such number of clusters.
        """
        if asked is None:
            few = [k for k in self.ks if k <= PICTURE_K] or [min(self.ks)]
            return max(few if readable else self.ks)
        if asked not in self.ks:
            known = ", ".join(map(str, self.ks))
            raise SettingsError(
                f"Cluster model {self.model} has no {asked} clusters, but {known}. Ask for one of "
                f"these, or fit a new model with `histoencoder cluster --refit -n {asked}`."
            )
        return asked

    def source(self, k: int) -> str:
        """What a figure was made from, in a line."""
        return (
            f"Cluster model {self.model}, K = {k}  ·  {self.encoder}  ·  "
            f"{counted(self.slides, 'slide')}, {counted(self.tiles, 'tile')}"
        )

    @property
    def left_out(self) -> str:
        """Which slides are not counted, in a sentence; empty if all are."""
        missing = {s: n for s, n in self.states.items() if s in {"failed", "stale", "missing"}}
        if not missing:
            return ""
        told = ", ".join(f"{number} {_WORDS[state]}" for state, number in sorted(missing.items()))
        count = sum(missing.values())
        return f"Not counted: {counted(count, 'slide')} without current clusters ({told})."


_WORDS = {
    "failed": "failed",
    "stale": "made from something that has changed since",
    "missing": "not done yet",
}


def read_facts(store: Store) -> Facts:
    """Read what the catalog says of the cohort.

    Raises:
        StoreError: There is no catalog yet.
    """
    counts = rows_of(
        store,
        "SELECT k, sum(tiles)::BIGINT AS tiles, sum(labelled_tiles)::BIGINT AS labelled_tiles "
        "FROM cluster_purity GROUP BY k ORDER BY k",
    )
    model = next(iter(rows_of(store, "FROM model")), {})
    states = rows_of(store, "SELECT state FROM completeness WHERE stage = 'clusters'")
    largest = counts[-1] if counts else {"tiles": 0, "labelled_tiles": 0}
    [assigned] = rows_of(store, "SELECT count(DISTINCT slide) AS slides FROM cluster_counts")
    return Facts(
        ks=tuple(row["k"] for row in counts),
        model=model.get("version"),
        encoder=model.get("encoder"),
        untrained=bool(model.get("untrained")),
        slides=assigned["slides"],
        tiles=largest["tiles"],
        labelled_tiles=largest["labelled_tiles"],
        states=dict(Counter(row["state"] for row in states)),
    )


def rows_of(store: Store, query: str) -> list[dict[str, Any]]:
    """The rows that the catalog answers."""
    rows: list[dict[str, Any]] = run_sql(store, query).to_pylist()
    return rows


def percent(share: float | None, digits: int = 0) -> str:
    r"""A share in words, which do not come apart at the end of a line.

    Example:
        >>> percent(0.518), percent(0.0004), percent(0.9996), percent(None)
        ('52\xa0%', '<\xa01\xa0%', '>\xa099\xa0%', '–')
    """
    if share is None:
        return "–"
    least = 10.0**-digits / 100
    share = round(share, 12)  # what rounding leaves of 1 is 1
    if 0 < share < least:
        return f"<\u00a0{100 * least:.{digits}f}\u00a0%"
    if 1 - least < share < 1:
        return f">\u00a0{100 * (1 - least):.{digits}f}\u00a0%"
    return f"{100 * share:.{digits}f}\u00a0%"


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "slide"), counted(3800000, "tile")
        ('1 slide', '3,800,000 tiles')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
