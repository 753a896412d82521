"""A mixture as one pure function: tokens, their Routing and the experts' weights in, y out.

All experts whose weights are plain tensors go through it. What it does depends on the data, so
modules hide it from `torch.compile`, which would compile it again for every group size. They do so
under the compiler only: `torch.compiler.disable` imports it, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moestro.kernels import backends
from moestro.kernels.backends import Backend, Work
from moestro.kernels.reference import Activation, Biases
from moestro.moe import dispatch
from moestro.moe.lora import Adapters
from moestro.moe.noise import Drop
from moestro.moe.routing import Routing

# Most rows that are multiplied expert by expert instead of being grouped, without gradients.
FEW_ROWS = 16


class ExpertWeights(NamedTuple):
    """The weights of E feed-forward networks; see `reference.expert_ffn`.

    A function instead of an activation's name runs between two products; a name lets a
    kernel fuse all three.
    """

    up_EHD: Tensor
    down_EDF: Tensor
    activation: Activation
    biases: Biases | None = None
    norm: Callable[[Tensor], Tensor] | None = None  # of each row after the second product
    adapters: Adapters | None = None
    drop: Drop | None = None

    def differentiated(self, *others: Tensor) -> bool:
        """Whether derivatives with respect to any weight, or to the others, are wanted."""
        adapters = [each for each in self.adapters or () if each is not None]
        trained = [parameter for each in adapters for parameter in each.parameters()]
        return differentiated(*others, *self[:2], *(self.biases or ()), *trained)

    def work(self, x_TD: Tensor, use: str, lacks: str | None = None) -> Work:
        """What is to be computed with them; see `backends.Work`."""
        if callable(self.activation) or self.drop is not None:
            lacks = lacks or "the experts have an activation or gate of their own"
        elif self.adapters is not None:
            lacks = lacks or "the experts have adapters"
        elif self.norm is not None:
            lacks = lacks or "the experts have a norm after each"
        up_EHD, down_EDF = weights = self[:2]
        widths = (up_EHD.shape[2], up_EHD.shape[1], down_EDF.shape[2])
        return Work(x_TD.device.type, x_TD.dtype, widths, use, weights, lacks)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on, else the tensor's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether derivatives with respect to any of these are wanted."""
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors):
        return True
    return forward_ad._current_level >= 0


def mix(
    x_TD: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    backend: str = "auto",
    training: bool | None = None,
) -> Tensor:
    """Dispatch → experts → combine; without gradients in one call, or expert by expert.

    Args:
        x_TD: tokens, in the dtype to compute in, which is that of the result.
        routing: who goes where.
        weights: of the experts, in any dtype.
        backend: a kernel's name, or "auto"; see `moestro.kernels.backends`.
        training: whether to compute as where gradients are wanted; None: where they are.
    """
    if routing.weights_R.dtype.itemsize < 4:  # A wrapper cast its inputs, as FSDP2 does.
        routing = routing._replace(weights_R=routing.weights_R.float())
    if training is None:
        training = weights.differentiated(x_TD, routing.weights_R)
    lacks = None if routing.top_k else "tokens have varying numbers of experts"
    kernel = backends.choose(backend, weights.work(x_TD, "train" if training else "infer", lacks))
    if kernel.mixture is not None and weights.norm is None and weights.drop is None:
        rows = (routing.tokens_R, routing.experts_R, routing.weights_R)
        if weights.adapters is not None:
            up_EHD, down_EDF = weights.adapters.merged(*weights[:2])
            weights = weights._replace(up_EHD=up_EHD, down_EDF=down_EDF)
        return kernel.mixture(x_TD, *rows, *weights[:4], routing.kept_R)
    few = not training and routing.top_k and len(routing.experts_R) <= FEW_ROWS
    single = _single(kernel, weights) if few else None
    if single is not None:
        return dispatch.mix_few(x_TD, routing, single)
    plan = dispatch.make_plan(routing, lambda counts_E: kernel.padded_counts(counts_E, x_TD.dtype))
    rows_RD = dispatch.dispatch(x_TD, plan)
    if weights.drop is not None:
        weights = weights._replace(activation=weights.drop.after(weights.activation, plan))
    rows_RD = _ffn(kernel, rows_RD, weights, plan.offsets_E, plan.experts_E)
    if weights.norm is not None:
        rows_RD = weights.norm(rows_RD)
    return dispatch.combine(rows_RD, routing.weights_R, plan)


def dense(x_TD: Tensor, weights: ExpertWeights, backend: str = "auto") -> Tensor:
    """One network that takes every row, by the kernels that train; see `mix`."""
    kernel = backends.choose(backend, weights.work(x_TD, "train"))
    few = len(x_TD) <= FEW_ROWS and not weights.differentiated(x_TD)
    single = _single(kernel, weights) if few else None
    if single is not None:
        return single(x_TD, 0)
    all_rows_E = torch.tensor([len(x_TD)], dtype=torch.int64, device=x_TD.device)
    return _ffn(kernel, x_TD, weights, all_rows_E, None)


def _single(kernel: Backend, weights: ExpertWeights) -> Callable[[Tensor, int], Tensor] | None:
    """One expert as a function: (rows [P, D], its number) → [P, D], without gradients.

    For generating text, where so few rows are multiplied that grouping them costs more. None where
    grouping is better or needed: a kernel without such a function, no named activation, a norm,
    adapters, dropout.
    """
    up_EHD, down_EDF, activation, biases, norm, adapters, drop = weights
    single_ffn = kernel.single_ffn
    if single_ffn is None or callable(activation) or norm or adapters or drop is not None:
        return None
    return lambda rows_PD, expert: single_ffn(rows_PD, expert, up_EHD, down_EDF, activation, biases)


def _ffn(
    kernel: Backend,
    rows_RD: Tensor,
    weights: ExpertWeights,
    offsets_E: Tensor,
    experts_E: Tensor | None,
) -> Tensor:
    """Each row through its expert; rows past the last offset give zero."""
    up_EHD, down_EDF, activation, biases, _, adapters, _ = weights
    if adapters is not None:
        up, down = (
            partial(_product, kernel, w_EOI, bias_EO, offsets_E, experts_E)
            for w_EOI, bias_EO in zip(weights[:2], biases or (None, None), strict=True)
        )
        return adapters.ffn(rows_RD, up, down, activation, offsets_E, experts_E)
    if not callable(activation):
        plain = (up_EHD, down_EDF, offsets_E, activation, experts_E, biases)
        return kernel.expert_ffn(rows_RD, *plain)
    up_EH, down_ED = biases or (None, None)
    hidden_RH = kernel.grouped_mm(rows_RD, up_EHD, offsets_E, experts_E, up_EH)
    return kernel.grouped_mm(activation(hidden_RH), down_EDF, offsets_E, experts_E, down_ED)


def _product(
    kernel: Backend,
    w_EOI: Tensor,
    bias_EO: Tensor | None,
    offsets_E: Tensor,
    experts_E: Tensor | None,
    rows_RI: Tensor,
) -> Tensor:
    return kernel.grouped_mm(rows_RI, w_EOI, offsets_E, experts_E, bias_EO)
