import pytest
import torch

from moestro.errors import ShapeError
from moestro.kernels import activations, reference
from moestro.kernels.formats import ACTIVATIONS

# One rounding to bf16 or fp32 per elementwise step, at most four steps.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward_equal_the_definition(activation, rows, dtype):
    hidden_RH = (6 * torch.randn(rows, 10)).to(dtype)  # beyond the cuts
    before_RH = hidden_RH.clone()
    exact_RH = hidden_RH.double().clone().requires_grad_()
    exact_RF = reference.activate(exact_RH, activation)
    grad_RF = torch.randn_like(exact_RF).to(dtype)
    (expected_RH,) = torch.autograd.grad(exact_RF, exact_RH, grad_RF.double())

    act_RF, kept_RF = activations.forward(hidden_RH, activation)
    grad_RH, again_RF = activations.backward(grad_RF, hidden_RH, kept_RF, activation)

    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    assert act_RF.dtype == grad_RH.dtype == again_RF.dtype == dtype
    torch.testing.assert_close(act_RF.double(), exact_RF.detach(), **tolerance)
    torch.testing.assert_close(again_RF.double(), exact_RF.detach(), **tolerance)
    torch.testing.assert_close(grad_RH.double(), expected_RH, **tolerance)
    assert torch.equal(hidden_RH, before_RH), "the hidden rows were overwritten"


@pytest.mark.parametrize("activation", reference.LIMITS)
def test_nothing_flows_back_through_a_cut_input(activation):
    """Gate above the limit, gate below (never cut), up beyond it, and both exactly at the cut."""
    gate, up = [8.0, -8.0, 1.0, 1.0, 7.0, 9.0], [1.0, 1.0, 7.5, -7.5, -7.0, 9.0]
    if activation == "limited_swiglu":
        gate, up = ([each * 10 / 7 for each in values] for values in (gate, up))
    hidden_RH = torch.tensor([gate + up], dtype=torch.float64)
    leaf_RH = hidden_RH.clone().requires_grad_()
    reference.activate(leaf_RH, activation).sum().backward()
    _, kept_RF = activations.forward(hidden_RH, activation)
    ones_RF = torch.ones_like(kept_RF)
    grad_RH, _ = activations.backward(ones_RF, hidden_RH, kept_RF, activation)
    torch.testing.assert_close(grad_RH, leaf_RH.grad)
    flows = [False, True, True, True, True, False, True, True, False, False, True, False]
    assert (grad_RH[0] != 0).tolist() == flows


@pytest.mark.parametrize("activate", [reference.activate, activations.forward])
def test_another_name_is_refused(activate):
    with pytest.raises(ShapeError, match=r"activations are swiglu, .*given 'swish'"):
        activate(torch.randn(2, 8), "swish")
