"""A mixture as one pure function: tokens, their Routing and the experts' weights in, y out.

All experts whose weights are plain tensors go through it. What it does depends on the data, so
modules hide it from `torch.compile`, which would compile it again for every group size. They do so
under the compiler only: `torch.compiler.disable` imports it, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.kernels import backends
from moestro.kernels.reference import Activation, Biases
from moestro.moe import dispatch
from moestro.moe.routing import Routing

# Most rows that are multiplied expert by expert instead of being grouped, without gradients.
FEW_ROWS = 16


class ExpertWeights(NamedTuple):
    """The weights of E feed-forward networks.

    Attributes:
        up_EHD: see `reference.expert_ffn`.
        down_EDF: see `reference.expert_ffn`.
        activation: see `reference.activate`; a function in its place runs between two products,
            where a name lets a kernel fuse all three.
        biases: of the experts that have them.
    """

    up_EHD: Tensor
    down_EDF: Tensor
    activation: Activation
    biases: Biases | None = None


def mix(x_TD: Tensor, routing: Routing, weights: ExpertWeights, backend: str = "auto") -> Tensor:
    """Dispatch → experts → combine; of few rows without gradients, expert by expert.

    Args:
        x_TD: tokens, in the dtype to compute in.
        routing: who goes where.
        weights: of the experts, in any dtype.
        backend: a kernel's name, or "auto"; see `moestro.kernels.backends`.

    Returns:
        y_TD in the tokens' dtype.
    """
    kernel = _kernel(x_TD, weights, backend)
    if routing.weights_R.dtype.itemsize < 4:  # A wrapper cast its inputs, as FSDP2 does.
        routing = routing._replace(weights_R=routing.weights_R.float())
    if kernel.mixture is not None:
        rows = (routing.tokens_R, routing.experts_R, routing.weights_R)
        return kernel.mixture(x_TD, *rows, *weights, routing.kept_R)
    few = routing.top_k and len(routing.experts_R) <= FEW_ROWS
    single = _single(kernel, weights) if few else None
    if single is not None:
        return dispatch.mix_few(x_TD, routing, single)
    plan = dispatch.make_plan(routing, lambda counts_E: kernel.rooms(counts_E, x_TD.dtype))
    rows_RD = dispatch.dispatch(x_TD, plan)
    rows_RD = _ffn(kernel, rows_RD, weights, plan.offsets_E, plan.experts_E)
    return dispatch.combine(rows_RD, routing.weights_R, plan)


def dense(x_TD: Tensor, weights: ExpertWeights, backend: str = "auto") -> Tensor:
    """One network that takes every row; see `mix`."""
    kernel = _kernel(x_TD, weights, backend)
    single = _single(kernel, weights) if len(x_TD) <= FEW_ROWS else None
    if single is not None:
        return single(x_TD, 0)
    all_rows_E = torch.tensor([len(x_TD)], dtype=torch.int64, device=x_TD.device)
    return _ffn(kernel, x_TD, weights, all_rows_E, None)


def _kernel(x_TD: Tensor, weights: ExpertWeights, backend: str) -> backends.Backend:
    up_EHD, down_EDF = weights.up_EHD, weights.down_EDF
    widths = (up_EHD.shape[2], up_EHD.shape[1], down_EDF.shape[2])
    return backends.choose(backend, x_TD.device.type, x_TD.dtype, widths)


def _single(
    kernel: backends.Backend, weights: ExpertWeights
) -> Callable[[Tensor, int], Tensor] | None:
    """One expert as a function: (rows [P, D], its number) → [P, D], without gradients.

    For generating text, where so few rows are multiplied that grouping them costs more. None where
    grouping is better or needed: gradients, a kernel without such a function, no named activation.
    """
    up_EHD, down_EDF, activation, biases = weights
    single_ffn = kernel.single_ffn
    if single_ffn is None or callable(activation) or torch.is_grad_enabled():
        return None
    return lambda rows_PD, expert: single_ffn(rows_PD, expert, up_EHD, down_EDF, activation, biases)


def _ffn(
    kernel: backends.Backend,
    rows_RD: Tensor,
    weights: ExpertWeights,
    offsets_E: Tensor,
    experts_E: Tensor | None,
) -> Tensor:
    """Each row through its expert; rows past the last offset give zero."""
    up_EHD, down_EDF, activation, biases = weights
    if not callable(activation):
        return kernel.expert_ffn(
            rows_RD, up_EHD, down_EDF, offsets_E, activation, experts_E, biases
        )
    up_EH, down_ED = biases or (None, None)
    hidden_RH = kernel.grouped_mm(rows_RD, up_EHD, offsets_E, experts_E, up_EH)
    return kernel.grouped_mm(activation(hidden_RH), down_EDF, offsets_E, experts_E, down_ED)
