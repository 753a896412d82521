"""Weights on disk: reading every layout through one function, and writing."""
