"""Routers: which experts each token goes to, with what weight.

Each maps tokens to a `Routing`, in fp32 whatever the model's dtype. To add one: a class with this
`forward`, a name in `RouterConfig.kind`, a line in `ROUTERS`.

Letters: T tokens, D width, E experts, K experts per token, C tokens per expert.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.config import MoEConfig
from moestro.errors import ShapeError
from moestro.kernels import pointwise
from moestro.moe import noise
from moestro.moe.dispatch import capacity
from moestro.moe.lora import Adapter
from moestro.moe.routing import Routing


class Router(nn.Module):
    """Base: a linear map to one logit per expert, and the ways in which routers differ from it."""

    logit_bias: nn.Parameter | None
    bias: Tensor | None

    def __init__(self, cfg: MoEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.num_experts, cfg.dim))
        self.logit_bias = nn.Parameter(torch.empty(cfg.num_experts)) if cfg.router.bias else None
        self.weight_adapter: Adapter | None = None
        self.register_buffer("bias", None)
        if cfg.router.selection_bias:
            self.bias = torch.empty_like(self.weight[:, 0], dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal, σ = sqrt(s / D) (Fedus et al. 2021, §2.4); both biases zero."""
        std = math.sqrt(self.cfg.init_scale / self.cfg.dim)
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        for bias_E in (self.logit_bias, self.bias):
            if bias_E is not None:
                nn.init.zeros_(bias_E)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the selection bias too, but keep it fp32: steps of 1e-3 die in 16 bits."""
        bias_E = self.bias
        super()._apply(fn, recurse)
        if bias_E is not None and self.bias is not None and self.bias.dtype != bias_E.dtype:
            self.bias = bias_E.to(self.bias.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Keep the selection bias fp32 when `assign=True` puts another tensor in its place."""
        super()._load_from_state_dict(*args)
        if self.bias is not None:
            self.bias = self.bias.float()

    def logits(self, x_TD: Tensor, jitter: float, noise_T: Tensor | None = None) -> Tensor:
        """fp32 logits [T, E] of the tokens, in training of jittered ones.

        Jitter ε multiplies the input by U(1-ε, 1+ε) (Fedus et al. 2021, Table 11).
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.training and jitter:
                x_TD = x_TD.to(_router_dtype(x_TD))
                if noise_T is None:
                    factor_TD = torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
                else:
                    keys_T = noise.mixed(noise_T, noise.JITTER)
                    spread_TD = noise.uniform(keys_T, x_TD.shape[1], x_TD.dtype)
                    factor_TD = 1 + jitter * (2 * spread_TD - 1)
                x_TD = x_TD * factor_TD
            logits_TE = pointwise.fp32_linear(x_TD, self.weight)
            if self.weight_adapter is not None:
                logits_TE = logits_TE + self.weight_adapter(x_TD.to(logits_TE.dtype))
            if self.logit_bias is not None:
                logits_TE = logits_TE + self.logit_bias.to(logits_TE.dtype)
            return logits_TE

    def forward(
        self,
        x_TD: Tensor,
        token_ids_T: Tensor | None = None,
        valid_T: Tensor | None = None,
        noise_T: Tensor | None = None,
    ) -> Routing:
        """Route T tokens; see each router.

        Args:
            x_TD: tokens.
            token_ids_T: int64 ids of the tokens; only the hash router needs them.
            valid_T: bool, False for padding; None where all are real.
            noise_T: int64 keys of the tokens, of which noise is a function (`moestro.moe.noise`);
                None: it is drawn by torch's generator.
        """
        raise NotImplementedError  # every router in ROUTERS has its own


class TopKRouter(Router):
    """Token choice by softmax or sigmoid score: the routers of most models.

    softmax, K = 1, weight kept: Switch Transformer (Fedus et al. 2021, eq. 2). softmax, K = 2,
    renormalised: Mixtral (Jiang et al. 2024, §2.1), the same as a softmax over the top-K logits.
    sigmoid with a selection bias, groups and scale: DeepSeek-V3 (2024, eq. 12-16); the bias
    chooses and is never part of a weight (Wang et al. 2024, "Auxiliary-loss-free").
    """

    def forward(
        self,
        x_TD: Tensor,
        token_ids_T: Tensor | None = None,
        valid_T: Tensor | None = None,
        noise_T: Tensor | None = None,
    ) -> Routing:
        """See `Router.forward`."""
        router = self.cfg.router
        logits_TE = self.logits(x_TD, router.jitter, noise_T)
        # A softmax of logarithms divides scores by their sum without an epsilon, which a router
        # could learn to exploit by pushing all its scores towards zero.
        if router.kind == "sigmoid":
            scores_TE, logs_TE = logits_TE.sigmoid(), F.logsigmoid(logits_TE)
            probs_TE = logs_TE.softmax(-1)
        else:
            scores_TE = probs_TE = logits_TE.softmax(-1)
            logs_TE = logits_TE
        experts_TK = self._select(scores_TE.detach())
        if self.cfg.renormalizes:
            weights_TK = logs_TE.gather(-1, experts_TK).softmax(-1)
        else:
            weights_TK = scores_TE.gather(-1, experts_TK)
        return Routing.of_choice(experts_TK, weights_TK, logits_TE, probs_TE, valid_T, router.scale)

    def _select(self, scores_TE: Tensor) -> Tensor:
        """The K experts of each token, best first, within its best groups. int64 [T, K]."""
        router = self.cfg.router
        choice_TE = scores_TE if self.bias is None else scores_TE + self.bias
        if router.num_groups > 1:
            choice_TE = choice_TE.masked_fill(~self._allowed(choice_TE), -math.inf)
        return choice_TE.topk(self.cfg.top_k, dim=-1).indices

    def _allowed(self, choice_TE: Tensor) -> Tensor:
        """Group-limited selection: experts of the top groups only (DeepSeek-V2 §2.1.2, V3 §2.1.2).

        A group's score is its best expert's (V2) or the sum of its two best (V3). bool [T, E].
        """
        router = self.cfg.router
        size = self.cfg.num_experts // router.num_groups
        grouped_TNP = choice_TE.view(-1, router.num_groups, size)
        best = min(2, size) if router.group_score == "top2" else 1
        group_scores_TN = grouped_TNP.topk(best, dim=-1).values.sum(-1)
        chosen_TG = group_scores_TN.topk(router.top_groups, dim=-1).indices
        none_TN = torch.zeros_like(group_scores_TN, dtype=torch.bool)
        allowed_TN = none_TN.scatter(-1, chosen_TG, True)
        return allowed_TN.repeat_interleave(size, dim=-1)


class NoisyTopKRouter(Router):
    """Top-K of noisy logits (Shazeer et al. 2017, eq. 3-5), noise in training only.

    H = x·W_g + N(0, 1) · softplus(x·W_n); the weights are the softmax over the K kept. Both
    matrices start at zero, so that all experts start alike.
    """

    def __init__(self, cfg: MoEConfig) -> None:
        super().__init__(cfg)
        self.noise = nn.Parameter(torch.zeros(cfg.num_experts, cfg.dim))

    def reset_parameters(self) -> None:
        """Zero, as in the paper's appendix A."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        x_TD: Tensor,
        token_ids_T: Tensor | None = None,
        valid_T: Tensor | None = None,
        noise_T: Tensor | None = None,
    ) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(x_TD, self.cfg.router.jitter, noise_T)
        noisy_TE, load_TE = logits_TE, None
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.training:
                x32_TD = x_TD.to(logits_TE.dtype)
                std_TE = F.softplus(F.linear(x32_TD, self.noise.to(x32_TD.dtype))) + 1e-9
                noisy_TE = logits_TE + self._drawn(logits_TE, noise_T) * std_TE
                load_TE = _chance_of_choice(logits_TE, noisy_TE, std_TE, self.cfg.top_k)
            probs_TE = noisy_TE.softmax(-1)
            weights_TK, experts_TK = probs_TE.topk(self.cfg.top_k, dim=-1)
            if self.cfg.renormalizes:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        routing = Routing.of_choice(
            experts_TK, weights_TK, logits_TE, probs_TE, valid_T, self.cfg.router.scale
        )
        return routing._replace(load_TE=load_TE)

    def _drawn(self, logits_TE: Tensor, noise_T: Tensor | None) -> Tensor:
        if noise_T is None:
            return torch.randn_like(logits_TE)
        keys_T = noise.mixed(noise_T, noise.ROUTER)
        return noise.normal(keys_T, logits_TE.shape[1], logits_TE.dtype)


class SparseMixerRouter(Router):
    """Two experts, one after the other, each against its close rivals alone (Phi-3.5-MoE).

    GRIN MoE, Liu et al. 2024, arXiv 2409.12136: the first expert is the best, its weight its share
    of a softmax over the logits within a relative distance of 2 · `jitter`; the second likewise
    among the others. The two weights need not sum to one.

    This is the paper's routing at inference. In training it samples the experts and estimates the
    gradient of the sampling (its SparseMixer-v2); here training makes the same choices, with the
    plain gradient of the two softmaxes. `jitter` is the distance and never moves the input.
    """

    def forward(
        self,
        x_TD: Tensor,
        token_ids_T: Tensor | None = None,
        valid_T: Tensor | None = None,
        noise_T: Tensor | None = None,
    ) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(x_TD, jitter=0.0)
        first_T1, first_weight_T1 = self._best(logits_TE, logits_TE)
        others_TE = logits_TE.scatter(-1, first_T1, -math.inf)
        second_T1, second_weight_T1 = self._best(logits_TE, others_TE)
        experts_TK = torch.cat([first_T1, second_T1], dim=-1)
        weights_TK = torch.cat([first_weight_T1, second_weight_T1], dim=-1)
        if self.cfg.renormalizes:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        probs_TE, scale = logits_TE.softmax(-1), self.cfg.router.scale
        return Routing.of_choice(experts_TK, weights_TK, logits_TE, probs_TE, valid_T, scale)

    def _best(self, logits_TE: Tensor, open_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The best of the open experts, and its share among those near it.

        An expert is near if (best - logit) / max(|logit|, best) ≤ 2 · jitter.
        """
        with torch.no_grad():
            top_T1, expert_T1 = open_TE.max(-1, keepdim=True)
            reach_TE = 2 * self.cfg.router.jitter * torch.maximum(logits_TE.abs(), top_T1)
            far_TE = top_T1 - logits_TE > reach_TE
        shares_TE = open_TE.masked_fill(far_TE, -math.inf).softmax(-1)
        return expert_T1, shares_TE.gather(-1, expert_T1)


class ExpertChoiceRouter(Router):
    """Each expert takes its C = ceil(T·K/E) best tokens (Zhou et al. 2022, §3.2).

    Perfectly balanced, and not causal: whether a token is taken depends on later tokens, so a
    language model trained with it sees the future (Wang et al. 2024 bound the leak).
    """

    def __init__(self, cfg: MoEConfig) -> None:
        super().__init__(cfg)
        warnings.warn(
            "expert_choice routing is not causal: an autoregressive model trained with it sees "
            "later tokens, and generates worse than its training loss says",
            UserWarning,
            stacklevel=2,
        )

    def forward(
        self,
        x_TD: Tensor,
        token_ids_T: Tensor | None = None,
        valid_T: Tensor | None = None,
        noise_T: Tensor | None = None,
    ) -> Routing:
        """See `Router.forward`. Padding tokens are never chosen."""
        logits_TE = self.logits(x_TD, self.cfg.router.jitter, noise_T)
        probs_TE = logits_TE.softmax(-1)
        bids_TE, num_tokens = probs_TE, len(x_TD)
        if valid_T is not None:
            bids_TE = probs_TE.masked_fill(~valid_T[:, None], -1.0)
            num_tokens = int(valid_T.sum())
        rows = capacity(1.0, num_tokens, self.cfg.top_k, self.cfg.num_experts)
        weights_CE, tokens_CE = bids_TE.topk(min(rows, num_tokens), dim=0)
        experts_CE = torch.arange(self.cfg.num_experts, device=x_TD.device).expand_as(tokens_CE)
        weights_R = weights_CE.flatten() * self.cfg.router.scale
        chosen = (tokens_CE.flatten(), experts_CE.flatten(), weights_R)
        return Routing(*chosen, logits_TE, probs_TE, top_k=0, valid_T=valid_T)


class HashRouter(nn.Module):
    """Experts by a fixed hash of the token's id (Roller et al. 2021): nothing is learned.

    The K experts of an id lie E // K apart, each with weight 1 / K. Logits are all zero, the
    distribution is uniform over the experts chosen.
    """

    def __init__(self, cfg: MoEConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def forward(
        self,
        x_TD: Tensor,
        token_ids_T: Tensor | None = None,
        valid_T: Tensor | None = None,
        noise_T: Tensor | None = None,
    ) -> Routing:
        """See `Router.forward`.

        Raises:
            ShapeError: no token ids were given.
        """
        if token_ids_T is None:
            raise ShapeError("the hash router routes by token id: call the layer with token_ids=")
        num_experts, top_k = self.cfg.num_experts, self.cfg.top_k
        # Knuth's multiplicative hash, its high bits.
        first_T = ((token_ids_T * 2_654_435_761) % 2**32 >> 12) % num_experts
        steps_K = torch.arange(top_k, device=x_TD.device) * (num_experts // top_k)
        experts_TK = (first_T[:, None] + steps_K) % num_experts
        zeros_TE = x_TD.new_zeros(len(x_TD), num_experts, dtype=_router_dtype(x_TD))
        weights_TK = zeros_TE.new_full(experts_TK.shape, 1 / top_k)
        probs_TE = zeros_TE.scatter(-1, experts_TK, 1 / top_k)
        scale = self.cfg.router.scale
        return Routing.of_choice(experts_TK, weights_TK, zeros_TE, probs_TE, valid_T, scale)


ROUTERS: dict[str, Any] = {
    "softmax": TopKRouter,
    "sigmoid": TopKRouter,
    "noisy_top_k": NoisyTopKRouter,
    "sparsemixer": SparseMixerRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
}


def build_router(cfg: MoEConfig) -> Router | HashRouter:
    """The router that `cfg.router.kind` names."""
    router: Router | HashRouter = ROUTERS[cfg.router.kind](cfg)
    return router


def _router_dtype(x_TD: Tensor) -> torch.dtype:
    """fp32 for every model dtype; fp64 stays, so that gradcheck can pass through."""
    return torch.promote_types(x_TD.dtype, torch.float32)


def _chance_of_choice(logits_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int) -> Tensor:
    """P(token picks expert) if only that expert's noise were drawn again (Shazeer 2017, eq. 8-9).

    Φ((clean logit - the K-th highest noisy logit of the others) / std). [T, E].
    """
    if top_k == logits_TE.shape[1]:
        return torch.ones_like(logits_TE)
    best_TK = noisy_TE.topk(top_k + 1, dim=-1).values
    chosen_TE = noisy_TE > best_TK[:, -1:]
    threshold_TE = torch.where(chosen_TE, best_TK[:, -1:], best_TK[:, -2:-1])
    chance_TE: Tensor = torch.special.ndtr((logits_TE - threshold_TE) / std_TE)
    return chance_TE
