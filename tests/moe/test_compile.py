"""`torch.compile` over batches of many lengths: the same numbers, and no limit of recompiles."""

import pytest
import torch
import torch._dynamo
from torch import nn

from moestro import MoE
from moestro.config import ModelConfig
from moestro.models.build import build_model

# The compiler's own: about graph breaks, and about gradients that it looks for itself.
pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS = {
    "plain": {},
    "sigmoid, shared": {
        "router": {"kind": "sigmoid", "selection_bias": True},
        "shared": {"hidden_dim": 4, "gate": True},
    },
    "capacity": {"capacity": {"factor": 1.0}},
    "capacity of each sequence": {"capacity": {"per_sequence": 2, "priority": "router"}},
}


@pytest.fixture(autouse=True)
def _compiler():
    """A fresh compiler, to which its limit of recompiles is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


class Output(nn.Module):
    """The first of what a module returns."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


def check_lengths(model, make, lengths, backend="eager"):
    """Output and gradients at each length as without the compiler; then without gradients."""
    fast = torch.compile(model, backend=backend)
    for length in lengths:
        x, results = make(length), []
        leaves = [*model.parameters(), *([x] if x.is_floating_point() else [])]
        for each in (fast, model):
            y = each(x)
            results.append((y, *torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer(tiny, kind):
    layer = Output(MoE(tiny(num_experts=8, **LAYERS[kind])))
    make = lambda length: torch.randn(2, length, 8, requires_grad=True)  # noqa: E731
    # One of them with autograd traced ahead of time too, which takes longer.
    backend = "aot_eager" if kind == "plain" else "eager"
    check_lengths(layer, make, range(1, 24), backend)


def test_a_decoder(tiny):
    """Dense blocks and mixtures share the compiler's limits."""
    cfg = ModelConfig(
        vocab_size=32, dim=8, num_layers=2, attention={"num_heads": 2}, dense_first=1,
        dense={"hidden_dim": 12}, moe=tiny(capacity={}),
    )  # fmt: skip
    make = lambda length: torch.randint(0, 32, (2, length))  # noqa: E731
    check_lengths(Output(build_model(cfg)), make, (1, 2, 5, 8, 13, 17, 23))
