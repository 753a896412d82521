"""What the experts of each mixture do on a text: how often, how much, how alike; in one pass.

Letters: T tokens, R assignments, E experts, D width, N windows, S sequence.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moestro.checkpoints.transfer import Progress
from moestro.config import MoEConfig
from moestro.errors import DataError
from moestro.models.blocks import Block
from moestro.moe.layer import MoE
from moestro.moe.routing import Routing
from moestro.surgery.layers import Layers

# Tokens that an expert should see for its numbers to mean something.
LEAST_TOKENS = 64
_ROWS = 8192  # most rows through the experts at a time, where each token goes to all


class LayerStatistics(NamedTuple):
    """Sums over the tokens of a text, all float64; g is an assignment's weight, f its output.

    Attributes:
        counts_E: assignments of each expert.
        norms_E: Σ |f|.
        weighted_E: Σ g · |f|.
        alike_EE: Σ of the products of two experts' router logits, over all tokens.
        means_ED: the mean of f over all tokens, chosen or not; None unless asked for.
    """

    counts_E: Tensor
    norms_E: Tensor
    weighted_E: Tensor
    alike_EE: Tensor
    means_ED: Tensor | None


class Sums:
    """`LayerStatistics` so far. It outlives the experts, of which one layer is in memory.

    Args:
        every: each token also goes to all experts, for `means_ED`.
    """

    def __init__(self, num_experts: int, every: bool = False) -> None:
        zeros_E = torch.zeros(num_experts, dtype=torch.float64, device="cpu")
        self.counts_E, self.norms_E, self.weighted_E = zeros_E, zeros_E.clone(), zeros_E.clone()
        self.alike_EE = zeros_E.new_zeros(num_experts, num_experts)
        self.sums_ED: Tensor | None = None
        self.tokens, self._every = 0, every

    def add(self, experts: nn.Module, x_TD: Tensor, routing: Routing) -> None:
        """Count what the experts do with these tokens."""
        keep_R = slice(None) if routing.kept_R is None else routing.kept_R
        tokens_R, experts_R = routing.tokens_R[keep_R], routing.experts_R[keep_R]
        weights_R = routing.weights_R[keep_R].double()
        norms_R = unweighted(experts, x_TD, routing, tokens_R, experts_R).double().norm(dim=-1)
        self.counts_E.index_add_(0, experts_R, torch.ones_like(weights_R))
        self.norms_E.index_add_(0, experts_R, norms_R)
        self.weighted_E.index_add_(0, experts_R, weights_R * norms_R)
        logits_TE = routing.logits_TE.double()
        self.alike_EE += logits_TE.T @ logits_TE
        self.tokens += len(x_TD)
        if self._every:
            self._add_every(experts, x_TD, routing)

    def _add_every(self, experts: nn.Module, x_TD: Tensor, routing: Routing) -> None:
        number = routing.num_experts
        all_T = torch.arange(len(x_TD), device=x_TD.device)
        for tokens_T in torch.split(all_T, max(1, _ROWS // number)):
            experts_R = torch.arange(number, device=x_TD.device).repeat(len(tokens_T))
            tokens_R = tokens_T.repeat_interleave(number)
            f_RD = unweighted(experts, x_TD, routing, tokens_R, experts_R)
            sums_ED = f_RD.view(-1, number, f_RD.shape[1]).double().sum(0)
            self.sums_ED = sums_ED if self.sums_ED is None else self.sums_ED + sums_ED

    def statistics(self) -> LayerStatistics:
        """What was added up."""
        means_ED = None if self.sums_ED is None else self.sums_ED / self.tokens
        return LayerStatistics(
            self.counts_E, self.norms_E, self.weighted_E, self.alike_EE, means_ED
        )


class Watched(nn.Module):
    """Experts that say what they do; what they return stays the same.

    Args:
        experts: called as `experts(x_TD, routing)`, any kind.
        sums: what they add it to.
    """

    def __init__(self, experts: nn.Module, sums: Sums) -> None:
        super().__init__()
        self.experts, self._sums = experts, sums

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See `Experts.forward`."""
        y_TD: Tensor = self.experts(x_TD, routing)
        self._sums.add(self.experts, x_TD, routing)
        return y_TD


def unweighted(
    experts: nn.Module, x_TD: Tensor, routing: Routing, tokens_R: Tensor, experts_R: Tensor
) -> Tensor:
    """What an expert makes of a token, for R pairs of the two: [R, D].

    Each pair is a token of its own with one expert, of weight 1, so that any kind of experts
    says what it computes.
    """
    nothing_RE = routing.logits_TE.new_zeros(()).expand(len(tokens_R), routing.num_experts)
    each_R = torch.arange(len(tokens_R), device=tokens_R.device)
    ones_R = routing.weights_R.new_ones(len(tokens_R))
    alone = Routing(each_R, experts_R, ones_R, nothing_RE, nothing_RE, top_k=1)
    f_RD: Tensor = experts(x_TD[tokens_R], alone)
    return f_RD


def tokens_needed(moe: MoEConfig, least: int = LEAST_TOKENS) -> int:
    """Tokens of which each expert sees `least` on average."""
    return -(-least * moe.num_experts // moe.top_k)


def collect(
    layers: Layers,
    tokens_NS: Tensor,
    *,
    every: bool = False,
    least: int = LEAST_TOKENS,
    more: str = "give more text",
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> dict[int, LayerStatistics]:
    """The statistics of each mixture, by layer number, of one pass over a text.

    Args:
        layers: of the model.
        tokens_NS: windows, int64 [N, S + 1].
        every: also the mean outputs over all tokens, which costs E / K times as much.
        least: tokens that each expert should see, on average.
        more: what to do where they see fewer.
        memory_bytes: most for hidden states; see `Layers.bits`.
        progress: called with (blocks so far, blocks in all).

    Raises:
        DataError: the text is too short for the number of experts; says how much is needed.
    """
    moe = layers.cfg.moe
    assert moe is not None
    tokens, needed = tokens_NS[:, 1:].numel(), tokens_needed(moe, least)
    if tokens < needed:
        raise DataError(
            f"{tokens:,} tokens to calibrate on are too few: {moe.num_experts} experts with "
            f"{moe.top_k} per token need {needed:,} to see {least} each on average; {more}"
        )
    sums: dict[int, Sums] = {}
    watch = partial(_install, sums, every)
    layers.bits(tokens_NS, [layers.unchanged()], watch, memory_bytes, progress)
    return {layer: each.statistics() for layer, each in sums.items()}


def _install(sums: dict[int, Sums], every: bool, layer: int, block: nn.Module) -> None:
    """Watch the block's experts; what an earlier pass added up is added to."""
    if isinstance(block, Block) and isinstance(block.ffn, MoE):
        if layer not in sums:
            sums[layer] = Sums(block.ffn.cfg.num_experts, every)
        block.ffn.experts = Watched(block.ffn.experts, sums[layer])
