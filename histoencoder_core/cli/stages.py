"""Commands that make something: tile, extract, cluster, label."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from tqdm import tqdm

from histoencoder_core.cli.cohort import expected
from histoencoder_core.cli.progress import each_slide, finish
from histoencoder_core.clusters import (
    ClusterModel,
    assign_slide,
    cluster_slide,
    current_model,
    feature_file,
    feature_files,
)
from histoencoder_core.cohort import publish_catalog, run_sql
from histoencoder_core.errors import LabelError, SettingsError, StoreError
from histoencoder_core.labels import Annotations, label_annotated
from histoencoder_core.settings import (
    ClusterSettings,
    PlatformSettings,
    StageSettings,
    TilingSettings,
)
from histoencoder_core.slides import Register, Sheet, receive_slide
from histoencoder_core.slides.find import find_pattern
from histoencoder_core.store import Stamp, Store
from histoencoder_core.tiles import TileSource, cut_tiles, tile_source
from histoencoder_core.tiles.source import slide_ids_with_tiles

Made = TypeVar("Made")
Settings = TypeVar("Settings", bound=StageSettings)

CPUS = os.cpu_count() or 1

StoreFolder = Annotated[
    Path,
    typer.Option(
        "--input_dir",
        "--input-dir",
        "-i",
        exists=True,
        file_okay=False,
        help="Folder with a sub-folder for each slide.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", "-z", help="Do it again even where it is done.")
]
Workers = Annotated[int, typer.Option("--num-workers", "-j", min=1, help="Reading threads.")]


def tile(
    pattern: Annotated[
        str,
        typer.Option("--input", "-i", help="Slides: a folder, a file, or a pattern with * and **."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder for all outputs.")
    ],
    mpp: Annotated[
        float | None, typer.Option(help="Resolution of a tile in µm/px.  [default: 0.5]")
    ] = None,
    tile_px: Annotated[
        int | None,
        typer.Option(help="Size of a tile in pixels at that resolution.  [default: 512]"),
    ] = None,
    level: Annotated[
        int | None, typer.Option("--level", "-l", help="Pyramid level to read (HistoPrep's way).")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option("--width", "-w", help="Tile width in level-0 pixels (HistoPrep's way)."),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option("--height", "-h", help="Tile height in level-0 pixels.  [default: width]"),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(
            "--overlap", "-n", help="Overlap of neighbours.  [default: 0.5; with --width 0]"
        ),
    ] = None,
    max_background: Annotated[
        float | None,
        typer.Option(
            "--max-background",
            "-b",
            help="Most background in a tile.  [default: 0.5; with --width 0.75]",
        ),
    ] = None,
    max_ink: Annotated[
        float | None, typer.Option(help="Most ink of pens and dye in a tile.  [default: any]")
    ] = None,
    max_blank: Annotated[
        float | None,
        typer.Option(help="Most of a tile that is neither tissue nor ink.  [default: any]"),
    ] = None,
    max_blur: Annotated[
        float | None,
        typer.Option(help="Most blur of a tile, 0 to 1; needs --metrics.  [default: any]"),
    ] = None,
    in_bounds: Annotated[
        bool | None,
        typer.Option("--in-bounds", help="Leave out tiles that reach beyond the slide."),
    ] = None,
    tissue: Annotated[
        str | None,
        typer.Option(
            help="'without-ink', or 'otsu' as HistoPrep, to which ink is tissue.  "
            "[default: without-ink; with --width otsu]"
        ),
    ] = None,
    threshold: Annotated[
        int | None,
        typer.Option("--threshold", "-t", help="Grey value that parts tissue.  [default: Otsu's]"),
    ] = None,
    multiplier: Annotated[
        float | None,
        typer.Option("--multiplier", "-x", help="Factor on Otsu's threshold.  [default: 1.05]"),
    ] = None,
    max_dimension: Annotated[
        int | None, typer.Option(help="Size of the image tissue is looked for in.  [default: 8192]")
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Blur before thresholding, in pixels.  [default: 1.0]")
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="'dark' for fluorescence.  [default: bright]")
    ] = None,
    allow_upsampling: Annotated[
        bool | None, typer.Option("--allow-upsampling", help="Accept finer than the slide has.")
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Measure quality on each tile at its own resolution.")
    ] = False,
    save_tiles: Annotated[
        bool, typer.Option("--save-tiles", help="Also write each tile as a JPEG.")
    ] = False,
    slides_csv: Annotated[
        Path | None, typer.Option(help="Table: slide, mpp, patient, site, scanner, stain, split.")
    ] = None,
    overwrite: Overwrite = False,
    num_workers: Workers = CPUS,
) -> None:
    """Find tissue on slides and lay tiles over it.

    Ask for tiles by resolution (--mpp, --tile-px) or, as with HistoPrep, in level-0 pixels
    (--width).
    """
    asked = {
        "mpp": mpp, "tile_px": tile_px, "level": level, "width": width, "height": height,
        "overlap": overlap, "max_background": max_background, "max_ink": max_ink,
        "max_blank": max_blank, "max_blur": max_blur, "in_bounds": in_bounds, "tissue": tissue,
        "threshold": threshold, "multiplier": multiplier, "max_dimension": max_dimension,
        "sigma": sigma, "background": background, "allow_upsampling": allow_upsampling,
        "metrics": "tile" if metrics else None,
    }  # fmt: skip
    settings = _tiling(asked)
    found = find_pattern(pattern)
    if not found:
        raise SettingsError(f"No slides were found by {pattern!r}.")
    sheet_path = slides_csv or PlatformSettings().sheet or _beside(found[0].path, found[0].relative)
    sheet = Sheet.read(sheet_path)
    store = Store(output)
    slides = Register(store).assign(found)

    def work(slide_id: str) -> Stamp | str:
        received = receive_slide(store, slide_id, slides[slide_id], sheet)
        if received.duplicate_of is not None:
            return f"has the content of {received.duplicate_of}: it is not computed again"
        return cut_tiles(
            store.slide(received.slide),
            settings,
            save_images=save_tiles,
            overwrite=overwrite,
            num_workers=num_workers,
        )

    finish(each_slide("Tiling", slides, work))


def extract(
    input_dir: StoreFolder,
    model_name: Annotated[
        str | None, typer.Option("--model-name", "-m", help="Encoder; see `histoencoder encoders`.")
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option("--num-blocks", "-n", min=1, help="Attention blocks whose outputs are kept."),
    ] = None,
    avg_pool: Annotated[
        bool | None, typer.Option("--avg-pool", "-a", help="Append the average of the last block.")
    ] = None,
    input_size: Annotated[
        int | None,
        typer.Option("--input-size", "-s", help="Size of the encoder's input in pixels."),
    ] = None,
    float16: Annotated[
        bool | None, typer.Option("--float16", help="Store features as float16.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the arithmetic: float32, float16, bfloat16.  [default: auto]",
        ),
    ] = None,
    normalise: Annotated[
        str | None,
        typer.Option(
            help="'slide' estimates each slide's own mean and deviation, as HistoEncoder 0.1.1 "
            "did.  [default: encoder]",
        ),
    ] = None,
    use_cpu: Annotated[
        bool, typer.Option("--use-cpu", "-c", help="Do not look for a GPU.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [default: auto]")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="openvino, compile or eager.  [default: auto]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="Tiles a forward pass.")
    ] = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="Write HistoEncoder's columns feat1, feat2, …")
    ] = False,
    overwrite: Overwrite = False,
    num_workers: Annotated[
        int | None,
        typer.Option(
            "--num-workers", "-j", min=1, help="Reading threads.  [default: one a CPU core]"
        ),
    ] = None,
) -> None:
    """Encode tiles into features.

    Takes folders made by `histoencoder tile`, by HistoPrep, or any folders of tile images.
    """
    deployment = _deployment(
        device="cpu" if use_cpu else device, backend=backend, batch_size=batch_size
    )
    settings = _changed(
        deployment.encoder,
        {
            "name": model_name,
            "num_blocks": num_blocks,
            "avg_pool": avg_pool,
            "input_size": input_size,
            "dtype": "float16" if float16 else None,
            "precision": precision,
            "normalise": normalise,
        },
    )
    store = Store(input_dir)
    slides = slide_ids_with_tiles(store)
    if not slides:
        raise StoreError(
            f"{input_dir}: holds no tiles. Give the folder that `histoencoder tile` or HistoPrep "
            "wrote to, or a folder with a sub-folder of tile images for each slide."
        )
    from histoencoder_core.features import Runner, extract_slides, load_encoder  # takes seconds

    encoder = load_encoder(
        settings,
        weights_folder=deployment.weights_folder,
        weights_url=deployment.weights_mirror,
        weights_sha256=deployment.weights_sha256,
    )
    if encoder.untrained:
        typer.secho(
            f"WARNING: {settings.name} is untrained: its features mean nothing.",
            fg="yellow",
            err=True,
        )
    runner = Runner(
        encoder,
        device=deployment.device,
        backend=deployment.backend,
        batch_size=deployment.batch_size,
    )
    with (
        tqdm(desc="Encoding", unit="tile", disable=None, position=1, leave=False) as bar,
        extract_slides(
            store,
            slides,
            runner,
            readers=num_workers or deployment.readers,
            wide=wide,
            overwrite=overwrite,
            progress=bar.update,
        ) as features,
    ):
        counts = each_slide("Extracting", slides, lambda slide_id: features[slide_id].result())
    finish(counts)


def cluster(
    input_dir: StoreFolder,
    num_clusters: Annotated[
        list[int] | None,
        typer.Option(
            "--num-clusters",
            "-n",
            min=2,
            help="Number of clusters; repeat for several.  [default: 8 16 24 32 64 128]",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the clustering.  [default: 0]")] = None,
    normalise: Annotated[
        bool | None, typer.Option("--normalise", help="Scale features to length 1 first.")
    ] = None,
    whiten: Annotated[
        int | None,
        typer.Option(min=2, help="Project on so many principal components of equal variance."),
    ] = None,
    per_slide: Annotated[
        bool,
        typer.Option("--per-slide", help="Cluster each slide by itself, beside the cohort's."),
    ] = False,
    memory: Annotated[
        float | None, typer.Option(help="Memory in GB that fitting may take.  [default: 2]")
    ] = None,
    use_cpu: Annotated[
        bool, typer.Option("--use-cpu", "-c", help="Do not look for a GPU.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [default: auto]")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            "--refit",
            "-z",
            help="Fit a new model even if there is one, and assign all slides with it.",
        ),
    ] = False,
) -> None:
    """Cluster features over all slides.

    The first time, a model is fitted. Later, slides are assigned with it: a new slide never
    renumbers the clusters of the others. --refit, other options or another encoder call for a
    new model, whose clusters are numbered after those of the one before that they match.
    """
    deployment = _deployment(device="cpu" if use_cpu else device, cluster_memory_gb=memory)
    asked = {
        "n_clusters": tuple(sorted(set(num_clusters))) if num_clusters else None,
        "seed": seed,
        "normalise": normalise,
        "whiten": whiten,
    }
    settings = _changed(deployment.clusters, asked)
    store = Store(input_dir)
    how: dict[str, Any] = {
        "memory_gb": deployment.cluster_memory_gb,
        "device": deployment.device,
    }
    if per_slide:
        with_features = [s for s in store.slide_ids() if store.slide(s).record("features").exists()]
        if not with_features:
            raise StoreError(f"{input_dir}: holds no features; run `histoencoder extract` first.")
        finish(
            each_slide(
                "Clustering",
                with_features,
                lambda slide_id: cluster_slide(
                    store.slide(slide_id), settings, overwrite=overwrite, **how
                ),
            )
        )
        return
    changed = any(value is not None for value in asked.values())
    model = _model(store, settings, asked=changed, refit=overwrite, **how)
    inputs = feature_files(store)
    counts = each_slide(
        "Assigning",
        [file.slide for file in inputs],
        lambda slide_id: assign_slide(store.slide(slide_id), model),
    )
    _publish(store)
    finish(counts)


def label(
    input_dir: StoreFolder,
    annotations: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of <slide>.geojson, of masks (<slide>.png, .tif) and of CSV files; see "
            "docs/annotations.md.",
        ),
    ] = None,
    min_share: Annotated[
        float | None,
        typer.Option(
            help="Share of a tile's tissue that its class must cover.  [default: 0.5]",
        ),
    ] = None,
) -> None:
    """Label tiles from annotations, and from the labels in tiles.csv."""
    settings = _changed(PlatformSettings().labels, {"min_share": min_share})
    store = Store(input_dir)
    slides = slide_ids_with_tiles(store)
    said = Annotations(store, annotations, slides)
    annotated = sorted({*slides}.intersection(said.slides()))
    lost = [
        f"{slide_id}: has labels, but no annotation in {annotations} any more; they are kept."
        for slide_id in slides
        if annotations is not None
        and slide_id not in annotated
        and store.slide(slide_id).stamp("labels") is not None
    ]
    unmatched = [f"{name}: matches no slide with tiles." for name in said.unmatched]
    for warning in (*said.faults, *unmatched, *lost):
        typer.secho(f"WARNING: {warning}", fg="yellow", err=True)
    if not annotated:
        raise LabelError(
            f"No annotations were found for the slides in {input_dir}. GeoJSON files and masks are "
            "named after the slide's id, and CSV files name it in the column 'slide'."
        )

    def work(slide_id: str) -> Stamp:
        source = _source(store, slide_id)
        stamp = label_annotated(store.slide(slide_id), source, said, settings)
        assert stamp is not None
        return stamp

    counts = each_slide("Labelling", annotated, work, describe="labelled")
    _publish(store, annotations=annotations)
    finish(counts)


def _source(store: Store, slide_id: str) -> TileSource:
    source = tile_source(store, slide_id)
    if source is None:
        raise StoreError(f"{store.root / slide_id}: its tiles were taken away in between.")
    return source


def _model(
    store: Store,
    settings: ClusterSettings,
    *,
    asked: bool,
    refit: bool,
    memory_gb: float,
    device: str,
) -> ClusterModel:
    """The current model if it will do, else that of the features and settings."""
    model = current_model(store)
    found = [feature_file(store.slide(slide_id)) for slide_id in store.slide_ids()]
    fits = model is not None and {f.space for f in found if f is not None} == {model.space}
    if model is not None and fits and not refit and (not asked or model.settings == settings):
        typer.echo(f"Using cluster model {model.version}; --refit fits a new one.")
        return model
    from histoencoder_core.clusters.fit import ensure_model  # torch takes seconds to import

    model, fitted = ensure_model(
        store, feature_files(store), settings, memory_gb=memory_gb, device=device
    )
    result = model.stamp.result
    ks = ", ".join(map(str, result["n_clusters"]))
    note = " (untrained encoder)" if model.untrained else ""
    typer.echo(
        f"{'Fitted' if fitted else 'Went back to'} cluster model {model.version}{note}: {ks} "
        f"clusters of {result['tiles']} tiles on {result['slides']} slides."
    )
    if fitted and len(model.matches):
        same = sum(model.matches.column("same").to_pylist())
        typer.echo(
            f"Numbered after model {result['previous']}: {same} of {len(model.matches)} clusters "
            "are the same."
        )
    return model


def _publish(store: Store, *, annotations: Path | None = None) -> None:
    asked = expected(PlatformSettings())
    summary = publish_catalog(
        store, **{**asked, "annotations": annotations or asked["annotations"]}
    )
    typer.echo(
        f"Catalog: {summary.slides} slides, {summary.tiles} tiles, {summary.labelled_tiles} "
        f'labelled. Ask it: histoencoder sql -i "{store.root}" "from cluster_purity"'
    )
    k = max(summary.purity.column("k").to_pylist(), default=None)
    for row in run_sql(store, f"FROM coverage_at({k}, 0.9)").to_pylist() if k else ():
        if row["coverage"] is not None:
            interval = "" if row["low"] is None else f" ({row['low']:.0%} to {row['high']:.0%})"
            typer.echo(
                f"Of the labelled tiles, {row['coverage']:.0%}{interval} lie in clusters at least "
                f"90% pure, of {k} clusters."
            )


def _tiling(asked: dict[str, Any]) -> TilingSettings:
    if any(asked[name] is not None for name in ("level", "width", "height")):
        return _made(TilingSettings.histoprep, asked)
    return _changed(_deployment().tiling, asked)


def _deployment(**asked: Any) -> PlatformSettings:
    """The deployment's values with those given on the command line."""
    return _made(PlatformSettings, asked)


def _changed(settings: Settings, asked: dict[str, Any]) -> Settings:
    """The deployment's settings with those given on the command line."""
    return _made(type(settings), asked, **settings.model_dump(exclude_defaults=True))


def _made(make: Callable[..., Made], asked: dict[str, Any], /, **before: Any) -> Made:
    """Settings as they were before, with what is given on the command line: all but None."""
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        return make(**{**before, **given})
    except ValidationError as error:
        raise SettingsError(first_problem(error)) from error


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong with settings, in one line."""
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    text = problem["msg"].removeprefix("Value error, ")
    if where == "device" and problem["type"] == "string_pattern_mismatch":
        text = f"There is no device {problem['input']!r}. Choose auto, cpu, cuda or cuda:N."
    return f"{where}: {text}" if where else text


def _beside(path: Path, relative: str) -> Path | None:
    """The slides.csv in the folder that was searched."""
    candidate = Path(str(path).removesuffix(relative)) / "slides.csv"
    return candidate if candidate.is_file() else None
