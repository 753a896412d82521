"""Plain experts that lie transposed, alternating or apart: as rows side by side.

In bf16 the same bits; fp32 is summed 32 inputs at a time, the same on every path.
"""

import pytest
import torch

from moestro.errors import ShapeError
from moestro.kernels import native_cpu
from moestro.kernels.native_library import CSteps

pytestmark = pytest.mark.skipif(native_cpu.available() is not None, reason="no native library")

COUNT, BIAS = 3, (torch.randn(3, 90), torch.randn(3, 34))


def transposed(x_EOI):
    """The same numbers, stored as [E, I, O]."""
    return x_EOI.mT.contiguous().mT


def alternating(up_EHD):
    """Gates and what they multiply, of one tensor [E, D, 2F] where they take turns."""
    pair = torch.stack(up_EHD.chunk(2, dim=1), dim=2).flatten(1, 2)
    pair = transposed(pair)
    return pair[:, ::2], pair[:, 1::2]


def apart(up_EHD):
    return tuple(each.contiguous() for each in up_EHD.chunk(2, dim=1))


def widened(x_EOI):
    """Rows that lie further apart than they are long."""
    return torch.cat([x_EOI, torch.full_like(x_EOI, torch.nan)], dim=2)[..., : x_EOI.shape[2]]


FORMS = {
    "transposed": (transposed, transposed),
    "alternating": (alternating, transposed),
    "apart": (apart, transposed),
    "rows apart": (apart, lambda x: x),
    "far apart": (widened, widened),
}


def same(found, expected):
    if found.dtype == torch.bfloat16:
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def mixture(up, down_EDF, activation, tokens, biases=()):
    x_TD = torch.randn(99, down_EDF.shape[1], generator=torch.Generator().manual_seed(5))[:tokens]
    experts_A = torch.arange(2 * tokens) * 7 % COUNT
    tokens_A = torch.arange(tokens).repeat_interleave(2)
    packed = native_cpu.plain_experts(up, down_EDF, activation, *biases)
    weights_A = torch.linspace(0.1, 0.9, 198)[: 2 * tokens]
    return native_cpu.mixture(packed, x_TD.to(down_EDF.dtype), tokens_A, experts_A, weights_A)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "hidden", "tokens"), [(34, 45, 1), (96, 64, 7), (32, 33, 40)])
def test_the_same_bits_wherever_they_lie(dim, hidden, tokens, dtype, form, on_every_path):
    up_EHD = torch.randn(COUNT, 2 * hidden, dim).to(dtype)
    down_EDF = torch.randn(COUNT, dim, hidden).to(dtype)
    if dtype == torch.bfloat16 and hidden % 2:  # rows are read as pairs, so here with a zero beside
        rows = torch.cat([down_EDF, torch.zeros_like(down_EDF)], dim=2)
        gates = (torch.cat([x, torch.zeros_like(x)], dim=1) for x in up_EHD.chunk(2, dim=1))
        expected = mixture(torch.cat([*gates], dim=1), rows, "clamped_swiglu", tokens)
        if form in ("rows apart", "far apart"):
            with pytest.raises(ShapeError, match="even width"):
                mixture(up_EHD, FORMS[form][1](down_EDF), "clamped_swiglu", tokens)
            return
    else:
        expected = mixture(up_EHD, down_EDF, "clamped_swiglu", tokens)
    assert float(expected.abs().max()) > 1
    up, down = FORMS[form][0](up_EHD), FORMS[form][1](down_EDF)
    found = on_every_path(lambda: mixture(up, down, "clamped_swiglu", tokens))
    assert same(found, expected)
    ahead = mixture(up, down, "clamped_swiglu", tokens + 3)
    assert torch.equal(found, ahead[:tokens]), "rows of the batch change each other"


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_biases_and_experts_without_gates(activation):
    up_EHD, down_EDF = (
        torch.randn(3, 90, 34),
        torch.randn(3, 34, 90 if activation == "relu" else 45),
    )
    expected = mixture(up_EHD, down_EDF, activation, 5, BIAS)
    found = mixture(transposed(up_EHD), transposed(down_EDF), activation, 5, BIAS)
    assert same(found, expected)
    assert not torch.equal(found, mixture(up_EHD, down_EDF, activation, 5))


def test_what_does_not_fit_is_refused():
    gates_EFD, down_EDF = torch.randn(3, 45, 34), torch.randn(3, 34, 45)
    for other, words in (
        (transposed(gates_EFD), "equal strides; given .*contiguous"),
        (gates_EFD[:, :44], "must be float32"),
        (gates_EFD.bfloat16(), "must be float32"),
    ):
        with pytest.raises(ShapeError, match=words):
            mixture((gates_EFD, other), down_EDF, "swiglu", 2)
    one_number = torch.ones(1, 1, 1).expand(3, 34, 45)
    with pytest.raises(ShapeError, match="no one number for all"):
        mixture((gates_EFD, gates_EFD), one_number, "swiglu", 2)


@pytest.mark.parametrize("size", [(1, 34, 45), (3, 34, 1), (3, 1, 45), (1, 1, 1)])
def test_strides_of_axes_of_one_mean_nothing(size):
    """Gates and what they multiply differ in these alone."""
    count, dim, hidden = size
    up_EHD, down_EDF = torch.randn(count, 2 * hidden, dim), torch.randn(count, dim, hidden)
    gates, other = apart(up_EHD)
    steps = [step if n > 1 else 7 for n, step in zip(other.shape, other.stride(), strict=True)]
    odd = other.as_strided(other.shape, steps)
    assert odd.stride() != gates.stride()
    experts_A, tokens_A, x_TD = torch.arange(count), torch.arange(count), torch.randn(count, dim)
    weights_A = torch.ones(count)

    def run(pair):
        packed = native_cpu.plain_experts(pair, down_EDF, "swiglu")
        return native_cpu.mixture(packed, x_TD, tokens_A, experts_A, weights_A)

    assert torch.equal(run((gates, odd)), run((gates, other)))


@pytest.mark.parametrize("field", ["up_steps", "down_steps"])
@pytest.mark.parametrize("steps", [(0, 0, 0), (1530, 0, 0), (-1, 34, 1), (0, -1, 1), (0, 1, -1)])
def test_native_code_refuses_steps_that_cannot_be(field, steps, monkeypatch):
    plain_of = native_cpu._plain_of
    lie = {field: CSteps(*steps)}
    monkeypatch.setattr(native_cpu, "_plain_of", lambda packed: plain_of(packed)._replace(**lie))
    with pytest.raises(ShapeError, match="native kernels take"):
        mixture(torch.randn(3, 90, 34), torch.randn(3, 34, 45), "swiglu", 2)
