"""Whatever stands in the place of experts is called as a module, for any number of tokens.

Hooks, wrappers, sharding and casts live around a module's `forward`: nothing may reach past it.
"""

import pytest
import torch
from torch import nn

from moestro import MoE
from moestro.errors import ShapeError
from moestro.kernels.packing import Format
from moestro.moe import mixing
from moestro.moe.experts import FeedForward
from moestro.moe.routing import Routing

ROUTERS = {
    "softmax": {},
    "sigmoid": {"router": {"kind": "sigmoid", "selection_bias": True, "scale": 2.5}},
    "one, kept": {"top_k": 1, "router": {"renormalize": False}},
    "noisy": {"router": {"kind": "noisy_top_k"}},
    "phi": {"router": {"kind": "sparsemixer", "jitter": 0.1}},
    "shared": {"shared": {"hidden_dim": 4, "gate": True}},
    "capacity": {"capacity": {}},
}


def calls_of(module):
    """How often the module is called from now on, as the length of a list."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def pack(owner, name):
    setattr(owner, name, getattr(owner, name).to_packed(Format("int8", 32)))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 4, 40])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_hooks_see_every_call(tiny, kind, num_tokens, gradients):
    layer = MoE(tiny(dim=32, hidden_dim=32, shared={"hidden_dim": 32})).eval()
    if kind == "packed":
        pack(layer, "experts")
        pack(layer, "shared")
    calls = [calls_of(module) for module in (layer.router, layer.experts, layer.shared)]
    with torch.set_grad_enabled(gradients):
        layer(torch.randn(num_tokens, 32))
    assert [len(each) for each in calls] == [1, 1, 1]


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_hooks_result_is_the_layers(tiny, num_tokens):
    layer, x_TD = MoE(tiny()), torch.randn(num_tokens, 8)
    layer.experts.register_forward_hook(lambda module, args, y_TD: 2 * y_TD)
    with torch.no_grad():
        assert torch.equal(layer(x_TD)[0], 2 * layer.experts.forward(x_TD, layer.router(x_TD)))


class Halved(nn.Module):
    """Somebody's adapter around experts."""

    def __init__(self, experts):
        super().__init__()
        self.base = experts

    def forward(self, x_TD, routing):
        return 0.5 * self.base(x_TD, routing)


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_any_module_may_stand_there(tiny, num_tokens):
    layer, x_TD = MoE(tiny()).eval(), torch.randn(num_tokens, 8)
    whole_TD, _ = layer(x_TD)
    layer.experts = Halved(layer.experts)
    with torch.no_grad():
        torch.testing.assert_close(layer(x_TD)[0], 0.5 * whole_TD)


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (1, 2, 3, 8)])
@pytest.mark.parametrize("backend", ["segments", "reference"])
@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_that_carries_gradients_is_returned_as_a_view(tiny, router, backend, shape):
    """FSDP2 hangs its hooks on what a module returns; a change in place of a view loses them."""
    y, routing = MoE(tiny(**ROUTERS[router]), backend)(torch.randn(shape))
    for tensor in (y, *routing):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            assert tensor._base is None


def test_the_dense_network_returns_no_view():
    assert FeedForward(8, 4)(torch.randn(20, 8))._base is None


def test_weights_of_16_bits_are_added_up_in_fp32(tiny):
    """FSDP2's mixed precision casts all that a module is given, the routing's weights too."""
    layer = MoE(tiny(top_k=3)).bfloat16()
    x_TD = torch.randn(20, 8).bfloat16()
    routing = layer.router(x_TD)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        weights_R = routing.weights_R.detach().bfloat16().to(dtype).requires_grad_()
        y_TD = layer.experts(x_TD, routing._replace(weights_R=weights_R))
        results.append((y_TD, torch.autograd.grad(y_TD.float().sin().sum(), weights_R)[0]))
    (low_TD, low_R), (high_TD, high_R) = results
    assert torch.equal(low_TD, high_TD)
    assert torch.equal(low_R, high_R.bfloat16())


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_experts_check_the_dtype_of_what_they_are_given(tiny, num_tokens):
    layer = MoE(tiny())
    x_TD = torch.randn(num_tokens, 8)
    with pytest.raises(ShapeError, match=r"float64.*float32.*autocast"):
        layer.experts(x_TD.double(), layer.router(x_TD))


def test_a_function_in_the_place_of_an_activation():
    """It runs between two products, with the gradients of the fused one."""
    x_TD = torch.randn(9, 8, requires_grad=True)
    up_EHD, down_EDF = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 8, 5)
    any_TE = torch.zeros(9, 3)
    routing = Routing.of_choice(torch.rand(9, 3).topk(2).indices, torch.rand(9, 2), any_TE, any_TE)
    results = []
    for activation in ("relu", torch.relu):
        for backend in ("segments", "reference"):
            weights = mixing.ExpertWeights(up_EHD, down_EDF, activation)
            y_TD = mixing.mix(x_TD, routing, weights, backend)
            results.append((y_TD, *torch.autograd.grad(y_TD.sin().sum(), (x_TD, up_EHD))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
