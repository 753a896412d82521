"""RMS norm and rotation with their own backward, against their definitions in float64."""

import math

import pytest
import torch

from moestro.kernels import pointwise, reference

# fp64 and fp32: a few roundings. bf16: the result is rounded once (2^-9 relative) where the norm
# computes in fp32; the rotation computes in bf16 and rounds cosines, products and sums.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(0, 6), (1, 6), (7, 6), (2, 3, 4, 6), (63, 1)]


def close(actual, expected, dtype):
    scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1.0
    assert actual.isfinite().all()
    assert actual.shape == expected.shape
    torch.testing.assert_close(
        actual.double() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype]
    )


def exactly(function, inputs, grad):
    leaves = [tensor.detach().double().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.double())]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "dtype"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
    ids=["fp64", "fp32", "bf16", "fp32 to bf16", "bf16 with fp32 weight"],
)
def test_rms_norm(shape, x_dtype, weight_dtype, dtype):
    x_TD = (2 * torch.randn(shape)).to(x_dtype).requires_grad_()
    weight_D = torch.rand(shape[-1]).add(0.5).to(weight_dtype).requires_grad_()
    y_TD = pointwise.rms_norm(x_TD, weight_D, 1e-3, dtype)
    grad_TD = torch.randn(shape).to(dtype)
    y_TD.backward(grad_TD)
    assert y_TD.dtype == dtype
    assert (x_TD.grad.dtype, weight_D.grad.dtype) == (x_dtype, weight_dtype)
    expected = exactly(
        lambda x, w: reference.rms_norm(x, w, 1e-3, torch.float64), (x_TD, weight_D), grad_TD
    )
    for actual, exact in zip((y_TD.detach(), x_TD.grad, weight_D.grad), expected, strict=True):
        close(actual, exact, dtype)


def test_rms_norm_by_hand():
    x_D, weight_D = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 10.0])
    expected = [3 / math.sqrt(12.5 + 0.5), 40 / math.sqrt(12.5 + 0.5)]
    for function in (pointwise.rms_norm, reference.rms_norm):
        assert function(x_D, weight_D, 0.5, torch.float32).tolist() == pytest.approx(expected)


def test_rms_norm_of_zeros_is_zero():
    x_TD = torch.zeros(3, 4, requires_grad=True)
    weight_D = torch.ones(4, requires_grad=True)
    y_TD = pointwise.rms_norm(x_TD, weight_D, 1e-6, torch.float32)
    y_TD.sum().backward()
    assert not y_TD.any()
    assert x_TD.grad.isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [0, 1, 7])
def test_rotate(length, dtype):
    angles_SA = torch.randn(length, 3, dtype=torch.float64) * 10
    x_BSHA = torch.randn(2, length, 5, 6).to(dtype).requires_grad_()
    grad_BSHA = torch.randn(2, length, 5, 6).to(dtype)
    y_BSHA = pointwise.rotate(x_BSHA, angles_SA.cos().float(), angles_SA.sin().float())
    y_BSHA.backward(grad_BSHA)
    assert y_BSHA.dtype == x_BSHA.grad.dtype == dtype
    cos_SA, sin_SA = angles_SA.cos().float().double(), angles_SA.sin().float().double()
    (y, grad_x) = exactly(lambda x: reference.rotate(x, cos_SA, sin_SA), (x_BSHA,), grad_BSHA)
    close(y_BSHA.detach(), y, dtype)
    close(x_BSHA.grad, grad_x, dtype)


def test_rotate_by_complex_numbers():
    x_BSHA = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    angles_SA = torch.randn(4, 3, dtype=torch.float64)
    turned = torch.complex(x_BSHA[..., :3], x_BSHA[..., 3:]) * (1j * angles_SA[:, None]).exp()
    expected_BSHA = torch.cat([turned.real, turned.imag], -1)
    for function in (pointwise.rotate, reference.rotate):
        y_BSHA = function(x_BSHA, angles_SA.cos(), angles_SA.sin())
        torch.testing.assert_close(y_BSHA, expected_BSHA)


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (7, 24)], ids=str)
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_fp32_linear(shape, x_dtype, weight_dtype):
    x_TI = torch.randn(shape).to(x_dtype).requires_grad_()
    w_OI = torch.randn(5, shape[1]).to(weight_dtype).requires_grad_()
    y_TO = pointwise.fp32_linear(x_TI, w_OI)
    grad_TO = torch.randn(shape[0], 5).to(y_TO.dtype)
    y_TO.backward(grad_TO)
    assert y_TO.dtype == torch.promote_types(x_dtype, torch.float32)
    assert (x_TI.grad.dtype, w_OI.grad.dtype) == (x_dtype, weight_dtype)
    expected = exactly(reference.fp32_linear, (x_TI, w_OI), grad_TO)
    dtypes = (y_TO.dtype, x_dtype, weight_dtype)
    results = (y_TO.detach(), x_TI.grad, w_OI.grad)
    for actual, exact, dtype in zip(results, expected, dtypes, strict=True):
        close(actual, exact, dtype)


def test_gradcheck():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight_D = torch.randn(4, dtype=torch.float64, requires_grad=True)
    angles_SA = torch.randn(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: pointwise.rms_norm(x, w, 1e-3, torch.float64), (x, weight_D)
    )
    w_OI = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    x_TI = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pointwise.fp32_linear, (x_TI, w_OI))
    assert torch.autograd.gradcheck(
        lambda x: pointwise.rotate(x, angles_SA.cos(), angles_SA.sin()), (x,)
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_few_numbers_without_gradients_equal_the_definition(dtype):
    """The way of one token when generating text."""
    x_BSHA, weight_A, w_OA = torch.randn(1, 1, 3, 8), torch.rand(8) + 0.5, torch.randn(5, 8)
    x_BSHA, w_OA = x_BSHA.to(dtype), w_OA.to(dtype)
    angles_SA = torch.randn(1, 4)
    turn = (angles_SA.cos(), angles_SA.sin())
    exact_BSHA, exact_OA = x_BSHA.double(), w_OA.double()
    with torch.no_grad():
        normed = pointwise.rms_norm(x_BSHA, weight_A, 1e-3, dtype)
        turned = pointwise.rotate(x_BSHA, *turn)
        logits = pointwise.fp32_linear(x_BSHA[0, 0], w_OA)
    assert normed.dtype == turned.dtype == dtype
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    close(normed, reference.rms_norm(exact_BSHA, weight_A, 1e-3, torch.float64), dtype)
    close(turned, reference.rotate(exact_BSHA, *turn), dtype)
    close(logits, reference.fp32_linear(exact_BSHA[0, 0], exact_OA), logits.dtype)


def test_strides_and_inputs_left_alone():
    """Slices of a wider projection, and gradients that are expanded or transposed."""
    wide = torch.randn(2, 3, 5, 8)
    part, whole = wide[..., 1:3, :].requires_grad_(), wide[..., 1:3, :].clone().requires_grad_()
    angles_SA = torch.randn(3, 4)
    kept = wide.clone()
    weight_D = torch.rand(8)
    for function in (
        lambda x: pointwise.rotate(x, angles_SA.cos(), angles_SA.sin()),
        lambda x: pointwise.rms_norm(x, weight_D, 1e-6, torch.float32),
    ):
        for grad in (
            torch.ones(()).expand(2, 3, 2, 8),
            torch.randn(8, 2, 3, 2).permute(1, 2, 3, 0),
            torch.randn(2, 3, 2, 8).transpose(0, 2).contiguous().transpose(0, 2),
        ):
            left = torch.autograd.grad(function(part), part, grad)
            right = torch.autograd.grad(function(whole), whole, grad.contiguous())
            torch.testing.assert_close(left, right)
    assert torch.equal(wide, kept)
