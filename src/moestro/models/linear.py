"""Projections: torch's with a faster product for one token on CPU, and packed ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.kernels import native_cpu
from moestro.kernels.packing import PackedMatrix
from moestro.moe.experts import compute_dtype
from moestro.moe.packed import Packed

# Weights of so few numbers are cast to fp32: torch's 16-bit product takes 15 µs however small.
SMALL = 2**15


class Linear(nn.Linear):
    """`torch.nn.Linear`. One row in 16 bits on CPU goes through the product of a vector.

    That reads weights up to twice as fast there as torch's product of matrices.
    """

    def forward(self, x_TI: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        weight_OI, dtype = self.weight, x_TI.dtype
        alone = (
            not torch.is_grad_enabled()
            and x_TI.numel() == weight_OI.shape[1]
            and dtype.itemsize == 2
            and dtype == weight_OI.dtype
            and x_TI.device.type == "cpu"
        )
        if not alone:
            return super().forward(x_TI)
        product = torch.float32 if weight_OI.numel() <= SMALL else dtype
        y_O = torch.mv(weight_OI.to(product), x_TI.reshape(-1).to(product))
        if self.bias is not None:
            y_O = y_O + self.bias
        return y_O.to(dtype).view(*x_TI.shape[:-1], -1)


class PackedLinear(Packed):
    """A projection with packed weights, in the place of `torch.nn.Linear`.

    Args:
        weights: from `native_cpu.pack_matrix`, or mapped from a file.
        bias_O: fp32; None: none.
    """

    def __init__(self, weights: PackedMatrix, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.weights, self.bias_O = weights, bias_O

    def parts(self) -> dict[str, Tensor]:
        """Packed bytes, and the bias where there is one."""
        return {"packed": self.weights.data} | (
            {} if self.bias_O is None else {"bias_O": self.bias_O}
        )

    def use(self, parts: dict[str, Tensor]) -> None:
        """Take others in their place."""
        self.weights = self.weights._replace(data=parts["packed"])
        self.bias_O = parts.get("bias_O")

    def forward(self, x_TI: Tensor) -> Tensor:
        """[..., I] → [..., O], in the dtype to compute in."""
        rows_TI = self.rows(x_TI).reshape(-1, x_TI.shape[-1])
        y_TO = native_cpu.linear(self.weights, rows_TI, self.bias_O)
        return y_TO.to(compute_dtype(x_TI)).view(*x_TI.shape[:-1], -1)

    def extra_repr(self) -> str:
        """Shapes, for print(model)."""
        return f"{self.weights.columns} → {self.weights.rows}, {self.weights.format.kind}"
