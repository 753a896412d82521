"""Which class of transformers a module is, within wrappers, and which classes are mixtures."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from moestro.kernels.reference import LIMITS, STEEPNESS


class ExpertsTraits(NamedTuple):
    """What sets a class of experts apart.

    Attributes:
        counted_by: the attribute that holds the number of experts, those that do nothing included.
        skips: a weight of 0 means that the token skips the mixture; counted as one more expert.
        gate: what its own gate is, if its attributes have the values of `needs`; see
            `reference.activate`.
        needs: attributes and their values, of `act_fn` its name.
    """

    counted_by: str = "num_experts"
    skips: bool = False
    gate: str | None = None
    needs: tuple[tuple[str, object], ...] = ()


def _limited(kind: str, limit: str, *needs: tuple[str, object]) -> ExpertsTraits:
    return ExpertsTraits(gate=kind, needs=((limit, LIMITS[kind]), *needs))


PLAIN = ExpertsTraits()
_SILU = ("act_fn", "silu")
EXPERTS = {
    "DeepseekV4Experts": _limited("limited_swiglu", "limit", _SILU),
    "Glm5NextTextExperts": _limited("limited_swiglu", "swiglu_limit"),
    "GptOssExperts": _limited("clamped_swiglu", "limit", ("alpha", STEEPNESS)),
    "HYV4Experts": _limited("limited_swiglu", "swiglu_limit"),
    "HYV4VLExperts": _limited("limited_swiglu", "swiglu_limit"),
    "LongcatFlashExperts": ExpertsTraits(counted_by="total_experts"),
    "MiniMaxM3VLExperts": _limited("clamped_swiglu", "swiglu_limit", ("swiglu_alpha", STEEPNESS)),
    "OpenAIPrivacyFilterExperts": _limited("clamped_swiglu", "limit", ("alpha", STEEPNESS)),
    "Step3p7Experts": _limited("capped_swiglu", "limit", _SILU),
    "ZayaExperts": ExpertsTraits(skips=True),
}
# Mixtures of something other than feed-forward networks.
NOT_FEED_FORWARD = frozenset({"JetMoeMoA"})
# What blocks are called that hold a mixture, in transformers and in code that came with a model.
_BLOCK = re.compile(r"(MoE|Moe|MoeBlock|MoEBlock|MoELayer|MoeLayer|SparseMLP|MoA)$")


def unaccounted(
    modules: Mapping[str, nn.Module], known: Collection[str], *, beside: bool
) -> list[str]:
    """Classes that look like mixtures by their own or their modules' names, and are not known.

    Args:
        modules: of a model, by name.
        known: names of modules; what holds one, or lies within, is accounted for.
        beside: so are experts in the same block as a known one.
    """
    found = set()
    blocks = {name.rpartition(".")[0] for name in known if beside}
    for name, module in modules.items():
        own, parent = type(module).__name__, name.rpartition(".")[0]
        # Shared experts take every token: nothing is chosen there.
        experts = name.split(".")[-1] == "experts" or ("Experts" in own and "Shared" not in own)
        if not name or not (experts or _BLOCK.search(own)):
            continue
        around = {kind(module), kind(modules.get(parent)) if experts else ""}
        nested = any(_within(each, name) or _within(name, each) for each in known)
        if not (nested or (experts and parent in blocks) or around & NOT_FEED_FORWARD):
            found.add(own)
    return sorted(found)


def kind(module: object) -> str:
    """The name of the class whose forward a module runs.

    Classes that are made at run time around another (FSDP, parametrizations) inherit its forward.
    """
    classes = type(module).__mro__
    return next((each.__name__ for each in classes if "forward" in vars(each)), classes[0].__name__)


def core(module: nn.Module) -> nn.Module:
    """What a wrapper holds, or the module itself: the first that names what it takes."""
    return next((each for each in module.modules() if not _passes_on(each)), module)


def core_kind(module: nn.Module | None) -> str:
    """The `kind` of a module within wrappers, also for messages."""
    return "no router" if module is None else kind(core(module))


def outermost(modules: Mapping[str, nn.Module], name: str) -> str:
    """The name of the outermost module that only passes calls on to the one of that name."""
    outer = name.rpartition(".")[0]
    while outer and _passes_on(modules[outer]):
        if not isinstance(modules[outer], nn.ModuleDict | nn.ModuleList):
            name = outer
        outer = outer.rpartition(".")[0]
    return name


def _within(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def _passes_on(module: nn.Module) -> bool:
    """Whether a module takes whatever it is given, as wrappers do (adapters, compiled modules)."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(each.kind is each.VAR_POSITIONAL for each in parameters)
