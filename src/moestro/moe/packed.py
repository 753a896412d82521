"""Packed experts in the place of `Experts`, and a packed dense network: no gradients, CPU only.

A quantised model is the same model with other experts. The packed bytes are no parameters: `to`
neither moves nor converts them, and they are saved by `moestro.checkpoints.packed_files` only.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from moestro.errors import MoestroError
from moestro.kernels import native_cpu, packing
from moestro.moe.experts import compute_dtype
from moestro.moe.routing import Routing


class Packed(nn.Module):
    """What packed modules have in common: they never train, and no state dict holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode.

        Raises:
            MoestroError: training was asked for.
        """
        if mode:
            raise MoestroError(
                "packed weights cannot be trained; train the model as it was before packing, "
                "and pack the result"
            )
        return super().train(False)

    def rows(self, x_TI: Tensor) -> Tensor:
        """The rows in a dtype that the kernels take.

        Raises:
            MoestroError: gradients would have to flow through them.
        """
        if torch.is_grad_enabled() and x_TI.requires_grad:
            raise MoestroError(
                "packed weights have no gradients; call the model under torch.no_grad(), or train "
                "it as it was before packing"
            )
        x_TI = x_TI.to(compute_dtype(x_TI))
        return x_TI.float() if x_TI.dtype == torch.float16 else x_TI

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it is made of, by the names that `use` takes."""
        raise NotImplementedError

    def use(self, parts: dict[str, Tensor]) -> None:
        """Take others in their place, of the same shapes and dtypes."""
        raise NotImplementedError

    def _save_to_state_dict(self, *_: Any) -> None:
        raise MoestroError(
            "packed weights belong in no state dict; write them with "
            "moestro.checkpoints.packed_files.save, or save the model before packing it"
        )


class PackedWeights(Packed):
    """E packed feed-forward networks: what `PackedExperts` and `PackedFeedForward` share.

    Args:
        weights: from `native_cpu.pack_expert`, expert by expert, or mapped from a file.
    """

    def __init__(self, weights: packing.PackedExperts) -> None:
        super().__init__()
        self.weights = weights

    def parts(self) -> dict[str, Tensor]:
        """Packed bytes, and biases where there are some."""
        data, biases = self.weights.data, (self.weights.up_bias, self.weights.down_bias)
        up_down = zip(("up_bias", "down_bias"), biases, strict=True)
        return {"packed": data} | {name: bias for name, bias in up_down if bias is not None}

    def use(self, parts: dict[str, Tensor]) -> None:
        """Take others in their place."""
        self.weights = self.weights._replace(
            data=parts["packed"], up_bias=parts.get("up_bias"), down_bias=parts.get("down_bias")
        )

    def extra_repr(self) -> str:
        """Shapes, for print(model)."""
        packed = self.weights
        shape = f"{packed.num_experts} × ({packed.dim} → {packed.hidden_dim} → {packed.dim})"
        return f"{shape}, {packed.activation}, {packed.format.kind}"


class PackedExperts(PackedWeights):
    """Packed experts: a whole mixture in one call of the kernels."""

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See `Experts.forward`."""
        tokens_R, experts_R, weights_R = routing.tokens_R, routing.experts_R, routing.weights_R
        if routing.kept_R is not None:
            kept_R = routing.kept_R
            tokens_R, experts_R, weights_R = (
                each[kept_R] for each in (tokens_R, experts_R, weights_R)
            )
        if routing.top_k == 0:  # Expert choice lists its assignments by expert.
            order_R = tokens_R.argsort(stable=True)
            tokens_R, experts_R, weights_R = (
                each[order_R] for each in (tokens_R, experts_R, weights_R)
            )
        rows_TD = self.rows(x_TD)
        y_TD = native_cpu.mixture(self.weights, rows_TD, tokens_R, experts_R, weights_R)
        return y_TD.to(compute_dtype(x_TD))


class PackedFeedForward(PackedWeights):
    """A packed dense network: one expert that takes every row."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """See `FeedForward.forward`."""
        rows_TD = self.rows(x_TD)
        tokens_T = torch.arange(len(rows_TD), device="cpu")
        experts_T = torch.zeros_like(tokens_T)
        weights_T = torch.ones_like(tokens_T, dtype=torch.float32)
        y_TD = native_cpu.mixture(self.weights, rows_TD, tokens_T, experts_T, weights_T)
        return y_TD.to(compute_dtype(x_TD))
