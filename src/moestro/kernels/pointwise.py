"""RMS norm, rotary positions and the router's product with their own backward.

They pass over memory less often and keep less than autograd would. The definitions are
`reference.rms_norm`, `reference.rotate` and `reference.fp32_linear`; one token's numbers, as when
generating text, go through few plain ops instead, since there each call costs more than its work.
So does everything under the transforms of `torch.func`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moestro.kernels import reference

# Up to so many numbers, and without gradients, the fewest calls win.
SMALL = 2**14


def transformed() -> bool:
    """Whether `torch.func` (grad, vmap, jvp, …) is active, which needs plain torch ops."""
    return torch._C._are_functorch_transforms_active()


def _plain(x: Tensor) -> bool:
    return (x.numel() <= SMALL and not torch.is_grad_enabled()) or transformed()


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x32_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        norm_T1 = torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True)
        scale_T1 = (norm_T1.square_().div_(x_TD.shape[-1]) + eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        y_TD: Tensor = (x32_TD * scale_T1).mul_(weight_D).to(dtype)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        x32_TD, weight32_D = x_TD.to(scale_T1.dtype), weight_D.to(scale_T1.dtype)
        width = x_TD.shape[-1]
        scaled_TD = grad_TD.to(scale_T1.dtype) * scale_T1
        # The two sums over products of gradient and input are matrix-vector products.
        product_TD = (scaled_TD * x32_TD).reshape(-1, width)
        grad_weight_D = product_TD.sum(0).to(weight_D.dtype)
        slope_T1 = torch.mv(product_TD, weight32_D).view_as(scale_T1)
        slope_T1.mul_(scale_T1.square()).div_(-width)
        grad_x_TD = scaled_TD.mul_(weight32_D).addcmul_(x32_TD, slope_T1)
        return grad_x_TD.to(x_TD.dtype), grad_weight_D, None, None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`reference.rms_norm`."""
    if _plain(x_TD):
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        shape = weight_D.shape
        return F.rms_norm(x_TD.to(wide), shape, weight_D.to(wide), eps).to(dtype)
    y_TD: Tensor = _RMSNorm.apply(x_TD, weight_D, eps, dtype)
    return y_TD


def _turn(x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
    """Rotate the pairs (i, i + A/2) by the angles; cos and sin as [S, A/2].

    x · cos + swap(x) · (-sin, sin), with tables as wide as all heads: long rows are what makes
    16-bit arithmetic on CPU fast.
    """
    heads, width = x_BSHA.shape[2:]
    first, second = x_BSHA[..., : width // 2], x_BSHA[..., width // 2 :]
    swapped_BSHA = torch.cat([second, first], dim=-1)
    cos_SHA = torch.cat([cos_SA, cos_SA], dim=-1)[:, None].repeat(1, heads, 1)
    sin_SHA = torch.cat([-sin_SA, sin_SA], dim=-1)[:, None].repeat(1, heads, 1)
    return (x_BSHA * cos_SHA).addcmul_(swapped_BSHA, sin_SHA)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SA, sin_SA)
        return _turn(x_BSHA, cos_SA, sin_SA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHA: Tensor) -> tuple[Tensor | None, ...]:
        cos_SA, sin_SA = ctx.saved_tensors
        return _turn(grad_BSHA, cos_SA, -sin_SA), None, None


def rotate(x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
    """`reference.rotate`."""
    if _plain(x_BSHA):
        return reference.rotate(x_BSHA, cos_SA, sin_SA)
    if cos_SA.dim() == 3:  # one long sequence, with the positions of all
        tables = (each.flatten(0, 1) for each in (cos_SA, sin_SA))
        return rotate(x_BSHA.flatten(0, 1)[None], *tables).view_as(x_BSHA)
    y_BSHA: Tensor = _Rotate.apply(x_BSHA, cos_SA.to(x_BSHA.dtype), sin_SA.to(x_BSHA.dtype))
    return y_BSHA


class _Fp32Linear(torch.autograd.Function):
    """Keeps the input as it came, not its fp32 copy; differentiable twice, and forward."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, w_OI)
        ctx.save_for_forward(x_TI, w_OI)
        dtype = torch.promote_types(x_TI.dtype, torch.float32)
        return torch.mm(x_TI.to(dtype), w_OI.to(dtype).t())

    @staticmethod
    def jvp(ctx: Any, dx_TI: Tensor | None, dw_OI: Tensor | None) -> Tensor:
        x_TI, w_OI = ctx.saved_tensors
        dx_TI = torch.zeros_like(x_TI) if dx_TI is None else dx_TI
        dw_OI = torch.zeros_like(w_OI) if dw_OI is None else dw_OI
        return reference.fp32_linear(dx_TI, w_OI) + reference.fp32_linear(x_TI, dw_OI)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor]:
        x_TI, w_OI = ctx.saved_tensors
        grad_x_TI = torch.mm(grad_TO, w_OI.to(grad_TO.dtype)).to(x_TI.dtype)
        grad_w_OI = torch.mm(grad_TO.t(), x_TI.to(grad_TO.dtype)).to(w_OI.dtype)
        return grad_x_TI, grad_w_OI


def fp32_linear(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """`reference.fp32_linear`."""
    if _plain(x_TI):
        return reference.fp32_linear(x_TI, w_OI)
    y_TO: Tensor = _Fp32Linear.apply(x_TI, w_OI)
    return y_TO
