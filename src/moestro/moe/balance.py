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

# What configurations of transformers call the weight of their balance loss.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


def converted(coefficient: float, top_k: int, layers: int) -> float:
    """What a coefficient of transformers is worth as `switch=` here: c · K / L.

    transformers' loss is K at perfect balance and one for all layers; ours is 1 in each layer, and
    summed. The gradients are the same where all layers are uneven alike (docs/balance.md).

    Args:
        coefficient: c, such as `config.router_aux_loss_coef`.
        top_k: K, experts per token.
        layers: L, mixtures in the model.
    """
    return coefficient * top_k / layers


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
    share_E = _shares(counts_E, routing.probs_TE.dtype)
    mean_E = _real(routing, routing.probs_TE).sum(0) / _num_real(routing)
    return routing.num_experts * (share_E * mean_E).sum()


def sequence_loss(routing: Routing, num_sequences: int) -> Tensor:
    """The Switch loss inside each sequence, then the mean (DeepSeek-V3 2024, eq. 17-20).

    T = N · S tokens are stored sequence by sequence. One of padding alone does not count.

    Raises:
        ShapeError: T does not split into N sequences.
    """
    num_tokens, num_experts = routing.logits_TE.shape
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ShapeError(f"{num_tokens} tokens do not split into {num_sequences} sequences")
    valid_T = routing.valid_T
    if valid_T is None:
        valid_T = torch.ones_like(routing.probs_TE[:, 0], dtype=torch.bool)
    length = num_tokens // num_sequences
    experts_R, tokens_R = routing.experts_R, routing.tokens_R
    keys_R = (tokens_R // length) * num_experts + experts_R
    keys_R = keys_R[valid_T[tokens_R]]
    counts_NE = torch.bincount(keys_R, minlength=num_sequences * num_experts)
    share_NE = _shares(counts_NE.view(num_sequences, num_experts), routing.probs_TE.dtype)
    real_N = valid_T.view(num_sequences, length).sum(-1)
    probs_TE = _real(routing, routing.probs_TE)
    sums_NE = probs_TE.view(num_sequences, length, num_experts).sum(1)
    probs_NE = sums_NE / real_N.clamp(min=1)[:, None]
    losses_N = num_experts * (share_NE * probs_NE).sum(-1)
    return losses_N.sum() / (real_N > 0).sum().clamp(min=1)


def importance_loss(routing: Routing) -> Tensor:
    """CV² of the experts' summed weights: 0 at balance (Shazeer et al. 2017, eq. 6-7)."""
    weights_R = routing.weights_R
    if routing.valid_T is not None:
        weights_R = weights_R.masked_fill(~routing.valid_T[routing.tokens_R], 0)
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
    return _cv_squared(_real(routing, routing.load_TE).sum(0))


def z_loss(routing: Routing) -> Tensor:
    """mean_t logsumexp_e(logits)²: keeps router logits small (Zoph et al. 2022, ST-MoE eq. 5)."""
    # Masked on both sides of the logarithm: before it for the gradient, after it for log E.
    squares_T1 = _real(routing, routing.logits_TE).logsumexp(-1, keepdim=True).square()
    return _real(routing, squares_T1).sum() / _num_real(routing)


def update_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """One step of loss-free balancing, in place: b_e += u · (s_e - mean s), s = sign(mean n - n_e).

    Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", alg. 1: once per optimizer step, from
    the counts n of that whole step over all ranks, after the weights have been updated. Only
    differences between biases choose, so the steps' own mean is taken out: it says nothing, and
    with a few dead experts would carry all biases away together. The paper's rate u is 1e-3.

    Raises:
        ShapeError: the bias is of 16 bits, where steps of u are lost.
    """
    if bias_E.dtype.itemsize < 4:
        raise ShapeError(
            f"the selection bias is {bias_E.dtype}, where steps of {rate} are lost; keep it float32"
        )
    load_E = counts_E.double()  # Exact; in 16 bits 999 and 1001 are one number.
    step_E = torch.sign(load_E.mean() - load_E)
    bias_E.add_((step_E - step_E.mean()).to(bias_E.dtype), alpha=rate)


def _shares(counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts over their sum, last axis; divided in `dtype`, integers would be in the default."""
    return counts_E.to(dtype) / counts_E.sum(-1, keepdim=True).clamp(min=1)


def _real(routing: Routing, values_TE: Tensor) -> Tensor:
    """The values with padding at 0, whatever it held: 0 times NaN would be NaN."""
    valid_T = routing.valid_T
    return values_TE if valid_T is None else values_TE.masked_fill(~valid_T[:, None], 0)


def _num_real(routing: Routing) -> Tensor | int:
    """Number of real tokens, at least 1."""
    if routing.valid_T is None:
        return max(routing.num_tokens, 1)
    return routing.valid_T.sum().clamp(min=1)


def _cv_squared(values_E: Tensor) -> Tensor:
    """Variance over squared mean; 0 where everything is zero."""
    mean = values_E.mean()
    return values_E.var(correction=0) / mean.square().clamp(min=1e-20)
