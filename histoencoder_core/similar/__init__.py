"""Nearest tiles over the cohort by cosine distance, and the tiles that show a cluster best.

Flow: `query` finds the tile whose like is looked for, `nearest` asks `exact`, which looks at every
tile, or in large cohorts `index`, which knows where to look, and gives a table. `prototypes` reads
the distances to centroids that assigning wrote.
"""

from histoencoder_core.similar.nearest import similar_tiles
from histoencoder_core.similar.prototypes import Prototype, prototypes
from histoencoder_core.similar.query import QueryTile, find_tile

__all__ = ["Prototype", "QueryTile", "find_tile", "prototypes", "similar_tiles"]
