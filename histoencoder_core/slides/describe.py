"""Describing a slide: ``properties.json`` and ``thumbnail.jpeg``."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from histoencoder_core.errors import SlideError
from histoencoder_core.slides.content import content_fingerprint, signature
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
        content: Fingerprint of its content.
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


def describe_slide(folder: SlideFolder, found: FoundSlide, row: SheetRow) -> Stamp:
    """Open a slide and write what it is, unless that is done already.

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
    with folder.locked():
        return _describe(folder, found, row)


def _describe(folder: SlideFolder, found: FoundSlide, row: SheetRow) -> Stamp:
    sheet = _sheet(row)
    inputs: dict[str, Any] = {"path": str(found.path), "relative_path": found.relative}
    try:
        if not found.path.is_file():
            raise SlideError(f"{found.path}: is not there.", kind="missing")
        size, mtime_ns = signature(found.path)
        inputs |= {"size": size, "mtime_ns": mtime_ns}
        stamp = folder.stamp("slides")
        if stamp is not None and stamp.algorithm == ALGORITHM and stamp.made_from["sheet"] == sheet:
            content = files.read_json(folder.record("slides"))
            if all(content.get(key) == value for key, value in inputs.items()):
                folder.clear_failure("slides")
                return stamp
        started = time.perf_counter()
        with open_slide(found.path) as slide:
            thumbnail = slide.overview(THUMBNAIL_DIMENSION)
            description = _description(folder.slide_id, slide, row, inputs)
        stamp = Stamp.of(
            "slides", algorithm=ALGORITHM, made_from={"slide": description.content, "sheet": sheet}
        ).with_result(seconds=round(time.perf_counter() - started, 3))
        with folder.writing("slides") as writer:
            writer.image(layout.THUMBNAIL, thumbnail, stamp)
            writer.json(asdict(description), stamp)
    except Exception as error:
        folder.record_failure("slides", error, inputs={**inputs, "sheet": sheet})
        raise
    return stamp.just_made()


def read_description(folder: SlideFolder) -> Description | None:
    """Read what `describe_slide` wrote; None if the slide was never described."""
    if folder.stamp("slides") is None:
        return None
    content = files.read_json(folder.record("slides"))
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
    asked = {"path": str(path), "size": seen[0], "mtime_ns": seen[1], "sheet": _sheet(row)}
    failure = folder.failures().get("slides")
    if failure is not None:  # it came after any success: that would have cleared it
        told = failure.get("inputs") or {}
    else:
        stamp = folder.stamp("slides")
        if stamp is None:
            return False
        content = files.read_json(folder.record("slides"))
        told = {**content, "sheet": stamp.made_from["sheet"]}
    return all(told.get(name) == value for name, value in asked.items())


def _sheet(row: SheetRow) -> dict[str, Any]:
    return {"mpp": row.mpp, "facts": row.facts}


def _description(slide_id: str, slide: Slide, row: SheetRow, inputs: dict[str, Any]) -> Description:
    mpp, source, problem = _resolution(slide, row)
    power = slide.properties.get("objective_power")
    return Description(
        slide=slide_id,
        content=content_fingerprint(slide.path, quickhash=slide.properties.get("quickhash")),
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
        **inputs,
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
