"""What is checked: a module, how it is run, and what it should compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moestro.check.definition import Choice, Weights
from moestro.check.description import RouterRule


class Ran(NamedTuple):
    """What one forward gave: y like x, and what else is known of it."""

    y: Tensor
    balance: Tensor | None = None
    choice: Choice | None = None
    z: Tensor | None = None


# (module, x [B, S, D], valid [B, S] or None) → what it computes.
Run = Callable[[nn.Module, Tensor, Tensor | None], Ran]
# (module in float64, x [B, S, D]) → what it should compute; all tokens are real.
Define = Callable[[nn.Module, Tensor], Ran]


class Adapters(NamedTuple):
    """Of the experts' weights: names of those that have them, and what can be done to a module's.

    Attributes:
        weights: their names.
        merge: (module): adds the adapters to the weights, in place.
        isolate: (module, weight, expert): zeroes B of all pairs but this one; None: of all.
    """

    weights: tuple[str, ...]
    merge: Callable[[nn.Module], None]
    isolate: Callable[[nn.Module, str, int | None], None]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, under each of their names."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return {**named, **dict(module.named_buffers(remove_duplicate=False))}


@dataclass(frozen=True)
class Subject:
    """A mixture, and what is needed to check it.

    Attributes:
        title: for people.
        module: never changed by a check; each takes copies.
        dim: D.
        hidden_dim: F.
        num_experts: E.
        top_k: K.
        run: the module's own forward.
        define: the definition, of a float64 copy of the module: a function of its parameters.
        part: name of a parameter → router, experts, shared, adapters or other.
        choose: what the definition chooses, of a float64 copy and tokens [T, D], without computing
            the rest; None: `define` says it.
        relabel: put expert order[e] in the place of expert e, in place; None: not known how.
        experts: of a float64 copy, all in one form; None: not known.
        rule: of the router; None: the definition takes the module's own choice.
        training: mode in which it is checked.
        takes_mask: run takes valid.
        drops: it has a capacity, so that tokens depend on each other.
        resized: the same layer in other sizes (keywords dim, hidden_dim, num_experts, top_k).
        adapters: of the experts, low-rank; None: none are described.
        spread: the module with its experts spread over the ranks; None: not known how.
        norm: of such a module, over all ranks' gradients; None: not known how.
        whole: the model that the mixture is of, for checks of its losses.
        lost: why there should be such a model and is none; empty: it is here, or adds no loss.
        trains: it has gradients; False: only outputs are compared.
        only: names of the checks that mean something of it; empty: all.
        eps: of its own rounding, which is more than its dtype's; see `compare`.
        unreached: why the experts did not run as was asked for; empty: they did.
        choice_biases: names of tensors that are added to the scores to choose only.
        score: what these scores are, softmax or sigmoid of the logits; empty: not known.
        zeros: names of other tensors that, while they are zero, hide what is done with them.
        filled: what copies have in place of such zeros, by name; see `filling`.
    """

    title: str
    module: nn.Module
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    run: Run
    define: Define
    part: Callable[[str], str]
    choose: Callable[[nn.Module, Tensor], Choice] | None = None
    relabel: Callable[[nn.Module, list[int]], None] | None = None
    experts: Callable[[nn.Module], Weights] | None = None
    rule: RouterRule | None = None
    training: bool = True
    takes_mask: bool = False
    drops: bool = False
    resized: Callable[..., Subject] | None = None
    adapters: Adapters | None = None
    spread: Callable[[nn.Module], nn.Module] | None = None
    norm: Callable[[nn.Module], Tensor] | None = None
    whole: nn.Module | None = None
    lost: str = ""
    trains: bool = True
    only: frozenset[str] = frozenset()
    eps: float = 0.0
    unreached: str = ""
    choice_biases: tuple[str, ...] = ()
    score: str = ""
    zeros: tuple[str, ...] = ()
    filled: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    def copied(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module again, in a dtype, in the mode to be checked, without gradients so far."""
        module = copy.deepcopy(self.module)
        tensors = named_tensors(module) if self.filled else {}
        with torch.no_grad():
            for name, values in self.filled.items():
                tensors[name].copy_(values.bfloat16())  # the same numbers in every dtype
        module = module.to(dtype).train(self.training)
        module.zero_grad(set_to_none=True)
        return module

    def chosen(self, exact: nn.Module, x_TD: Tensor) -> Choice:
        """What the definition chooses, of a float64 copy."""
        if self.choose is not None:
            return self.choose(exact, x_TD)
        choice = self.define(exact, x_TD[None]).choice
        assert choice is not None
        return choice

    @property
    def terms(self) -> int:
        """Numbers that a sum in it has, but for tokens."""
        return self.dim + self.hidden_dim + self.top_k
