"""The catalogue of seeded defects."""

from . import adapting, computing, routing, running
from .catalogue import CATALOGUE

__all__ = ["CATALOGUE", "adapting", "computing", "routing", "running"]
