"""Mixtures of transformers as subjects: each kind of block in a model, or made tiny from settings.

The definition of a block is a float64 copy of it in which the experts are replaced by the
definition's loop and, where the router's rule is known, its choice by the rule's. What is neither
(shared experts, norms, an unknown router) is the block's own code, in float64.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moestro.check import definition
from moestro.check.definition import Choice, Weights
from moestro.check.description import RouterRule
from moestro.check.subject import Ran, Subject
from moestro.errors import CheckpointError, MoestroError
from moestro.foreign import layouts, routers
from moestro.foreign.classes import core, kind
from moestro.foreign.taps import RawChoice, Tap, tapped, taps
from moestro.hf.compute import fused, gate_of
from moestro.hf.plug import NAME, install
from moestro.kernels.reference import Biases

# Widths that a block's settings may have, and what they are made.
WIDTHS = {
    "hidden_size": 40, "d_model": 40, "intermediate_size": 20, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10, "shared_intermediate_size": 10, "ffn_hidden_size": 12,
    "expert_ffn_hidden_size": 12, "moe_shared_expert_intermediate_size": 10, "moe_hidden_size": 16,
    "router_hidden_size": 12, "share_expert_dim": 10,
}  # fmt: skip


def subjects(model: nn.Module, implementation: str = "eager", title: str = "") -> list[Subject]:
    """One for each class of blocks with a mixture in a model, with the model's own weights.

    Args:
        model: of transformers.
        implementation: experts_implementation to be checked.
        title: default: the model's class.

    Raises:
        MoestroError: it has no mixture, or one that cannot be looked into.
    """
    if implementation == NAME:
        install()
    modules = dict(model.named_modules())
    found: dict[tuple[str, str], tuple[nn.Module, Tap]] = {}
    for tap in taps(model):
        parent = tap.name.rpartition(".")[0]
        block = modules[parent]
        if kind(block).endswith("DecoderLayer"):  # norms and attention beside it: experts alone
            continue
        inner = tap._replace(name=tap.name.removeprefix(f"{parent}."))
        found.setdefault((kind(block), kind(modules[tap.name])), (block, inner))
    if not found:
        raise MoestroError(f"the mixtures of {type(model).__name__} are part of a larger layer")
    name = title or type(model).__name__
    return [
        _subject(block, tap, implementation, f"{name}: {kind(block)}, {implementation}")
        for block, tap in found.values()
    ]


def from_settings(path: Path, implementation: str = "eager", seed: int = 0) -> list[Subject]:
    """Those of the model that a config.json describes: tiny widths, random weights.

    Experts, choices and rules are as the settings say; nothing of the model is read.

    Raises:
        CheckpointError: transformers does not know the settings.
        MoestroError: see `subjects`; or a block cannot be built alone.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            settings = transformers.AutoConfig.for_model(**fields)
            settings = settings.get_text_config()
            with torch.device("meta"):
                auto: Any = transformers.AutoModel
                model = auto.from_config(settings)
        except (OSError, ValueError, KeyError, TypeError) as error:
            first = str(error).split("\n")[0]
            raise CheckpointError(f"transformers cannot build {path}: {first}") from error
        return [_tiny(each) for each in subjects(model, implementation, fields["model_type"])]


def randomise(module: nn.Module) -> None:
    """Weights and biases that tell tokens and experts apart."""
    with torch.no_grad():
        for name, each in module.named_parameters():
            fan_in = each.shape[-1] if each.dim() > 1 else 1
            each.normal_(0, 2 * fan_in**-0.5 if each.dim() > 1 else 0.3)
            if each.dim() == 1 and "norm" in name:
                each.add_(1.0)
        for name, buffer in module.named_buffers():
            if name.split(".")[-1] in routers.BIASES:
                buffer.normal_(0, 0.1)


def _tiny(subject: Subject) -> Subject:
    """The same block, built from narrow settings."""
    block = subject.module
    holders = (
        each for each in block.modules() if hasattr(getattr(each, "config", None), "to_dict")
    )
    config = getattr(next(holders, None), "config", None)
    if config is None:
        raise MoestroError(f"{kind(block)} holds no settings to build it from")
    config = copy.deepcopy(config)
    for name, width in WIDTHS.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, width)
    config._experts_implementation = "eager"
    try:
        with torch.device("cpu"):
            made = type(block)(config)
    except Exception as error:
        raise MoestroError(
            f"{kind(block)} cannot be built from its settings alone ({error}); build a tiny model "
            "and call moestro.check.check(model)"
        ) from error
    made = made.float().eval()
    randomise(made)
    holder = nn.Module()
    holder.layer = made
    implementation = subject.title.rpartition(", ")[2]
    return subjects(holder, implementation, subject.title.partition(":")[0])[0]


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
        training=False,
    )  # fmt: skip


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
        scale=getattr(router, "routed_scaling_factor", 1.0), num_groups=router.num_group,
        top_groups=router.topk_group,
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
    dim = _first_int(owners, "hidden_size", "hidden_dim", "d_model", "ffn_hidden_size")
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
