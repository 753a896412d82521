"""The definition: a token-choice mixture one token and one expert at a time, in float64.

Independent of the project's routers, dispatch and kernels, which are checked with it too; the one
thing shared is `reference.mixture`, the definition that these have themselves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.check.description import Capacity, RouterRule
from moestro.kernels import reference
from moestro.kernels.reference import Activation, Biases


class Choice(NamedTuple):
    """The experts of each token, first choice first; gradients flow through all but `experts_TK`.

    Attributes:
        experts_TK: int64.
        weights_TK: what multiplies each expert's output.
        logits_TE: None: not known.
        probs_TE: rows sum to 1; what a balance loss is made of. None: not known.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor | None = None
    probs_TE: Tensor | None = None


class Weights(NamedTuple):
    """The experts in one form, see `reference.expert_ffn`; views, so that gradients reach all."""

    up_EHD: Tensor
    down_EDF: Tensor
    activation: Activation
    biases: Biases | None = None
    weigh_input: bool = False


def choose(rule: RouterRule, logits_TE: Tensor, bias_E: Tensor | None) -> Choice:
    """Token by token: scores, the best groups, the best K experts in them, their weights.

    Softmax or sigmoid, K of them, divided by their sum: Mixtral (Jiang et al. 2024, §2.1). Bias and
    groups: DeepSeek-V3 (2024, §2.1.2).
    """
    softmax = rule.score == "softmax"
    scores_TE = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
    experts, weights = [], []
    for scores_E in scores_TE:
        choice_E = scores_E.detach() if bias_E is None else (scores_E + bias_E).detach()
        order = choice_E.argsort(descending=True).tolist()
        size = len(order) // rule.num_groups
        if rule.num_groups > 1:
            best = 1 if rule.group_score == "max" else min(2, size)
            group = [float(g.topk(best).values.sum()) for g in choice_E.split(size)]
            ranked = sorted(range(len(group)), key=lambda g: -group[g])
            order = [e for e in order if e // size in ranked[: rule.top_groups]]
        chosen = order[: rule.top_k]
        weights_K = scores_E[chosen]
        if rule.normalise:
            weights_K = weights_K / weights_K.sum()
        experts.append(chosen)
        weights.append(weights_K * rule.scale)
    device, top_k = logits_TE.device, rule.top_k
    experts_TK = torch.tensor(experts, dtype=torch.int64, device=device).view(-1, top_k)
    weights_TK = torch.stack(weights) if weights else logits_TE[:, :top_k]
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    return Choice(experts_TK, weights_TK, logits_TE, probs_TE)


def kept(rule: Capacity, choice: Choice, num_experts: int) -> Tensor:
    """Bool [T, K]: which assignments find room when experts take them in order."""
    num_tokens, top_k = choice.experts_TK.shape
    room = math.ceil(rule.factor * num_tokens * top_k / num_experts - 1e-9)
    places = [(t, k) for t in range(num_tokens) for k in range(top_k)]
    if rule.order == "choices":
        places.sort(key=lambda place: place[1])
    elif rule.order == "weights":
        places.sort(key=lambda place: -float(choice.weights_TK[place]))
    taken, kept_TK = [0] * num_experts, torch.zeros_like(choice.experts_TK, dtype=torch.bool)
    for place in places:
        expert = int(choice.experts_TK[place])
        kept_TK[place] = taken[expert] < room
        taken[expert] += 1
    return kept_TK


def mix(x_TD: Tensor, choice: Choice, weights: Weights, kept_TK: Tensor | None = None) -> Tensor:
    """Σ_k w_k · expert_k(x), or Σ_k expert_k(w_k · x); [T, D]."""
    num_tokens, top_k = choice.experts_TK.shape
    if not num_tokens:
        return x_TD + 0 * sum(each.sum() for each in weights[:2])
    tokens_R = torch.arange(num_tokens, device=x_TD.device).repeat_interleave(top_k)
    weights_R = choice.weights_TK.flatten()
    kept_R = None if kept_TK is None else kept_TK.flatten()
    if weights.weigh_input:
        rows_RD = x_TD[tokens_R] * weights_R[:, None]
        each_R = torch.arange(len(rows_RD), device=x_TD.device)
        y_RD = reference.mixture(
            rows_RD, each_R, choice.experts_TK.flatten(), torch.ones_like(weights_R),
            *weights[:4], kept_R,
        )  # fmt: skip
        return y_RD.view(num_tokens, top_k, -1).sum(1)
    return reference.mixture(
        x_TD, tokens_R, choice.experts_TK.flatten(), weights_R, *weights[:4], kept_R
    )


def switch_loss(choice: Choice) -> Tensor:
    """E · Σ_e f_e · P_e, 1 at even use (Fedus et al. 2021, eq. 4-6; f divided by K)."""
    assert choice.probs_TE is not None
    num_experts = choice.probs_TE.shape[1]
    counts_E = torch.bincount(choice.experts_TK.flatten(), minlength=num_experts)
    shares_E = counts_E / counts_E.sum().double()
    return num_experts * (shares_E * choice.probs_TE.mean(0)).sum()


def z_loss(choice: Choice) -> Tensor:
    """mean_t logsumexp_e(logits)² (Zoph et al. 2022, eq. 5)."""
    assert choice.logits_TE is not None
    return choice.logits_TE.logsumexp(-1).square().mean()
