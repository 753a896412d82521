"""Weights on disk: one door to every layout, and what is written."""
