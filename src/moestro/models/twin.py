"""The dense twin of a mixture: a model like it, of the same cost per token or the same size."""

from __future__ import annotations

from typing import Literal, TypeVar

from moestro.config import DenseConfig, NetworkConfig
from moestro.errors import ConfigError
from moestro.models.count import count, matrices

Model = TypeVar("Model", bound=NetworkConfig)


def dense_twin(cfg: Model, of: Literal["active", "total"] = "active") -> Model:
    """The dense model whose every token costs what it costs in `cfg`, or one as large as it.

    Every layer gets one feed-forward network of the experts' activation, wide enough that the
    parameters (router and shared expert included) are as many, up to rounding: to whole
    columns, or to multiples of 8 from 256 columns on, where odd widths would slow the twin down.

    Args:
        cfg: the mixture.
        of: "active", or "total" for the dense model that is as large as the whole mixture.

    Raises:
        ConfigError: `cfg` has no mixture.
    """
    if cfg.moe is None:
        raise ConfigError("this model has no mixture, so it has no dense twin; set model.moe")
    activation = cfg.moe.activation
    narrow = cfg.model_copy(
        update={"moe": None, "dense": DenseConfig(hidden_dim=1, activation=activation)}
    )
    layers = sum(len(stack.layers) for stack in cfg.stacks())
    missing = getattr(count(cfg), of) - count(narrow).total
    exact = 1 + missing / (layers * matrices(activation) * cfg.dim)
    step = 8 if exact >= 256 else 1
    width = max(1, round(exact / step) * step)
    dense = DenseConfig(hidden_dim=width, activation=activation)
    return narrow.model_copy(update={"dense": dense})
