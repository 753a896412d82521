"""Fewer experts: which to keep by what they did on a text, and the model without the others.

Letters: E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.errors import ConfigError
from moestro.surgery.calibration import LayerStatistics
from moestro.surgery.layers import Change, Tensors

# An expert's score, the lowest of which go; g is an assignment's weight, f its output.
CRITERIA: Mapping[str, Callable[[LayerStatistics], Tensor]] = {
    # The mean of g · |f| over the expert's tokens (REAP, Lasby et al. 2025, arXiv 2510.13999).
    "reap": lambda seen: seen.weighted_E / seen.counts_E.clamp(min=1),
    # How many tokens it had.
    "frequency": lambda seen: seen.counts_E,
    # Σ |f|: expert activation norm.
    "ean": lambda seen: seen.norms_E,
    # Σ g · |f|.
    "weighted": lambda seen: seen.weighted_E,
}


def possible(cfg: ModelConfig) -> list[int]:
    """How many experts a model can be left with, ascending.

    At least K, and as many in each group; K must find room in the groups that are open, and groups
    that count by their best two have two.

    Raises:
        ConfigError: the model is dense, its router does not choose by score, or none can go.
    """
    moe = cfg.moe
    if moe is None:
        raise ConfigError("the model is dense: there are no experts to remove; see moestro upcycle")
    router = moe.router
    if router.kind in ("hash", "expert_choice"):
        raise ConfigError(
            f"a router of kind {router.kind} does not let tokens choose experts by score; "
            "only models whose routers do can be pruned and merged"
        )
    least = -(-moe.top_k // router.top_groups) * router.num_groups
    if router.num_groups > 1 and router.group_score == "top2":  # which takes two of each group
        least = max(least, 2 * router.num_groups)
    numbers = list(range(least, moe.num_experts, router.num_groups))
    if not numbers:
        raise ConfigError(
            f"none of {moe.num_experts} experts can go from a model with {moe.top_k} per token"
        )
    return numbers


def fewer(cfg: ModelConfig, number: int) -> ModelConfig:
    """The settings with `number` experts in each mixture.

    Raises:
        ConfigError: see `possible`; or the number is not among those.
    """
    numbers, moe = possible(cfg), cfg.moe
    assert moe is not None
    if number not in numbers:
        groups = moe.router.num_groups
        split = f", a multiple of its {groups} groups" if groups > 1 else ""
        raise ConfigError(
            f"{number} experts would be left; a model with {moe.num_experts} experts, "
            f"{moe.top_k} per token, can be left with {numbers[0]} to {numbers[-1]}{split}"
        )
    return cfg.model_copy(update={"moe": moe.model_copy(update={"num_experts": number})})


def highest(scores_E: Tensor, number: int, groups: int = 1) -> Tensor:
    """The `number` experts of highest score, as many in each group; int64, ascending."""
    size = len(scores_E) // groups
    best_GN = scores_E.view(groups, size).topk(number // groups).indices
    first_G1 = torch.arange(groups, device="cpu")[:, None] * size
    return (best_GN + first_G1).flatten().sort().values


def chosen(
    cfg: ModelConfig, seen: Mapping[int, LayerStatistics], method: str, number: int
) -> dict[int, Tensor]:
    """The experts to keep, by layer.

    Args:
        cfg: of the model.
        seen: its statistics, by layer.
        method: a key of `CRITERIA`.
        number: of experts to keep in each layer.
    """
    assert cfg.moe is not None
    groups, score = cfg.moe.router.num_groups, CRITERIA[method]
    return {layer: highest(score(each), number, groups) for layer, each in seen.items()}


def at_random(cfg: ModelConfig, number: int, seed: int) -> dict[int, Tensor]:
    """As many experts in each mixture, drawn alike: what a criterion has to beat."""
    moe = cfg.moe
    assert moe is not None
    draw = torch.Generator("cpu").manual_seed(seed)
    return {
        layer: highest(_drawn(moe.num_experts, draw), number, moe.router.num_groups)
        for layer in range(cfg.num_layers)
        if cfg.is_moe_layer(layer)
    }


def pruned(cfg: ModelConfig, keep: Mapping[int, Tensor]) -> Change:
    """The model with these experts of each mixture alone.

    Their router rows and selection biases stay, so a router computes what it did with the logits
    of the others at -∞: the weights of those that are left are shares of what is left.

    Args:
        cfg: of the model.
        keep: experts in ascending order, as many in each layer, by layer.
    """
    (number,) = {len(kept) for kept in keep.values()}

    def network(layer: int, tensors: Tensors) -> Tensors:
        if layer not in keep:
            return tensors
        return {
            name: tensor[keep[layer]] if per_expert(name) else tensor
            for name, tensor in tensors.items()
        }

    return Change.of_networks(fewer(cfg, number), network)


def per_expert(name: str) -> bool:
    """Whether the first axis of a mixture's tensor is its experts."""
    return name.startswith(("router.", "experts."))


def _drawn(number: int, draw: torch.Generator) -> Tensor:
    return torch.rand(number, generator=draw, dtype=torch.float32, device="cpu")
