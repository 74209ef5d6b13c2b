"""Figures of the cohort, and the page that joins them."""
