"""A transformers family's own balance loss: its coefficient, and how to disable it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moestro.errors import ConfigError
from moestro.foreign import hooks
from moestro.foreign.classes import core
from moestro.foreign.taps import Tap
from moestro.moe.balance import COEFFICIENTS, converted

# What models, or their configurations, call what they multiply their losses by.
_HELD = {*COEFFICIENTS, "router_z_loss_coef"}


def own_switch(model: nn.Module, found: Sequence[Tap]) -> float | None:
    """The coefficient that the model's configuration names, converted; None: it names none.

    Raises:
        ConfigError: its routers do not state one K.
    """
    coefficient = _coefficient(model)
    if coefficient is None:
        return None
    stated = {getattr(tap.router and core(tap.router), "top_k", None) for tap in found}
    top_k = stated.pop() if len(stated) == 1 else None
    if not isinstance(top_k, int):
        raise ConfigError(
            f"the routers of {type(model).__name__} do not state one K, so the family's "
            "coefficient cannot be converted; give switch= (0.01 is usual)"
        )
    return converted(coefficient, top_k, len(found))


class OwnLoss:
    """Keeps the balance loss that a family has itself out of what is differentiated.

    While the model runs, every coefficient that it could multiply that loss by is 0; outside of
    forward passes, and in what a checkpoint saves, they are what they were set to. `aux_loss` in
    the output keeps its value and loses its gradient.

    Args:
        model: of transformers. Where its own loss is on, a warning says that it will be off.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners = [*model.modules(), *_configs(model)]
        self._owners = [each for each in self._owners if not _HELD.isdisjoint(vars(each))]
        self._held: list[tuple[Any, str, Any]] = []
        self._said = False
        asked = any(getattr(each, "output_router_logits", False) for each in _configs(model))
        if asked and _coefficient(model):
            self._say(model, stacklevel=5)
        self._before = hooks.add(model.register_forward_pre_hook, self._stop)
        self._after = hooks.add(model.register_forward_hook, self._resume, always_call=True)

    def remove(self) -> None:
        """Restore the model's own loss."""
        self._put_back()
        self._before.remove()
        self._after.remove()

    def _stop(self, *_: Any) -> None:
        self._put_back()  # what a pass that was interrupted left at 0
        for owner in self._owners:
            for name in _HELD:
                value = vars(owner).get(name)
                if isinstance(value, int | float):
                    self._held.append((owner, name, value))
                    setattr(owner, name, 0.0)

    def _resume(self, model: nn.Module, _: Any, output: Any) -> None:
        self._put_back()
        loss = getattr(output, "aux_loss", None)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        output.aux_loss = loss.detach()
        if not self._said:
            self._say(model, stacklevel=3)

    def _say(self, model: nn.Module, stacklevel: int) -> None:
        self._said = True
        warnings.warn(
            f"{type(model).__name__} has a balance loss of its own (output_router_logits). It is "
            "off until the balancer's remove(), so that balance is not paid for twice: aux_loss in "
            "its output is without gradient",
            UserWarning,
            stacklevel,
        )

    def _put_back(self) -> None:
        for owner, name, value in self._held:
            setattr(owner, name, value)
        self._held = []


def _coefficient(model: nn.Module) -> float | None:
    values = (getattr(each, name, None) for each in _configs(model) for name in COEFFICIENTS)
    return next((float(value) for value in values if value is not None), None)


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model, of its text part and of its networks, its own first."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        for each in (config, *(getattr(config, n, None) for n in ("text_config", "ffn_config"))):
            if hasattr(each, "__dict__"):
                found[id(each)] = each
    return list(found.values())
