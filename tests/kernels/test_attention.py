"""Attention against its definition and torch's own: every mask, sinks, biases, all gradients."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from moestro.kernels import attention, reference_attention

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
    monkeypatch.setattr(attention, "short_causal", lambda q, *_: called.append(1) or q)
    q = torch.randn(1, 1, length, 2, dtype=dtype, requires_grad=training)
    attention.causal(q, q, q)
    assert bool(called) == short


# (S, P): whole texts, one new position, a few of many.
LENGTHS = [(1, 1), (7, 7), (1, 9), (4, 11), (9, 9)]
FEATURES = [
    set(features)
    for count in range(5)
    for features in itertools.combinations(["window", "sinks", "bias", "valid"], count)
] + [{"chosen"}, {"chosen", "window", "valid"}, {"chosen", "sinks", "bias"}]


def random_case(features, length, span, heads=(4, 2), width=4, value_width=4):
    """Arguments of `attend`, float64, every float tensor wanting a gradient."""
    q = torch.randn(2, heads[0], length, width, dtype=torch.float64)
    k = torch.randn(2, heads[1], span, width, dtype=torch.float64)
    v = torch.randn(2, heads[1], span, value_width, dtype=torch.float64)
    options = {}
    if "window" in features:
        options["window"] = 3
    if "sinks" in features:
        options["sinks_H"] = torch.randn(heads[0], dtype=torch.float64)
    if "bias" in features:
        options["bias_HSP"] = torch.randn(heads[0], length, span, dtype=torch.float64)
    if "valid" in features:
        options["valid_BP"] = torch.rand(2, span) < 0.6
    if "chosen" in features:
        chosen_BSP = torch.rand(2, length, span) < 0.6
        own_S = torch.arange(length)
        chosen_BSP[:, own_S, own_S + span - length] = True
        options["chosen_BSP"] = chosen_BSP
    for tensor in (q, k, v, *options.values()):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_()
    return (q, k, v), options


def attended(function, tensors, options, grad):
    """The result, and the gradients of all that has one."""
    y = function(*tensors, **options)
    leaves = [*tensors, *(t for t in options.values() if getattr(t, "requires_grad", False))]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def attend(q_BHSA, k_BGPA, v_BGPA, chosen_BSP=None, **options):
    """`attention.attend`, with the definition's argument."""
    if chosen_BSP is not None:
        first = chosen_BSP.shape[2] - chosen_BSP.shape[1]

        def choose(own, keys, seen):
            rows = slice(own.start - first, own.stop - first)
            return seen & chosen_BSP[:, None, rows, keys.start : keys.stop]

        options["choose"] = choose
    return attention.attend(q_BHSA, k_BGPA, v_BGPA, **options)


@pytest.mark.parametrize("features", FEATURES, ids=lambda f: "+".join(sorted(f)) or "plain")
@pytest.mark.parametrize(("length", "span"), LENGTHS)
@pytest.mark.parametrize("rows", [3, 256])
def test_attend_equals_its_definition(monkeypatch, features, length, span, rows):
    monkeypatch.setattr(attention, "ROWS", rows)
    tensors, options = random_case(features, length, span)
    grad = torch.randn(2, 4, length, 4, dtype=torch.float64)
    fast = attended(attend, tensors, options, grad)
    slow = attended(reference_attention.attend, tensors, options, grad)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("features", FEATURES, ids=lambda f: "+".join(sorted(f)) or "plain")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 256])
def test_attend_without_gradients(monkeypatch, features, dtype, rows):
    """As when generating: with sinks, another kernel than in training."""
    monkeypatch.setattr(attention, "ROWS", rows)
    for length, span in LENGTHS:
        tensors, options = random_case(features, length, span)
        tensors = [t.to(dtype) for t in tensors]
        low = {n: t.to(dtype) if n[:5] in ("sinks", "bias_") else t for n, t in options.items()}
        with torch.inference_mode():
            y = attend(*tensors, **low)
        assert y.dtype == dtype
        exact = reference_attention.attend(
            *(t.double() for t in tensors),
            **{n: t.double() if n[:5] in ("sinks", "bias_") else t for n, t in low.items()},
        )
        tolerance = max(TOLERANCES[dtype], 1e-9)
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)])
@pytest.mark.parametrize("value_width", [2, 7])
@pytest.mark.parametrize("features", [set(), {"sinks"}, {"window", "bias"}, {"valid"}])
def test_attend_takes_any_heads_scale_and_width_of_values(heads, value_width, features):
    for length, span in LENGTHS:
        tensors, options = random_case(features, length, span, heads, 4, value_width)
        options["scale"] = 0.9
        grad = torch.randn(2, heads[0], length, value_width, dtype=torch.float64)
        fast = attended(attend, tensors, options, grad)
        slow = attended(reference_attention.attend, tensors, options, grad)
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [set(), {"sinks", "window"}, {"bias"}, {"sinks", "bias"}])
def test_attend_in_the_dtype_it_is_given(dtype, features):
    for length, span in LENGTHS:
        tensors, options = random_case(features, length, span)
        low = {n: t.to(dtype) if n.endswith(("_H", "_HSP")) else t for n, t in options.items()}
        y = attention.attend(*(t.to(dtype) for t in tensors), **low)
        exact = reference_attention.attend(*tensors, **options)
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_sink_takes_attention():
    """With one key, its value times the logistic function of score - sink."""
    q, k, v = torch.randn(3, 1, 1, 1, 4, dtype=torch.float64)
    sink = torch.tensor([0.7], dtype=torch.float64)
    score = (q * k).sum() / 2
    y = attention.attend(q, k, v, sinks_H=sink)
    torch.testing.assert_close(y, v * (score - sink).sigmoid())


def test_gradcheck_of_sinks_and_bias(monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 3)
    (q, k, v), options = random_case({"sinks", "bias"}, 4, 6, width=2, value_width=2)

    def attend(q, k, v, sinks_H, bias_HSP):
        return attention.attend(q, k, v, window=3, sinks_H=sinks_H, bias_HSP=bias_HSP)

    leaves = (q[:1], k[:1], v[:1], options["sinks_H"], options["bias_HSP"])
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(attend, leaves)


def test_no_mask_where_none_is_needed(monkeypatch):
    """Training without padding, and one new token however long the text: plain attention."""

    def refuse(*_):
        raise AssertionError("a mask was made")

    monkeypatch.setattr(attention, "visible", refuse)
    for features in (set(), {"sinks"}, {"bias"}):
        for length, span in [(1, 1), (1, 8)]:
            tensors, options = random_case(features, length, span)
            attention.attend(*tensors, **options, window=8)
    tensors, _ = random_case(set(), 8, 8)
    attention.attend(*tensors, window=8)


def test_a_window_is_not_paid_for_beyond_it(monkeypatch):
    """Blocks of a long text take the keys of their window only."""
    spans = []
    fused = attention._fused

    def counted(q, k, *rest):
        spans.append(k.shape[2])
        return fused(q, k, *rest)

    monkeypatch.setattr(attention, "_fused", counted)
    monkeypatch.setattr(attention, "ROWS", 16)
    q = torch.randn(1, 1, 64, 4)
    attention.attend(q, q, q, window=8)
    assert spans == [16, 23, 23, 23]


BOTH_WAYS = [set(features) for features in ([], ["bias"], ["valid"], ["bias", "valid"])]


@pytest.mark.parametrize("features", BOTH_WAYS, ids=lambda f: "+".join(sorted(f)) or "plain")
@pytest.mark.parametrize(("length", "span"), [*LENGTHS, (11, 4)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_bidirectional_attention_equals_its_definition(features, length, span, heads):
    """Of an encoder, and of a decoder to an encoder's output.

    One text is padding alone: its result is a number, and its gradient means nothing.
    """
    tensors, options = random_case(features, length, span, heads)
    grad = torch.randn(2, 4, length, 4, dtype=torch.float64)
    if "valid" in features:
        options["valid_BP"][0, :2] = True
        options["valid_BP"][1] = False
        grad[1] = 0
    options["bidirectional"] = True
    fast = attended(attend, tensors, options, grad)
    slow = attended(reference_attention.attend, tensors, options, grad)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)
    with torch.inference_mode():
        y = attention.attend(*(t.bfloat16() for t in tensors), **options)
    torch.testing.assert_close(y.double(), slow[0], rtol=4e-2, atol=4e-2)
