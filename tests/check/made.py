"""Factories that the command line is given by name, one of them with a defect."""

import torch

from moestro import MoE, MoEConfig

from .defects.computing import EarlyReturn, GradientsDoubled
from .plain_layer import SHAPES, factory

clean = factory(SHAPES["deepseek"])
doubled = factory(SHAPES["mixtral"], GradientsDoubled)
early = factory(SHAPES["mixtral"], EarlyReturn)


def ours():
    """A layer of this project."""
    torch.manual_seed(0)
    return MoE(MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2))


def raises():
    """A factory with a mistake."""
    raise KeyError("experts")
