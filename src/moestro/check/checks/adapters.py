"""Checks of low-rank adapters on experts: each expert's own pair, in output and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.check.checks.check import Check
from moestro.check.compare import difference
from moestro.check.report import Finding, skipped, wrong
from moestro.check.trial import Trial, differences

_NONE = "no adapters are described"


def reached(trial: Trial) -> Finding:
    """Each weight's pair of one expert at a time, all others zero: what it adds, and to whom."""
    subject = trial.subject
    if subject.adapters is None:
        return skipped(_NONE)
    zero, exact_zero = (
        _pass(trial, subject.adapters.weights[0], None, exact=exact) for exact in (False, True)
    )
    for weight in subject.adapters.weights:
        lost = []
        for expert in range(subject.num_experts):
            # What the pair adds, not the output, in which a pair is small.
            added = _pass(trial, weight, expert, exact=False) - zero
            meant = _pass(trial, weight, expert, exact=True) - exact_zero
            rounding = 2 * trial.allowed() * float(exact_zero.norm() + meant.norm())
            if not float((added - meant).norm()) <= rounding:
                lost.append(expert)
        if lost:
            return wrong(f"what the adapters of {weight} add is wrong for experts {lost}")
    return Finding("ok")


def _pass(trial: Trial, weight: str, expert: int | None, *, exact: bool) -> Tensor:
    subject = trial.subject
    assert subject.adapters is not None
    module = subject.copied(torch.float64 if exact else torch.float32)
    subject.adapters.isolate(module, weight, expert)
    with torch.no_grad():
        if exact:
            return subject.define(module, trial.x).y
        return subject.run(module, trial.x.float(), None).y.double()


def gradients(trial: Trial) -> Finding:
    """Of every A and B."""
    names = trial.names("adapters")
    if not names:
        return skipped(_NONE)
    return trial.verdict(differences(trial.ran, trial.exact, names))


def merged(trial: Trial) -> Finding:
    """Added to the weights in place, the adapters give what they gave beside them."""
    subject = trial.subject
    if subject.adapters is None:
        return skipped(_NONE)
    module = subject.copied()
    with torch.no_grad():
        subject.adapters.merge(module)
        y = subject.run(module, trial.x.float(), None).y
    return trial.verdict([difference("the output after merging", y, trial.expected.y)])


def alone(trial: Trial) -> Finding:
    """With all but the adapters frozen, their gradients are the same and nothing else has any."""
    names = trial.names("adapters")
    if not names:
        return skipped(_NONE)
    module = trial.subject.copied()
    for name, each in module.named_parameters():
        each.requires_grad_(name in names)
    got = trial.tested(trial.x, trial.up, module)
    return trial.verdict(differences(got, trial.expected, ["input", *names]))


CHECKS = (
    Check("adapter-outputs", "Each expert's low-rank pair adds scale · B A x to that expert alone.",
          "experts left out (unsloth#11014, peft#3009); one pair for all; a scale forgotten",
          reached),
    Check("adapter-gradients", "Every expert's A and B have the gradients of the merged weight.",
          "adapters that a fused experts module does not see (transformers' 3-D experts)",
          gradients),
    Check("adapter-merge", "Merged into the weights, adapters give what they gave beside them.",
          "a scale left out, or experts mixed up, when merging (vllm#41384, sglang#25528)", merged),
    Check("adapter-frozen", "With all but the adapters frozen, their gradients are the same.",
          "a backward that wants gradients of the weights", alone),
)  # fmt: skip
