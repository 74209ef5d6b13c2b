"""Slides in buckets, such as S3's: a folder that stands for each, and copies to read.

::

    bucket ──list──▶ <folder>/listed/…   a file for each object, of its size and time but empty
                           │  is looked at like any folder of slides
                           ▼
    slide is opened ─────▶ <folder>/copies/<hash>/…   all its files, for as long as there is room

A bucket owns the slides; its folder owns nothing: all in it can be removed at any time, and comes
again. Decoders need whole files, so a slide is copied when it is read, not when it is found. The
processes that work on one store share these folders, as they do the store.
"""

from histoencoder_core.buckets.bucket import Bucket, BucketAwayError, as_bucket_url
from histoencoder_core.buckets.copies import copied, drop_copy, find_copy

__all__ = ["Bucket", "BucketAwayError", "as_bucket_url", "copied", "drop_copy", "find_copy"]
