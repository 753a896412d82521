"""Checks of balance and z-losses: their value, what reaches the router, which tokens count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moestro.check.checks.check import Check
from moestro.check.compare import difference
from moestro.check.report import Finding, skipped, wrong
from moestro.check.subject import Ran
from moestro.check.trial import Result, Trial

Which = Literal["balance", "z"]


class Loss(NamedTuple):
    """One of the two, as a field of what a layer returns, and what people call it."""

    field: Which
    words: str

    def of(self, ran: Ran | Result) -> Tensor | None:
        """Its value; None: not described."""
        return ran.balance if self.field == "balance" else ran.z

    def missing(self, trial: Trial) -> Finding | None:
        """Why it cannot be checked."""
        if self.of(trial.ran) is None or self.of(trial.exact) is None:
            return skipped(f"no {self.words} is described")
        return None


LOSSES = (Loss("balance", "balance loss"), Loss("z", "z-loss"))


def value(loss: Loss, trial: Trial) -> Finding:
    """By its formula, of the definition's choice."""
    exact = loss.of(trial.exact)
    assert exact is not None
    return trial.verdict([difference(f"the {loss.words}", loss.of(trial.ran), exact)])


def gradient(loss: Loss, trial: Trial) -> Finding:
    """Of the router alone, by the loss alone."""
    exact = _gradients(loss, trial, trial.subject.copied(torch.float64), trial.x)
    got = _gradients(loss, trial, trial.subject.copied(), trial.x.float())
    if got is None or exact is None:
        return wrong(f"the {loss.words} has no gradient")
    # At even use the gradient is zero; what rounds is as large as the mean of a token.
    floor = 0.1 * float(trial.x.norm()) / trial.x.shape[0] / trial.x.shape[1]
    found = []
    for name in trial.names("router"):
        meant = exact[name]
        if meant is not None:
            found.append(difference(f"the gradient of {name}", got[name], meant, floor))
    return trial.verdict(found)


# Of all logits: sigmoid scores of 1e-21, far above the smallest number of fp32.
FALLEN = -48.0


def fallen(loss: Loss, trial: Trial) -> Finding:
    """Of sigmoid scores that have all fallen alike: what is uneven stays so.

    An error of eps in a logit of size 48 is one of 48 · eps in its score.
    """
    subject = trial.subject
    if subject.rule is None or subject.rule.score != "sigmoid":
        return skipped("scores of softmax cannot all fall")
    module, x_TD = subject.copied(), trial.x.flatten(0, 1)[: subject.dim // 2]
    down_D = torch.linalg.lstsq(x_TD, torch.full_like(x_TD[:, :1], FALLEN)).solution[:, 0]
    weight = module.get_parameter(subject.rule.weight)
    with torch.no_grad():
        weight.add_(down_D.float()[:, None] if subject.rule.transposed else down_D.float())
        got = loss.of(subject.run(module, x_TD[None].float(), None))
        exact = loss.of(subject.define(copy.deepcopy(module).double(), x_TD[None]))
    assert exact is not None
    allowed = trial.allowed() * abs(FALLEN)
    return trial.verdict([difference(f"the {loss.words}", got, exact)], allowed)


def masked(loss: Loss, trial: Trial) -> Finding:
    """Padding does not count."""
    subject = trial.subject
    if not subject.takes_mask:
        return skipped("no mask is described")
    valid = torch.ones_like(trial.x[..., 0], dtype=torch.bool)
    valid[0, 1:] = False
    exact = loss.of(subject.define(subject.copied(torch.float64), trial.x[valid][None]))
    got = loss.of(subject.run(subject.copied(), trial.x.float(), valid))
    assert exact is not None
    return trial.verdict([difference(f"the {loss.words}", got, exact)])


def kept(loss: Loss, trial: Trial) -> Finding:
    """A loss of a batch does not depend on the batch before it, and is gone with its graph."""
    module, found = trial.subject.copied(), []
    for row in range(2):
        x = trial.x[row : row + 1]
        got = loss.of(trial.subject.run(module, x.float(), None))
        exact = loss.of(trial.subject.define(trial.subject.copied(torch.float64), x))
        assert exact is not None
        found.append(difference(f"the {loss.words} of batch {row}", got, exact))
    return trial.verdict(found)


def _gradients(
    loss: Loss, trial: Trial, module: nn.Module, x: Tensor
) -> dict[str, Tensor | None] | None:
    exact = x.dtype == torch.float64
    ran = trial.subject.define(module, x) if exact else trial.subject.run(module, x, None)
    total = loss.of(ran)
    assert total is not None
    if not total.requires_grad:
        return None
    torch.autograd.backward(total)
    return {name: each.grad for name, each in module.named_parameters()}


def _of(loss: Loss, function: Callable[[Loss, Trial], Finding]) -> Callable[[Trial], Finding]:
    return lambda trial: loss.missing(trial) or function(loss, trial)


_BALANCE, _Z = LOSSES

CHECKS = (
    Check("balance-loss", "The balance loss is its formula, E · Σ f · P, times its stated value.",
          "softmax of a softmax (transformers#45120); K or 1 at even use; f of experts, not of K",
          _of(_BALANCE, value)),
    Check("balance-gradient", "The balance loss reaches the router, by its formula's gradient.",
          "a loss that is detached or times N (Automodel#1408, torchtitan#4494)",
          _of(_BALANCE, gradient)),
    Check("balance-mask", "Padding does not count in the balance loss.",
          "padding counted (Megatron-LM#1617)", _of(_BALANCE, masked)),
    Check("balance-state", "Each batch has its own balance loss.",
          "losses collected in a global list (MegaBlocks); counts kept over batches",
          _of(_BALANCE, kept)),
    Check("balance-epsilon", "A sigmoid router cannot lower its loss by lowering all scores.",
          "1e-20 in the sum of scores (Megatron-LM#1545)", _of(_BALANCE, fallen)),
    Check("z-loss", "The z-loss is the mean over tokens of logsumexp(logits)².",
          "a sum for the mean; logsumexp of probabilities; the square left out", _of(_Z, value)),
    Check("z-gradient", "The z-loss reaches the router, by its formula's gradient.",
          "a loss that is detached, or of rounded logits", _of(_Z, gradient)),
    Check("z-mask", "Padding does not count in the z-loss.",
          "log(E)² of masked logits counted; a mean over padding too", _of(_Z, masked)),
    Check("z-state", "Each batch has its own z-loss.", "losses that add up over batches",
          _of(_Z, kept)),
)  # fmt: skip
