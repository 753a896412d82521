"""The balance loss that a family of transformers has itself: what it weighs, how to stop it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from moestro.errors import ConfigError, MoestroError

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
# Where the models keep what they multiply their losses by.
_HELD = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef")


def converted(coefficient: float, top_k: int, layers: int) -> float:
    """What a coefficient of transformers is worth as `switch=` here: c · K / L.

    transformers' loss is K at perfect balance, and is one loss over all layers together; ours is 1
    at balance in each layer, and is summed over the layers. With the converted coefficient the two
    give the same gradient where all layers are uneven in the same way; where they are not,
    transformers lets the unevenness of one layer cancel that of another, and this project does not.

    Args:
        coefficient: c, such as `config.router_aux_loss_coef`.
        top_k: K, experts per token.
        layers: L, mixtures in the model.
    """
    return coefficient * top_k / layers


def own_coefficient(model: nn.Module) -> float | None:
    """The coefficient that the model's configuration names; None: it names none."""
    for config in _configs(model):
        for name in COEFFICIENTS:
            value = getattr(config, name, None)
            if value is not None:
                return float(value)
    return None


class OwnLoss:
    """The family's own balance loss, which `stop` switches off until `restore`.

    The coefficients that modules hold become 0, which leaves configurations, and what a checkpoint
    saves of them, as they are. A model that reads its configuration instead stops to compute the
    loss: its `output_router_logits` becomes False.

    Args:
        model: of transformers. Where its own loss is on, a warning says that it will be off.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (module, name, value)
            for module in model.modules()
            for name in _HELD
            if isinstance(value := vars(module).get(name), int | float)
        ]
        coefficient = own_coefficient(model)
        asking = [each for each in _configs(model) if getattr(each, "output_router_logits", False)]
        if asking and coefficient:
            warnings.warn(
                f"{type(model).__name__} adds a balance loss of its own "
                f"(coefficient {coefficient}); it is off while moestro.hf.balance is "
                "at work, so that balance is not paid for twice",
                UserWarning,
                stacklevel=4,
            )
        # Without a coefficient it only returns the routers' logits, which may go on.
        self._asking = asking if coefficient and not self._held else []

    def stop(self) -> None:
        """From now on the model adds nothing."""
        for module, name, _ in self._held:
            setattr(module, name, 0.0)
        for config in self._asking:
            config.output_router_logits = False

    def check(self, output: Any) -> None:
        """Refuse an output that has the family's own loss in it after all.

        Raises:
            MoestroError: it has.
        """
        if not self._held and getattr(output, "aux_loss", None) is not None:
            raise MoestroError(
                "the model computed a balance loss of its own beside the one of "
                "moestro.hf.balance; do not pass output_router_logits=True"
            )

    def restore(self) -> None:
        """As it was before."""
        for module, name, value in self._held:
            setattr(module, name, value)
        for config in self._asking:
            config.output_router_logits = True
        self._held, self._asking = [], []


def chosen_per_token(model: nn.Module, routers: Sequence[nn.Module | None]) -> int:
    """K, as the routers state it.

    Raises:
        ConfigError: they do not, or differ; what to give instead.
    """
    stated = {getattr(router, "top_k", None) for router in routers}
    top_k = stated.pop() if len(stated) == 1 else None
    if not isinstance(top_k, int):
        raise ConfigError(
            f"the routers of {type(model).__name__} do not state one number of experts per token, "
            "so the family's coefficient cannot be converted; give switch= (0.01 is usual)"
        )
    return top_k


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configuration of a model, of its text part and of its networks."""
    config = getattr(model, "config", None)
    for each in (config, *(getattr(config, n, None) for n in ("text_config", "ffn_config"))):
        if each is not None:
            yield each
