"""Fewer experts, each the mean of a group that is alike: HC-SMoE and M-SMoE.

Letters: E experts, P experts of one group, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.kernels.reference import GATED
from moestro.surgery.assignment import cheapest
from moestro.surgery.calibration import LayerStatistics
from moestro.surgery.layers import Change, Tensors
from moestro.surgery.prune import fewer, highest, per_expert

Groups = list[list[int]]  # experts of each, ascending, by the first
_EXACT = "donot_use_mm_for_euclid_dist"


def by_output(seen: LayerStatistics, number: int) -> Groups:
    """Average linkage of the experts' mean outputs over all tokens, by Euclidean distance.

    HC-SMoE (Chen et al. 2024, arXiv 2410.08589).
    """
    assert seen.means_ED is not None
    apart_EE = torch.cdist(seen.means_ED, seen.means_ED, compute_mode=_EXACT)
    apart_EE.fill_diagonal_(torch.inf)
    groups = {expert: [expert] for expert in range(len(apart_EE))}
    while len(groups) > number:
        one, other = sorted(divmod(int(apart_EE.argmin()), len(apart_EE)))
        share = len(groups[one]) / (len(groups[one]) + len(groups[other]))
        apart_EE[one] = share * apart_EE[one] + (1 - share) * apart_EE[other]
        apart_EE[:, one] = apart_EE[one]
        apart_EE[other] = apart_EE[:, other] = torch.inf
        groups[one] = sorted(groups[one] + groups.pop(other))
    return sorted(groups.values())


def by_router(seen: LayerStatistics, number: int) -> Groups:
    """The most frequent experts, and with each those whose router logits resemble its own most.

    Similarity is the cosine of the logits over all tokens. M-SMoE (Li et al. 2023, "Merge, then
    compress", arXiv 2310.01334).
    """
    length_E = seen.alike_EE.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    cosine_EE = seen.alike_EE / length_E[:, None] / length_E
    dominant = highest(seen.counts_E, number).tolist()
    groups: Groups = [[expert] for expert in dominant]
    for expert in range(len(length_E)):
        if expert not in dominant:
            groups[int(cosine_EE[expert, dominant].argmax())].append(expert)
    return sorted(sorted(group) for group in groups)


METHODS: Mapping[str, Callable[[LayerStatistics, int], Groups]] = {
    "hc-smoe": by_output,
    "m-smoe": by_router,
}


def groups_of(cfg: ModelConfig, seen: LayerStatistics, method: str, number: int) -> Groups:
    """The groups of one layer by a method of `METHODS`, each within one group of the router.

    A router's groups are places in its rows: an expert that moved to another would be chosen with
    other rivals.
    """
    assert cfg.moe is not None
    parts, found = cfg.moe.router.num_groups, []
    size = len(seen.counts_E) // parts
    for first in range(0, parts * size, size):
        own = slice(first, first + size)
        part = LayerStatistics(
            seen.counts_E[own],
            seen.norms_E[own],
            seen.weighted_E[own],
            seen.alike_EE[own, own],
            None if seen.means_ED is None else seen.means_ED[own],
        )
        groups = METHODS[method](part, number // parts)
        found += [[first + expert for expert in group] for group in groups]
    return found


def merged(
    cfg: ModelConfig,
    groups: Mapping[int, Groups],
    seen: Mapping[int, LayerStatistics],
    align: bool = False,
) -> Change:
    """The model with one expert for each group: the mean of its weights, by how often each ran.

    A group keeps the router's row, and the selection bias, of its most frequent expert. Layouts
    of files have one row per expert, and a token that chose two of a group would now choose it
    once and another beside it: that is the loss of every merge, and the reason why a merged model
    can be worse than one with the others removed.

    Args:
        cfg: of the model.
        groups: as many in each layer, by layer.
        seen: the counts are read.
        align: bring the hidden units of a group's experts into the order of its most frequent one
            first, which changes none of them (M-SMoE §3.2).

    Raises:
        ConfigError: see `prune.fewer`.
    """
    (number,) = {len(each) for each in groups.values()}
    new, moe = fewer(cfg, number), cfg.moe
    assert moe is not None
    gated = moe.activation in GATED

    def network(layer: int, tensors: Tensors) -> Tensors:
        if layer not in groups:
            return tensors
        made: dict[str, list[Tensor]] = {name: [] for name in tensors if per_expert(name)}
        for group in groups[layer]:
            counts_P = seen[layer].counts_E[group]
            first = int(counts_P.argmax())
            shares_P = counts_P / counts_P.sum() if counts_P.any() else None
            experts: list[Tensors] = [
                {name: tensors[name][expert] for name in made} for expert in group
            ]
            if align:
                experts = [_aligned(one, experts[first], gated) for one in experts]
            for name, each in made.items():
                rows = [expert[name] for expert in experts]
                each.append(rows[first] if name.startswith("router.") else _mean(rows, shares_P))
        return {**tensors, **{name: torch.stack(each) for name, each in made.items()}}

    return Change.of_networks(new, network)


def _mean(tensors: list[Tensor], shares_P: Tensor | None) -> Tensor:
    """The mean with these shares, None: equal ones; of one tensor, itself."""
    if len(tensors) == 1:
        return tensors[0]
    shares = [1 / len(tensors)] * len(tensors) if shares_P is None else shares_P.tolist()
    mean = sum(share * each.double() for share, each in zip(shares, tensors, strict=True))
    assert isinstance(mean, Tensor)
    return mean.to(tensors[0].dtype)


def _aligned(expert: Tensors, like: Tensors, gated: bool) -> Tensors:
    """One expert with its hidden units in the order that is closest to another's.

    Closest: the least sum of squared distances of what belongs to each unit, of gate, up and down.
    """
    if expert is like:
        return expert
    mine_FX, theirs_FX = _units(expert, gated), _units(like, gated)
    cost_FF = torch.cdist(theirs_FX, mine_FX, compute_mode=_EXACT) ** 2
    order_F = torch.as_tensor(cheapest(cost_FF.numpy()), device="cpu")
    rows = torch.cat([order_F, order_F + len(order_F)]) if gated else order_F
    found = dict(expert)
    for name, tensor in expert.items():
        if name.startswith("experts.gate_up"):
            found[name] = tensor[rows]
        elif name == "experts.down":
            found[name] = tensor[:, order_F]
    return found


def _units(expert: Tensors, gated: bool) -> Tensor:
    """What belongs to each hidden unit; float64 [F, 3D] or [F, 2D]."""
    down_FD = expert["experts.down"].double().T
    up_HD = expert["experts.gate_up"].double()
    halves = up_HD.chunk(2) if gated else (up_HD,)
    return torch.cat([*halves, down_FD], dim=1)
