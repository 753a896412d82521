"""Embeddings and projections: torch's, begun at this project's scales, and packed ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moestro.errors import ShapeError
from moestro.kernels import native_cpu, torch_grouped
from moestro.kernels.addresses import ROWS
from moestro.kernels.packing import Format, PackedMatrix, StoredRows, blank_matrix
from moestro.moe.lora import Adapter, unpacked_mm
from moestro.moe.mixing import compute_dtype
from moestro.moe.packed import Packed


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` whose vectors start N(0, scale² / D), and which names ids without a row.

    On CPU only: elsewhere that would wait for the device, and torch ends the kernel there.
    """

    def __init__(self, tokens: int, dim: int, scale: float = 1.0) -> None:
        self.scale = scale
        super().__init__(tokens, dim)

    def reset_parameters(self) -> None:
        """Draw new vectors."""
        nn.init.normal_(self.weight, std=self.scale * self.embedding_dim**-0.5)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """[...] → [..., D].

        Raises:
            ShapeError: ids are not int64 or int32, or outside the vocabulary.
        """
        if tokens_BS.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"token ids are int64; given {tokens_BS.dtype}")
        if torch.compiler.is_compiling():
            return super().forward(tokens_BS)
        try:
            return super().forward(tokens_BS)
        except IndexError:
            wrong = tokens_BS[(tokens_BS < 0) | (tokens_BS >= self.num_embeddings)]
            raise ShapeError(
                f"token ids are from 0 to {self.num_embeddings - 1}, the model's vocabulary; given "
                f"{wrong[:4].tolist()}. Use the tokenizer that the model was trained with"
            ) from None


class PlainLinear(nn.Linear):
    """`torch.nn.Linear` whose weights start N(0, scale² / I), and its bias at zero; never packed.

    One row in 16 bits on CPU goes through the product of a vector, which reads weights up to twice
    as fast there as torch's product of matrices.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, scale: float = 1.0) -> None:
        self.scale = scale
        super().__init__(inputs, outputs, bias)
        self.weight_adapter: Adapter | None = None

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight, std=self.scale * self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TI: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        alone = (
            not torch.is_grad_enabled()
            and x_TI.numel() == self.in_features
            and x_TI.dtype.itemsize == 2
            and x_TI.dtype == self.weight.dtype
            and x_TI.device.type == "cpu"
        )
        if alone:
            y_1O = torch_grouped.linear(x_TI.reshape(1, -1), self.weight, self.bias)
            y_TO = y_1O.view(*x_TI.shape[:-1], -1)
        else:
            y_TO = super().forward(x_TI)
        return y_TO if self.weight_adapter is None else y_TO + self.weight_adapter(x_TI)


class Linear(PlainLinear):
    """A projection that can be packed."""

    def to_packed(self, format: Format, stored: StoredRows | None = None) -> PackedLinear:
        """See `moestro.moe.packed.Packable`."""
        weight_OI = self.weight.detach()
        if stored is None and weight_OI.is_meta:
            return PackedLinear(blank_matrix(weight_OI, format, self.bias))
        if stored is None and weight_OI.dtype not in ROWS:
            weight_OI = weight_OI.float()
        return PackedLinear(native_cpu.pack_matrix(weight_OI, format, self.bias, stored))

    def native(self) -> PackedMatrix:
        """The weights as the native kernels read them, not copied."""
        return native_cpu.plain_matrix(self.weight, self.bias)


class QKV(Linear):
    """Queries, keys and values in one projection.

    Args:
        dim: D.
        queries: rows of the queries, which come first.
        others: rows of keys and values together.
        bias: whether there is one.
        query_scale: of the queries' weights at the start; T5 has there what others divide scores
            by.
    """

    def __init__(
        self, dim: int, queries: int, others: int, bias: bool = False, query_scale: float = 1.0
    ) -> None:
        self.queries, self.query_scale = queries, query_scale
        super().__init__(dim, queries + others, bias)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()
        with torch.no_grad():
            self.weight[: self.queries] *= self.query_scale


class PackedLinear(Packed):
    """A projection with packed weights, in place of `torch.nn.Linear`."""

    TENSORS: ClassVar = {"packed": "data", "bias_O": "bias"}
    weights: PackedMatrix

    def __init__(self, weights: Any) -> None:
        super().__init__(weights)
        self.weight_adapter: Adapter | None = None

    def described(self) -> dict[str, Any]:
        """See `Packed.described`."""
        _, rows, columns, format, _ = self.weights
        return {"rows": rows, "columns": columns, **format.described()}

    def forward(self, x_TI: Tensor) -> Tensor:
        """[..., I] → [..., O], in the dtype to compute in."""
        rows_TI = self.rows(x_TI).reshape(-1, x_TI.shape[-1])
        if self.unpacks:
            all_rows = torch.tensor([len(rows_TI)], dtype=torch.int64, device=rows_TI.device)
            y_TO = unpacked_mm(rows_TI, lambda _: native_cpu.unpack_matrix(self.weights), all_rows)
            y_TO = y_TO if self.weights.bias is None else y_TO + self.weights.bias.to(y_TO.dtype)
        else:
            y_TO = self.product(rows_TI)
        if self.weight_adapter is not None:
            y_TO = y_TO + self.weight_adapter(rows_TI)
        return y_TO.to(compute_dtype(x_TI)).view(*x_TI.shape[:-1], -1)

    def product(self, rows_TI: Tensor) -> Tensor:
        """[T, I] → [T, O] in the rows' dtype."""
        return native_cpu.linear(self.weights, rows_TI, self.weights.bias)

    def extra_repr(self) -> str:
        """Shapes, for print(model)."""
        return f"{self.weights.columns} → {self.weights.rows}, {self.weights.format.kind}"
