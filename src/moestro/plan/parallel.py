"""What each rank holds and sends in a training step that several share.

Collectives are counted as rings and direct exchanges send: of N ranks each sends (N - 1) / N of a
tensor to gather or to scatter it, twice that to reduce it to all. Gradients travel in fp32,
gathered weights and routed rows in the dtype that is computed in.

Letters: N ranks, K experts per token, T tokens of one rank, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moestro.config import LayerSpec, NetworkConfig
from moestro.errors import ConfigError
from moestro.models.count import Count
from moestro.plan.memory import STATE_BYTES, Training

KINDS = ("data", "fsdp", "expert")
GRADIENT_BYTES = 4


class Rank(NamedTuple):
    """One of `ranks` processes that train together.

    Attributes:
        kind: "data" (all of the model on each), "fsdp" (parameters, gradients and moments fully
            sharded), "expert" (experts split, all else as with "data").
        ranks: N.
        weights: bytes, of the fullest rank, as are the next two.
        gradients: bytes.
        optimizer: bytes.
        activations: bytes for its own sequences; None where the settings are not known.
        gathered: bytes of the layer whose weights are gathered to compute with (fsdp); None where
            the number of layers is not known.
        sent: bytes that it sends in a step.
        all_to_all_per_layer: bytes that it sends of one mixture layer's rows in a step: there and
            back, forward and backward.
        all_to_all: of all mixture layers; part of `sent`.
    """

    kind: str
    ranks: int
    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    gathered: int | None
    sent: int
    all_to_all_per_layer: int
    all_to_all: int

    @property
    def held(self) -> int:
        """Bytes on the device, activations included so far as they are known."""
        state = self.weights + self.gradients + self.optimizer
        return state + (self.gathered or 0) + (self.activations or 0)


def rank(
    cfg: NetworkConfig | None,
    counted: Count,
    training: Training,
    kind: str,
    ranks: int,
    tokens: int,
    number: int,
) -> Rank | None:
    """The fullest rank of a training step; None where expert parallelism means nothing.

    Args:
        cfg: the model; None where it is not known.
        counted: its count.
        training: its step on one device.
        kind: one of `KINDS`.
        ranks: N.
        tokens: T, of each rank.
        number: bytes of one number in the dtype computed in.

    Raises:
        ConfigError: there are more ranks than experts.
    """
    share = (ranks - 1) / ranks
    if kind == "data":
        sent = 2 * share * counted.total * GRADIENT_BYTES
        return _rank(kind, ranks, counted.total, training, sent=sent)
    if kind == "fsdp":
        # Gathered in the forward and again in the backward, then the gradients scattered.
        sent = share * counted.total * (2 * number + GRADIENT_BYTES)
        layers = len(_layers(cfg))
        body = counted.total - counted.input_embedding - counted.output_embedding
        gathered = number * math.ceil(body / layers) if layers else None
        held = math.ceil(counted.total / ranks)
        return _rank(kind, ranks, held, training, sent=sent, gathered=gathered)
    if cfg is None or cfg.moe is None:
        return None
    experts = cfg.moe.num_experts
    if ranks > experts:
        raise ConfigError(
            f"expert parallelism over {ranks} ranks needs as many experts, and a layer has "
            f"{experts}; lower --ranks to {experts}, or choose --parallel fsdp"
        )
    everywhere = counted.total - counted.expert
    held = everywhere + counted.expert // experts * math.ceil(experts / ranks)
    exchange = round(4 * tokens * cfg.moe.top_k * cfg.dim * number * share)
    exchanges = exchange * sum(layer.mixture for layer in _layers(cfg))
    sent = 2 * share * everywhere * GRADIENT_BYTES + exchanges
    return _rank(kind, ranks, held, training, sent, exchange=exchange, exchanges=exchanges)


def _rank(
    kind: str,
    ranks: int,
    parameters: int,
    training: Training,
    sent: float,
    gathered: int | None = 0,
    exchange: int = 0,
    exchanges: int = 0,
) -> Rank:
    return Rank(
        kind=kind,
        ranks=ranks,
        weights=STATE_BYTES.weights * parameters,
        gradients=STATE_BYTES.gradients * parameters,
        optimizer=STATE_BYTES.optimizer * parameters,
        activations=training.activations,
        gathered=gathered,
        sent=round(sent),
        all_to_all_per_layer=exchange,
        all_to_all=exchanges,
    )


def _layers(cfg: NetworkConfig | None) -> list[LayerSpec]:
    """Of all stacks; none where the settings are not known."""
    return [] if cfg is None else [layer for stack in cfg.stacks() for layer in stack.layers]
