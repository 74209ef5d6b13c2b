"""From a scanned slide to SQL over clusters, without an orchestrator.

Data flows one way. Each stage is a sub-package with the same name as its Dagster asset, reads the
files of the stages before it and owns exactly the files it writes into a slide's folder:

========  ==============================================  =========================================
stage     reads                                           owns (in ``<store>/<slide_id>/``)
========  ==============================================  =========================================
slides    a slide file, ``slides.csv``                    ``properties.json``, ``thumbnail.jpeg``
tiles     the slide's overview                            ``metadata.parquet``, ``tiles/``,
                                                          ``thumbnail_tissue.jpeg``,
                                                          ``thumbnail_tiles.jpeg``
features  the tiles' pixels, an encoder                   ``features.parquet``
clusters  features; the cohort's current cluster model    ``clusters.parquet``,
                                                          ``thumbnail_clusters.jpeg``
labels    annotations, the tile grid                      ``labels.parquet``
cohort    all of the above                                ``<store>/_cohort/catalog.duckdb``
========  ==============================================  =========================================

``settings`` says what is asked for, ``store`` is the only place that knows file names, schemas and
how a file is written whole, ``functional`` is HistoEncoder's own functional API, and ``cli`` the
command line. Nothing here imports Dagster.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("histoencoder-platform")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
