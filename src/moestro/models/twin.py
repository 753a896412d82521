"""The dense twin of a mixture: the same model with the same active parameters per token."""

from __future__ import annotations

from moestro.config import DenseConfig, ModelConfig
from moestro.errors import ConfigError
from moestro.models.count import count, matrices


def dense_twin(cfg: ModelConfig) -> ModelConfig:
    """The dense model whose every token costs what it costs in `cfg`.

    Every layer gets one feed-forward network of the experts' activation, wide enough that the
    active parameters (router and shared expert included) are the same up to rounding: to whole
    columns, or to multiples of 8 from 256 columns on, where odd widths would slow the twin down.

    Raises:
        ConfigError: `cfg` has no mixture.
    """
    if cfg.moe is None:
        raise ConfigError("this model has no mixture, so it has no dense twin; set model.moe")
    activation = cfg.moe.activation
    narrow = cfg.model_copy(
        update={"moe": None, "dense": DenseConfig(hidden_dim=1, activation=activation)}
    )
    column = cfg.num_layers * matrices(activation) * cfg.dim
    exact = 1 + (count(cfg).active - count(narrow).active) / column
    step = 8 if exact >= 256 else 1
    width = max(1, round(exact / step) * step)
    return narrow.model_copy(update={"dense": DenseConfig(hidden_dim=width, activation=activation)})
