"""Commands that show tiles: similar, show cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from histoencoder_core.cli.cohort import OptionalStore
from histoencoder_core.cli.tables import print_row, print_table
from histoencoder_core.cohort import run_sql
from histoencoder_core.decoding.images import IMAGE_FORMATS
from histoencoder_core.errors import SettingsError
from histoencoder_core.montage import Pixels, montage
from histoencoder_core.settings import PlatformSettings
from histoencoder_core.similar import find_tile, prototypes, similar_tiles
from histoencoder_core.store import Store
from histoencoder_core.store.files import atomic_path

show = typer.Typer(help="Show what numbers stand for.", no_args_is_help=True)

Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", dir_okay=False,
        help="The picture, JPEG or PNG.  [default: one in STORE/_cohort/figures]",
    ),
]  # fmt: skip

_QUERY_FRAME = (213, 94, 0)
_SLIDES_TOLD = 20
_FILES_READ = 64
_QUALITY = 90


def similar(
    slide: Annotated[str, typer.Argument(help="The slide's id.")],
    x: Annotated[int | None, typer.Argument(help="Of a point on it, in level-0 pixels.")] = None,
    y: Annotated[int | None, typer.Argument(help="The same, from top to bottom.")] = None,
    tile: Annotated[
        str | None, typer.Option(help="The tile's name, instead of a point in it.")
    ] = None,
    input_dir: OptionalStore = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Tiles to find.")] = 24,
    other_slides: Annotated[
        bool, typer.Option("--other-slides", help="Look on other slides only.")
    ] = False,
    output: Output = None,
) -> None:
    """Find the tiles of all slides that are most like one: a table, and a picture of them."""
    if tile is not None and x is None:
        at: tuple[int, int] | str = tile
    elif tile is None and x is not None and y is not None:
        at = (x, y)
    else:
        raise SettingsError("Say which tile: either by a point in it, X and Y, or by --tile.")
    store = _store(input_dir)
    query = find_tile(store, slide, at)
    if query.file.untrained:
        typer.secho(
            f"WARNING: {query.file.encoder} is untrained: to be alike for it means nothing.",
            fg="yellow",
            err=True,
        )
    found = similar_tiles(
        store,
        query,
        count=number,
        other_slides=other_slides,
        tell=lambda text: typer.echo(text, err=True),
    )
    typer.echo(f"Tiles like {query.tile} of {slide}:")
    print_table(found)
    rows = found.to_pylist()
    captions = [f"{row['rank']}: {row['distance']:.3f} {row['label'] or ''}" for row in rows]
    picture = montage(
        store,
        [(slide, query.tile), *((row["slide"], row["tile"]) for row in rows)],
        captions=["query", *captions],
        frames=[_QUERY_FRAME, *[None] * len(rows)],
    )
    name = re.sub(r"[^\w.-]", "_", f"similar_{slide}_{query.tile}")
    _write(output or store.figures / f"{name}.jpeg", picture)


@show.command("cluster")
def show_cluster(
    k: Annotated[int, typer.Argument(help="Number of clusters.")],
    cluster: Annotated[int, typer.Argument(metavar="ID", help="The cluster, from 0.")],
    input_dir: OptionalStore = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Tiles to show.")] = 24,
    output: Output = None,
) -> None:
    """Show a cluster: its numbers, the slides it comes from, and the tiles nearest its centroid."""
    store = _store(input_dir)
    row = run_sql(store, f"FROM cluster_purity WHERE k = {k} AND cluster = {cluster}").to_pylist()
    if not row:
        raise SettingsError(_no_such_cluster(store, k, cluster))
    spread = run_sql(
        store, f"FROM cluster_spread({k}) AS s WHERE s.cluster = {cluster}"
    ).to_pylist()
    print_row({**row[0], **spread[0]})
    slides = run_sql(store, _slides_of(k, cluster))
    typer.echo()
    print_table(slides.slice(0, _SLIDES_TOLD))
    if slides.num_rows > _SLIDES_TOLD:
        typer.echo(f"and {slides.num_rows - _SLIDES_TOLD} slides more.")
    [version] = run_sql(store, "SELECT version FROM model").column("version").to_pylist()
    nearest = prototypes(
        store,
        version,
        k,
        clusters=[cluster],
        count=number,
        slides=slides.column("slide").to_pylist(),
        max_files=_FILES_READ,
    )[cluster]
    picture = montage(
        store,
        [(tile.slide, tile.tile) for tile in nearest],
        captions=[tile.slide for tile in nearest],
    )
    _write(output or store.figures / f"cluster_{k}_{cluster}.jpeg", picture)


def _slides_of(k: int, cluster: int) -> str:
    """The slides a cluster comes from, those that hold most of it first."""
    return f"""
        WITH counted AS (
            SELECT slide, sum(tiles) FILTER (cluster = {cluster}) AS tiles, sum(tiles) AS clustered
            FROM cluster_counts
            WHERE k = {k}
            GROUP BY slide
        )
        SELECT slide, tiles::BIGINT AS tiles, tiles / sum(tiles) OVER () AS share_of_cluster,
            tiles / clustered AS share_of_slide
        FROM counted
        WHERE tiles > 0
        ORDER BY tiles DESC, slide
    """  # noqa: S608 - two numbers


def _no_such_cluster(store: Store, k: int, cluster: int) -> str:
    counts = run_sql(
        store, "SELECT k, max(cluster) AS last FROM cluster_purity GROUP BY k ORDER BY k"
    )
    last = dict(zip(*(column.to_pylist() for column in counts.columns), strict=True))
    if not last:
        return f"{store.root}: no slide has clusters yet; run `histoencoder cluster`."
    if k not in last:
        known = ", ".join(map(str, last))
        return f"There are no {k} clusters; the numbers of clusters are {known}."
    return f"There is no cluster {cluster} of {k} with tiles in it; they are 0 to {last[k]}."


def _write(path: Path, picture: Pixels) -> None:
    form = IMAGE_FORMATS.get(path.suffix.lower())
    if form is None:
        raise SettingsError(f"{path}: a picture's name ends in .jpeg or .png.")
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format=form, quality=_QUALITY)
    typer.echo(f"Picture: {path}")


def _store(input_dir: Path | None) -> Store:
    return Store(input_dir or PlatformSettings().store)
