"""Training a mixture's experts by the native kernels' AMX tiles: bf16 rows on CPU, sums in fp32.

SwiGLU experts without biases go through up, activation and down chunk by chunk of rows while these
lie in the cache; the others through the same products one after another, as in `torch_grouped`.
Weights are bf16 or fp32 (rounded to bf16 on the way to the tiles), and so are their gradients.
What a row gets depends on no other row, and nothing on the number of threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.errors import BackendError, ShapeError
from moestro.kernels.native_library import PATHS, Grouping, library
from moestro.kernels.reference import Biases
from moestro.kernels.torch_grouped import Groups, Products, clear_tail, segments_add_bias

WIDTH = 32  # of which widths are multiples
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


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
        return f"needs AMX tiles; the native kernels' path here is {PATHS[native.moestro_path()]}"
    return None


def mm(x_RI: Tensor, w_EOI: Tensor, groups: Groups, back: bool) -> Tensor:
    """See `torch_grouped.Products.mm`.

    Raises:
        ShapeError: rows, weights and groups do not fit each other, or have a wrong dtype.
        MemoryError: there is not enough for the packed weights.
    """
    w_EOI = _weights(w_EOI)
    num_experts, outputs, inputs = w_EOI.shape
    _check_rows(x_RI, outputs if back else inputs)
    x_RI = x_RI.contiguous()
    y_RO = x_RI.new_empty(x_RI.shape[0], inputs if back else outputs)
    grouping = _Grouping(groups, num_experts, len(x_RI))
    _done(
        library().moestro_grouped(
            *grouping.given, _DTYPES[w_EOI.dtype], w_EOI.data_ptr(), outputs, inputs, back,
            x_RI.data_ptr(), y_RO.data_ptr(),
        )
    )  # fmt: skip
    return y_RO


def weight_grad(grad_RO: Tensor, x_RI: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
    """See `torch_grouped.Products.weight_grad`; raises as `mm` does."""
    for rows in (grad_RO, x_RI):
        _check_rows(rows, rows.shape[-1])
    grad_RO, x_RI = grad_RO.contiguous(), x_RI.contiguous()
    num_experts, outputs, inputs = len(groups.offsets_E), grad_RO.shape[1], x_RI.shape[1]
    made = dtype if dtype in _DTYPES else torch.float32
    grad_EOI = x_RI.new_empty(num_experts, outputs, inputs, dtype=made)
    grouping = _Grouping(groups, num_experts, min(len(x_RI), len(grad_RO)))
    _done(
        library().moestro_grouped_grad(
            *grouping.given, _DTYPES[made], outputs, inputs, grad_RO.data_ptr(), x_RI.data_ptr(),
            grad_EOI.data_ptr(),
        )
    )  # fmt: skip
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
    _check_rows(x_RD, dim)
    y_RD = torch.empty_like(x_RD)
    grouping = _Grouping(groups, num_experts, len(x_RD))
    _done(
        library().moestro_ffn(
            *grouping.given, _DTYPES[up_EHD.dtype], up_EHD.data_ptr(), down_EDF.data_ptr(), dim,
            hidden, x_RD.data_ptr(), None if hidden_RH is None else hidden_RH.data_ptr(),
            y_RD.data_ptr(),
        )
    )  # fmt: skip
    return clear_tail(y_RD, groups)


def _backward(
    grad_RD: Tensor, up_EHD: Tensor, down_EDF: Tensor, groups: Groups, hidden_RH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the hidden rows, activated rows, gradient of the rows)."""
    up_EHD, down_EDF = _expert_weights(up_EHD, down_EDF)
    num_experts, dim, hidden = down_EDF.shape
    _check_rows(grad_RD, dim)
    grad_hidden_RH = torch.empty_like(hidden_RH)
    act_RF = grad_RD.new_empty(len(grad_RD), hidden)
    grad_x_RD = torch.empty_like(grad_RD)
    grouping = _Grouping(groups, num_experts, len(grad_RD))
    _done(
        library().moestro_ffn_back(
            *grouping.given, _DTYPES[up_EHD.dtype], up_EHD.data_ptr(), down_EDF.data_ptr(), dim,
            hidden, grad_RD.data_ptr(), hidden_RH.data_ptr(), grad_hidden_RH.data_ptr(),
            act_RF.data_ptr(), grad_x_RD.data_ptr(),
        )
    )  # fmt: skip
    return grad_hidden_RH, act_RF, clear_tail(grad_x_RD, groups)


class _Grouping:
    """The C structure of some groups, with the tensors that it points to."""

    def __init__(self, groups: Groups, num_experts: int, num_rows: int) -> None:
        order_E = groups.experts_E
        lengths = {len(groups.offsets_E), num_experts if order_E is None else len(order_E)}
        if lengths != {num_experts}:
            raise ShapeError(f"{num_experts} experts have as many groups; given {lengths}")
        self.kept = [
            None if each is None else each.to("cpu", torch.int64).contiguous()
            for each in (groups.offsets_E, order_E)
        ]
        addresses = (None if each is None else each.data_ptr() for each in self.kept)
        self.given = (ctypes.byref(Grouping(*addresses, num_experts, num_rows)),)


def _weights(w_EOI: Tensor) -> Tensor:
    """As the kernels read them: fp32 or bf16 in one piece."""
    if w_EOI.dim() != 3 or w_EOI.device.type != "cpu":
        raise ShapeError(
            f"weights are [E, O, I] on CPU; given {list(w_EOI.shape)} on {w_EOI.device}"
        )
    return (w_EOI if w_EOI.dtype in _DTYPES else w_EOI.to(torch.bfloat16)).contiguous()


def _expert_weights(up_EHD: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor]:
    """Both weights in one dtype."""
    if up_EHD.dtype != down_EDF.dtype:
        up_EHD, down_EDF = up_EHD.to(torch.bfloat16), down_EDF.to(torch.bfloat16)
    up_EHD, down_EDF = _weights(up_EHD), _weights(down_EDF)
    num_experts, dim, hidden = down_EDF.shape
    if up_EHD.shape != (num_experts, 2 * hidden, dim):
        raise ShapeError(
            f"swiglu experts with down {list(down_EDF.shape)} have up "
            f"{[num_experts, 2 * hidden, dim]}; given {list(up_EHD.shape)}"
        )
    return up_EHD, down_EDF


def _check_rows(rows_RI: Tensor, width: int) -> None:
    fits = rows_RI.dim() == 2 and rows_RI.shape[1] == width and rows_RI.dtype == torch.bfloat16
    if not fits or rows_RI.device.type != "cpu":
        raise ShapeError(
            f"AMX tiles take bfloat16 rows [R, {width}] on CPU; given {rows_RI.dtype} "
            f"{list(rows_RI.shape)} on {rows_RI.device}"
        )


def _done(code: int) -> None:
    if code == -2:
        raise MemoryError("not enough memory for the native kernels' buffers")
    if code == -3:
        raise BackendError("the native kernels' path changed to one without AMX tiles")
    if code:
        raise ShapeError(
            f"the native kernel refused its arguments: a width is no multiple of {WIDTH}, offsets "
            "fall or pass the last row, or an expert has not exactly one group"
        )
