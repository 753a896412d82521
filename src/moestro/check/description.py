"""What must be told of a mixture before it can be checked: where its parameters are, and its rules.

Parameters are named as in `module.named_parameters()`; `{e}` stands for an expert's number where
each expert has tensors of its own. Letters as in docs/shapes.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from moestro.config.mixture import Activation
from moestro.config.number import Positive, PositiveFloat
from moestro.settings import Settings


class RouterRule(Settings):
    """How the K experts of a token and their weights follow from its logits."""

    top_k: Positive
    weight: str = Field("router.weight", description="[E, D]; logits are x · Wᵀ.")
    transposed: bool = Field(False, description="weight is [D, E].")
    logit_bias: str | None = Field(None, description="[E], learned, part of the logits.")
    choice_bias: str | None = Field(None, description="[E], added to the scores to choose only.")
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = Field(True, description="The K weights are divided by their sum.")
    scale: PositiveFloat = Field(1.0, description="Of the weights, last.")
    num_groups: Positive = 1
    top_groups: Positive = 1
    group_score: Literal["max", "top2"] = "top2"


class ExpertNames(Settings):
    """Parameters of the experts: `gate_up`, or `gate` and `up`, or `up` alone; and `down`."""

    gate_up: str | None = Field(None, description="[E, 2F, D], all gate rows first.")
    gate: str | None = None
    up: str | None = None
    down: str
    up_bias: str | None = Field(None, description="[E, 2F], or [E, F] of plain experts.")
    down_bias: str | None = None
    activation: Activation = "swiglu"
    transposed: bool = Field(False, description="Stored as [E, in, out].")
    interleaved: bool = Field(False, description="Rows of gate_up alternate: gate, up, gate, …")
    weigh_input: bool = Field(False, description="The weight multiplies what enters the expert.")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.gate_up is None) == (self.up is None) or (self.gate and not self.up):
            raise ValueError("give gate_up, or gate and up, or up alone")
        return self


class AdapterNames(Settings):
    """Low-rank pairs of one weight of the experts: W_e + scale · B_e A_e (Hu et al. 2021)."""

    weight: str = Field(description="As named in ExpertNames.")
    a: str = Field(description="[E, N, I]; I is the weight's input.")
    b: str = Field(description="[E, O, N].")
    scale: PositiveFloat = 1.0
    flat: bool = Field(False, description="Stored as PEFT does: a [E · N, I], b [O, N · E].")


class SharedNames(Settings):
    """An expert that every token passes."""

    module: str = Field(description="A submodule: [T, D] → [T, D].")
    gate: str | None = Field(None, description="[1, D]: its output times sigmoid(x · w).")


class Capacity(Settings):
    """Most tokens an expert takes: C = ceil(factor · T · K / E); others are dropped."""

    factor: PositiveFloat
    order: Literal["choices", "tokens", "weights"] = Field(
        "choices",
        description="Who comes first: first choices of all tokens (GShard), all choices of the "
        "first token, or the largest weight.",
    )


def _call(module: Any, x: Any) -> Any:
    return module(x)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


class Description(Settings):
    """A layer `[B, S, D] → [B, S, D]`: its rules, its parameters, and how it is called."""

    router: RouterRule
    experts: ExpertNames
    shared: SharedNames | None = None
    capacity: Capacity | None = None
    training: bool = Field(True, description="Checked in training mode; False: it draws noise.")
    call: Callable[..., Any] = Field(_call, description="(module, x) or, with a mask, (…, valid).")
    takes_mask: bool = Field(False, description="call takes valid [B, S], False for padding.")
    output: Callable[..., Any] = Field(_first, description="What call returned → y.")
    balance: Callable[..., Any] | None = Field(
        None,
        description="(module, what call returned) → balance loss; 1 at balance when divided "
        "by balance_at_even.",
    )
    balance_at_even: PositiveFloat = Field(1.0, description="Its value at even use: 1, K, c · K, …")
    z: Callable[..., Any] | None = Field(
        None,
        description="(module, what call returned) → z-loss: mean of logsumexp(logits)².",
    )
    adapters: tuple[AdapterNames, ...] = ()
    merge: Callable[..., Any] | None = Field(
        None,
        description="(module): adds the adapters to the weights, in place; None: the check does.",
    )
    spread: Callable[..., Any] | None = Field(
        None,
        description="(module) → the same, each rank with its share of the experts in order.",
    )
    norm: Callable[..., Any] | None = Field(
        None,
        description="(that module) → the norm of all ranks' gradients; those of what is no expert "
        "are the same on all ranks.",
    )
