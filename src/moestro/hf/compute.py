"""Computes the experts of a transformers model, on tensors alone.

Without gradients on CPU the native kernels run, on the model's own weights or on packed ones.
Everything else runs on the kernels that this project trains with: gradients, GPUs, a missing
native library, and what the native kernels have no form for; on CPU without gradients a warning
gives the reason once. What runs is chosen by the table of `moestro.kernels.backends`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moestro.foreign import undecorated
from moestro.foreign.layouts import ForeignWeights
from moestro.kernels import backends, native_cpu, reference
from moestro.kernels.backends import Work
from moestro.kernels.packing import ExpertSlabs
from moestro.kernels.reference import Biases
from moestro.moe import dispatch, mixing
from moestro.moe.mixing import ExpertWeights, compute_dtype
from moestro.moe.routing import Routing

_said: set[str] = set()


def without_gradients(
    weights: ForeignWeights,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    name: str,
    experts: Any = None,
) -> tuple[Tensor, str | None]:
    """The mixture where no gradients are wanted.

    Args:
        weights: of the experts.
        x_TD: tokens.
        experts_TK: the experts of each token; E and above: of another rank, takes no part.
        weights_TK: their weights in the sum.
        name: of the experts, for the warning.
        experts: the module, whose own functions run between and after the products where `fused`
            has no name for them.

    Returns:
        y_TD in the tokens' dtype, and why it was not one native call (None: it was).

    Raises:
        BackendError: what MOESTRO_BACKEND names cannot run.
    """
    lacks = weights.odd()
    if lacks is not None:
        lacks = f"they have {lacks}"
    work = Work(x_TD.device.type, compute_dtype(x_TD), (), "infer", weights.matrices, lacks)
    reason = backends.why_not_whole("auto", work)
    if reason is None:
        return _native(_plain(weights), x_TD, experts_TK, weights_TK), None
    warning = f"{name} runs on moestro's torch kernels: {reason}"
    if backends.forced() == "auto" and x_TD.device.type == "cpu" and warning not in _said:
        _said.add(warning)
        warnings.warn(warning, stacklevel=3)
    return by_torch(weights, x_TD, experts_TK, weights_TK, experts, training=False), reason


def _plain(weights: ForeignWeights) -> ExpertSlabs:
    """The experts for the native kernels, on the model's own memory."""
    assert weights.activation is not None
    up_EH = weights.up_EH
    if up_EH is not None and weights.interleaved:
        up_EH = torch.cat([up_EH[:, ::2], up_EH[:, 1::2]], dim=1)
    up = weights.halves() if weights.gated else weights.up_EHD
    return native_cpu.plain_experts(
        up, weights.down_EDF, weights.activation, up_EH, weights.down_ED
    )


def by_packed(packed: ExpertSlabs, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The mixture of packed experts, without gradients; raises as `without_gradients` does."""
    backends.choose("auto", backends.PACKED)
    return _native(packed, x_TD, experts_TK, weights_TK)


def _native(packed: ExpertSlabs, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    tokens_A = _tokens(*experts_TK.shape)
    experts_A, weights_A = experts_TK.reshape(-1).long(), weights_TK.detach().reshape(-1)
    here_A = experts_A < packed.num_experts
    if not bool(here_A.all()):
        tokens_A, experts_A, weights_A = tokens_A[here_A], experts_A[here_A], weights_A[here_A]
    rows_TD = x_TD.to(compute_dtype(x_TD))
    return native_cpu.mixture(packed, rows_TD, tokens_A, experts_A, weights_A).to(x_TD.dtype)


def by_torch(
    weights: ForeignWeights,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    experts: Any = None,
    training: bool = True,
) -> Tensor:
    """Dispatch, experts and combine, with their gradients; see `without_gradients`, `mix`."""
    rows_TD = x_TD.to(compute_dtype(x_TD))
    if weights.other_EFD is not None:
        y_TD = split(weights, rows_TD, experts_TK, weights_TK, experts, product)
        return y_TD.to(x_TD.dtype)
    up_EHD, down_EDF, up_EH, down_ED = weights[:4]
    biases = None if up_EH is None or down_ED is None else Biases(up_EH, down_ED)
    norm = experts.post_expert_norm if weights.post_norm else None
    activation = fused(weights) or _gate(weights, experts)
    values = ExpertWeights(up_EHD, down_EDF, activation, biases, norm)
    routing = _routing(experts_TK, weights_TK, len(up_EHD))
    return mixing.mix(rows_TD, routing, values, training=training).to(x_TD.dtype)


def split(
    weights: ForeignWeights,
    rows_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    experts: Any,
    product: Callable[..., Tensor],
) -> Tensor:
    """The mixture in steps, where a module's own functions run between or after the products.

    `product` is the function of that name, or its operator; else see `without_gradients`.
    """
    num_tokens, top_k = experts_TK.shape
    experts_A = experts_TK.reshape(-1)
    rows_AD = rows_TD[:, None].expand(-1, top_k, -1).reshape(num_tokens * top_k, -1)
    hidden_AH = product(rows_AD, experts_A, weights.up_EHD, weights.up_EH)
    if weights.other_EFD is not None:
        other_AF = product(rows_AD, experts_A, weights.other_EFD, None)
        hidden_AH = torch.cat([hidden_AH, other_AF], dim=-1)
    rows_AD = product(
        _gate(weights, experts)(hidden_AH), experts_A, weights.down_EDF, weights.down_ED
    )
    if weights.post_norm:
        rows_AD = experts.post_expert_norm(rows_AD)
    dtype = torch.promote_types(rows_AD.dtype, torch.float32)
    # Zero where it must not be read: zero times NaN would not be zero.
    weights_TK1 = weights_TK.to(dtype).masked_fill(experts_TK >= len(weights.up_EHD), 0)[..., None]
    y_TD = (rows_AD.to(dtype).view(num_tokens, top_k, -1) * weights_TK1).sum(1)
    return y_TD.to(rows_TD.dtype)


def fused(weights: ForeignWeights) -> str | None:
    """The activation, where a kernel takes it between the two products; None: split there."""
    apart = weights.interleaved or weights.post_norm or weights.other_EFD is not None
    return weights.activation if not apart else None


def _gate(weights: ForeignWeights, experts: Any) -> Callable[[Tensor], Tensor]:
    """`gate_of` a module; of weights alone, the definition of their activation."""
    if experts is not None:
        return gate_of(experts)
    name, take_turns = weights.activation, weights.interleaved
    assert name is not None

    def gate(hidden_AH: Tensor) -> Tensor:
        if take_turns:
            hidden_AH = torch.cat([hidden_AH[..., ::2], hidden_AH[..., 1::2]], dim=-1)
        return reference.activate(hidden_AH, name)

    return gate


def gate_of(experts: Any) -> Callable[[Tensor], Tensor]:
    """What a module of transformers does between its two products."""
    found = undecorated.layout(experts)
    if found is not None and not hasattr(experts, "_apply_gate"):
        act = undecorated.tensor(experts, found.within(found.act))
        if found.each is None:
            return lambda hidden_AH: _gated(hidden_AH, act)
        drop = undecorated.dropout(experts, found)
        plain: Callable[[Tensor], Tensor] = act
        return plain if drop is None else lambda hidden_AH: drop(act(hidden_AH))
    own = found is not None or experts.has_gate
    gate: Callable[[Tensor], Tensor] = experts._apply_gate if own else experts.act_fn
    return gate


def _gated(hidden_AH: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    gate_AF, up_AF = hidden_AH.chunk(2, dim=-1)
    return act(gate_AF) * up_AF


def product(x_AI: Tensor, experts_A: Tensor, w_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    """Multiply each row by its expert's matrix, by the kernels of training; rows in any order.

    Returns:
        [A, O] in the rows' dtype; zero where the expert is that of another rank.
    """
    kernel = backends.choose("auto", Work(x_AI.device.type, x_AI.dtype, tuple(w_EOI.shape[1:])))
    routing = _routing(experts_A[:, None], x_AI.new_ones(len(x_AI), 1), len(w_EOI))
    plan = dispatch.make_plan(routing, lambda counts_E: kernel.padded_counts(counts_E, x_AI.dtype))
    rows_RI = dispatch.dispatch(x_AI, plan)
    y_RO = kernel.grouped_mm(rows_RI, w_EOI, plan.offsets_E, plan.experts_E, bias_EO)
    return dispatch.combine(y_RO, routing.weights_R, plan)


@lru_cache(maxsize=64)
def _tokens(num_tokens: int, top_k: int) -> Tensor:
    """The token of each assignment, where all take part; on CPU, whatever the default device."""
    return torch.arange(num_tokens, device="cpu").repeat_interleave(top_k)


def _routing(experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Routing:
    """A router's choice as a Routing; experts of other ranks count as dropped."""
    # In at least fp32, and zero where it must not be read: zero times NaN would not be zero.
    weights_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
    experts_TK, away_TK, kept_R = experts_TK.long(), experts_TK >= num_experts, None
    if bool(away_TK.any()):
        kept_R = ~away_TK.flatten()
        weights_TK, experts_TK = (each.masked_fill(away_TK, 0) for each in (weights_TK, experts_TK))
    # Only the shape of the logits is used here.
    shape_TE = torch.empty(len(experts_TK), num_experts, dtype=torch.float32, device="meta")
    return Routing.of_choice(experts_TK, weights_TK, shape_TE, shape_TE)._replace(kept_R=kept_R)
