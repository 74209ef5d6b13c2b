"""Describing a slide: ``properties.json`` and ``thumbnail.jpeg``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from histoencoder_core.errors import SlideError
from histoencoder_core.slides.content import Content, signature
from histoencoder_core.slides.find import FoundSlide
from histoencoder_core.slides.reader import Slide, open_slide
from histoencoder_core.slides.sheet import MPP_RANGE, SheetRow, plausible_mpp
from histoencoder_core.store import SlideFolder, Stamp, files, layout

ALGORITHM = 1
THUMBNAIL_DIMENSION = 2048
NO_MPP = "the file states no resolution"


@dataclass(frozen=True)
class Description:
    """What is known of a slide.

    Nothing is taken from the file's own properties but resolution, size and what is named here:
    labels, macro images, names, dates and numbers of persons are never read.

    Attributes:
        slide: Its id.
        path: Absolute path of its file.
        relative_path: Path relative to the folder it was found in.
        size: Size of its files in bytes.
        mtime_ns: Newest modification time of its files in nanoseconds.
        content: Fingerprint of its content; see `content.Content`, as the two below.
        sample: Fingerprint of a sample of its bytes.
        whole: Hash of all its bytes; None where they were never read.
        backend: Reader used.
        vendor: Scanner's maker, as the reader tells it.
        objective_power: Nominal magnification, as the file states it.
        width: Width in level-0 pixels.
        height: Height in level-0 pixels.
        levels: Width, height and downsample of each pyramid level.
        mpp_x: Resolution in µm/px at level 0; None if not known.
        mpp_y: The same, vertically.
        mpp_source: ``slides.csv`` or ``slide``.
        mpp_problem: Why the slide's own resolution is not used.
        facts: ``patient, site, scanner, stain, split`` from ``slides.csv``.
    """

    slide: str
    path: str
    relative_path: str
    size: int
    mtime_ns: int
    content: str
    sample: str
    whole: str | None
    backend: str
    vendor: str | None
    objective_power: float | None
    width: int
    height: int
    levels: list[dict[str, float]]
    mpp_x: float | None
    mpp_y: float | None
    mpp_source: str | None
    mpp_problem: str | None
    facts: dict[str, str]

    @property
    def identity(self) -> Content:
        """The slide's content."""
        return Content(self.sample, self.whole, self.content)


def describe_slide(folder: SlideFolder, found: FoundSlide, row: SheetRow) -> Stamp:
    """Open a slide and write what it is, unless that is done already.

    Of a slide that was scanned again, what was made from its former content is taken away before
    the new description is put in place: nobody ever sees old tiles of a new slide. It is kept under
    ``versions/``.

    Args:
        folder: The slide's folder in the store.
        found: The slide's file.
        row: The slide's row of ``slides.csv``.

    Returns:
        The stamp of ``properties.json``.

    Raises:
        SlideError: The slide can't be opened or read. The failure is recorded in its folder.
        StoreError: Another program's files stand in the way.
    """
    with folder.locked(), describing(folder, found, row) as inputs:
        stamp = already_described(folder, inputs)
        if stamp is not None:
            return stamp
        with open_slide(found.path) as slide:
            return write_description(folder, slide, row, inputs)


@contextmanager
def describing(folder: SlideFolder, found: FoundSlide, row: SheetRow) -> Iterator[dict[str, Any]]:
    """Record the failure of a slide whose description fails. The slide's lock must be held.

    Yields:
        What is described: path, size and time of the file, and its row of ``slides.csv``.

    Raises:
        SlideError: The file is not there.
    """
    inputs: dict[str, Any] = {
        "path": str(found.path),
        "relative_path": found.relative,
        "sheet": sheet_inputs(row),
    }
    try:
        if not files.is_text(str(found.path)):
            told = str(found.path).encode("utf-8", "backslashreplace").decode()
            raise SlideError(
                f"{told}: its name, or that of a folder it is in, is not UTF-8. Rename it.",
                kind="unsupported",
            )
        try:
            inputs["size"], inputs["mtime_ns"] = signature(found.path)
        except FileNotFoundError as error:
            raise _not_there(found.path) from error
        yield inputs
    except Exception as error:
        folder.record_failure("slides", error, inputs=inputs)
        raise


def already_described(folder: SlideFolder, inputs: dict[str, Any]) -> Stamp | None:
    """The stamp of a description of the very same file and row; None if there is none."""
    stamp = folder.stamp("slides")
    if stamp is None or stamp.algorithm != ALGORITHM:
        return None
    told = {**files.read_json(folder.record("slides")), "sheet": stamp.made_from["sheet"]}
    if any(told.get(key) != value for key, value in inputs.items()):
        return None
    folder.clear_failure("slides")
    return stamp


def content_of(folder: SlideFolder, slide: Slide, inputs: dict[str, Any]) -> Content:
    """Identify the content of an open slide, in the light of its former description."""
    before, quickhash = read_description(folder), slide.properties.get("quickhash")
    if before is None:
        return Content.of(slide.copy, quickhash=quickhash)
    former = before.identity
    if before.path != inputs["path"]:
        now = Content.of(slide.copy, quickhash=quickhash)
        return former if former.is_that_of(slide.copy, now) else now
    if (before.size, before.mtime_ns) == (inputs["size"], inputs["mtime_ns"]):
        return former
    return Content.of(slide.copy, quickhash=quickhash, before=former)


def write_description(
    folder: SlideFolder,
    slide: Slide,
    row: SheetRow,
    inputs: dict[str, Any],
    content: Content | None = None,
) -> Stamp:
    """Write what an open slide is.

    Args:
        folder: The slide's folder in the store.
        slide: The open slide.
        row: Its row of ``slides.csv``.
        inputs: From `describing`.
        content: Its content, if it is known.
    """
    started = time.perf_counter()
    content = content or content_of(folder, slide, inputs)
    thumbnail = slide.overview(THUMBNAIL_DIMENSION)
    require_unchanged(slide.path, (inputs["size"], inputs["mtime_ns"]))
    description = _description(folder.slide_id, slide, row, inputs, content)
    stamp = Stamp.of(
        "slides",
        algorithm=ALGORITHM,
        made_from={"slide": description.content, "sheet": inputs["sheet"]},
    ).with_result(seconds=round(time.perf_counter() - started, 3))
    before = read_description(folder)
    with folder.writing("slides") as writer:
        writer.image(layout.THUMBNAIL, thumbnail, stamp)
        writer.json(asdict(description), stamp)
        if before is not None and before.content != description.content:
            for stage in reversed(layout.STAGES[1:]):
                folder.withdraw(stage)
    return stamp.just_made()


def require_unchanged(path: Path, seen: tuple[int, int]) -> None:
    """Make sure that a slide's file is still the one that was looked at.

    Args:
        path: The file.
        seen: What its `content.signature` was.

    Raises:
        SlideError: It has changed, or is gone.
    """
    try:
        changed = signature(path) != seen
    except FileNotFoundError as error:
        raise _not_there(path) from error
    if changed:
        raise SlideError(
            f"{path}: has changed while it was worked on. It is taken up again once it stands "
            "still.",
            kind="changing",
        )


@contextmanager
def unchanged(slide: Description) -> Iterator[Path]:
    """Work on a slide's file that is the one that was described, from beginning to end.

    Yields:
        The file.

    Raises:
        SlideError: It has changed since, or meanwhile, or is gone: what was made of it must not be
            kept as made from the content that was described.
    """
    path, seen = Path(slide.path), (slide.size, slide.mtime_ns)
    require_unchanged(path, seen)
    yield path
    require_unchanged(path, seen)


def read_description(folder: SlideFolder) -> Description | None:
    """Read what `describe_slide` wrote; None if the slide was never described."""
    if folder.stamp("slides") is None:
        return None
    content = files.read_json(folder.record("slides"))
    # Earlier releases knew no other content than the sample.
    content = {"sample": content["content"], "whole": None, **content}
    names = Description.__dataclass_fields__
    return Description(**{name: content[name] for name in names})


def was_tried(folder: SlideFolder, path: Path, seen: tuple[int, int], row: SheetRow) -> bool:
    """Whether a slide was described, or failed to be, as it is now.

    Args:
        folder: The slide's folder in the store.
        path: Its file.
        seen: The file's `content.signature`.
        row: Its row of ``slides.csv``: a changed row, such as a µm/px that was missing, counts.
    """
    asked = {"path": str(path), "size": seen[0], "mtime_ns": seen[1], "sheet": sheet_inputs(row)}
    failure, duplicate = folder.failures().get("slides"), folder.duplicate()
    if failure is not None:  # it came after any success: that would have cleared it
        told = failure.get("inputs") or {}
    elif duplicate is not None:
        told = duplicate
    else:
        stamp = folder.stamp("slides")
        if stamp is None:
            return False
        content = files.read_json(folder.record("slides"))
        told = {**content, "sheet": stamp.made_from["sheet"]}
    return all(told.get(name) == value for name, value in asked.items())


def sheet_inputs(row: SheetRow) -> dict[str, Any]:
    """What a description takes from a slide's row of ``slides.csv``."""
    return {"mpp": row.mpp, "facts": row.facts}


def _not_there(path: Path) -> SlideError:
    return SlideError(
        f"{path}: is not there. Check that the folder of slides is mounted.", kind="missing"
    )


def _description(
    slide_id: str, slide: Slide, row: SheetRow, inputs: dict[str, Any], content: Content
) -> Description:
    mpp, source, problem = _resolution(slide, row)
    power = slide.properties.get("objective_power")
    return Description(
        slide=slide_id,
        content=content.fingerprint,
        sample=content.sample,
        whole=content.whole,
        backend=slide.backend,
        vendor=slide.properties.get("vendor"),
        objective_power=float(power) if power and power.replace(".", "", 1).isdigit() else None,
        width=slide.width,
        height=slide.height,
        levels=[
            {"width": w, "height": h, "downsample": round((x + y) / 2, 6)}
            for (w, h), (x, y) in zip(slide.level_sizes, slide.downsamples, strict=True)
        ],
        mpp_x=mpp and mpp[0],
        mpp_y=mpp and mpp[1],
        mpp_source=source,
        mpp_problem=problem,
        facts=row.facts,
        **{name: inputs[name] for name in ("path", "relative_path", "size", "mtime_ns")},
    )


def _resolution(
    slide: Slide, row: SheetRow
) -> tuple[tuple[float, float] | None, str | None, str | None]:
    """The resolution to use, where it comes from, and what is wrong with the slide's own."""
    problem = None
    if slide.mpp is None:
        problem = NO_MPP
    elif not all(plausible_mpp(value) for value in slide.mpp):
        problem = (
            f"the file states {slide.mpp[0]:g} × {slide.mpp[1]:g} µm/px, outside of the plausible "
            f"{MPP_RANGE[0]:g} to {MPP_RANGE[1]:g}"
        )
    if row.mpp is not None:
        return (row.mpp, row.mpp), "slides.csv", problem
    if problem is not None:
        return None, None, problem
    return slide.mpp, "slide", None
