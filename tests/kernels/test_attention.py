"""Short causal attention equals torch's own, with all gradients, whatever the length and heads."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from moestro.kernels import attention

# bf16 keeps 8 bits; scores, probabilities and results are each rounded once.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def run(function, q, k, v, grad):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = function(*leaves)
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("length", [1, 7, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
def test_equals_torchs_attention(dtype, length, heads, groups):
    torch.manual_seed(length)
    q = torch.randn(2, heads, length, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, length, 8, dtype=torch.float64)
    grad = torch.randn_like(q)
    fast = run(attention.short_causal, *(x.to(dtype) for x in (q, k, v, grad)))
    slow = run(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        *(x.to(dtype).double() for x in (q, k, v, grad)),
    )
    for a, b in zip(fast, slow, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_transposed_and_expanded_inputs_and_gradients():
    q, k, v = torch.randn(3, 2, 9, 2, 4, dtype=torch.float64).transpose(2, 3)
    grad = torch.ones((), dtype=torch.float64).expand(q.shape)
    fast = run(attention.short_causal, q, k, v, grad)
    slow = run(lambda *x: scaled_dot_product_attention(*x, is_causal=True), q, k, v, grad)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)


def test_the_future_is_not_seen():
    q, k, v = torch.randn(3, 1, 1, 200, 4)
    before = attention.short_causal(q, k, v)
    k[..., 150:, :], v[..., 150:, :] = 99.0, 99.0
    after = attention.short_causal(q, k, v)
    assert torch.equal(before[..., :150, :], after[..., :150, :])
    assert not torch.equal(before[..., 150:, :], after[..., 150:, :])


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 3)
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(attention.short_causal, (q, k, v))


@pytest.mark.parametrize(
    ("length", "dtype", "training", "short"),
    [
        (16, torch.bfloat16, True, True),
        (attention.LONGEST + 1, torch.bfloat16, True, False),
        (16, torch.float32, True, False),
        (16, torch.bfloat16, False, False),
    ],
)
def test_the_short_path_is_taken_where_it_is_faster(monkeypatch, length, dtype, training, short):
    called = []
    monkeypatch.setattr(attention, "short_causal", lambda q, k, v: called.append(1) or q)
    q = torch.randn(1, 1, length, 2, dtype=dtype, requires_grad=training)
    attention.causal(q, q, q)
    assert bool(called) == short
