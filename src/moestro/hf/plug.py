"""Register with transformers, refuse models that would run other code, and check what ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import wraps
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from moestro.errors import BackendError
from moestro.foreign import classes, layouts, undecorated
from moestro.hf.forward import mixture, watching
from moestro.hf.undecorated import host, release
from moestro.kernels import native_cpu

NAME = "moestro"


class Installed(NamedTuple):
    """What `install` did."""

    name: str  # what to ask for: `experts_implementation=name`
    transformers: str  # the version registered with
    native: str | None  # path of the native kernels (amx, avx512, …); None: torch's run
    reason: str | None  # why there are no native kernels; None: there are


class Checked(NamedTuple):
    """What ran in one forward pass."""

    ran: dict[str, str]  # the kernels that computed each experts module, by its name
    calls: int  # how often they did, all modules together


def install() -> Installed:
    """Offer `experts_implementation="moestro"` to every model of transformers.

    Two methods of `PreTrainedModel` are wrapped, the end of its construction and
    `set_experts_implementation`: there a model is refused whose experts transformers would run
    by other code though this name was asked for. To install again changes nothing.
    """
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ExpertsInterface.register(NAME, mixture)
        base: Any = PreTrainedModel
        base.post_init = _guarded_construction(base.post_init)
        base.set_experts_implementation = _guarded_setting(base.set_experts_implementation)
    reason = native_cpu.available()
    path = native_cpu.path() if reason is None else None
    return Installed(NAME, transformers.__version__, path, reason)


def use(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Make all experts of a model run on moestro, and return them by name.

    Raises:
        BackendError: some cannot be reached.
    """
    install()
    found = layouts.find(model)
    model.set_experts_implementation(NAME)
    return found


def check(model: PreTrainedModel, inputs: Tensor | Mapping[str, Any]) -> Checked:
    """Run a forward pass, without gradients, and make sure that each mixture was computed here.

    Of a compiled model too, whose Python then runs as it does without a compiler. The inputs are
    token ids, or the keywords of the model's forward.

    Raises:
        BackendError: some mixture ran other code, or did not run; names it and its class.
    """
    found = layouts.find(model)
    reached: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: reached.update([name]))
        for name, module in found.items()
    ]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), watching() as seen:
            _ = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    modules, ran = dict(model.named_modules()), {}
    places = {name: classes.outermost(modules, name) for name in found}
    used = {places[name] for name in reached}  # an adapter may hold two and run one
    for name, module in found.items():
        lines = seen.get(id(module), [])
        if len(lines) < max(reached[name], places[name] not in used):
            raise BackendError(_missed(name, module, reached[name], len(lines)))
        if lines:
            ran[name] = "; ".join(dict.fromkeys(lines))
    return Checked(ran, sum(len(lines) for lines in seen.values()))


def _missed(name: str, module: nn.Module, reached: int, ours: int) -> str:
    kind = type(module).__name__
    if not reached:
        return (
            f"{name} ({kind}) was not reached: these inputs pass it by, or a kernel from the hub "
            "stands in for its block; give inputs that use it, load without use_kernels"
        )
    asked = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return (
        f"{name} ({kind}) ran {reached} times and {ours} times by moestro; its implementation is "
        f'{asked!r}. Call model.set_experts_implementation("{NAME}")'
    )


def _guarded_construction(post_init: Any) -> Any:
    @wraps(post_init)
    def guarded(self: PreTrainedModel) -> None:
        post_init(self)
        if getattr(self.config, "_experts_implementation", None) == NAME:
            layouts.refuse_unreachable(self)
            host(self)

    return guarded


def _guarded_setting(setter: Any) -> Any:
    @wraps(setter)
    def guarded(self: PreTrainedModel, experts_implementation: str | dict[str, str]) -> None:
        if experts_implementation == NAME:
            layouts.refuse_unreachable(self)
        setter(self, experts_implementation)
        release(self)
        if experts_implementation != NAME:
            return
        host(self)
        for name, module in layouts.reachable(self):
            if undecorated.layout(module) is not None:
                continue
            # transformers passes over models whose source it cannot read, without a word.
            if getattr(module.config, "_experts_implementation", None) != NAME:
                raise BackendError(
                    f"transformers did not pass the setting on to {name} "
                    f"({type(module).__name__}); give experts_implementation={NAME!r} when the "
                    "model is made"
                )

    return guarded
