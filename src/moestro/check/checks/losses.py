"""Checks of balance losses: their value, what reaches the router, and which tokens count."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.check.checks.check import Check
from moestro.check.compare import difference
from moestro.check.report import Finding, skipped, wrong
from moestro.check.trial import Trial


def value(trial: Trial) -> Finding:
    """E · Σ f · P of the definition's choice."""
    got, exact = trial.ran.balance, trial.exact.balance
    if got is None or exact is None:
        return skipped("no balance loss is described")
    return trial.verdict([difference("the balance loss", got, exact)])


def gradient(trial: Trial) -> Finding:
    """Of the router alone, by the balance loss alone."""
    if trial.ran.balance is None or trial.exact.balance is None:
        return skipped("no balance loss is described")
    exact = _gradients(trial, trial.subject.copied(torch.float64), trial.x, None)
    got = _gradients(trial, trial.subject.copied(), trial.x.float(), None)
    if got is None:
        return wrong("the balance loss has no gradient")
    return _compare(trial, got, exact)


def masked(trial: Trial) -> Finding:
    """Padding counts neither in f nor in P."""
    subject = trial.subject
    if trial.ran.balance is None or not subject.takes_mask:
        return skipped("no balance loss, or no mask, is described")
    valid = torch.ones_like(trial.x[..., 0], dtype=torch.bool)
    valid[0, 1:] = False
    exact = subject.define(subject.copied(torch.float64), trial.x[valid][None])
    got = subject.run(subject.copied(), trial.x.float(), valid)
    assert exact.balance is not None
    return trial.verdict([difference("the balance loss", got.balance, exact.balance)])


def accumulated(trial: Trial) -> Finding:
    """A loss of a batch does not depend on the batch before it, and is gone with its graph."""
    if trial.ran.balance is None:
        return skipped("no balance loss is described")
    module, found = trial.subject.copied(), []
    for row in range(2):
        x = trial.x[row : row + 1]
        got = trial.subject.run(module, x.float(), None).balance
        exact = trial.subject.define(trial.subject.copied(torch.float64), x).balance
        assert exact is not None
        found.append(difference(f"the balance loss of batch {row}", got, exact))
    return trial.verdict(found)


def _gradients(
    trial: Trial, module: nn.Module, x: Tensor, valid: Tensor | None
) -> dict[str, Tensor | None] | None:
    exact = x.dtype == torch.float64
    ran = trial.subject.define(module, x) if exact else trial.subject.run(module, x, valid)
    assert ran.balance is not None
    if not ran.balance.requires_grad:
        return None
    torch.autograd.backward(ran.balance)
    return {name: each.grad for name, each in module.named_parameters()}


def _compare(
    trial: Trial, got: dict[str, Tensor | None], exact: dict[str, Tensor | None] | None
) -> Finding:
    assert exact is not None
    # At even use the gradient is zero; what rounds is as large as the mean of a token.
    floor = 0.1 * float(trial.x.norm()) / trial.x.shape[0] / trial.x.shape[1]
    found = []
    for name in trial.names("router"):
        meant = exact[name]
        if meant is not None:
            found.append(difference(f"the gradient of {name}", got[name], meant, floor))
    return trial.verdict(found)


CHECKS = (
    Check("balance-loss", "The balance loss is its formula, E · Σ f · P, times its stated value.",
          "softmax of a softmax (transformers#45120); K or 1 at even use; f of experts, not of K",
          value),
    Check("balance-gradient", "The balance loss reaches the router, by its formula's gradient.",
          "a loss that is detached or times N (Automodel#1408, torchtitan#4494)", gradient),
    Check("balance-mask", "Padding does not count in the balance loss.",
          "padding counted (Megatron-LM#1617)", masked),
    Check("balance-state", "Each batch has its own balance loss.",
          "losses collected in a global list (MegaBlocks); counts kept over batches", accumulated),
)  # fmt: skip
