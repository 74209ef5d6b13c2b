"""Tiles: tissue mask, tile grid, quality metrics, and where the pixels of tiles come from.

Flow: `tissue` finds tissue on a slide's overview, and `ink` what must not pass for it; `grid` lays
tiles over it, `quality` measures them, `cut` writes ``metadata.parquet`` with its pictures.
`source` gives the feature stage a slide's tiles, whether they were cut here, by HistoPrep, or are
just a folder of images; `pixels` reads them, neighbours together.
"""

from histoencoder_core.tiles.cut import cut_tiles, tiles_stamp
from histoencoder_core.tiles.source import TileSource, tile_source

__all__ = ["TileSource", "cut_tiles", "tile_source", "tiles_stamp"]
