"""What each rank holds and sends in a training step that several share.

Collectives are counted as rings and direct exchanges send: of N ranks each sends (N - 1) / N of a
tensor to gather or to scatter it, twice that to reduce it to all. Gradients travel in fp32,
gathered weights and routed rows in the dtype that is computed in.

Letters: N ranks, K experts per token, T tokens of one rank, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moestro.config import LayerSpec, Layout, MoEConfig, NetworkConfig
from moestro.errors import ConfigError
from moestro.models.count import Count
from moestro.plan.memory import Training, state_bytes

# All of the model on each; parameters, gradients and moments fully sharded; experts split, all else
# as with "data".
KINDS = ("data", "fsdp", "expert")
SPREAD = "spread"  # as `moestro train` with parallel: see `spread`
GRADIENT_BYTES = 4


class Rank(NamedTuple):
    """One of `ranks` processes that train together; bytes, of the fullest rank."""

    kind: str  # one of `KINDS`, or `SPREAD`
    ranks: int
    weights: int
    gradients: int
    optimizer: int
    # Of its own sequences in a micro-batch; None where the settings are not known.
    activations: int | None
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

    @property
    def saved(self) -> int:
        """What it writes of a checkpoint: a copy in host memory while saved in the background."""
        return self.weights + self.optimizer


class Step(NamedTuple):
    """How a step of `moestro train` goes.

    Attributes:
        micro_batches: of each rank. Each gathers, scatters and exchanges rows.
        recomputes: whether activations are recomputed (`train.runtime.checkpoint_activations`):
            rows then travel again; weights are gathered for the backward in any case.
    """

    micro_batches: int = 1
    recomputes: bool = False


PLAIN = Step()


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


def spread(
    cfg: NetworkConfig,
    counted: Count,
    training: Training,
    layout: Layout,
    tokens: int,
    number: int,
    step: Step = PLAIN,
) -> Rank:
    """One rank of a step of `moestro train`: experts split, all else sharded, both on their meshes.

    Weights are gathered in fp32, in the forward and again in the backward, and gradients scattered;
    what has copies is then summed over them, once a step. A gathered layer counts its weights and
    their gradients.

    Args:
        cfg: the model.
        counted: its count.
        training: its step on one device.
        layout: that fits the model.
        tokens: T, of each rank, in each micro-batch.
        number: bytes of one number of a row.
        step: how a step goes.
    """
    dense, layers = counted.total - counted.expert, _layers(cfg)
    share = counted.expert // layout.expert  # of each group's rank, before it is sharded
    held = math.ceil(dense / layout.shard) + math.ceil(share / layout.expert_shard)
    sent = _collectives(dense, layout.shard, layout.replicas, step.micro_batches)
    sent += _collectives(share, layout.expert_shard, layout.expert_replicas, step.micro_batches)
    mixtures = sum(layer.mixture for layer in layers)
    body = dense - counted.input_embedding - counted.output_embedding
    gathered = math.ceil(body / len(layers)) if layout.shard > 1 else 0
    if layout.expert_shard > 1:
        gathered += math.ceil(share / max(1, mixtures))
    exchange, times = 0, mixtures * step.micro_batches
    if cfg.moe is not None:
        away, forwards = (layout.expert - 1) / layout.expert, 2 if step.recomputes else 1
        trips = 2 * forwards + 2  # there and back, in each forward and in the backward
        exchange = round(trips * tokens * cfg.moe.top_k * cfg.dim * number * away)
        sent += forwards * times * _assignments(cfg.moe, layout.ranks, tokens)
    return Rank(
        SPREAD,
        layout.ranks,
        **state_bytes(held),
        activations=training.checkpointed if step.recomputes else training.activations,
        gathered=2 * GRADIENT_BYTES * gathered,
        sent=round(sent) + exchange * times,
        all_to_all_per_layer=exchange,
        all_to_all=exchange * times,
    )


def _collectives(parameters: int, shards: int, copies: int, times: int) -> float:
    """Bytes that a rank sends: two gathers and a scatter over shards, then a sum over copies."""
    sharded = times * 3 * (shards - 1) / shards * parameters
    return GRADIENT_BYTES * (sharded + 2 * (copies - 1) / copies * parameters / shards)


def _assignments(cfg: MoEConfig, ranks: int, tokens: int) -> int:
    """Bytes that a rank sends in one forward of a layer whose capacity is of all ranks' tokens.

    The number of tokens in 8 bytes, the validity of each in 1, of each assignment its expert in 4,
    and its weight in 4 where that decides.
    """
    if cfg.capacity is None or cfg.capacity.scope != "global":
        return 0
    each = 8 if cfg.capacity.priority == "router" else 4
    return (ranks - 1) * (8 + tokens * (1 + each * cfg.top_k))


def _layers(cfg: NetworkConfig | None) -> list[LayerSpec]:
    """Of all stacks; none where the settings are not known."""
    return [] if cfg is None else [layer for stack in cfg.stacks() for layer in stack.layers]
