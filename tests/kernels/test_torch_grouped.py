"""Every backend against the definition in float64: outputs and all gradients, on odd shapes."""

import pytest
import torch

from moestro.kernels import native_training, reference, torch_grouped
from moestro.kernels.reference import Biases

# Relative error allowed, measured against the largest value of the compared tensor. Each backend
# computes in `dtype` with fp32 accumulation or better, so what is left is rounding of the inputs'
# products: a few units in the last place (fp64 2e-16, fp32 1e-7, bf16 4e-3), times the three
# roundings between the input and an outermost gradient (hidden, activated, gradient of hidden).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}

SEGMENTS = (torch_grouped.SEGMENTS.grouped_mm, torch_grouped.SEGMENTS.expert_ffn)
TORCH = (torch_grouped.TORCH.grouped_mm, torch_grouped.TORCH.expert_ffn)
NATIVE = (native_training.NATIVE.grouped_mm, native_training.expert_ffn)
NO_TILES = native_training.reason_against("cpu", torch.bfloat16, ())
BACKENDS = [
    pytest.param(SEGMENTS, torch.float64, id="segments-fp64"),
    pytest.param(SEGMENTS, torch.float32, id="segments-fp32"),
    pytest.param(SEGMENTS, torch.bfloat16, id="segments-bf16"),
    # torch's grouped_mm has no float64.
    pytest.param(TORCH, torch.float32, id="torch-fp32"),
    pytest.param(TORCH, torch.bfloat16, id="torch-bf16"),
    pytest.param(
        NATIVE,
        torch.bfloat16,
        id="native-bf16",
        marks=pytest.mark.skipif(NO_TILES is not None, reason=str(NO_TILES)),
    ),
]
# Rows of each expert, and rows past the last offset.
SHAPES = {
    "no rows": ((0, 0, 0), 0),
    "only rows of nobody": ((0, 0), 3),
    "one row": ((0, 1, 0), 0),
    "seven, one expert empty": ((4, 0, 3), 0),
    "first and last empty": ((0, 5, 2, 0), 0),
    "all rows to one": ((0, 0, 7, 0), 0),
    "a single expert": ((7,), 0),
    "equal neighbours": ((4, 4, 4), 0),
    "equal neighbours around an empty expert": ((3, 3, 0, 3, 3, 3, 5, 0), 3),
    "63": ((20, 1, 0, 41, 1), 0),
    "63 and a tail": ((20, 1, 0, 41, 1), 5),
    "tail after an empty expert": ((3, 4, 0), 2),
}
ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu", "relu", "gelu")
D, F = 32, 64


def make_case(shape, activation, dtype, weight_dtype=None):
    counts, tail = SHAPES[shape]
    offsets_E = torch.tensor(counts).cumsum(0)
    rows = sum(counts) + tail
    width = 2 * F if activation in reference.GATED else F
    x_RD = torch.randn(rows, D).to(dtype)
    up_EHD = (torch.randn(len(counts), width, D) / D**0.5).to(weight_dtype or dtype)
    down_EDF = (torch.randn(len(counts), D, F) / F**0.5).to(weight_dtype or dtype)
    grad_RD = torch.randn(rows, D).to(dtype)
    if tail:
        x_RD[-tail:] = float("nan")
        grad_RD[-tail:] = float("nan")
    return x_RD, up_EHD, down_EDF, offsets_E, grad_RD


def run(function, inputs, grad, *rest):
    """Output and gradients of `function(*inputs, *rest)`."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves, *rest)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(actual, expected, dtype):
    for tensor, exact in zip(actual, expected, strict=True):
        assert tensor.shape == exact.shape
        assert tensor.isfinite().all()
        scale = exact.abs().max().item() if exact.numel() else 1.0
        error = (tensor.double() - exact).abs().max().item() if exact.numel() else 0.0
        assert error <= TOLERANCE[dtype] * max(scale, 1e-3), (error, scale)


def exact(function, inputs, grad, offsets_E, *rest):
    """The definition in float64 on the same numbers; the tail gets no gradient."""
    end = int(offsets_E[-1])
    leaves = [tensor.detach().double().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves, offsets_E, *rest)
    total = (output[:end] * grad[:end].double()).sum() + 0 * sum(leaf[:0].sum() for leaf in leaves)
    return [output.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_expert_ffn(backend, dtype, shape, activation):
    *inputs, offsets_E, grad_RD = make_case(shape, activation, dtype)
    actual = run(backend[1], inputs, grad_RD, offsets_E, activation)
    expected = exact(reference.expert_ffn, inputs, grad_RD, offsets_E, activation)
    assert all(tensor.dtype == dtype for tensor in actual)
    assert_same(actual, expected, dtype)
    end = int(offsets_E[-1])
    assert not actual[0][end:].any()
    assert not actual[1][end:].any()


def biased(expert_ffn):
    """`expert_ffn` with its biases among the first inputs, as `run` and `exact` want them."""
    return lambda x, up, down, up_EH, down_ED, offsets_E, activation, experts_E=None: expert_ffn(
        x, up, down, offsets_E, activation, experts_E, Biases(up_EH, down_ED)
    )


def with_biases(inputs, dtype):
    _, up_EHD, down_EDF = inputs
    return [*inputs, *(torch.randn(w.shape[:2]).to(dtype) for w in (up_EHD, down_EDF))]


# No ReLU: in bf16 a sum of product and bias near 0 may round to the other side of its kink.
@pytest.mark.parametrize("activation", ["clamped_swiglu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_expert_ffn_with_biases(backend, dtype, shape, activation):
    *inputs, offsets_E, grad_RD = make_case(shape, activation, dtype)
    inputs = with_biases(inputs, dtype)
    order = torch.randperm(len(offsets_E))
    for rest in ((offsets_E, activation), (offsets_E, activation, order)):
        actual = run(biased(backend[1]), inputs, grad_RD, *rest)
        expected = exact(biased(reference.expert_ffn), inputs, grad_RD, *rest)
        assert all(tensor.dtype == dtype for tensor in actual)
        assert_same(actual, expected, dtype)
        end = int(offsets_E[-1])
        assert not actual[0][end:].any()
        assert not actual[1][end:].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_grouped_mm_with_a_bias(backend, dtype, shape):
    x_RD, up_EHD, _, offsets_E, _ = make_case(shape, "swiglu", dtype)
    grad_RH = torch.randn(len(x_RD), up_EHD.shape[1]).to(dtype)
    grad_RH[int(offsets_E[-1]) :] = float("nan")
    inputs = [x_RD, up_EHD, torch.randn(up_EHD.shape[:2]).to(dtype)]

    def by(grouped_mm):
        return lambda x, w, bias, offsets_E: grouped_mm(x, w, offsets_E, None, bias)

    actual = run(by(backend[0]), inputs, grad_RH, offsets_E)
    assert_same(actual, exact(by(reference.grouped_mm), inputs, grad_RH, offsets_E), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_grouped_mm(backend, dtype, shape):
    x_RD, up_EHD, _, offsets_E, _ = make_case(shape, "swiglu", dtype)
    grad_RH = torch.randn(len(x_RD), up_EHD.shape[1]).to(dtype)
    grad_RH[int(offsets_E[-1]) :] = float("nan")
    actual = run(backend[0], [x_RD, up_EHD], grad_RH, offsets_E)
    expected = exact(reference.grouped_mm, [x_RD, up_EHD], grad_RH, offsets_E)
    assert_same(actual, expected, dtype)
    end = int(offsets_E[-1])
    assert not actual[0][end:].any()
    assert not actual[1][end:].any()


@pytest.mark.parametrize("backend", [SEGMENTS, TORCH], ids=["segments", "torch"])
@pytest.mark.parametrize("shape", ["63 and a tail", "seven, one expert empty", "no rows"])
def test_bf16_rows_with_fp32_weights_give_fp32_weight_gradients(backend, shape):
    case = make_case(shape, "swiglu", torch.bfloat16, torch.float32)
    *inputs, offsets_E, grad_RD = case
    y, grad_x, grad_up, grad_down = run(backend[1], inputs, grad_RD, offsets_E, "swiglu")
    assert y.dtype == grad_x.dtype == torch.bfloat16
    assert grad_up.dtype == grad_down.dtype == torch.float32
    inputs[1:] = [weight.bfloat16() for weight in inputs[1:]]
    expected = exact(reference.expert_ffn, inputs, grad_RD, offsets_E, "swiglu")
    assert_same([y, grad_x, grad_up, grad_down], expected, torch.bfloat16)
    inputs = with_biases(inputs, torch.float32)
    actual = run(biased(backend[1]), inputs, grad_RD, offsets_E, "swiglu")
    assert [grad.dtype for grad in actual[4:]] == [torch.float32] * 2
    inputs[3:] = [bias.bfloat16() for bias in inputs[3:]]
    expected = exact(biased(reference.expert_ffn), inputs, grad_RD, offsets_E, "swiglu")
    assert_same(actual, expected, torch.bfloat16)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gradients_of_any_stride(backend, dtype):
    *inputs, offsets_E, grad_RD = make_case("63", "swiglu", dtype)
    layouts = {
        "expanded": torch.ones((), dtype=dtype).expand_as(grad_RD),
        "expanded row": grad_RD[:1].expand_as(grad_RD),
        "transposed": grad_RD.t().contiguous().t(),
    }
    for name, grad in layouts.items():
        actual = run(backend[1], inputs, grad, offsets_E, "swiglu")
        expected = run(backend[1], inputs, grad.contiguous(), offsets_E, "swiglu")
        for left, right in zip(actual, expected, strict=True):
            assert torch.equal(left, right), name


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_rows_and_weights_of_any_stride(backend, dtype):
    *inputs, offsets_E, grad_RD = make_case("63", "geglu", dtype)
    expected = run(backend[1], inputs, grad_RD, offsets_E, "geglu")
    leaves = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = backend[1](*leaves, offsets_E, "geglu")
    output.backward(grad_RD)
    actual = [output.detach(), *(leaf.grad for leaf in leaves)]
    assert_same(actual, [tensor.double() for tensor in expected], dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", ["63 and a tail", "first and last empty"])
def test_gradcheck_of_segments(shape, activation):
    x_RD, up_EHD, down_EDF, offsets_E, _ = make_case(shape, activation, torch.float64)
    # ReLU has no derivative at 0: no hidden unit may lie within gradcheck's step of it.
    x_RD, up_EHD, down_EDF = x_RD[:, :4], up_EHD[:, ::6, :4], down_EDF[:, :4, ::6]
    x_RD = x_RD.nan_to_num(0.5)
    inputs = with_biases((x_RD, up_EHD, down_EDF), torch.float64)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    plain = torch_grouped.SEGMENTS.expert_ffn
    for ffn, count in ((plain, 3), (biased(plain), 5)):
        assert torch.autograd.gradcheck(
            lambda *tensors, ffn=ffn: ffn(*tensors, offsets_E, activation),
            leaves[:count],
            fast_mode=True,
        )


def test_gradcheck_of_grouped_mm():
    x_RI = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    w_EOI = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    offsets_E = torch.tensor([2, 2, 5])
    assert torch.autograd.gradcheck(
        lambda x, w: torch_grouped.SEGMENTS.grouped_mm(x, w, offsets_E), (x_RI, w_EOI)
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4])
def test_only_the_gradients_asked_for(backend, dtype, wanted):
    *inputs, offsets_E, grad_RD = make_case("63 and a tail", "swiglu", dtype)
    inputs = with_biases(inputs, dtype)
    expected = run(biased(backend[1]), inputs, grad_RD, offsets_E, "swiglu")[1 + wanted]
    leaves = [tensor.clone() for tensor in inputs]
    leaves[wanted].requires_grad_()
    biased(backend[1])(*leaves, offsets_E, "swiglu").backward(grad_RD)
    assert torch.equal(leaves[wanted].grad, expected)
    assert all(leaf.grad is None for n, leaf in enumerate(leaves) if n != wanted)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_inputs_are_left_alone_and_runs_repeat_bitwise(backend, dtype):
    *inputs, offsets_E, grad_RD = make_case("63", "swiglu", dtype)
    kept = [tensor.clone() for tensor in (*inputs, grad_RD)]
    first = run(backend[1], inputs, grad_RD, offsets_E, "swiglu")
    second = run(backend[1], inputs, grad_RD, offsets_E, "swiglu")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*inputs, grad_RD), kept, strict=True))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gradients_accumulate(backend, dtype):
    """Weight gradients handed to autograd may be kept by it: they must not share memory."""
    *inputs, offsets_E, grad_RD = make_case("63", "swiglu", dtype)
    once = run(backend[1], inputs, grad_RD, offsets_E, "swiglu")[1:]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    for _ in range(2):
        backend[1](*leaves, offsets_E, "swiglu").backward(grad_RD)
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [F, 8192])
def test_a_single_experts_rows(width, dtype, weight_dtype, rows):
    """Both sides of `SMALL`, where 16-bit products change their way."""
    assert (width * D > torch_grouped.SMALL) == (width != F)
    x_PD = torch.randn(rows, D).to(dtype)
    up_EHD = (torch.randn(3, 2 * width, D) / D**0.5).to(weight_dtype)
    down_EDF = (torch.randn(3, D, width) / width**0.5).to(weight_dtype)
    biases = Biases(*(torch.randn(w.shape[:2]).to(weight_dtype) for w in (up_EHD, down_EDF)))
    offsets_E = torch.tensor([0, rows, rows])
    for biases_or_none in (None, biases):
        y_PD = torch_grouped.single_ffn(x_PD, 1, up_EHD, down_EDF, "swiglu", biases_or_none)
        exact_PD = torch_grouped.SEGMENTS.expert_ffn(
            x_PD.double(), up_EHD, down_EDF, offsets_E, "swiglu", None, biases_or_none
        )
        assert y_PD.dtype == dtype
        assert_same([y_PD], [exact_PD], dtype)


def test_double_backward_is_refused_rather_than_wrong():
    x = torch.randn(3, 4, requires_grad=True)
    w = torch.randn(1, 4, 4, requires_grad=True)
    y = torch_grouped.SEGMENTS.grouped_mm(x, w, torch.tensor([3]))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [SEGMENTS, TORCH], ids=["segments", "torch"])
def test_expert_ffn_on_cuda(backend, shape, activation):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    *plain, offsets_E, grad_RD = make_case(shape, activation, torch.bfloat16)
    cases = [(lambda ffn: ffn, plain)]
    if activation != "relu":
        cases.append((biased, with_biases(plain, torch.bfloat16)))
    for form, inputs in cases:
        expected = exact(form(reference.expert_ffn), inputs, grad_RD, offsets_E, activation)
        inputs = [tensor.cuda() for tensor in inputs]
        actual = run(form(backend[1]), inputs, grad_RD.cuda(), offsets_E.cuda(), activation)
        assert_same([tensor.cpu() for tensor in actual], expected, torch.bfloat16)
