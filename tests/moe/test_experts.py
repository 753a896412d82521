import pytest
import torch

from moestro.kernels import reference
from moestro.moe.experts import Experts, FeedForward
from moestro.moe.mixing import compute_dtype
from moestro.moe.routing import Routing

KINDS = ("swiglu", "geglu", "clamped_swiglu", "relu", "gelu")


def routed(experts_T, num_experts):
    """Each token to one expert, with weight 1."""
    experts_T1 = torch.tensor(experts_T)[:, None]
    any_TE = torch.zeros(len(experts_T), num_experts)
    return Routing.of_choice(experts_T1, torch.ones(experts_T1.shape), any_TE, any_TE)


@pytest.mark.parametrize("activation", KINDS)
def test_layout_of_the_weights(activation):
    experts = Experts(3, 8, 5, activation)
    width = 5 if activation in ("relu", "gelu") else 10
    plain = {"gate_up": (3, width, 8), "down": (3, 8, 5)}
    assert {name: tuple(p.shape) for name, p in experts.state_dict().items()} == plain
    experts = Experts(3, 8, 5, activation, bias=True)
    shapes = {name: tuple(p.shape) for name, p in experts.state_dict().items()}
    assert shapes == plain | {"gate_up_bias": (3, width), "down_bias": (3, 8)}
    assert not experts.gate_up_bias.any()
    assert not experts.down_bias.any()


@pytest.mark.parametrize("activation", KINDS)
def test_equal_the_definition(activation):
    experts = Experts(3, 8, 5, activation)
    x_TD, weights = torch.randn(9, 8), (experts.gate_up, experts.down)
    expected_TD = reference.expert_ffn(x_TD, *weights, torch.tensor([4, 4, 9]), activation)
    torch.testing.assert_close(experts(x_TD, routed([0] * 4 + [2] * 5, 3)), expected_TD)


def test_gate_rows_come_first():
    experts = Experts(1, 2, 1, "swiglu").double()
    with torch.no_grad():
        experts.gate_up.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
        experts.down.fill_(1)
    x_RD = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    expected = torch.nn.functional.silu(torch.tensor(2.0, dtype=torch.float64)) * 3
    torch.testing.assert_close(experts(x_RD, routed([0], 1)), expected.expand(1, 2))


def test_a_feed_forward_network_is_a_mixture_of_one():
    dense = FeedForward(8, 5, "geglu")
    x_TD = torch.randn(7, 8)
    gate_TF, up_TF = (x_TD @ dense.gate_up[0].T).chunk(2, -1)
    expected = (torch.nn.functional.gelu(gate_TF) * up_TF) @ dense.down[0].T
    torch.testing.assert_close(dense(x_TD), expected)
    assert dense(x_TD[:0]).shape == (0, 8)


@pytest.mark.parametrize(("scale", "std"), [(1.0, 0.1), (0.1, 0.1 / 10**0.5)])
def test_initial_scale(scale, std):
    experts = Experts(4, 100, 400, init_scale=scale)
    assert experts.gate_up.std().item() == pytest.approx(0.88 * std, rel=0.05)
    assert experts.down.std().item() == pytest.approx(0.88 * std / 2, rel=0.05)


def test_dropout_zeroes_hidden_units_in_training_only():
    """ReLU experts of ones: the output counts the hidden units kept, rescaled to the mean."""
    experts = Experts(2, 1, 1000, "relu", dropout=0.4)
    with torch.no_grad():
        experts.gate_up.fill_(1)
        experts.down.fill_(1)
    x_TD, routing = torch.ones(50, 1), routed([0] * 20 + [1] * 30, 2)
    assert (experts.eval()(x_TD, routing) == 1000).all()
    kept_T = experts.train()(x_TD, routing)[:, 0] * 0.6
    assert kept_T.mean().item() == pytest.approx(600, rel=0.02)
    assert kept_T.std() > 5
    assert Experts(2, 1, 4, dropout=0.0).train()(x_TD, routing).isfinite().all()


def test_dropout_keeps_the_biases():
    """ReLU experts without matrices: only the up bias is dropped, the down bias stays."""
    experts = Experts(2, 1, 1000, "relu", dropout=0.4, bias=True)
    with torch.no_grad():
        experts.gate_up.fill_(0)
        experts.gate_up_bias.copy_(torch.tensor([[1.0], [2.0]]).expand(2, 1000))
        experts.down.fill_(1)
        experts.down_bias.copy_(torch.tensor([[5000.0], [7000.0]]))
    y_T = experts.train()(torch.ones(50, 1), routed([0] * 20 + [1] * 30, 2))[:, 0]
    assert y_T[:20].mean().item() == pytest.approx(6000, rel=0.01)
    assert y_T[20:].mean().item() == pytest.approx(9000, rel=0.01)
    assert y_T[:20].std() > 5
    y_T.sum().backward()
    assert experts.down_bias.grad.flatten().tolist() == [20, 30]
    assert experts.gate_up_bias.grad.sum(-1).tolist() == pytest.approx([20e3, 30e3], rel=0.02)


def test_compute_dtype():
    x = torch.zeros(1)
    assert compute_dtype(x) == torch.float32
    assert compute_dtype(x.double()) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16
