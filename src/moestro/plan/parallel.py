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
from moestro.plan.memory import Training, state_bytes

# All of the model on each; parameters, gradients and moments fully sharded; experts split, all else
# as with "data".
KINDS = ("data", "fsdp", "expert")
GRADIENT_BYTES = 4


class Rank(NamedTuple):
    """One of `ranks` processes that train together; bytes, of the fullest rank."""

    kind: str  # one of `KINDS`
    ranks: int
    weights: int
    gradients: int
    optimizer: int
    activations: int | None  # of its own sequences; None where the settings are not known
    # The layer whose weights are gathered to compute with (fsdp); None where the number of layers
    # is not known.
    gathered: int | None
    sent: int  # in a step
    all_to_all_per_layer: int  # of one mixture layer's rows: there and back, forward and backward
    all_to_all: int  # of all mixture layers; part of `sent`

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
    share, layers, total = (ranks - 1) / ranks, _layers(cfg), counted.total
    gathered: int | None = 0
    exchange = exchanges = 0
    if kind == "data":
        held, sent = total, 2 * share * total * GRADIENT_BYTES
    elif kind == "fsdp":
        # Gathered in the forward and again in the backward, then the gradients scattered.
        held, sent = math.ceil(total / ranks), share * total * (2 * number + GRADIENT_BYTES)
        body = total - counted.input_embedding - counted.output_embedding
        gathered = number * math.ceil(body / len(layers)) if layers else None
    elif cfg is None or cfg.moe is None:
        return None
    elif ranks > cfg.moe.num_experts:
        raise ConfigError(
            f"expert parallelism over {ranks} ranks needs as many experts, and a layer has "
            f"{cfg.moe.num_experts}; lower --ranks to {cfg.moe.num_experts}, or choose --parallel "
            "fsdp"
        )
    else:
        experts, everywhere = cfg.moe.num_experts, total - counted.expert
        held = everywhere + counted.expert // experts * math.ceil(experts / ranks)
        exchange = round(4 * tokens * cfg.moe.top_k * cfg.dim * number * share)
        exchanges = exchange * sum(layer.mixture for layer in layers)
        sent = 2 * share * everywhere * GRADIENT_BYTES + exchanges
    return Rank(
        kind,
        ranks,
        **state_bytes(held),
        activations=training.activations,
        gathered=gathered,
        sent=round(sent),
        all_to_all_per_layer=exchange,
        all_to_all=exchanges,
    )


def _layers(cfg: NetworkConfig | None) -> list[LayerSpec]:
    """Of all stacks; none where the settings are not known."""
    return [] if cfg is None else [layer for stack in cfg.stacks() for layer in stack.layers]
