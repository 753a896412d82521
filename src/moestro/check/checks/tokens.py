"""Checks of what tokens may do to each other: nothing, whatever their order, number and experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moestro.check.checks.check import Check
from moestro.check.compare import difference
from moestro.check.definition import Choice
from moestro.check.report import Finding, skipped, wrong
from moestro.check.trial import Result, Trial, differences
from moestro.errors import ConfigError

_CAPACITY = "with a capacity, tokens depend on each other"


def permuted(trial: Trial) -> Finding:
    """Tokens in another order."""
    if trial.subject.drops:
        return skipped(_CAPACITY)
    order = trial.normal(trial.x.shape[1]).argsort()
    got = trial.tested(trial.x[:, order], trial.up[:, order])
    back = order.argsort()
    gradient = got.grads["input"]
    grads = {**got.grads, "input": None if gradient is None else gradient[:, back]}
    return trial.compared(got._replace(y=got.y[:, back], grads=grads), trial.expected)


def relabelled(trial: Trial) -> Finding:
    """Experts in another order, in the layer and in what the router calls them."""
    subject = trial.subject
    if subject.relabel is None:
        return skipped("it is not known how to reorder the experts")
    groups = subject.rule.num_groups if subject.rule else 1
    size = subject.num_experts // groups
    order = [g * size + e for g in reversed(range(groups)) for e in reversed(range(size))]
    module = subject.copied()
    subject.relabel(module, order)
    if subject.drops:
        return skipped(_CAPACITY)
    y = subject.run(module, trial.x.float(), None).y
    return trial.verdict([difference("the output", y, trial.expected.y)])


def split(trial: Trial) -> Finding:
    """Each sequence, and each half of it, alone."""
    if trial.subject.drops:
        return skipped(_CAPACITY)
    half = trial.x.shape[1] // 2
    module, found = trial.subject.copied(), []
    for row in range(len(trial.x)):
        for part in (slice(None, half), slice(half, None)):
            y = trial.subject.run(module, trial.x[row : row + 1, part].float(), None).y
            found.append(difference("the output", y, trial.expected.y[row : row + 1, part]))
    return trial.verdict(found)


def one_token(trial: Trial) -> Finding:
    """A batch of one token, with gradients."""
    x, up = trial.x[:1, :1], trial.up[:1, :1]
    return trial.compared(trial.tested(x, up), trial.defined(x, up))


def no_token(trial: Trial) -> Finding:
    """A batch without tokens: an output of its shape, and gradients of zero that exist."""
    x = trial.x[:, :0]
    got = trial.tested(x, x)
    if got.y.shape != x.shape:
        return wrong(f"the output has shape {list(got.y.shape)}, not {list(x.shape)}")
    if not trial.subject.trains:
        return Finding("ok")
    if not got.y.requires_grad:
        return wrong("the output is not part of the graph: a backward would not reach parameters")
    names = trial.names("experts", "router")
    return _zero(trial, got, [n for n in names if f"the gradient of {n}" not in trial.broken])


def empty_expert(trial: Trial) -> Finding:
    """Tokens that leave an expert out: its gradients are zero."""
    counts_E = _counts(trial, trial.x.flatten(0, 1))
    expert = int(counts_E.argmin())
    x_TD = trial.x.flatten(0, 1)
    if counts_E[expert]:
        x_TD = trial.clear(6, lambda choice: (choice.experts_TK != expert).all(1))
        if len(x_TD) < 2:
            return skipped("every token uses every expert")
    x, up = x_TD[None], trial.normal(1, *x_TD.shape)
    got = trial.tested(x, up)
    missing = [
        name for name in trial.names("experts")
        if got.grads[name] is None and f"the gradient of {name}" not in trial.broken
    ]  # fmt: skip
    if missing:
        return wrong(f"the gradient of {missing[0]} is None where its expert has no token")
    return trial.compared(got, trial.defined(x, up))


def one_expert(trial: Trial) -> Finding:
    """Tokens so alike that all of them use the same K experts, and all others have none."""
    seed_1D = trial.clear(1)
    x = (seed_1D + NEAR * trial.normal(10, trial.subject.dim))[None]
    counts_E = _counts(trial, x[0])
    if trial.subject.drops or (counts_E > 0).sum() > trial.subject.top_k:
        x = seed_1D.expand(10, -1)[None]
    up = trial.normal(*x.shape)
    return trial.compared(trial.tested(x, up), trial.defined(x, up))


NEAR = 1e-4


def padding(trial: Trial) -> Finding:
    """What padding holds, real tokens neither see nor are charged for."""
    valid = torch.ones_like(trial.x[..., 0], dtype=torch.bool)
    valid[0, -2:] = valid[1, :1] = False
    garbage = trial.x.masked_fill(~valid[..., None], 0) + 100 * (~valid[..., None])
    return _padded(trial, garbage, valid)


def nan_in_padding(trial: Trial) -> Finding:
    """NaN in padding reaches no other token's output; with a mask, no gradient either."""
    valid = torch.ones_like(trial.x[..., 0], dtype=torch.bool)
    valid[0, -2:] = valid[1, :1] = False
    return _padded(trial, trial.x.masked_fill(~valid[..., None], float("nan")), valid)


def _padded(trial: Trial, x: Tensor, valid: Tensor) -> Finding:
    subject = trial.subject
    if subject.drops and not subject.takes_mask:
        return skipped(_CAPACITY + ", and it takes no mask")
    up = trial.up * valid[..., None]
    exact = trial.defined(trial.x[valid][None], up[valid][None])
    got = trial.tested(x, up, valid=valid)
    finite = bool(x.isfinite().all())
    if not subject.takes_mask and not finite:  # 0 · NaN of its backward is nobody's fault
        y = trial.expected.y[valid]
        return trial.verdict([difference("the output of real tokens", got.y[valid], y)])
    gradient = got.grads["input"]
    grads = {**got.grads, "input": None if gradient is None else gradient[valid][None]}
    return trial.compared(got._replace(y=got.y[valid][None], grads=grads), exact)


def unchanged(trial: Trial) -> Finding:
    """The input and the parameters hold what they held."""
    module = trial.subject.copied()
    before = {name: each.detach().clone() for name, each in module.named_parameters()}
    x = trial.x.float()
    with torch.no_grad():
        trial.subject.run(module, x, None)
    if not torch.equal(x, trial.x.float()):
        return wrong("the input was changed in place")
    for name, each in module.named_parameters():
        if not torch.equal(each, before[name]):
            return wrong(f"{name} was changed by a forward pass")
    return Finding("ok")


def resized(**changes: Any) -> Any:
    """A check of the same layer in other sizes, outputs and gradients."""

    def function(trial: Trial) -> Finding:
        if trial.subject.resized is None:
            return skipped("it cannot be built in other sizes")
        sizes = {
            name: value(trial.subject) if callable(value) else value
            for name, value in changes.items()
        }
        rule = trial.subject.rule
        try:
            made = trial.subject.resized(**sizes)
        except ConfigError as error:
            if rule is None or rule.num_groups == 1:
                raise
            return skipped(f"its groups of experts have no such size: {error}")
        other = Trial(made, trial.seed)
        found = differences(other.ran, other.exact)
        return trial.verdict(each for each in found if each.name not in trial.broken)

    return function


def _counts(trial: Trial, x_TD: Tensor) -> Tensor:
    with torch.no_grad():
        choice: Choice = trial.choice(trial.subject.copied(torch.float64), x_TD)
    return torch.bincount(choice.experts_TK.flatten(), minlength=trial.subject.num_experts)


def _zero(trial: Trial, got: Result, names: list[str]) -> Finding:
    zeros: dict[str, Tensor | None] = {}
    for name in names:
        grad = got.grads[name]
        if grad is None:
            return wrong(f"the gradient of {name} is None")
        zeros[name] = torch.zeros_like(grad, dtype=torch.float64)
    exact = Result(got.y.detach().double(), zeros)
    return trial.verdict(differences(got, exact, names), 0.0)


CHECKS = (
    Check("permutation", "Tokens in another order give the same, in that order.",
          "a scatter to the wrong tokens; an unsorted permutation used as its inverse", permuted),
    Check("relabelling", "Experts in another order, with their rows of the router, give the same.",
          "a group or rank that is tied to an expert's number", relabelled),
    Check("batch-split", "A batch gives what its parts give: packed documents do not mix.",
          "weights normalised over the batch; statistics shared across documents", split),
    Check("one-token", "A single token gives the same, with all gradients.",
          "squeeze() of a batch of one; a separate path for decoding", one_token),
    Check("zero-tokens", "No token gives an empty output, in the graph, and gradients of zero.",
          "a rank without tokens that hangs or returns early (Megatron-LM#4851, torchtitan#3686)",
          no_token),
    Check("empty-expert", "An expert without tokens has gradients of zero: not None, not NaN.",
          "grad=None (Automodel#2995), hangs of ZeRO-3 (DeepSpeed#4808), pytorch#152668",
          empty_expert),
    Check("one-expert", "All tokens may go to the same experts.",
          "an index or buffer sized for even use", one_expert),
    Check("padding", "Padding has no part in real tokens' outputs and gradients.",
          "padding that takes capacity or is counted (Megatron-LM#1617)", padding),
    Check("padding-nan", "NaN in padding stays there.",
          "0 · NaN in masks (torchtitan#1237, #1254, #2255)", nan_in_padding),
    Check("unchanged", "A forward pass changes neither its input nor a parameter.",
          "operations in place on the residual stream", unchanged),
    Check("odd-widths", "Widths that are no multiple of 8 give the same.",
          "padding of kernels that is read (pytorch#172440)", resized(dim=13, hidden_dim=7)),
    Check("all-experts", "K = E: every token uses all experts.",
          "topk of K + 1; a threshold that is not there",
          resized(top_k=lambda subject: subject.num_experts)),
    Check("single-expert", "E = 1: a dense network.", "division by E - 1; squeeze() of experts",
          resized(num_experts=1, top_k=1)),
)  # fmt: skip
