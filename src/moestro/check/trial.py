"""One subject under test beside its definition: inputs, runs with gradients, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moestro.check.compare import Difference, difference, tolerance
from moestro.check.definition import Choice
from moestro.check.filling import filled
from moestro.check.report import Finding, skipped
from moestro.check.subject import Ran, Subject

# How much a token is moved to see whether rounding could change its experts: more than bf16's eps.
NUDGE = 2.0**-6
# How often: a token close to a change passes one time in two, whatever the size.
NUDGES = 6


class Result(NamedTuple):
    """A forward and a backward.

    Attributes:
        y: like x.
        grads: of the input, under the name "input", and of every parameter.
        balance: balance loss, 1 at even use.
        choice: of the definition.
        z: z-loss.
    """

    y: Tensor
    grads: dict[str, Tensor | None]
    balance: Tensor | None = None
    choice: Choice | None = None
    z: Tensor | None = None


class Trial:
    """A subject and the inputs of a seed.

    Attributes:
        subject: what is checked, with numbers in place of zeros; see `filling`.
        slow: checks that take long may run.
        x: [2, S, D] in float64; tokens whose choice is clear, see `clear`.
        up: gradient of y.
    """

    def __init__(
        self, subject: Subject, seed: int = 0, length: int = 6, slow: bool = False
    ) -> None:
        self.subject, self.seed, self.slow = filled(subject), seed, slow
        self.generator = torch.Generator().manual_seed(seed)
        x_TD = self.clear(2 * length)
        self.x = x_TD[: len(x_TD) // 2 * 2].view(2, -1, subject.dim)
        self.up = self.normal(*self.x.shape)

    @cached_property
    def exact(self) -> Result:
        """The definition's output and gradients."""
        return self.defined(self.x, self.up)

    @cached_property
    def ran(self) -> Result:
        """The subject's, in fp32."""
        return self.tested(self.x, self.up)

    @cached_property
    def broken(self) -> set[str]:
        """What the plain run gets wrong already, by the names of its differences."""
        found = differences(self.ran, self.exact)
        return {each.name for each in found if not each.relative <= self.allowed()}

    @cached_property
    def expected(self) -> Result:
        """The definition's; where the plain run is wrong already, what it gave.

        A check of another way to run the layer then says only what that way changes.
        """
        y, grads = self.exact.y, dict(self.exact.grads)
        if "the output" in self.broken:
            y = self.ran.y.detach().double()
        for name in grads:
            if f"the gradient of {name}" in self.broken:
                own = self.ran.grads[name]
                grads[name] = None if own is None else own.double()
        return self.exact._replace(y=y, grads=grads)

    def normal(self, *shape: int) -> Tensor:
        """Random numbers of the seed in float64, each exact in bf16."""
        made = torch.randn(shape, generator=self.generator, device="cpu", dtype=torch.float64)
        return made.bfloat16().double()

    def clear(self, count: int, wanted: Callable[[Choice], Tensor] | None = None) -> Tensor:
        """[count, D]: tokens whose experts no rounding changes, and that `wanted` (bool [T]) takes.

        Fewer, where there are not enough of them.
        """
        exact, dim = self.subject.copied(torch.float64), self.subject.dim
        found: list[Tensor] = []
        for _ in range(8):
            x_TD = self.normal(4 * count, dim)
            with torch.no_grad():
                first = self.choice(exact, x_TD)
                experts_TK = first.experts_TK
                if wanted is not None:
                    x_TD, experts_TK = x_TD[wanted(first)], experts_TK[wanted(first)]
                for _ in range(NUDGES):
                    moved_TD = x_TD * (1 + NUDGE * self.normal(*x_TD.shape).sign())
                    same_T = (self.choice(exact, moved_TD).experts_TK == experts_TK).all(1)
                    x_TD, experts_TK = x_TD[same_T], experts_TK[same_T]
            found.append(x_TD)
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]

    def choice(self, exact: nn.Module, x_TD: Tensor) -> Choice:
        """What the definition chooses."""
        return self.subject.chosen(exact, x_TD)

    def defined(self, x: Tensor, up: Tensor, module: nn.Module | None = None) -> Result:
        """The definition in float64, of a module or a copy of the subject's."""
        module = module or self.subject.copied(torch.float64)
        got = differentiate(lambda m, x, _: self.subject.define(m, x), module, x, up)
        return got if self.subject.trains else got._replace(grads={"input": None})

    def tested(
        self,
        x: Tensor,
        up: Tensor,
        module: nn.Module | None = None,
        valid: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Result:
        """The subject's own forward and backward in a dtype."""
        module = module or self.subject.copied(dtype)
        got = differentiate(self.subject.run, module, x.to(dtype), up.to(dtype), valid)
        return got if self.subject.trains else got._replace(grads={"input": None})

    def names(self, *parts: str) -> list[str]:
        """Parameters of these parts that want gradients."""
        return [] if not self.subject.trains else [
            name for name, each in self.subject.module.named_parameters()
            if self.subject.part(name) in parts and each.requires_grad
        ]  # fmt: skip

    def allowed(self, tokens: int = 16, dtype: torch.dtype = torch.float32) -> float:
        """The tolerance of a result; see `compare`."""
        return tolerance(dtype, self.subject.terms + tokens, self.subject.eps)

    def verdict(self, differences: Iterable[Difference], allowed: float | None = None) -> Finding:
        """Wrong if the worst of these is more than rounding."""
        allowed = self.allowed() if allowed is None else allowed
        worst = max(differences, key=lambda each: each.relative, default=None)
        if worst is None:
            return skipped("what it compares is wrong already")
        wrong = not worst.relative <= allowed
        words = worst.sentence if wrong else ""
        return Finding("wrong" if wrong else "ok", words, worst.relative, allowed)

    def compared(self, got: Result, exact: Result, allowed: float | None = None) -> Finding:
        """Output and all gradients at once, but for what the plain run gets wrong already."""
        found = differences(got, exact)
        if exact is not self.expected:
            found = [each for each in found if each.name not in self.broken]
        return self.verdict(found, allowed)


def differentiate(
    run: Callable[[nn.Module, Tensor, Tensor | None], Ran],
    module: nn.Module,
    x: Tensor,
    up: Tensor,
    valid: Tensor | None = None,
) -> Result:
    """One forward and, of y · up, one backward."""
    x = x.detach().clone().requires_grad_()
    ran = run(module, x, valid)
    if ran.y.requires_grad:
        kept = ran.balance is not None or ran.z is not None
        torch.autograd.backward(ran.y, up.to(ran.y.dtype), retain_graph=kept)
    grads: dict[str, Tensor | None] = {"input": x.grad}
    grads |= {name: each.grad for name, each in module.named_parameters() if each.requires_grad}
    return Result(ran.y, grads, ran.balance, ran.choice, ran.z)


def differences(got: Result, exact: Result, names: Iterable[str] | None = None) -> list[Difference]:
    """Of the output (where all is compared) and of gradients, by name."""
    all_names = exact.grads if names is None else names
    known = [each for each in exact.grads.values() if each is not None]
    floor = 0.1 * math.sqrt(sum(float(each.norm()) ** 2 for each in known) / max(len(known), 1))
    found = [] if names is not None else [difference("the output", got.y, exact.y)]
    for name in all_names:
        exact_grad = exact.grads[name]
        if exact_grad is None:
            like = got.grads.get(name)
            if like is None:
                continue
            exact_grad = torch.zeros_like(like, dtype=torch.float64)
        label = "the gradient of " + name
        found.append(difference(label, got.grads.get(name), exact_grad, floor))
    return found
