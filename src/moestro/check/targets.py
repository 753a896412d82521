"""What people give to be checked: layers, factories, their names, models; and what is refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from moestro.check.described import described
from moestro.check.description import (
    AdapterNames,
    Description,
    ExpertNames,
    RouterRule,
    SharedNames,
)
from moestro.check.subject import Subject
from moestro.config import MoEConfig
from moestro.errors import ConfigError, MoestroError
from moestro.kernels.reference import GATED
from moestro.models.network import Network
from moestro.moe.balance import switch_loss, z_loss
from moestro.moe.layer import MoE
from moestro.moe.lora import Adapter
from moestro.moe.packed import PackedExperts
from moestro.moe.parallel import ParallelExperts
from moestro.train.parallel import Place, square


def of_moe(layer: MoE, title: str = "") -> Subject:
    """A layer of this project.

    Raises:
        MoestroError: its router is not token choice by scores, or is adapted.
    """
    cfg, router = layer.cfg, layer.cfg.router
    if router.kind not in ("softmax", "sigmoid"):
        raise MoestroError(f"the {router.kind} router is not checked; softmax and sigmoid are")
    if getattr(layer.router, "weight_adapter", None) is not None:
        raise MoestroError("the router has an adapter; merge it, then check the layer")
    if cfg.capacity and cfg.capacity.per_sequence:
        raise MoestroError("a capacity of each sequence is not checked; leave per_sequence out")
    adapters = _adapters(layer)
    random = (
        router.jitter
        or cfg.experts.dropout
        or any(module.dropout for module in layer.modules() if isinstance(module, Adapter))
    )
    factor = cfg.capacity and (cfg.capacity.eval_factor if random else cfg.capacity.factor)
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
            weigh_input=router.weighs == "input",
        ),
        shared=cfg.shared and SharedNames(
            module="shared", gate="shared_gate.weight" if cfg.shared.gate else None
        ),
        capacity=cfg.capacity and {"factor": factor, "order": order},
        training=not random,
        call=lambda module, x, valid=None: module(x, valid=valid), takes_mask=True,
        balance=lambda module, output: switch_loss(output[1]),
        z=lambda module, output: z_loss(output[1]), adapters=adapters,
        spread=None if adapters else _spread, norm=_norm,  # experts with adapters are not split
    )  # fmt: skip

    def resized(**sizes: int) -> Subject:
        values = {**cfg.model_dump(), **sizes}
        if values["top_k"] == values["num_experts"]:  # a group cannot hold them all
            values["router"] = {**values["router"], "num_groups": 1, "top_groups": 1}
        return of_moe(MoE(MoEConfig(**values), str(layer.experts.backend)), title)

    made = described(layer, about, title or f"MoE, {layer.experts.backend}")
    return made if about.adapters else replace(made, resized=resized)


def _adapters(layer: MoE) -> tuple[AdapterNames, ...]:
    found = ((name, getattr(layer.experts, f"{name}_adapter")) for name in ("gate_up", "down"))
    return tuple(
        AdapterNames(
            weight=f"experts.{name}", a=f"experts.{name}_adapter.a", b=f"experts.{name}_adapter.b",
            scale=each.scale,
        )
        for name, each in found if each is not None
    )  # fmt: skip


def _spread(layer: Any) -> MoE:
    made: MoE = layer
    made.experts = ParallelExperts(layer.experts)
    return made


def _norm(layer: nn.Module) -> Tensor:
    """As the training loop adds it up."""
    ranks, gradients, places = dist.get_world_size(), {}, {}
    for name, each in layer.named_parameters():
        if each.grad is not None:
            copies = 1 if name.startswith("experts.") else ranks
            gradients[name] = each.grad
            places[name] = Place((0, 0), tuple(each.shape), copies, saves=True)
    squared = square(gradients, places)
    dist.all_reduce(squared)
    return squared.sqrt()


def of_factory(words: str, title: str = "") -> Subject:
    """What `module:factory` returns: a layer and its description, an MoE, or a Subject.

    Raises:
        ConfigError: there is no such function, it raises, or returns something else.
    """
    place, _, name = words.partition(":")
    factory = getattr(imported(place), name, None)
    if not callable(factory):
        raise ConfigError(f"{place} has no function {name!r}; give module:factory")
    return made_by(factory, title or words)


def imported(name: str) -> Any:
    """A module of the user's.

    Raises:
        ConfigError: there is none, or it raises.
    """
    try:
        return import_module(name)
    except Exception as error:  # it runs anybody's code
        raise ConfigError(f"cannot import {name!r}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """An exception in one line."""
    words = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {words}"


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
        raise ConfigError(f"{title} raised {_said(error)}") from error
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


def of_anything(target: Any, title: str = "", implementation: str = "") -> list[Subject]:
    """A Subject, an MoE, (module, Description), a factory, its name, or a model or its settings.

    A model has a subject for each of its kinds of blocks.

    Args:
        target: one of these.
        title: of the report.
        implementation: experts_implementation of a model of transformers, or module:NAME of one
            that this module registers; empty: its own.

    Raises:
        MoestroError: it is none of these, or an implementation is asked of something else.
    """
    named = isinstance(target, str) and ":" in target and not Path(target).exists()
    if named or not _foreign(target):
        refuse_implementation(implementation)
    if isinstance(target, Subject):
        return [replace(target, title=title or target.title)]
    if isinstance(target, MoE):
        return [_of_own(target, title)]
    if isinstance(target, Network):
        return _of_network(target, title)
    if named:
        return [of_factory(target, title)]
    if _foreign(target):
        models = import_module("moestro.check.foreign_settings")
        found: list[Subject] = models.of_foreign(target, implementation, title)
        return found
    if isinstance(target, tuple) or (callable(target) and not isinstance(target, nn.Module)):
        return [made_by(target if callable(target) else lambda: target, title)]
    raise ConfigError(
        f"cannot check a {type(target).__name__}; give (module, Description), a factory that "
        "returns them, its name as module:factory, an MoE, or a model of transformers"
    )


def refuse_implementation(implementation: str) -> None:
    """Of a mixture that is not transformers'.

    Raises:
        ConfigError: one is given.
    """
    if implementation:
        raise ConfigError(
            f"{implementation} is to compute transformers' experts; give one of its models, or "
            "leave the implementation out"
        )


def _of_own(layer: MoE, title: str) -> Subject:
    if not isinstance(layer.experts, PackedExperts):
        return of_moe(layer, title)
    made: Subject = import_module("moestro.check.packed").of_packed(layer, title)
    return made


def _of_network(model: Network, title: str) -> list[Subject]:
    """The first mixture of each kind in a model of this project, by its settings."""
    kinds = {each.cfg.model_dump_json(): each for each in reversed(model.mixtures())}
    if not kinds:
        raise MoestroError(f"the {type(model).__name__} is dense: it has no mixture of experts")
    title = title or type(model).__name__
    names = {each: name for name, each in model.named_modules()}
    return [_of_own(each, f"{title}, {names[each]}") for each in reversed(kinds.values())]


def _foreign(target: Any) -> bool:
    """A path, or a model or settings of transformers, which such an object has imported already."""
    if isinstance(target, str | Path):
        return True
    if "transformers" not in sys.modules:
        return False
    library = sys.modules["transformers"]
    if isinstance(target, library.PretrainedConfig):
        return True
    return isinstance(target, nn.Module) and any(
        isinstance(each, library.PreTrainedModel) for each in target.modules()
    )
