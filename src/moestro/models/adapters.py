"""Where a decoder takes adapters, and how they are attached, merged and taken off.

The embedding, the head, norms, a shared expert's gate, DeltaNet layers, short convolutions, latent
attention's `kv_up` and the indexer of sparse attention take none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moestro.config import LoraConfig
from moestro.errors import ConfigError
from moestro.kernels.reference import GATED
from moestro.models.attention import Attention
from moestro.models.decoder import Decoder
from moestro.models.latent import LatentAttention
from moestro.moe.layer import MoE
from moestro.moe.lora import Adapter
from moestro.moe.packed import Packed

AnyModule = TypeVar("AnyModule", bound=nn.Module)
_LATENT = ("q", "q_down", "q_up", "kv_down", "out")


class Place(NamedTuple):
    """A weight that takes an adapter.

    Attributes:
        owner: the module that has it.
        name: of the weight there; in the model it is `path`.
        kind: attention, router, experts or dense.
        shape: [E, O, I], E = 1 where it is a matrix.
        rows: of its parts.
    """

    owner: nn.Module
    name: str
    path: str
    kind: str
    shape: tuple[int, int, int]
    rows: tuple[int, ...]

    def attach(
        self, rows: tuple[int, ...], rank: int, scale: float, dropout: float = 0.0
    ) -> Adapter:
        """Put a new adapter there, on the weight's device; on the CPU, where that has no memory."""
        experts, _, inputs = self.shape
        adapter = Adapter(experts, rows, inputs, rank, scale, dropout)
        weight = getattr(self.owner, self.name, None)  # packed ones are on the CPU
        if isinstance(weight, Tensor) and not weight.is_meta:
            adapter.to(weight.device)
        setattr(self.owner, f"{self.name}_adapter", adapter)
        return adapter

    @property
    def adapter(self) -> Adapter | None:
        """What is there."""
        found: Adapter | None = getattr(self.owner, f"{self.name}_adapter")
        return found


def places(model: nn.Module) -> list[Place]:
    """Every weight of a decoder that takes an adapter, first layer first.

    Raises:
        ConfigError: it is no decoder.
    """
    if not isinstance(model, Decoder):
        raise ConfigError(f"only decoders take adapters, not {type(model).__name__}")
    return [
        place
        for number, block in enumerate(model.blocks)
        for place in _of_block(block, f"blocks.{number}.")
    ]


def _of_block(block: Any, path: str) -> Iterator[Place]:
    attention, ffn = block.attention, block.ffn
    if isinstance(attention, Attention):
        width, at = attention.head_dim, f"{path}attention."
        queries = attention.num_heads * width * (1 + attention.gated)
        narrow = attention.num_kv_heads * width
        yield _matrix(attention.qkv, f"{at}qkv", "attention", (queries, narrow, narrow))
        yield _matrix(attention.out, f"{at}out", "attention")
    elif isinstance(attention, LatentAttention):
        for name in _LATENT:
            if hasattr(attention, name):
                yield _matrix(getattr(attention, name), f"{path}attention.{name}", "attention")
    if not isinstance(ffn, MoE):
        yield from _stack(ffn, f"{path}ffn", "dense")
        return
    if hasattr(ffn.router, "weight"):  # hashing has none
        yield _matrix(ffn.router, f"{path}ffn.router", "router")
    yield from _stack(ffn.experts, f"{path}ffn.experts", "experts")
    if ffn.shared is not None:
        yield from _stack(ffn.shared, f"{path}ffn.shared", "dense")


def _matrix(owner: Any, path: str, kind: str, rows: tuple[int, ...] | None = None) -> Place:
    if isinstance(owner, Packed):
        outputs, inputs = owner.weights.rows, owner.weights.columns
    else:
        outputs, inputs = owner.weight.shape
    return Place(owner, "weight", f"{path}.weight", kind, (1, outputs, inputs), rows or (outputs,))


def _stack(owner: Any, path: str, kind: str) -> Iterator[Place]:
    """Both weights of E networks; gate and up are one matrix of experts, two of a dense network."""
    sizes = owner.weights if isinstance(owner, Packed) else owner
    activation = sizes.activation
    if isinstance(owner, Packed):
        experts, dim, hidden = sizes.num_experts, sizes.dim, sizes.hidden_dim
    else:
        experts, dim, hidden = owner.down.shape
    width = 2 * hidden if activation in GATED else hidden
    rows = (width,) if kind == "experts" or width == hidden else (hidden, hidden)
    yield Place(owner, "gate_up", f"{path}.gate_up", kind, (experts, width, dim), rows)
    yield Place(owner, "down", f"{path}.down", kind, (experts, dim, hidden), (dim,))


def attach(model: nn.Module, cfg: LoraConfig) -> None:
    """Freeze a model, and put new adapters where `cfg` says.

    Raises:
        ConfigError: there is no such place in the model.
    """
    freeze(model)
    found = [place for place in places(model) if place.kind in cfg.targets]
    if not found:
        raise ConfigError(f"lora.targets = {list(cfg.targets)}: the model has nothing of the kind")
    for place in found:
        place.attach(place.rows, cfg.rank, cfg.scale, cfg.dropout)


def shared(model: AnyModule) -> AnyModule:
    """The same model in modules of its own: both have the same tensors, each its own adapters."""
    memo: dict[int, Any] = {id(each): each for each in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, Packed):
            memo[id(module.weights)] = module.weights
    return copy.deepcopy(model, memo)


def freeze(model: nn.Module) -> None:
    """No gradients for the weights; those of packed ones flow through to what comes before."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Packed):
            module.passes_gradients = True


def attached(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by the path of their weight."""
    return {place.path: place.adapter for place in places(model) if place.adapter is not None}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add what the adapters add to the weights, in fp32 at least, and take them off.

    Raises:
        ConfigError: a weight is packed.
    """
    for place in places(model):
        adapter = place.adapter
        if adapter is None:
            continue
        if isinstance(place.owner, Packed):
            raise ConfigError(
                "adapters cannot be merged into packed weights; merge them into the plain ones "
                "and pack the result"
            )
        weight = getattr(place.owner, place.name)
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = adapter.to(wide).delta().view(weight.shape)
        weight.copy_(weight.to(wide) + delta)
        setattr(place.owner, f"{place.name}_adapter", None)


def tensors(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """The adapters' parameters by their names in the model."""
    return ((name, each) for name, each in model.named_parameters() if "_adapter." in name)
