"""Annotation by cluster: what clusters mean, written onto slides, and how often it is right."""
