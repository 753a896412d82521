"""The catalogue of seeded defects."""

from . import computing, routing, running
from .catalogue import CATALOGUE

__all__ = ["CATALOGUE", "computing", "routing", "running"]
