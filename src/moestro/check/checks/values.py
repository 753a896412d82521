"""Checks of values: outputs, every gradient, and the weights and choice behind an output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moestro.check import definition
from moestro.check.checks.check import Check
from moestro.check.compare import difference
from moestro.check.definition import Choice
from moestro.check.description import RouterRule
from moestro.check.report import Finding, skipped, wrong
from moestro.check.trial import Trial, differences


def runs(trial: Trial) -> Finding:
    """The plain run, which the other checks share; where it raises, nothing else is done."""
    _ = trial.ran
    return Finding("ok")


def outputs(trial: Trial) -> Finding:
    """Against the definition."""
    return trial.verdict([difference("the output", trial.ran.y, trial.exact.y)])


def input_gradient(trial: Trial) -> Finding:
    """Of x."""
    return trial.verdict(differences(trial.ran, trial.exact, ["input"]))


def _gradients(*parts: str) -> Callable[[Trial], Finding]:
    def function(trial: Trial) -> Finding:
        names = trial.names(*parts)
        if not names:
            return skipped(f"no parameters are known as {' or '.join(parts)}")
        return trial.verdict(differences(trial.ran, trial.exact, names))

    return function


# Largest condition number of a token's experts' outputs at which its weights are told from them:
# the factor by which a difference of the output may grow in them.
CONDITION = 100.0


def weights(trial: Trial) -> Finding:
    """The K weights of each token, found from its output by least squares."""
    found = _found_weights(trial)
    if isinstance(found, Finding):
        return found
    found_TE, told_T = found
    choice = trial.exact.choice
    assert choice is not None
    exact_TE = torch.zeros_like(found_TE).scatter(1, choice.experts_TK, choice.weights_TK.detach())
    picked = (exact_TE != 0) & told_T[:, None]  # the choice is another check's
    said = difference("the weight", found_TE * picked, exact_TE * picked)
    finding = trial.verdict([said], CONDITION * trial.allowed())
    if finding.outcome == "wrong" and trial.subject.rule is not None:
        finding = finding._replace(words=finding.words + _guess(trial, found_TE * picked, told_T))
    return finding


def choice(trial: Trial) -> Finding:
    """Which experts have a part in each token's output."""
    found = _found_weights(trial)
    if isinstance(found, Finding):
        return found
    exact = trial.exact.choice
    assert exact is not None
    weight_TK = exact.weights_TK.detach()
    smallest = 0.05 * float(weight_TK[weight_TK > 0].min()) if (weight_TK > 0).any() else 0.0
    for token in found[1].nonzero().flatten().tolist():
        row_E = found[0][token]
        used = set((row_E.abs() > smallest).nonzero().flatten().tolist())
        meant = set(exact.experts_TK[token][weight_TK[token] > smallest].tolist())
        if used != meant:
            return wrong(f"token {token} uses experts {sorted(used)}, not {sorted(meant)}")
    return Finding("ok")


def _found_weights(trial: Trial) -> tuple[Tensor, Tensor] | Finding:
    """Weights [T, E], of which tokens, or why not: Σ_e w_e · expert_e(x) + rest = y, for w."""
    subject = trial.subject
    if subject.experts is None:
        return skipped("its experts are not described one by one")
    if subject.num_experts > subject.dim or subject.drops:
        return skipped("weights cannot be told from outputs: capacity, or more experts than D")
    exact = subject.copied(torch.float64)
    experts = subject.experts(exact)
    if experts.weigh_input:
        return skipped("weights of inputs cannot be told from outputs")
    with torch.no_grad():
        x_TD = trial.x.flatten(0, 1)
        ones_T1 = torch.ones_like(x_TD[:, :1])
        each = [
            definition.mix(x_TD, Choice(torch.full_like(ones_T1, e, dtype=torch.int64), ones_T1),
                           experts)
            for e in range(subject.num_experts)
        ]  # fmt: skip
        made = trial.exact.choice
        assert made is not None
        rest_TD = trial.exact.y.detach().flatten(0, 1) - definition.mix(x_TD, made, experts)
        y_TD = trial.ran.y.detach().double().flatten(0, 1) - rest_TD
        outputs_TDE = torch.stack(each, -1)
        told_T = torch.linalg.cond(outputs_TDE) < CONDITION
        if told_T.sum() < len(told_T) / 4:
            return skipped("the experts' outputs are too alike to tell their weights from them")
        found_TE = torch.linalg.pinv(outputs_TDE) @ y_TD[..., None]
        return found_TE[..., 0], told_T


# What weights become by the usual mistakes.
_MISTAKES: dict[str, dict[str, Any]] = {
    "not divided by their sum": {"normalise": False},
    "divided by their sum, which is not the rule": {"normalise": True},
    "scores of softmax": {"score": "softmax"},
    "scores of sigmoid": {"score": "sigmoid"},
    "without their scale": {"scale": 1.0},
}


def _guess(trial: Trial, found_TE: Tensor, told_T: Tensor) -> str:
    """Which mistake gives these weights, if one does."""
    rule, made = trial.subject.rule, trial.exact.choice
    assert rule is not None
    assert made is not None
    assert made.logits_TE is not None
    for words, change in _MISTAKES.items():
        other = RouterRule(**{**rule.model_dump(), **change})
        if other == rule:
            continue
        scores_TE = made.logits_TE.softmax(-1)
        if other.score == "sigmoid":
            scores_TE = made.logits_TE.sigmoid()
        weights_TK = scores_TE.gather(1, made.experts_TK)
        if other.normalise:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        guess_TE = torch.zeros_like(found_TE).scatter(
            1, made.experts_TK, weights_TK.detach() * other.scale
        )
        guess_TE = guess_TE * told_T[:, None]
        if difference("", found_TE, guess_TE).relative < CONDITION * trial.allowed():
            return f"; the weights are {words}"
    return ""


def strides(trial: Trial) -> Finding:
    """y.sum() gives an upstream gradient of strides 0; a transposed input has its own.

    To refuse an input by raising is no defect; to compute something else is.
    """
    up = torch.ones_like(trial.up[:1, :1, :1]).expand(trial.up.shape)
    exact, found = trial.defined(trial.x, up), []
    plain = trial.x.float()
    for x in (plain, plain.transpose(0, 1).contiguous().transpose(0, 1)):
        module, x = trial.subject.copied(), x.requires_grad_()
        try:
            y = trial.subject.run(module, x, None).y
        except Exception:  # anybody's layer refuses strides in its own way
            if x.is_contiguous():
                raise
            continue
        torch.autograd.backward(y.sum())
        grads = {name: each.grad for name, each in module.named_parameters() if each.requires_grad}
        got = trial.ran._replace(y=y, grads={"input": x.grad, **grads})
        found += [each for each in differences(got, exact) if each.name not in trial.broken]
    return trial.verdict(found)


def frozen(trial: Trial) -> Finding:
    """With the experts frozen, or all but them: the rest has the same gradients."""
    found = []
    for parts in (("experts",), ("router", "shared", "other")):
        module = trial.subject.copied()
        names = trial.names(*parts)
        for name, each in module.named_parameters():
            if name in names:
                each.requires_grad_(False)
        left = [name for name in trial.expected.grads if name not in names]
        found += differences(trial.tested(trial.x, trial.up, module), trial.expected, left)
    return trial.verdict(found)


def twice(trial: Trial) -> Finding:
    """Gradients of a second backward add to the first's: nothing is written over."""
    module = trial.subject.copied()
    trial.tested(trial.x, trial.up, module)
    got = trial.tested(trial.x, trial.up, module)
    grads = {name: each if each is None or name == "input" else each / 2
             for name, each in got.grads.items()}  # fmt: skip
    return trial.compared(got._replace(grads=grads), trial.expected)


CHECKS = (
    Check("run", "A forward and a backward in fp32 do not raise.",
          "a path that was never tried: another dtype, shape or device than the author's", runs),
    Check("outputs", "Outputs equal the definition's.",
          "a wrong layout of gate and up; a shared expert left out; Automodel#2995", outputs),
    Check("input-gradient", "The gradient of the input equals the definition's.",
          "a path to the input cut by detach; gradients doubled (pytorch#160285)", input_gradient),
    Check("router-gradient",
          "The gradient of the router, by the weights of its choices, equals the definition's.",
          "a router detached from the main loss (Automodel#2995, transformers#48687)",
          _gradients("router")),
    Check("expert-gradients", "The gradient of every expert equals the definition's.",
          "gradients scaled by the number of ranks or of tokens (pytorch#160285, torchtitan#1551)",
          _gradients("experts")),
    Check("shared-gradients", "Gradients of shared experts, their gate and what else there is.",
          "a shared expert under no_grad or left out", _gradients("shared", "other")),
    Check("weights", "The weight of each of the K experts follows the rule.",
          "weights not normalised, a bias in them, a scale forgotten (maxtext#2494)", weights),
    Check("choice", "Each token uses the K experts that the rule chooses.",
          "groups not limited, the bias ignored, one expert twice", choice),
    Check("strides", "Inputs and upstream gradients of any strides give the same.",
          "stride errors of grouped_mm (pytorch#172440, transformers#48644)", strides),
    Check("frozen", "Gradients do not depend on which other parameters are frozen.",
          "custom backward functions that ignore needs_input_grad", frozen),
    Check("accumulation", "A second backward adds to the gradients of the first.",
          "a backward that writes .grad itself; gradients divided twice (megablocks#86)", twice),
)  # fmt: skip
