"""Packed experts in place of `Experts`, and a packed dense network: no gradients, CPU only.

A quantised model is the same model with other experts. The packed bytes are not parameters: `to`
neither moves nor converts them, and they are saved by `moestro.checkpoints.packed_files` only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from moestro.errors import MoestroError
from moestro.kernels import backends, native_cpu, packing
from moestro.kernels.packing import ExpertSlabs, Format, StoredRows
from moestro.kernels.torch_grouped import Groups
from moestro.moe import dispatch
from moestro.moe.lora import Adapter, Adapters, unpacked_mm
from moestro.moe.mixing import compute_dtype
from moestro.moe.routing import Routing


@runtime_checkable
class Packable(Protocol):
    """A module that can be packed."""

    def to_packed(self, format: Format, stored: StoredRows | None = None) -> Packed:
        """The same with packed weights, without memory where it has none; see `quantize.pack`.

        With `stored`, matrices are read from there, and the module's own numbers do not count.
        """


class Packed(nn.Module):
    """What packed modules have in common: they never train, and no state dict holds them.

    Args:
        weights: a PackedMatrix or ExpertSlabs, from `native_cpu` or mapped from a file.

    Attributes:
        passes_gradients: to what comes before them, by unpacking; for adapters that are trained.
    """

    TENSORS: ClassVar[dict[str, str]]  # the tensors of the weights: name in a file → name there

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weights, self.training = weights, False
        self.passes_gradients = False

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode.

        Raises:
            MoestroError: training was asked for.
        """
        if mode and not self.passes_gradients:
            raise MoestroError(
                "packed weights cannot be trained; train the model as it was before packing, "
                "and pack the result"
            )
        return super().train(mode)

    def rows(self, x_TI: Tensor) -> Tensor:
        """The rows in a dtype that the kernels take.

        Raises:
            MoestroError: gradients would have to flow through them.
        """
        if torch.is_grad_enabled() and x_TI.requires_grad and not self.passes_gradients:
            raise MoestroError(
                "packed weights have no gradients; call the model under torch.no_grad(), or train "
                "it as it was before packing"
            )
        x_TI = x_TI.to(compute_dtype(x_TI))
        return x_TI.float() if x_TI.dtype == torch.float16 else x_TI

    @property
    def unpacks(self) -> bool:
        """Whether gradients are to pass now; one rounding for all layers, whatever needs them."""
        return self.passes_gradients and torch.is_grad_enabled()

    def native(self) -> Any:
        """The weights as the native kernels read them."""
        return self.weights

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it is made of, by the names that `use` takes."""
        found = {name: getattr(self.weights, own) for name, own in self.TENSORS.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def use(self, parts: dict[str, Tensor]) -> None:
        """Replace them by others of the same shapes and dtypes."""
        given = {own: parts.get(name) for name, own in self.TENSORS.items()}
        self.weights = self.weights._replace(**given)

    def described(self) -> dict[str, Any]:
        """Sizes and format, as the header of a packed file has them."""
        raise NotImplementedError

    def _save_to_state_dict(self, *_: Any) -> None:
        raise MoestroError(
            "packed weights belong in no state dict; write them with "
            "moestro.checkpoints.packed_files.save, or save the model before packing it"
        )


class PackedStack(Packed):
    """E packed feed-forward networks: what `PackedExperts` and `PackedFeedForward` share."""

    TENSORS: ClassVar = {"packed": "data", "up_bias": "up_bias", "down_bias": "down_bias"}
    weights: packing.ExpertSlabs

    def __init__(self, weights: Any) -> None:
        super().__init__(weights)
        self.gate_up_adapter: Adapter | None = None
        self.down_adapter: Adapter | None = None

    def described(self) -> dict[str, Any]:
        """See `Packed.described`."""
        _, experts, dim, hidden_dim, activation, format, *_ = self.weights
        sizes = {"experts": experts, "dim": dim, "hidden_dim": hidden_dim}
        dense = isinstance(self, PackedFeedForward)
        return {**sizes, "activation": activation, "dense": dense, **format.described()}

    def mix(self, x_TD: Tensor, tokens_R: Tensor, experts_R: Tensor, weights_R: Tensor) -> Tensor:
        """A whole mixture in one call; see `native_cpu.mixture`.

        Raises:
            BackendError: another backend was asked for; only native code reads packed weights.
        """
        rows_TD = self.rows(x_TD)
        backends.choose("auto", backends.PACKED)
        y_TD = native_cpu.mixture(self.weights, rows_TD, tokens_R, experts_R, weights_R)
        return y_TD.to(compute_dtype(x_TD))

    @property
    def unpacks(self) -> bool:
        """Also where adapters need the products one by one."""
        adapters = (self.gate_up_adapter, self.down_adapter)
        return super().unpacks or any(each is not None for each in adapters)

    def ffn(self, rows_RD: Tensor, offsets_E: Tensor, experts_E: Tensor | None) -> Tensor:
        """Each row through its expert, which is unpacked for it; in the rows' dtype."""
        weights = self.weights

        def product(
            unpack: Callable[[ExpertSlabs, int], Tensor], bias_EO: Tensor | None, x_RI: Tensor
        ) -> Tensor:
            y_RO = unpacked_mm(x_RI, partial(unpack, weights), offsets_E, experts_E)
            if bias_EO is not None:
                y_RO = (
                    y_RO + bias_EO.to(y_RO.dtype)[Groups(offsets_E, experts_E).experts_R(len(y_RO))]
                )
            return y_RO

        up = partial(product, native_cpu.unpack_up, weights.up_bias)
        down = partial(product, native_cpu.unpack_down, weights.down_bias)
        adapters = Adapters(self.gate_up_adapter, self.down_adapter)
        return adapters.ffn(rows_RD, up, down, weights.activation, offsets_E, experts_E)

    def extra_repr(self) -> str:
        """Shapes, for print(model)."""
        packed = self.weights
        shape = f"{packed.num_experts} × ({packed.dim} → {packed.hidden_dim} → {packed.dim})"
        return f"{shape}, {packed.activation}, {packed.format.kind}"


class PackedExperts(PackedStack):
    """Packed experts in place of `Experts`."""

    def forward(self, x_TD: Tensor, routing: Routing, noise_T: Tensor | None = None) -> Tensor:
        """See `Experts.forward`; nothing here is random."""
        if self.unpacks:
            plan = dispatch.make_plan(routing)
            rows_RD = dispatch.dispatch(self.rows(x_TD), plan)
            rows_RD = self.ffn(rows_RD, plan.offsets_E, plan.experts_E)
            y_TD = dispatch.combine(rows_RD, routing.weights_R.float(), plan)
            return y_TD.to(compute_dtype(x_TD))
        chosen = [routing.tokens_R, routing.experts_R, routing.weights_R]
        if routing.kept_R is not None:
            chosen = [each[routing.kept_R] for each in chosen]
        if routing.top_k == 0:  # Expert choice lists its assignments by expert.
            order_R = chosen[0].argsort(stable=True)
            chosen = [each[order_R] for each in chosen]
        return self.mix(x_TD, *chosen)


class PackedFeedForward(PackedStack):
    """A packed dense network: one expert that takes every row."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """See `FeedForward.forward`."""
        if self.unpacks:
            all_rows = torch.tensor([len(x_TD)], dtype=torch.int64, device=x_TD.device)
            y_TD = self.ffn(self.rows(x_TD), all_rows, None)
            return y_TD.to(compute_dtype(x_TD))
        tokens_T = torch.arange(len(x_TD), device="cpu")
        ones_T = torch.ones_like(tokens_T, dtype=torch.float32)
        return self.mix(x_TD, tokens_T, torch.zeros_like(tokens_T), ones_T)
