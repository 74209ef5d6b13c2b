"""The store: HistoEncoder's folder layout, with provenance and atomic writes.

This package alone knows file names, schemas and how a file is put in place whole::

    <store>/<slide_id>/properties.json, metadata.parquet, features.parquet, clusters.parquet,
                       labels.parquet, thumbnail*.jpeg, tiles/, versions/<fingerprint>/
    <store>/_cohort/   register.json, cluster_models/, catalog.duckdb
"""

from histoencoder_core.store.folder import SlideFolder
from histoencoder_core.store.root import Store
from histoencoder_core.store.stamp import Stamp

__all__ = ["SlideFolder", "Stamp", "Store"]
