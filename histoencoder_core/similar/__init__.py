"""Nearest tiles over the cohort by cosine distance."""
