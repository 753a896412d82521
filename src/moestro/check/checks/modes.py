"""Checks of the ways in which a layer is run, copied and stored: the result is the same in all."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro.check.checks.check import Check
from moestro.check.compare import difference
from moestro.check.report import Finding, skipped, wrong
from moestro.check.subject import Ran, named_tensors
from moestro.check.trial import Result, Trial, differentiate
from moestro.errors import MoestroError


def deterministic(trial: Trial) -> Finding:
    """The same bits twice, forward and backward."""
    again = trial.tested(trial.x, trial.up)
    if not torch.equal(again.y, trial.ran.y):
        return wrong("the output of a second run has other bits")
    for name, first in trial.ran.grads.items():
        second = again.grads[name]
        if (first is None) != (second is None):
            return wrong(f"the gradient of {name} is None in one of two runs")
        if first is not None and second is not None and not torch.equal(first, second):
            return wrong(f"the gradient of {name} has other bits in a second run")
    return Finding("ok")


def evaluation(trial: Trial) -> Finding:
    """Evaluation mode, without gradients, gives what training does: of all, and of one token."""
    if trial.subject.drops or not trial.subject.training:
        return skipped("the two modes differ by design")
    module, meant = trial.subject.copied().eval(), trial.expected.y
    with torch.no_grad():
        y = trial.subject.run(module, trial.x.float(), None).y
        first = trial.subject.run(module, trial.x[:1, :1].float(), None).y
    return trial.verdict(
        [difference("the output", y, meant), difference("one token's", first, meant[:1, :1])]
    )


def autocast(trial: Trial) -> Finding:
    """bf16 arithmetic over fp32 parameters; gradients in the parameters' dtype."""

    def run(module: nn.Module, x: Tensor, valid: Tensor | None) -> Ran:
        with torch.autocast("cpu", torch.bfloat16):
            return trial.subject.run(module, x, valid)

    got = differentiate(run, trial.subject.copied(), trial.x.float(), trial.up.float())
    odd = [
        name for name, each in got.grads.items() if each is not None and each.dtype != torch.float32
    ]
    if odd:
        return wrong(f"the gradient of {odd[0]} is not fp32, as its parameter is")
    return trial.compared(got, trial.expected, trial.allowed(dtype=torch.bfloat16))


def bfloat16(trial: Trial) -> Finding:
    """Parameters and input in bf16, against the definition of these very parameters."""
    module = trial.subject.copied(torch.bfloat16)
    rounded = copy.deepcopy(module).double()
    try:
        y = trial.subject.run(module, trial.x.bfloat16(), None).y
    except RuntimeError as error:
        return skipped(f"it refuses bf16: {error}")
    if y.dtype != torch.bfloat16:
        return wrong(f"the output of a bf16 input is {y.dtype}")
    with torch.no_grad():  # tokens whose experts the rounded router does not change
        own, plain = (trial.choice(each, trial.x.flatten(0, 1)).experts_TK
                      for each in (rounded, trial.subject.copied(torch.float64)))  # fmt: skip
    same_S = (own == plain).all(1).view(trial.x.shape[:2]).all(0)
    if not same_S.any() or (trial.subject.drops and not same_S.all()):
        raise MoestroError("rounding the router to bf16 changes a choice of these tokens")
    x, up = trial.x[:, same_S], trial.up[:, same_S]
    got = trial.tested(x, up, module, dtype=torch.bfloat16)
    return trial.compared(got, trial.defined(x, up, rounded), trial.allowed(dtype=torch.bfloat16))


def double(trial: Trial) -> Finding:
    """float64 in, float64 out; rounding is at most a router's in fp32."""
    try:
        got = trial.tested(trial.x, trial.up, dtype=torch.float64)
    except RuntimeError as error:
        return skipped(f"it refuses float64: {error}")
    if got.y.dtype != torch.float64:
        return wrong(f"the output of a float64 input is {got.y.dtype}")
    return trial.compared(got, trial.expected)


def recomputed(trial: Trial) -> Finding:
    """Activation checkpointing: the same gradients, and buffers change as without it."""
    plain = trial.subject.copied()
    trial.tested(trial.x, trial.up, plain)
    module = trial.subject.copied()

    def run(module: nn.Module, x: Tensor, valid: Tensor | None) -> Ran:
        y = checkpoint(lambda x: trial.subject.run(module, x, valid).y, x, use_reentrant=False)
        return Ran(y)

    got = differentiate(run, module, trial.x.float(), trial.up.float())
    for (name, once), again in zip(plain.named_buffers(), module.buffers(), strict=True):
        if not torch.equal(once, again):
            return wrong(f"buffer {name} changes more under recomputation: it is counted twice")
    return trial.compared(got, trial.expected)


def compiled(trial: Trial) -> Finding:
    """torch.compile, with gradients."""
    module = trial.subject.copied()
    run = torch.compile(lambda x: trial.subject.run(module, x, None).y)

    def through(module: nn.Module, x: Tensor, valid: Tensor | None) -> Ran:
        return Ran(run(x))

    return trial.compared(
        differentiate(through, module, trial.x.float(), trial.up.float()), trial.expected
    )


def copied(trial: Trial) -> Finding:
    """A copy gives the same bits, and shares nothing with the original."""
    module = trial.subject.copied()
    trial.tested(trial.x, trial.up, module)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for each in twin.parameters():
            each.zero_()
    y = trial.subject.run(module, trial.x.float(), None).y
    if not torch.equal(y, trial.ran.y):
        return wrong("a change of the copy changes the original")
    return Finding("ok")


def saved(trial: Trial) -> Finding:
    """What state_dict holds is all: loaded into other values, it gives the same bits."""
    module, other = trial.subject.copied(), trial.subject.copied()
    state = {name: each.clone() for name, each in module.state_dict().items()}
    _move(trial, (*other.parameters(), *other.buffers()))
    other.load_state_dict(state)
    y = trial.subject.run(module, trial.x.float(), None).y
    if torch.equal(y, trial.subject.run(other, trial.x.float(), None).y):
        return Finding("ok")
    lost = [name for name in named_tensors(module) if name not in state and _used(trial, name, y)]
    words = "a layer that loaded the state gives another output: "
    if not lost:
        return wrong(words + "something is not in it")
    return wrong(
        f"{words}{', '.join(map(repr, lost))} {'is' if len(lost) == 1 else 'are'} not in it"
    )


def _used(trial: Trial, name: str, y: Tensor) -> bool:
    """Whether another value of a tensor gives another output."""
    module = trial.subject.copied()
    _move(trial, [named_tensors(module)[name]])
    return not torch.equal(trial.subject.run(module, trial.x.float(), None).y, y)


def _move(trial: Trial, tensors: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for each in tensors:
            if each.is_floating_point():
                each.add_(trial.normal(*each.shape).to(each.dtype))


def dead_state(trial: Trial) -> Finding:
    """A training step's passes leave the next one's result alone: no state between calls."""
    module = trial.subject.copied()
    other = trial.x.flip(0) * 2
    trial.tested(other, trial.up, module)
    module.zero_grad(set_to_none=True)
    return trial.compared(trial.tested(trial.x, trial.up, module), trial.expected)


def micro_batches(trial: Trial) -> Finding:
    """Gradients of two halves of a batch add up to the whole's."""
    if trial.subject.drops:
        return skipped("with a capacity, tokens depend on each other")
    module = trial.subject.copied()
    parts = [trial.tested(trial.x[i : i + 1], trial.up[i : i + 1], module) for i in range(2)]
    inputs = [grad for part in parts if (grad := part.grads["input"]) is not None]
    joined = torch.cat(inputs) if len(inputs) == len(parts) else None
    y = torch.cat([part.y for part in parts])
    return trial.compared(Result(y, {**parts[1].grads, "input": joined}), trial.expected)


CHECKS = (
    Check("determinism", "Two runs give the same bits, forward and backward.",
          "atomic additions; an unseeded generator", deterministic),
    Check("evaluation", "Evaluation without gradients gives what training does.",
          "a fast path for inference with a rule of its own (AReaL#1207, Megatron-LM#4168)",
          evaluation),
    Check("float64", "A float64 layer computes in float64.", "an fp32 buffer in between", double),
    Check("bf16", "In bf16 the error is that of rounding.",
          "softmax or sums in bf16; a routing weight rounded before it is normalised", bfloat16),
    Check("autocast", "Under autocast the error is that of rounding; gradients stay fp32.",
          "a router in bf16; mixed dtypes in index_add", autocast),
    Check("recomputation", "Activation checkpointing changes neither gradients nor counts.",
          "bias counters counted twice (torchtitan#1593)", recomputed),
    Check("state", "A pass leaves nothing behind that changes the next.",
          "cached routing of the step before; a buffer that is written over", dead_state),
    Check("micro-batches", "Gradients of two halves add up to the whole's.",
          "losses or gradients divided by local tokens (Megatron-LM#3769)", micro_batches),
    Check("deepcopy", "A copy is independent of the original.",
          "closures that keep the original's weights", copied),
    Check("save-load", "The state holds all that the output depends on.",
          "experts or biases that are not saved (KempnerForge#202, Megatron-LM#5844)", saved),
    Check("compile", "torch.compile gives the same, with gradients.",
          "graph breaks that lose gradients", compiled, slow=True),
)  # fmt: skip
