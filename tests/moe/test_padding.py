"""Padding is never seen: NaN in it reaches no output, no loss and no gradient of a layer."""

import math

import pytest
import torch

from moestro import MoE
from moestro.moe import balance

ROUTERS = {
    "softmax": {"router": {"bias": True}},
    "sigmoid": {"router": {"kind": "sigmoid", "selection_bias": True, "num_groups": 2}},
    "noisy": {"router": {"kind": "noisy_top_k"}},
    "sparsemixer": {"router": {"kind": "sparsemixer", "jitter": 0.05}},
    "hash": {"router": {"kind": "hash"}},
    "expert choice": {"router": {"kind": "expert_choice"}},
    "capacity": {"capacity": {"factor": 0.8, "eval_factor": 0.8}},
}
VALID = torch.tensor([[True] * 6, [True] * 2 + [False] * 4, [False] * 6, [False] + [True] * 5])


def layer_of(tiny, router, backend="auto"):
    inside = {"experts": {"bias": True}, "shared": {"hidden_dim": 6, "gate": True}}
    layer = MoE(tiny(init_scale=4.0, **inside, **ROUTERS[router]), backend).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def run(layer, x, ids, valid=None):
    """(y, counts, losses, gradients of the parameters and of x); every row of y is in the loss."""
    x = x.clone().requires_grad_()
    y, routing = layer(x, token_ids=ids, valid=valid)
    losses = [balance.switch_loss(routing), balance.importance_loss(routing)]
    losses.append(balance.z_loss(routing))
    if routing.load_TE is not None:
        losses.append(balance.load_loss(routing))
    total = (y + y.square()).sum() + sum(losses)
    wanted = [x, *layer.parameters()]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return y, routing.counts_E(), losses, gradients


@pytest.fixture(params=ROUTERS)
def router(request):
    return request.param


@pytest.mark.filterwarnings("ignore:expert_choice routing is not causal")
@pytest.mark.parametrize("backend", ["reference", "segments"])
def test_a_padded_batch_is_the_batch_without_padding(tiny, router, backend):
    layer = layer_of(tiny, router, backend).eval()
    x, ids = torch.randn(4, 6, 8, dtype=torch.float64), torch.randint(0, 50, (4, 6))
    x[~VALID] = math.nan
    y, counts_E, losses, (grad_x, *gradients) = run(layer, x, ids, VALID)
    alone, alone_E, alone_losses, (alone_x, *alone_gradients) = run(layer, x[VALID], ids[VALID])
    assert not y[~VALID].any()
    assert not grad_x[~VALID].any()
    assert torch.equal(counts_E, alone_E)
    found = [y[VALID], grad_x[VALID], *losses, *gradients]
    for a, b in zip(found, [alone, alone_x, *alone_losses, *alone_gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:expert_choice routing is not causal")
def test_in_training_everything_stays_finite(tiny, router):
    """With jitter, noise and dropout; and with a gradient of NaN, as of a later attention."""
    layer = layer_of(tiny, router).train()
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    x[~VALID] = math.nan
    x.requires_grad_()
    y, routing = layer(x, token_ids=torch.randint(0, 50, (4, 6)), valid=VALID)
    grad_y = torch.randn_like(y)
    grad_y[~VALID] = math.nan
    ((y * grad_y).sum() + balance.z_loss(routing)).backward()
    assert y.isfinite().all()
    for name, parameter in [("x", x), *layer.named_parameters()]:
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.filterwarnings("ignore:expert_choice routing is not causal")
def test_nothing_but_padding(tiny, router):
    layer = layer_of(tiny, router).eval()
    x = torch.full((2, 3, 8), math.nan, dtype=torch.float64)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    y, counts_E, losses, gradients = run(layer, x, torch.zeros(2, 3).long(), nothing)
    assert not y.any()
    assert not counts_E.any()
    assert not any(losses)
    assert not any(gradient.any() for gradient in gradients)
