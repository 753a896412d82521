"""What is checked: a module, how it is run, and what it should compute; made from a description."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moestro.check import definition
from moestro.check.definition import Choice, Weights
from moestro.check.description import Description, ExpertNames, RouterRule, SharedNames
from moestro.config import MoEConfig
from moestro.errors import ConfigError, MoestroError
from moestro.kernels.reference import GATED, Biases
from moestro.moe.balance import switch_loss
from moestro.moe.layer import MoE


class Ran(NamedTuple):
    """What one forward gave: y like x, and what else is known of it."""

    y: Tensor
    balance: Tensor | None = None
    choice: Choice | None = None


# (module, x [B, S, D], valid [B, S] or None) → what it computes.
Run = Callable[[nn.Module, Tensor, Tensor | None], Ran]
# (module in float64, x [B, S, D]) → what it should compute; all tokens are real.
Define = Callable[[nn.Module, Tensor], Ran]


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
        part: name of a parameter → router, experts, shared or other.
        relabel: put expert order[e] in the place of expert e, in place; None: not known how.
        experts: of a float64 copy, all in one form; None: not known.
        rule: of the router; None: the definition takes the module's own choice.
        training: mode in which it is checked.
        takes_mask: run takes valid.
        drops: it has a capacity, so that tokens depend on each other.
        resized: the same layer in other sizes (keywords dim, hidden_dim, num_experts, top_k).
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
    relabel: Callable[[nn.Module, list[int]], None] | None = None
    experts: Callable[[nn.Module], Weights] | None = None
    rule: RouterRule | None = None
    training: bool = True
    takes_mask: bool = False
    drops: bool = False
    resized: Callable[..., Subject] | None = None

    def copied(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module again, in a dtype, in the mode to be checked, without gradients so far."""
        module = copy.deepcopy(self.module).to(dtype).train(self.training)
        module.zero_grad(set_to_none=True)
        return module

    @property
    def terms(self) -> int:
        """Numbers that a sum in it has, but for tokens."""
        return self.dim + self.hidden_dim + self.top_k


def described(module: nn.Module, about: Description, title: str = "") -> Subject:
    """A layer and its description.

    Raises:
        ConfigError: the description does not fit the layer.
    """
    tensors = _tensors(module)
    weight = _named(tensors, about.router.weight)
    if weight.dim() != 2:
        raise ConfigError(f"{about.router.weight} is {list(weight.shape)}; a router is [E, D]")
    num_experts, dim = weight.shape
    weights = _experts(tensors, about.experts, num_experts)
    hidden_dim = weights.down_EDF.shape[2]
    height = hidden_dim * (2 if about.experts.activation in GATED else 1)
    fits = weights.up_EHD.shape == (num_experts, height, dim)
    if not fits or weights.down_EDF.shape != (num_experts, dim, hidden_dim):
        raise ConfigError(
            f"experts of {about.experts.activation} with a router [{num_experts}, {dim}] are "
            f"[E, {height}, D] and [E, D, {hidden_dim}]; the description gives "
            f"{list(weights.up_EHD.shape)} and {list(weights.down_EDF.shape)}"
        )
    rule = about.router
    if rule.top_k > num_experts or num_experts % rule.num_groups:
        raise ConfigError(f"top_k and num_groups do not fit {num_experts} experts")

    def part(name: str) -> str:
        if name in (rule.weight, rule.logit_bias, rule.choice_bias):
            return "router"
        shared = about.shared
        if shared and (name == shared.gate or name.startswith(f"{shared.module}.")):
            return "shared"
        return "experts" if name in _expert_names(about.experts, num_experts) else "other"

    return Subject(
        title or type(module).__name__, module, dim, hidden_dim, num_experts, rule.top_k,
        lambda module, x, valid: _run(about, module, x, valid),
        lambda module, x: _define(about, num_experts, module, x),
        part,
        lambda module, order: _relabel(about, module, order),
        lambda module: _experts(_tensors(module), about.experts, num_experts),
        rule, about.training, about.takes_mask, about.capacity is not None,
    )  # fmt: skip


def of_moe(layer: MoE, title: str = "") -> Subject:
    """A layer of this project.

    Raises:
        MoestroError: its router is not token choice by scores.
    """
    cfg, router = layer.cfg, layer.cfg.router
    if router.kind not in ("softmax", "sigmoid"):
        raise MoestroError(f"the {router.kind} router is not checked; softmax and sigmoid are")
    order = "weights" if cfg.capacity and cfg.capacity.priority == "router" else "choices"
    bias = cfg.experts.bias
    about = Description(
        router=RouterRule(
            top_k=cfg.top_k, logit_bias="router.logit_bias" if router.bias else None,
            choice_bias="router.bias" if router.selection_bias else None, score=router.kind,
            normalise=cfg.renormalizes, scale=router.scale, num_groups=router.num_groups,
            top_groups=router.top_groups, group_score=router.group_score,
        ),
        experts=ExpertNames(
            **{"gate_up" if cfg.activation in GATED else "up": "experts.gate_up"},
            down="experts.down", activation=cfg.activation,
            up_bias="experts.gate_up_bias" if bias else None,
            down_bias="experts.down_bias" if bias else None,
        ),
        shared=cfg.shared and SharedNames(
            module="shared", gate="shared_gate.weight" if cfg.shared.gate else None
        ),
        capacity=cfg.capacity and {"factor": cfg.capacity.factor, "order": order},
        training=not router.jitter and not cfg.experts.dropout,
        call=lambda module, x, valid=None: module(x, valid=valid), takes_mask=True,
        balance=lambda module, output: switch_loss(output[1]),
    )  # fmt: skip

    def resized(**sizes: int) -> Subject:
        values = {**cfg.model_dump(), **sizes}
        if values["top_k"] == values["num_experts"]:  # a group cannot hold them all
            values["router"] = {**values["router"], "num_groups": 1, "top_groups": 1}
        return of_moe(MoE(MoEConfig(**values), str(layer.experts.backend)), title)

    made = described(layer, about, title or f"MoE, {layer.experts.backend}")
    return replace(made, resized=resized)


def of_factory(words: str) -> Subject:
    """What `module:factory` returns: a layer and its description, an MoE, or a Subject.

    Raises:
        ConfigError: there is no such function, it raises, or returns something else.
    """
    place, _, name = words.partition(":")
    try:
        factory = getattr(import_module(place), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import {words}: {error}") from error
    return made_by(factory, words)


def made_by(factory: Callable[..., Any], title: str = "", **sizes: int) -> Subject:
    """A factory's subject; it can be resized if the factory takes the names of sizes.

    Raises:
        ConfigError: it raises, or returns something else.
    """
    title = title or getattr(factory, "__name__", "factory")
    try:
        made = factory(**sizes)
    except MoestroError:
        raise
    except Exception as error:
        raise ConfigError(f"{title} raised {type(error).__name__}: {error}") from error
    if isinstance(made, Subject):
        return made
    if isinstance(made, MoE):
        return of_moe(made, title)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Description)):
        raise ConfigError(
            f"{title} returned {type(made).__name__}; it must return (module, Description)"
        )
    takes = set(inspect.signature(factory).parameters)
    names = {"dim", "hidden_dim", "num_experts", "top_k"}
    again = (lambda **sizes: made_by(factory, title, **sizes)) if names <= takes else None
    return replace(described(*made, title), resized=again)


def of_anything(target: Any, title: str = "") -> Subject:
    """A Subject, an MoE, (module, Description), a factory, or its name.

    Raises:
        MoestroError: it is none of these.
    """
    if isinstance(target, Subject):
        return target
    if isinstance(target, MoE):
        return of_moe(target, title)
    if isinstance(target, str) and ":" in target and not Path(target).exists():
        return of_factory(target)
    if isinstance(target, tuple) or (callable(target) and not isinstance(target, nn.Module)):
        return made_by(target if callable(target) else lambda: target, title)
    raise ConfigError(
        f"cannot check a {type(target).__name__}; give (module, Description), a factory that "
        "returns them, its name as module:factory, an MoE, or a model of transformers"
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_parameters(remove_duplicate=False))
    return {**named, **dict(module.named_buffers(remove_duplicate=False))}


def _named(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ConfigError(f"the layer has no parameter {name}; it has {', '.join(tensors)}")
    return tensors[name]


def _stacked(tensors: dict[str, Tensor], name: str, num_experts: int) -> Tensor:
    if "{e}" not in name:
        return _named(tensors, name)
    return torch.stack([_named(tensors, name.format(e=e)) for e in range(num_experts)])


def _expert_names(names: ExpertNames, num_experts: int) -> set[str]:
    given = (names.gate_up, names.gate, names.up, names.down, names.up_bias, names.down_bias)
    return {name.format(e=e) for name in given if name for e in range(num_experts)}


def _experts(tensors: dict[str, Tensor], names: ExpertNames, num_experts: int) -> Weights:
    def read(name: str | None) -> Tensor | None:
        return None if name is None else _stacked(tensors, name, num_experts)

    def matrix(name: str | None) -> Tensor | None:
        found = read(name)
        return found if found is None or not names.transposed else found.transpose(1, 2)

    whole, gate, up, down = map(matrix, (names.gate_up, names.gate, names.up, names.down))
    if whole is None:
        assert up is not None
        whole = up if gate is None else torch.cat([gate, up], 1)
    assert down is not None
    if names.interleaved:
        whole = torch.cat([whole[:, ::2], whole[:, 1::2]], 1)
    up_EH, down_ED = read(names.up_bias), read(names.down_bias)
    if names.interleaved and up_EH is not None:
        up_EH = torch.cat([up_EH[:, ::2], up_EH[:, 1::2]], 1)
    biases = None
    if up_EH is not None or down_ED is not None:
        biases = Biases(
            whole.new_zeros(whole.shape[:2]) if up_EH is None else up_EH,
            down.new_zeros(down.shape[:2]) if down_ED is None else down_ED,
        )
    return Weights(whole, down, names.activation, biases, names.weigh_input)


def _run(about: Description, module: nn.Module, x: Tensor, valid: Tensor | None) -> Ran:
    masked = about.takes_mask and valid is not None
    output = about.call(module, x, valid) if masked else about.call(module, x)
    balance = about.balance(module, output) if about.balance else None
    return Ran(about.output(output), None if balance is None else balance / about.balance_at_even)


def _define(about: Description, num_experts: int, module: nn.Module, x: Tensor) -> Ran:
    tensors, rule = _tensors(module), about.router
    x_TD = x.reshape(-1, x.shape[-1])
    logits_TE = x_TD @ tensors[rule.weight].t()
    if rule.logit_bias:
        logits_TE = logits_TE + tensors[rule.logit_bias]
    bias_E = tensors[rule.choice_bias].double() if rule.choice_bias else None
    choice = definition.choose(rule, logits_TE, bias_E)
    capacity = about.capacity
    kept_TK = definition.kept(capacity, choice, num_experts) if capacity else None
    experts = _experts(tensors, about.experts, num_experts)
    y_TD = definition.mix(x_TD, choice, experts, kept_TK)
    if about.shared:
        shared_TD = module.get_submodule(about.shared.module)(x_TD)
        if about.shared.gate:
            shared_TD = shared_TD * (x_TD @ tensors[about.shared.gate].t()).sigmoid()
        y_TD = y_TD + shared_TD
    return Ran(y_TD.view(x.shape), definition.switch_loss(choice), choice)


def _relabel(about: Description, module: nn.Module, order: list[int]) -> None:
    tensors, names = _tensors(module), about.experts
    router = about.router
    given = (router.weight, router.logit_bias, router.choice_bias, names.gate_up, names.gate,
             names.up, names.down, names.up_bias, names.down_bias)  # fmt: skip
    with torch.no_grad():
        for name in filter(None, given):
            stacked = _stacked(tensors, name, len(order))[order].clone()
            for e in range(len(order)) if "{e}" in name else ():
                tensors[name.format(e=e)].copy_(stacked[e])
            if "{e}" not in name:
                tensors[name].copy_(stacked)
