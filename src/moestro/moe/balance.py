"""What keeps experts evenly used: pure functions of one layer's Routing.

At perfect balance the Switch loss is 1 whatever K, importance and load are 0. Padding tokens never
count. docs/design/0002-numerics.md converts other projects' coefficients.

Letters: T tokens, E experts, K experts per token, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.errors import ShapeError
from moestro.moe.routing import Routing


def switch_loss(routing: Routing, counts_E: Tensor | None = None) -> Tensor:
    """E · Σ_e f_e · P_e: 1 when all experts get equal shares, E when one gets everything.

    f_e is the share of the assignments that expert e received (before drops), P_e the mean of its
    probability over the tokens; the gradient flows through P alone. K = 1: Fedus et al. 2021,
    eq. 4-6. K > 1: f counts all K choices and is divided by K (DeepSeekMoE, Dai et al. 2024,
    eq. 12-14), so the value at balance does not depend on K.

    Args:
        routing: one layer's.
        counts_E: assignments per expert to take f from instead: those of all micro-batches of the
            step and all ranks make this the global-batch loss (Qiu et al. 2025).
    """
    counts_E = routing.counts_E() if counts_E is None else counts_E
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return routing.num_experts * (share_E.to(routing.probs_TE.dtype) * _mean_probs(routing)).sum()


def sequence_loss(routing: Routing, num_sequences: int) -> Tensor:
    """The Switch loss inside each sequence, then the mean (DeepSeek-V3 2024, eq. 17-20).

    Args:
        routing: one layer's, of T = N · S tokens stored sequence by sequence.
        num_sequences: N. A sequence of padding alone does not count.

    Raises:
        ShapeError: T does not split into N sequences.
    """
    num_tokens, num_experts = routing.logits_TE.shape
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ShapeError(f"{num_tokens} tokens do not split into {num_sequences} sequences")
    valid_T = _valid(routing)
    length = num_tokens // num_sequences
    experts_R, tokens_R = routing.experts_R, routing.tokens_R
    keys_R = (tokens_R // length) * num_experts + experts_R
    keys_R = keys_R[valid_T[tokens_R]]
    counts_NE = torch.bincount(keys_R, minlength=num_sequences * num_experts)
    counts_NE = counts_NE.view(num_sequences, num_experts)
    share_NE = counts_NE / counts_NE.sum(-1, keepdim=True).clamp(min=1)
    masked_TE = routing.probs_TE * valid_T[:, None]
    real_N = valid_T.view(num_sequences, length).sum(-1)
    sums_NE = masked_TE.view(num_sequences, length, num_experts).sum(1)
    probs_NE = sums_NE / real_N.clamp(min=1)[:, None]
    losses_N = num_experts * (share_NE.to(probs_NE.dtype) * probs_NE).sum(-1)
    return losses_N.sum() / (real_N > 0).sum().clamp(min=1)


def importance_loss(routing: Routing) -> Tensor:
    """CV² of the experts' summed weights: 0 at balance (Shazeer et al. 2017, eq. 6-7)."""
    weights_R = routing.weights_R
    if routing.valid_T is not None:
        weights_R = weights_R * routing.valid_T[routing.tokens_R]
    importance_E = weights_R.new_zeros(routing.num_experts)
    importance_E = importance_E.index_add(0, routing.experts_R, weights_R)
    return _cv_squared(importance_E)


def load_loss(routing: Routing) -> Tensor:
    """CV² of the experts' smooth load: 0 at balance (Shazeer et al. 2017, eq. 10-11).

    Raises:
        ShapeError: the router has no noise.
    """
    if routing.load_TE is None:
        raise ShapeError(
            "the smooth load needs the noise of a noisy_top_k router in training mode; "
            "set balance.load = 0 for other routers"
        )
    return _cv_squared((routing.load_TE * _valid(routing)[:, None]).sum(0))


def z_loss(routing: Routing) -> Tensor:
    """mean_t logsumexp_e(logits)²: keeps router logits small (Zoph et al. 2022, ST-MoE eq. 5)."""
    squares_T = routing.logits_TE.logsumexp(-1).square()
    if routing.valid_T is None:
        return squares_T.sum() / max(len(squares_T), 1)
    return (squares_T * routing.valid_T).sum() / routing.valid_T.sum().clamp(min=1)


def update_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """One step of loss-free balancing, in place: b_e += u · sign(mean load - load_e).

    Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", alg. 1: once per optimizer step, from
    the counts of that whole step over all ranks, after the weights have been updated.

    Args:
        bias_E: fp32 buffer of the router.
        counts_E: assignments per expert, before drops.
        rate: u; the paper's is 1e-3.
    """
    load_E = counts_E.to(bias_E.dtype)
    bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=rate)


def _valid(routing: Routing) -> Tensor:
    if routing.valid_T is not None:
        return routing.valid_T
    return torch.ones(routing.num_tokens, dtype=torch.bool, device=routing.logits_TE.device)


def _mean_probs(routing: Routing) -> Tensor:
    """P_e over real tokens. [E]."""
    if routing.valid_T is None:
        return routing.probs_TE.sum(0) / max(routing.num_tokens, 1)
    real_TE = routing.probs_TE * routing.valid_T[:, None]
    return real_TE.sum(0) / routing.valid_T.sum().clamp(min=1)


def _cv_squared(values_E: Tensor) -> Tensor:
    """Variance over squared mean; 0 where everything is zero."""
    mean = values_E.mean()
    return values_E.var(correction=0) / mean.square().clamp(min=1e-20)
