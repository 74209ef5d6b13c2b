"""Taking slides out of what Dagster keeps as JSON, without harming what it reads back.

Names are struck only where nothing but people reads them (messages, errors, metadata), and keys
only where partitions are listed. A slide may be called ``tiles`` or ``1``: assets, steps and
versions of that name stay as they are.
"""

import base64
import binascii
import json
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from histoencoder_dagster.partitions import PARTITION, RANGE_END, RANGE_START

FORGOTTEN = "forgotten"
"""What stands where a name stood."""

_FOR_PEOPLE = frozenset(
    ["message", "user_message", "error", "error_info", "metadata", "metadata_entries",
     "description", "user_failure_data"]
)  # fmt: skip
"""Parts of a record that are only ever shown."""

_OF_PARTITIONS = frozenset(["subset", "__set__", "partition_names", "partition_keys"])
"""What lists of partitions are called."""

_OF_A_TYPE = frozenset(["__class__", "__enum__"])
_SUBSET = "DefaultPartitionsSubset"
_RANGES = "KeyRangesPartitionsSubset"
_RANGE = "PartitionKeyRange"
_PICTURE = re.compile(r"!\[[^\]]*\]\(data:image/[^)]*\)")
_AUTOMATION_CURSOR = re.compile(r"0[A-Za-z0-9+/]+={0,2}")
_QUOTED_CURSOR = re.compile(rf'(?<="){_AUTOMATION_CURSOR.pattern}')


class Redaction:
    """Strikes some slides out.

    Attributes:
        slides: Their ids.
        names: Ids, and what else the slides are called: paths and names of their files.
        order: All partitions in Dagster's order, the slides among them: ranges of partitions are
            kept as their ends.
    """

    def __init__(
        self, slides: Collection[str], names: Collection[str] = (), order: Sequence[str] = ()
    ) -> None:
        self.slides = frozenset(slides)
        self.order = list(order)
        self.names = sorted({*slides, *names}, key=len, reverse=True)
        told = "|".join(map(re.escape, self.names))
        self._pattern = re.compile(rf"(?<![A-Za-z0-9._-])(?:{told})(?![A-Za-z0-9_-])")

    def mentioned_in(self, text: str) -> bool:
        """Whether a text holds one of the names, also inside of an automation's cursor."""
        if self._pattern.search(text):
            return True
        return any(self._pattern.search(_unpacked(m[0])) for m in _QUOTED_CURSOR.finditer(text))

    def lists(self, text: str) -> bool:
        r"""Whether JSON lists one of the slides as a partition, also in JSON inside of it.

        Example:
            >>> told = '{"asset": ["tiles"], "done": "{\\"subset\\": [\\"A\\"]}"}'
            >>> Redaction(["A"]).lists(told), Redaction(["tiles"]).lists(told)
            (True, False)
        """
        try:
            return self._listed(json.loads(text))
        except ValueError:
            return False

    def _listed(self, value: Any, key: str = "") -> bool:
        if isinstance(value, dict):
            if value.get("__class__") == _RANGE:
                return not self.slides.isdisjoint(self._between(value))
            return any(self._listed(part, name) for name, part in value.items())
        if isinstance(value, list):
            own = key in _OF_PARTITIONS and any(
                isinstance(part, str) and part in self.slides for part in value
            )
            return own or any(self._listed(part) for part in value if not isinstance(part, str))
        return isinstance(value, str) and value.startswith(("{", "[")) and self.lists(value)

    def prose(self, text: str) -> str:
        """A text for people without the names.

        Example:
            >>> Redaction(["A-1"]).prose("A-1 failed: /scans/A-1.svs: is no slide, A-12 is")
            'forgotten failed: /scans/forgotten.svs: is no slide, A-12 is'
        """
        return self._pattern.sub(FORGOTTEN, text)

    def event(self, text: str, *, pictures: bool = True) -> str:
        """An event's JSON without the slides.

        Args:
            text: The JSON.
            pictures: Whether pictures stay. Those of the cohort may show a slide or its name.
        """
        return _rewritten(text, lambda value: self._record(value, shown=False, pictures=pictures))

    def instigator(self, text: str) -> str:
        """The JSON of a sensor's state whose cursor tells nothing of the slides."""

        def without(state: Any) -> Any:
            data = state.get("job_specific_data")
            if isinstance(data, dict) and isinstance(data.get("cursor"), str):
                data["cursor"] = self.cursor(data["cursor"])
            return state

        return _rewritten(text, without)

    def cursor(self, text: str) -> str:
        """A sensor's cursor without the slides: an automation's, JSON of our own, or a text."""
        if _AUTOMATION_CURSOR.fullmatch(text) and (inside := _unpacked(text)):
            told = self.event(inside)
            if told == inside:
                return text
            return "0" + base64.b64encode(zlib.compress(told.encode())).decode()
        try:
            content = json.loads(text)
        except ValueError:
            return self.prose(text)
        return text if (kept := self._without(content)) == content else json.dumps(kept)

    def tags(self, tags: dict[str, str]) -> dict[str, str]:
        """A run's tags whose range of partitions neither begins nor ends with one of the slides.

        Example:
            >>> Redaction(["a"], order="abc").tags({RANGE_START: "a", RANGE_END: "c"})
            {'dagster/asset_partition_range_start': 'b', 'dagster/asset_partition_range_end': 'c'}
        """
        kept = [key for key in covered(tags, self.order) if key not in self.slides]
        bounds = {RANGE_START: kept[:1], RANGE_END: kept[-1:]}
        return {
            key: next(iter(bounds.get(key, ())), FORGOTTEN)
            if key in {*bounds, PARTITION} and value in self.slides
            else value
            for key, value in tags.items()
        }

    def run(self, text: str) -> str:
        """A run's JSON without the slides."""

        def without(run: Any) -> Any:
            kept = {**run, "tags": self.tags(run.get("tags") or {})}
            if "partitions_subset" in run:
                kept |= self._record(
                    {"partitions_subset": run["partitions_subset"]}, shown=False, pictures=True
                )
            return kept

        return _rewritten(text, without)

    def _record(self, value: Any, *, shown: bool, pictures: bool, key: str = "") -> Any:
        def inside(part: Any, name: str = "") -> Any:
            free = shown or name in _FOR_PEOPLE
            return self._record(part, shown=free, pictures=pictures, key=name)

        if isinstance(value, dict):
            if value.get("__class__") == _SUBSET:
                return self._without(value)
            if value.get("__class__") == _RANGES:
                return {**value, "key_ranges": list(self._ranges(value["key_ranges"]))}
            if key in {"tags", "run_tags"}:
                return self.tags(value)
            kept = {k: v for k, v in value.items() if not (shown and k in self.slides)}
            return {k: v if k in _OF_A_TYPE else inside(v, k) for k, v in kept.items()}
        if isinstance(value, list):
            return [inside(part) for part in value]
        if not isinstance(value, str):
            return value
        if shown:
            return self.prose(value if pictures else _PICTURE.sub("*picture removed*", value))
        return FORGOTTEN if key == "partition" and value in self.slides else value

    def _ranges(self, ranges: list[dict[str, str]]) -> Iterator[dict[str, str]]:
        """Ranges of partitions that neither begin nor end with one of the slides."""
        for range_ in ranges:
            kept = [key for key in self._between(range_) if key not in self.slides]
            if kept:
                yield {**range_, "start": kept[0], "end": kept[-1]}

    def _between(self, range_: dict[str, str]) -> list[str]:
        return covered({RANGE_START: range_["start"], RANGE_END: range_["end"]}, self.order)

    def _without(self, value: Any) -> Any:
        """JSON without the slides among its keys and in its lists."""
        if isinstance(value, dict):
            return {k: self._without(v) for k, v in value.items() if k not in self.slides}
        if isinstance(value, list):
            items = (v for v in value if not (isinstance(v, str) and v in self.slides))
            return [self._without(v) for v in items]
        return value


def covered(tags: dict[str, str], order: Sequence[str]) -> list[str]:
    """The partitions that a run with these tags is of.

    Args:
        tags: The run's.
        order: All partitions in Dagster's order. Of a range whose ends are no longer among them,
            only the ends are known.
    """
    if PARTITION in tags:
        return [tags[PARTITION]]
    ends = [tags[key] for key in (RANGE_START, RANGE_END) if key in tags]
    if len(ends) == 2 and set(ends) <= set(order):
        return list(order[order.index(ends[0]) : order.index(ends[1]) + 1])
    return list(dict.fromkeys(ends))


def _rewritten(text: str, change: Any) -> str:
    """JSON after a change; the very same text if nothing changes."""
    before = json.loads(text)
    after = change(json.loads(text))
    return text if after == before else json.dumps(after)


def _unpacked(cursor: str) -> str:
    """What is inside of an automation's cursor; nothing if it is none."""
    try:
        return zlib.decompress(base64.b64decode(cursor[1:], validate=True)).decode()
    except (binascii.Error, zlib.error, UnicodeDecodeError, ValueError):
        return ""
