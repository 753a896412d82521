"""Mixtures of transformers as subjects: each kind of block in a model.

The definition of a block is a float64 copy of it in which the experts are replaced by the
definition's loop and, where the router's rule is known, its choice by the rule's. What is neither
(shared experts, norms, an unknown router) is the block's own code, in float64.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moestro.check import definition
from moestro.check.definition import Choice, Weights
from moestro.check.description import RouterRule
from moestro.check.filling import is_choice_bias
from moestro.check.subject import Ran, Subject, named_tensors
from moestro.check.targets import imported
from moestro.errors import ConfigError, MoestroError
from moestro.foreign import layouts, routers
from moestro.foreign.classes import core, kind
from moestro.foreign.taps import RawChoice, Tap, tapped, taps
from moestro.hf.compute import fused, gate_of
from moestro.hf.plug import NAME, install
from moestro.kernels.reference import Biases


def subjects(model: nn.Module, implementation: str = "eager", title: str = "") -> list[Subject]:
    """One for each class of blocks and routers of a model's mixtures, with its own weights.

    Args:
        model: of transformers.
        implementation: experts_implementation to be checked, or module:NAME of one that this
            module registers.
        title: default: the model's class.

    Raises:
        MoestroError: it has no mixture, or one that cannot be looked into.
        ConfigError: there is no such implementation.
    """
    place, _, implementation = implementation.rpartition(":")
    if place:
        imported(place)
    if implementation == NAME:
        install()
    if implementation != "eager" and implementation not in ALL_EXPERTS_FUNCTIONS:
        raise ConfigError(
            f"transformers knows no experts_implementation {implementation!r}; it has eager, "
            f"{', '.join(sorted(ALL_EXPERTS_FUNCTIONS))}; give module:{implementation} where a "
            "module of yours registers it"
        )
    modules = dict(model.named_modules())
    found: dict[tuple[str, ...], tuple[nn.Module, Tap]] = {}
    for tap in taps(model):
        parent = tap.name.rpartition(".")[0]
        block = modules[parent]
        if kind(block).endswith("DecoderLayer"):  # norms and attention beside it: experts alone
            continue
        inner = tap._replace(name=tap.name.removeprefix(f"{parent}."))
        kinds = kind(block), kind(modules[tap.name]), "" if tap.router is None else kind(tap.router)
        found.setdefault(kinds, (block, inner))
    if not found:
        raise MoestroError(f"the mixtures of {type(model).__name__} are part of a larger layer")
    name = title or type(model).__name__
    made = [
        _subject(block, tap, implementation, f"{name}: {kind(block)}, {implementation}")
        for block, tap in found.values()
    ]
    made[0] = replace(made[0], whole=model) if has_loss(type(model)) else made[0]
    return made


def has_loss(model: type[nn.Module]) -> bool:
    """Whether models of a class add a balance loss to their own when asked for router logits."""
    taken = set(inspect.signature(model.forward).parameters)
    return {"labels", "output_router_logits"} <= taken and hasattr(
        sys.modules[model.__module__], "load_balancing_loss_func"
    )


def _subject(block: nn.Module, tap: Tap, implementation: str, title: str) -> Subject:
    experts, block = core(block.get_submodule(tap.name)), block.eval()
    dim, hidden, top_k = _sizes(block, tap)
    rule, loop = _rule(tap.router), _looped(experts)
    whole = loop and (rule is not None or _known(tap.router))
    if not whole:
        title += " (beside its own code in float64)"
    find = partial(_find, name=tap.name, router=_name_of(block, tap.router), tap=tap)
    return Subject(
        title, block, dim, hidden, tap.num_experts, top_k,
        partial(_run, implementation=implementation),
        partial(_define, find=find, rule=rule, loop=loop),
        partial(_part, experts=tap.name, router=_name_of(block, tap.router)),
        training=False, unreached=_unreached(experts, implementation),
        choice_biases=tuple(name for name in named_tensors(block) if is_choice_bias(name)),
        score=tap.scoring if tap.scoring in ("softmax", "sigmoid") else "",
        zeros=tuple(name for name, _ in block.named_parameters() if not is_choice_bias(name)),
    )  # fmt: skip


def _unreached(experts: nn.Module, implementation: str) -> str:
    if implementation == "eager" or hasattr(experts, "is_transposed"):
        return ""
    return (
        f"{kind(experts)} has no experts interface: {implementation} was asked for, and its own "
        "code ran"
    )


def _run(module: nn.Module, x: Tensor, valid: Tensor | None, *, implementation: str) -> Ran:
    _implement(module, implementation)
    output = module(x)
    y = output[0] if isinstance(output, tuple) else output
    return Ran(y.view(x.shape))


def _define(
    module: nn.Module,
    x: Tensor,
    *,
    find: Callable[[nn.Module], Tap],
    rule: RouterRule | None,
    loop: bool,
) -> Ran:
    _implement(module, "eager")
    tap, seen = find(module), []
    if loop:
        inner: Any = core(tap.experts)
        inner.forward = partial(_loop, inner)

    def see(_: int, chosen: RawChoice) -> tuple[Tensor, Tensor] | None:
        experts_TK, weights_TK, logits_TE = chosen
        if logits_TE is not None and rule is not None:
            assert tap.router is not None
            bias_E = next((getattr(core(tap.router), b) for b in routers.BIASES
                           if hasattr(core(tap.router), b)), None)  # fmt: skip
            experts_TK, weights_TK = definition.choose(rule, logits_TE, bias_E)[:2]
        elif logits_TE is not None and tap.router is not None and _known(tap.router):
            zero_E = torch.zeros_like(logits_TE[0])
            weights_TK, experts_TK = routers.choose(core(tap.router), logits_TE, zero_E)
        seen.append(Choice(experts_TK, weights_TK, logits_TE))
        return None if experts_TK is chosen.experts_TK else (experts_TK, weights_TK)

    with tapped([tap], see, again=True):
        output = module(x)
    y = output[0] if isinstance(output, tuple) else output
    return Ran(y.view(x.shape), None, seen[-1])


def _loop(experts: Any, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The definition in place of the experts' forward."""
    stored = layouts.read(experts)
    up_EH, down_ED = stored.up_EH, stored.down_ED
    biases = None if up_EH is None or down_ED is None else Biases(up_EH, down_ED)
    weights = Weights(stored.up_EHD, stored.down_EDF, fused(stored) or gate_of(experts), biases)
    x_TD = x_TD.reshape(-1, x_TD.shape[-1])
    return definition.mix(x_TD, Choice(experts_TK, weights_TK.to(x_TD.dtype)), weights)


def _looped(experts: nn.Module) -> bool:
    """Whether the loop can stand for these experts."""
    if not hasattr(experts, "is_transposed"):
        return False
    try:
        return not layouts.read(experts).post_norm
    except MoestroError:
        return False


def _known(router: nn.Module | None) -> bool:
    """Whether foreign/routers.py has its rule, and nothing is added to its scores."""
    row = None if router is None else routers.ROUTERS.get(kind(core(router)))
    return row is not None and row.weigh is not None


def _rule(router: Any) -> RouterRule | None:
    """Of routers as DeepSeek-V3's: sigmoid, bias, groups, sum, scale, all of them attributes."""
    router = None if router is None else core(router)
    names = ("num_group", "topk_group", "norm_topk_prob", "top_k", "e_score_correction_bias")
    sigmoid = routers.scoring(router) == "sigmoid"
    if not sigmoid or not all(hasattr(router, name) for name in names):
        return None
    return RouterRule(
        top_k=router.top_k, score="sigmoid", normalise=router.norm_topk_prob,
        scale=getattr(router, "routed_scaling_factor", 1.0), num_groups=router.num_group or 1,
        top_groups=router.topk_group or 1,
    )  # fmt: skip


def _find(module: nn.Module, *, name: str, router: str | None, tap: Tap) -> Tap:
    found = None if router is None else module.get_submodule(router)
    return tap._replace(experts=module.get_submodule(name), router=found)


def _name_of(block: nn.Module, inner: nn.Module | None) -> str | None:
    return next((name for name, each in block.named_modules() if each is inner), None)


def _part(name: str, *, experts: str, router: str | None) -> str:
    if name.startswith(f"{experts}."):
        return "experts"
    if router and name.startswith(f"{router}."):
        return "router"
    return "shared" if "share" in name else "other"


def _sizes(block: nn.Module, tap: Tap) -> tuple[int, int, int]:
    """D, F and K."""
    experts: Any = core(tap.experts)
    owners = [*_owners(block, tap)]
    dim = _first_int(owners, "input_size", "hidden_size", "hidden_dim", "d_model",
                     "ffn_hidden_size")  # fmt: skip
    hidden = _first_int([experts], "intermediate_dim", "intermediate_size", "expert_dim",
                        "moe_intermediate_size", default=dim)  # fmt: skip
    top_k = _first_int(owners, "top_k", "num_experts_per_tok", "moe_top_k", default=1)
    return dim, hidden, top_k


def _owners(block: nn.Module, tap: Tap) -> Iterator[Any]:
    for module in (tap.router, block, *block.modules()):
        if module is not None:
            yield core(module)
            if hasattr(module, "config"):
                yield module.config


def _first_int(owners: list[Any], *names: str, default: int | None = None) -> int:
    for name in names:
        for owner in owners:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    if default is None:
        raise MoestroError(f"{type(owners[0]).__name__} states none of {', '.join(names)}")
    return default


def _implement(module: nn.Module, name: str) -> None:
    for each in module.modules():
        config = getattr(each, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = name
