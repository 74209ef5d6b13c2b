"""Slides, stores and other inputs, made small for the tests."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import tifffile
from PIL import Image

from histoencoder_core.slides import Description, FoundSlide, describe_slide
from histoencoder_core.slides.sheet import SheetRow
from histoencoder_core.store import SlideFolder, Stamp, Store, layout
from histoencoder_core.store.tables import key_table, tile_name

GLASS, TISSUE = (244, 243, 245), (198, 120, 170)


def tissue_pixels(width: int, height: int, *, seed: int = 0) -> np.ndarray:
    """Glass with one piece of tissue in its middle half."""
    noise = np.random.default_rng(seed).integers(-4, 5, (height, width, 3))
    pixels = np.full((height, width, 3), GLASS, np.int64)
    pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = TISSUE
    return (pixels + noise).astype(np.uint8)


def gradient_pixels(width: int, height: int) -> np.ndarray:
    """Pixels that tell their place: red rises to the right, green downwards."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return pixels


def halved(
    pixels: np.ndarray, *, width: int | None = None, height: int | None = None
) -> np.ndarray:
    """The next level of a pyramid."""
    size = (width or pixels.shape[1] // 2, height or pixels.shape[0] // 2)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def write_tiff(
    path: Path,
    *levels: np.ndarray,
    mpp: float | None = 0.5,
    description: str | None = None,
    missing: Sequence[int] = (),
    tile: int = 128,
) -> Path:
    """Write a tiled pyramidal TIFF; `missing` tiles have no data, as scanners leave glass out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    resolution: dict[str, Any] = {}
    if mpp is not None:
        resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        for i, pixels in enumerate(levels):
            file.write(
                _tiles(pixels, tile, missing if i == 0 else ()),
                shape=pixels.shape,
                dtype=pixels.dtype,
                tile=(tile, tile),
                photometric="rgb",
                extrasamples=["unassalpha"] if pixels.shape[2] == 4 else None,
                compression="zlib",
                compressionargs={"level": 1},
                subfiletype=0 if i == 0 else 1,
                description=description if i == 0 else None,
                metadata=None,
                **resolution,
            )
    return path


def _tiles(pixels: np.ndarray, tile: int, missing: Sequence[int]) -> Iterator[np.ndarray | None]:
    corners = [
        (y, x) for y in range(0, pixels.shape[0], tile) for x in range(0, pixels.shape[1], tile)
    ]
    for i, (y, x) in enumerate(corners):
        part = pixels[y : y + tile, x : x + tile]
        padding = [(0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)]
        yield None if i in missing else np.pad(part, padding)


def damage_tiles(path: Path, indices: Sequence[int]) -> None:
    """Overwrite the data of some of a TIFF's level-0 tiles, as a disk's fault would: unseen."""
    before = path.stat()
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        places = [(page.dataoffsets[i], page.databytecounts[i]) for i in indices]
    with path.open("r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(b"\xff" * count)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_czi(path: Path, *parts: tuple[np.ndarray, int, int], mpp: float = 0.22) -> Path:
    """Write RGB parts at ``x, y`` as a Zeiss mosaic."""
    from pylibCZIrw import czi

    with czi.create_czi(str(path), exist_ok=True) as document:
        for pixels, x, y in parts:
            document.write(data=np.ascontiguousarray(pixels[..., ::-1]), location=(x, y))
        document.write_metadata(scale_x=mpp * 1e-6, scale_y=mpp * 1e-6)
    return path


def write_dicom(
    path: Path, pixels: np.ndarray, *, uids: Sequence[str], mpp: float, patient: str, level: int = 0
) -> Path:
    """Write one level of a DICOM slide, in JPEG tiles; `uids` are those of its study and series."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

    tile, spacing = 128, mpp / 1000
    frames = []
    for part in _tiles(pixels, tile, ()):
        buffer = io.BytesIO()
        Image.fromarray(part).save(buffer, "JPEG", quality=95, subsampling=0)
        frames.append(buffer.getvalue())
    slide, measures, groups, optics = Dataset(), Dataset(), Dataset(), Dataset()
    slide.file_meta = FileMetaDataset()
    slide.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    slide.SOPClassUID = slide.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    slide.SOPInstanceUID = slide.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    slide.StudyInstanceUID, slide.SeriesInstanceUID = uids
    slide.FrameOfReferenceUID = uids[0]
    slide.PatientName, slide.PatientBirthDate, slide.Modality = patient, "19580314", "SM"
    slide.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED" if level else "NONE"]
    slide.InstanceNumber = level + 1
    slide.Rows = slide.Columns = tile
    slide.SamplesPerPixel, slide.PhotometricInterpretation = 3, "YBR_FULL_422"
    slide.PlanarConfiguration = slide.PixelRepresentation = 0
    slide.BitsAllocated, slide.BitsStored, slide.HighBit = 8, 8, 7
    slide.NumberOfFrames, slide.DimensionOrganizationType = len(frames), "TILED_FULL"
    slide.TotalPixelMatrixRows, slide.TotalPixelMatrixColumns = pixels.shape[:2]
    slide.TotalPixelMatrixFocalPlanes = slide.NumberOfOpticalPaths = 1
    slide.ImagedVolumeHeight, slide.ImagedVolumeWidth = (n * spacing for n in pixels.shape[:2])
    slide.ImagedVolumeDepth = measures.SliceThickness = 1.0
    measures.PixelSpacing = [spacing, spacing]
    groups.PixelMeasuresSequence = [measures]
    slide.SharedFunctionalGroupsSequence = [groups]
    optics.OpticalPathIdentifier = "1"
    slide.OpticalPathSequence = [optics]
    slide.PixelData = encapsulate(frames)
    slide["PixelData"].VR = "OB"
    slide["PixelData"].is_undefined_length = True
    path.parent.mkdir(parents=True, exist_ok=True)
    slide.save_as(path, enforce_file_format=True)
    return path


def found_at(path: Path, root: Path | None = None) -> FoundSlide:
    """A slide as the search finds it."""
    return FoundSlide(path, path.relative_to(root or path.parent).as_posix())


def described(store: Store, path: Path, row: SheetRow | None = None) -> SlideFolder:
    """Describe a slide under its stem and give its folder."""
    folder = store.slide(path.stem)
    describe_slide(folder, found_at(path), row or SheetRow())
    return folder


DESCRIPTION = Description(
    slide="CMU-1",
    path="/scans/CMU-1.svs",
    relative_path="CMU-1.svs",
    size=1,
    mtime_ns=1,
    content="c" * 64,
    sample="c" * 64,
    whole=None,
    backend="OPENSLIDE",
    vendor="aperio",
    objective_power=40.0,
    width=40000,
    height=30000,
    levels=[
        {"width": 40000 // n, "height": 30000 // n, "downsample": float(n)} for n in (1, 2, 4, 16)
    ],
    mpp_x=0.25,
    mpp_y=0.25,
    mpp_source="slide",
    mpp_problem=None,
    facts={},
)


def description(*, mpp: float | None = 0.25, **changes: Any) -> Description:
    """What is known of a slide that does not exist."""
    return replace(DESCRIPTION, **{"mpp_x": mpp, "mpp_y": mpp, **changes})


def stamp_of(text: str, stage: str = "tiles") -> Stamp:
    """A stamp that differs from others by a text."""
    return Stamp.of(stage, algorithm=1, made_from={"from": text})


def keys_of(*places: tuple[int, int, int, int]) -> pa.Table:
    """The keys of tiles at given places."""
    return key_table([tile_name(*place) for place in places], list(places))


def contents(folder: Path) -> dict[str, bytes]:
    """All files under a folder but locks, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != layout.LOCK
    }
