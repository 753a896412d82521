"""Training a mixture's experts by native kernels: bf16 rows on CPU, sums in fp32.

The products are those of AMX tiles, or of AVX-512's own instruction for pairs of bf16.

SwiGLU experts without biases go through up, activation and down chunk by chunk of rows while these
lie in the cache; the others through the same products one after another, as in `torch_grouped`.
Weights are bf16 or fp32 (rounded to bf16 as they are packed), and so are their gradients.
What a row gets depends on no other row, and nothing on the number of threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.errors import BackendError
from moestro.kernels.addresses import FLOATS, INT64, ROWS, Shape, address, check, piece
from moestro.kernels.native_library import PATHS, CGroups, call, library
from moestro.kernels.reference import Biases
from moestro.kernels.torch_grouped import Groups, Products, clear_tail, segments_add_bias

WIDTH = 32  # of which widths are multiples
_BF16, _WHOLE = (torch.bfloat16,), (*INT64, torch.int32)
_ALLOWED = (
    f"widths that are multiples of {WIDTH}, offsets that neither fall nor pass the last row, and "
    "exactly one group for each expert"
)


def reason_against(device: str, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    """Why these kernels cannot run, or None; see `backends.Backend.supports`."""
    if device != "cpu":
        return f"for the CPU, not {device}"
    if dtype != torch.bfloat16:
        return f"for bfloat16 only, not {dtype}"
    odd = [width for width in widths if width % WIDTH]
    if odd:
        return f"widths must be multiples of {WIDTH}; given {odd}"
    try:
        native = library()
    except BackendError as error:
        return str(error)
    if not native.moestro_trains():
        path = PATHS[native.moestro_path()]
        return f"needs bf16 products, of AMX or AVX-512; the native kernels' path here is {path}"
    return None


def mm(x_RI: Tensor, w_EOI: Tensor, groups: Groups, back: bool) -> Tensor:
    """See `torch_grouped.Products.mm`; raises as `native_library.call` does."""
    w_EOI = _weights(w_EOI)
    num_experts, outputs, inputs = w_EOI.shape
    x_RI = _rows(x_RI, outputs if back else inputs)
    y_RO = x_RI.new_empty(len(x_RI), inputs if back else outputs)
    given = (ROWS[w_EOI.dtype], _at(w_EOI), outputs, inputs, back, _at(x_RI), _at(y_RO))
    _call("grouped", groups, num_experts, len(x_RI), *given)
    return y_RO


def weight_grad(grad_RO: Tensor, x_RI: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
    """See `torch_grouped.Products.weight_grad`; raises as `mm` does."""
    grad_RO, x_RI = _rows(grad_RO), _rows(x_RI)
    num_experts, outputs, inputs = len(groups.offsets_E), grad_RO.shape[1], x_RI.shape[1]
    made = dtype if dtype in ROWS else torch.float32
    grad_EOI = x_RI.new_empty(num_experts, outputs, inputs, dtype=made)
    given = (ROWS[made], outputs, inputs, _at(grad_RO), _at(x_RI), _at(grad_EOI))
    _call("grouped_grad", groups, num_experts, min(len(x_RI), len(grad_RO)), *given)
    return grad_EOI.to(dtype)


NATIVE = Products(mm, weight_grad, segments_add_bias)


def expert_ffn(
    x_RD: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    offsets_E: Tensor,
    activation: str,
    experts_E: Tensor | None = None,
    biases: Biases | None = None,
) -> Tensor:
    """`reference.expert_ffn` by these kernels; raises as `mm` does."""
    if activation != "swiglu" or biases is not None:
        return NATIVE.expert_ffn(x_RD, up_EHD, down_EDF, offsets_E, activation, experts_E, biases)
    check(x_RD, "rows", (None, None), _BF16)
    for name, weight in (("up", up_EHD), ("down", down_EDF)):
        check(weight, name, (None, None, None), FLOATS)
    groups, inputs = Groups(offsets_E, experts_E), (x_RD, up_EHD, down_EDF)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        y_RD: Tensor = _SwiGLU.apply(*inputs, groups)
        return y_RD
    return _forward(x_RD.contiguous(), up_EHD, down_EDF, groups, None)


class _SwiGLU(torch.autograd.Function):
    """Whole experts, keeping the rows and the hidden rows; the backward activates these again."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, up_EHD: Tensor, down_EDF: Tensor, groups: Groups) -> Tensor:
        x_RD = x_RD.contiguous()
        hidden_RH = x_RD.new_empty(len(x_RD), up_EHD.shape[1])
        y_RD = _forward(x_RD, up_EHD, down_EDF, groups, hidden_RH)
        ctx.save_for_backward(x_RD, up_EHD, down_EDF, hidden_RH)
        ctx.groups = groups
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, up_EHD, down_EDF, hidden_RH = ctx.saved_tensors
        groups, wanted = ctx.groups, ctx.needs_input_grad
        grad_RD = grad_RD.contiguous()
        grad_hidden_RH, act_RF, grad_x_RD = _backward(grad_RD, up_EHD, down_EDF, groups, hidden_RH)
        grad_up = grad_down = None
        if wanted[2]:
            grad_down = weight_grad(grad_RD, act_RF, groups, down_EDF.dtype)
        del act_RF
        if wanted[1]:
            grad_up = weight_grad(grad_hidden_RH, x_RD, groups, up_EHD.dtype)
        return (grad_x_RD if wanted[0] else None), grad_up, grad_down, None


def _forward(
    x_RD: Tensor, up_EHD: Tensor, down_EDF: Tensor, groups: Groups, hidden_RH: Tensor | None
) -> Tensor:
    """y_RD; writes what the backward wants to `hidden_RH`."""
    up_EHD, down_EDF = _expert_weights(up_EHD, down_EDF)
    num_experts, dim, hidden = down_EDF.shape
    x_RD = _rows(x_RD, dim)
    y_RD = torch.empty_like(x_RD)
    kept = None if hidden_RH is None else _at(hidden_RH, len(x_RD), 2 * hidden)
    weights = (ROWS[up_EHD.dtype], _at(up_EHD), _at(down_EDF), dim, hidden)
    _call("ffn", groups, num_experts, len(x_RD), *weights, _at(x_RD), kept, _at(y_RD))
    return clear_tail(y_RD, groups)


def _backward(
    grad_RD: Tensor, up_EHD: Tensor, down_EDF: Tensor, groups: Groups, hidden_RH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the hidden rows, activated rows, gradient of the rows)."""
    up_EHD, down_EDF = _expert_weights(up_EHD, down_EDF)
    num_experts, dim, hidden = down_EDF.shape
    grad_RD = _rows(grad_RD, dim)
    grad_hidden_RH = torch.empty_like(hidden_RH)
    act_RF = grad_RD.new_empty(len(grad_RD), hidden)
    grad_x_RD = torch.empty_like(grad_RD)
    weights = (ROWS[up_EHD.dtype], _at(up_EHD), _at(down_EDF), dim, hidden)
    kept = (_at(grad_RD), _at(hidden_RH, len(grad_RD), 2 * hidden))
    made = (_at(grad_hidden_RH), _at(act_RF), _at(grad_x_RD))
    _call("ffn_back", groups, num_experts, len(grad_RD), *weights, *kept, *made)
    return grad_hidden_RH, act_RF, clear_tail(grad_x_RD, groups)


def _call(name: str, groups: Groups, num_experts: int, num_rows: int, *given: Any) -> None:
    """A native function that begins with the groups of its rows."""
    size, pairs = (num_experts,), []
    for what, each in (("offsets", groups.offsets_E), ("experts", groups.experts_E)):
        whole = None if each is None else check(each, what, size, _WHOLE).long()
        pairs.append((None, None) if whole is None else piece(whole, what, size, INT64))
    grouping = CGroups(*(at for _, at in pairs), num_experts, num_rows)
    call(name, ctypes.byref(grouping), *given, takes=_ALLOWED)


def _weights(w_EOI: Tensor, name: str = "weights", shape: Shape = (None,) * 3) -> Tensor:
    """As the kernels read them: fp32 or bf16 in one piece."""
    check(w_EOI, name, shape, FLOATS)
    return (w_EOI if w_EOI.dtype in ROWS else w_EOI.to(torch.bfloat16)).contiguous()


def _expert_weights(up_EHD: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor]:
    """Both weights in one dtype."""
    if up_EHD.dtype != down_EDF.dtype:
        up_EHD, down_EDF = up_EHD.to(torch.bfloat16), down_EDF.to(torch.bfloat16)
    down_EDF = _weights(down_EDF)
    num_experts, dim, hidden = down_EDF.shape
    return _weights(up_EHD, "up", (num_experts, 2 * hidden, dim)), down_EDF


def _rows(rows_RI: Tensor, width: int | None = None) -> Tensor:
    return check(rows_RI, "rows", (None, width), _BF16).contiguous()


def _at(tensor: Tensor, *shape: int) -> int:
    return address(tensor, "memory", shape or tensor.shape, ROWS)
