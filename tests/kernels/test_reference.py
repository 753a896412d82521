"""The definitions themselves, against scalar arithmetic and tensors worked out by hand."""

import math

import pytest
import torch

from moestro.kernels import reference


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def clamped(gate: float, up: float) -> float:
    gate, up = min(gate, 7.0), max(-7.0, min(up, 7.0))
    return gate / (1 + math.exp(-1.702 * gate)) * (up + 1)


def limited(gate: float, up: float) -> float:
    gate, up = min(gate, 10.0), max(-10.0, min(up, 10.0))
    return gate / (1 + math.exp(-gate)) * up


def capped(gate: float, up: float) -> float:
    return min(gate / (1 + math.exp(-gate)), 7.0) * max(-7.0, min(up, 7.0))


def by_tanh(gate: float) -> float:
    return gate / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("swiglu", lambda gate, up: gate / (1 + math.exp(-gate)) * up),
        ("geglu", lambda gate, up: gate * phi(gate) * up),
        ("clamped_swiglu", lambda gate, up: clamped(gate, up)),
        ("geglu_tanh", lambda gate, up: by_tanh(gate) * up),
        ("limited_swiglu", lambda gate, up: limited(gate, up)),
        ("capped_swiglu", lambda gate, up: capped(gate, up)),
        ("relu", lambda gate, up: max(gate, 0.0)),
        ("relu2", lambda gate, up: max(gate, 0.0) ** 2),
        ("gelu", lambda gate, up: gate * phi(gate)),
    ],
)
def test_activations_by_their_formulas(activation, formula):
    gate, up = [-12.0, -2.0, -0.5, 0.0, 0.7, 12.0], [1.0, 1.0, -2.0, 8.0, 11.5, -9.0]
    gated = activation in reference.GATED
    hidden_RH = torch.tensor([gate + up if gated else gate], dtype=torch.float64)
    expected = [formula(g, u) for g, u in zip(gate, up, strict=True)]
    assert reference.activate(hidden_RH, activation)[0].tolist() == pytest.approx(expected)


def test_grouped_mm_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [math.nan, math.nan]])
    w = torch.tensor([[[1.0, 0.0]], [[7.0, 7.0]], [[0.0, 10.0]]])
    # Expert 0 has row 0, expert 1 nothing, expert 2 rows 1 and 2; row 3 belongs to nobody.
    y = reference.grouped_mm(x, w, torch.tensor([1, 1, 3]))
    assert y.tolist() == [[1.0], [40.0], [60.0], [0.0]]


def test_expert_ffn_by_hand():
    gate, up, down = 2.0, 3.0, 5.0
    x = torch.tensor([[1.5]], dtype=torch.float64)
    up_EHD = torch.tensor([[[gate], [up]]], dtype=torch.float64)
    down_EDF = torch.tensor([[[down]]], dtype=torch.float64)
    y = reference.expert_ffn(x, up_EHD, down_EDF, torch.tensor([1]), "swiglu")
    silu = 3.0 / (1 + math.exp(-3.0))
    assert y.item() == pytest.approx(down * silu * 4.5)


def test_a_function_stands_for_itself():
    assert reference.activate(torch.tensor([[2.0]]), lambda hidden: hidden**3).item() == 8


def test_mixture_by_hand():
    x = torch.tensor([[1.0], [2.0], [3.0]])
    up_EHD = torch.tensor([[[1.0]], [[10.0]]])
    down_EDF = torch.ones(2, 1, 1)
    tokens_R, experts_R = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1])
    weights_R = torch.tensor([0.25, 0.75, 0.5])
    y = reference.mixture(x, tokens_R, experts_R, weights_R, up_EHD, down_EDF, "relu")
    assert y.tolist() == [[0.25 + 7.5], [0.0], [15.0]]


def test_biases_by_hand():
    """The down bias is part of what the weight multiplies; a row of nobody gets none."""
    x = torch.tensor([[1.0], [2.0], [3.0]])
    weights = (torch.tensor([[[1.0]], [[10.0]]]), torch.tensor([[[2.0]], [[3.0]]]))
    biases = reference.Biases(torch.tensor([[-1.5], [5.0]]), torch.tensor([[100.0], [200.0]]))
    y = reference.expert_ffn(x, *weights, torch.tensor([1, 2]), "relu", None, biases)
    assert y.tolist() == [[100.0], [275.0], [0.0]]
    who = (torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1]), torch.tensor([0.25, 0.5, 2.0]))
    y = reference.mixture(x, *who, *weights, "relu", biases)
    assert y.tolist() == [[25.0 + 122.5], [0.0], [2 * 305.0]]


def test_what_is_not_kept_takes_no_part():
    """Nor does what its token holds, in values and in gradients."""
    x = torch.tensor([[1.0], [math.nan], [3.0]], requires_grad=True)
    up_EHD, down_EDF = (torch.tensor(each, requires_grad=True) for each in (
        [[[1.0]], [[10.0]]], [[[2.0]], [[3.0]]]
    ))  # fmt: skip
    who = (torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0]))
    weights_R = torch.tensor([0.25, 0.75, 9.0, 0.5], requires_grad=True)
    kept_R = torch.tensor([True, False, False, True])
    y = reference.mixture(x, *who, weights_R, up_EHD, down_EDF, "relu", None, kept_R)
    assert y.tolist() == [[0.5], [0.0], [3.0]]
    y.sum().backward()
    assert x.grad.tolist() == [[0.5], [0.0], [1.0]]
    assert weights_R.grad.tolist() == [2.0, 0.0, 0.0, 6.0]
    assert up_EHD.grad.flatten().tolist() == [0.25 * 2 + 0.5 * 2 * 3, 0.0]
    assert down_EDF.grad.flatten().tolist() == [0.25 + 0.5 * 3, 0.0]


def test_mixture_of_no_tokens():
    y = reference.mixture(
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0),
        torch.zeros(2, 6, 4),
        torch.zeros(2, 4, 3),
        "swiglu",
    )
    assert y.shape == (0, 4)


@pytest.mark.parametrize("rows", [0, 3])
def test_without_rows_every_gradient_is_zero_rather_than_missing(rows):
    """A rank whose experts get no token must still take part in the backward."""
    x = torch.randn(rows, 4, requires_grad=True)
    w = torch.randn(2, 3, 4, requires_grad=True)
    reference.grouped_mm(x, w, torch.tensor([0, 0])).sum().backward()
    assert w.grad is not None
    assert not w.grad.any()
    assert x.grad is not None
    assert not x.grad.any()
