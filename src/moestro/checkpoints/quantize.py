"""Packing a model: bf16, int8 and int4 modules in the place of its matrices, one after another.

Attention's projections, dense networks, experts, shared experts and the head are packed.
Embeddings, norms, routers and gates stay as they are; so does latent attention's `kv_up`, by parts
of which decoding multiplies in both directions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moestro.checkpoints.reading import open_unread
from moestro.checkpoints.transfer import Progress, load_tensors
from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import ConfigError, MoestroError, ShapeError
from moestro.kernels import native_cpu, packing
from moestro.kernels.packing import Format
from moestro.models.build import Model, build_model
from moestro.models.latent import LatentAttention
from moestro.models.linear import PackedLinear
from moestro.models.materialize import materialize, without_memory
from moestro.moe.experts import FeedForward, StackedWeights
from moestro.moe.layer import MoE
from moestro.moe.packed import Packed, PackedExperts, PackedFeedForward, PackedWeights

WEIGHTS = {
    "fp32": Format("float32"),
    "bf16": Format("bfloat16"),
    "int8": Format("int8", 32),
    "int8-64": Format("int8", 64),
    "int4": Format("int4", 32),
    "int4-64": Format("int4", 64),
}
AS_IS = "as-is"
_KEPT = ((LatentAttention, "kv_up"), (MoE, "shared_gate"))


class Place(NamedTuple):
    """A module that can be packed: its full name, its parent, its name there, and itself."""

    path: str
    parent: nn.Module
    name: str
    module: nn.Module


def format_of(name: str) -> Format | None:
    """The format that --weights names; None: weights stay as they are.

    Raises:
        ConfigError: none has this name.
    """
    if name == AS_IS:
        return None
    if name not in WEIGHTS:
        raise ConfigError(f"weights {name!r} are none of {', '.join((*WEIGHTS, AS_IS))}")
    return WEIGHTS[name]


def places(model: nn.Module) -> list[Place]:
    """The modules of a model that packing replaces, in the model's order."""
    return list(_places(model))


def _places(model: nn.Module) -> Iterator[Place]:
    for path, parent in model.named_modules():
        for name, module in parent.named_children():
            kept = any(isinstance(parent, kind) and name == own for kind, own in _KEPT)
            if isinstance(module, nn.Linear | StackedWeights) and not kept:
                yield Place(f"{path}.{name}" if path else name, parent, name, module)


def is_packed(model: nn.Module) -> bool:
    """Whether any part of the model is packed."""
    return any(isinstance(module, Packed) for module in model.modules())


def pack(model: Model, format: Format) -> None:
    """Pack a model in place; what is packed gives its memory back at once.

    It is then for inference only: no parameter of it takes gradients any more.

    Args:
        model: on CPU, in evaluation mode; changed in place.
        format: of all packed weights.

    Raises:
        MoestroError: the model is in training mode, on another device, or packed already.
        ShapeError: weights hold NaN or infinity, or what the format cannot express.
        BackendError: there is no native library; says why.
    """
    if model.training:
        raise MoestroError("the model is in training mode; call model.eval() before packing")
    if is_packed(model):
        raise MoestroError("the model is packed already; open it again to pack it otherwise")
    device = model.embed.weight.device
    if device.type != "cpu":
        raise MoestroError(f"packed weights compute on CPU; the model is on {device}")
    native_cpu.library()
    for place in places(model):
        setattr(place.parent, place.name, packed(place, format))
    model.requires_grad_(False)


def packed(place: Place, format: Format) -> Packed:
    """The packed copy of one module.

    Raises:
        ShapeError: see `pack`; names the module.
    """
    try:
        if isinstance(place.module, nn.Linear):
            return _packed_linear(place.module, format)
        assert isinstance(place.module, StackedWeights)
        return _packed_experts(place.module, format)
    except ShapeError as error:
        raise ShapeError(f"{place.path}: {error}") from None


def read_packed(
    folder: Path,
    format: Format,
    progress: Progress | None = None,
    accept_fields: Collection[str] = (),
) -> Model:
    """Load a checkpoint straight into packed form, module by module.

    Memory peaks at the packed model and one module.

    Args:
        folder: from `moestro.checkpoints.hub.find_checkpoint`.
        format: of all packed weights.
        progress: called with (bytes read so far, bytes in all).
        accept_fields: see `reading.read_settings`.

    Raises:
        CheckpointError, ConfigError: see `reading.open_unread`.
        ShapeError, BackendError: see `pack`.
    """
    native_cpu.library()
    unread = open_unread(folder, accept_fields=accept_fields)
    model, dtype = unread.model, unread.dtype
    total, done = unread.bytes, 0

    def fill(names: set[str]) -> None:
        nonlocal done
        part, before = unread.part(names), done
        load_tensors(part, progress and (lambda now, _: progress(before + now, total)))
        done += part.bytes

    alone = [place for place in places(model) if not _tied(model, place)]
    names = set(model.state_dict())
    made = []
    for place in alone:
        materialize(place.module, dtype, "cpu")
        own = {f"{place.path}.{name}" for name, _ in place.module.named_parameters()}
        fill(own)
        names -= own
        made.append(packed(place, format))
        place.module.to_empty(device="meta")
    materialize(model, dtype, "cpu", without={place.module for place in alone})
    fill(names)
    return _finish(model, alone, made, format)


def random_model(cfg: ModelConfig | EncDecConfig, format: Format | None) -> Model:
    """A model of random weights, for measuring; straight in packed form, or plain bf16.

    Every matrix is uniform with variance 1 / fan-in, so that activations stay of order one.

    Args:
        cfg: its settings.
        format: of the packed weights; None: plain.

    Raises:
        BackendError: there is no native library to pack with; says why.
    """
    with without_memory():
        model = build_model(cfg)
    if format is None:
        materialize(model, torch.bfloat16, "cpu")
        for name, module in model.named_modules():
            _draw(module, norm="norm" in name.rpartition(".")[2])
        return model.requires_grad_(False).eval()
    native_cpu.library()
    alone = [place for place in places(model) if not _tied(model, place)]
    made = []
    for place in alone:
        materialize(place.module, torch.bfloat16, "cpu")
        _draw(place.module)
        made.append(packed(place, format))
        place.module.to_empty(device="meta")
    materialize(model, torch.bfloat16, "cpu", without={place.module for place in alone})
    for name, module in model.named_modules():
        if all(place.module is not module for place in alone):
            _draw(module, norm="norm" in name.rpartition(".")[2])
    return _finish(model, alone, made, format)


@torch.no_grad()
def _draw(module: nn.Module, norm: bool = False) -> None:
    """Random numbers for a module's own tensors; gains are one, biases zero."""
    for weight in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if weight.dim() > 1:
            bound = (3 / weight.shape[-1]) ** 0.5
            weight.uniform_(-bound, bound)
        else:
            weight.fill_(1.0 if norm else 0.0)


def _tied(model: Model, place: Place) -> bool:
    return place.path == "head" and model.cfg.head.tied


def _finish(model: Model, alone: list[Place], made: list[Packed], format: Format) -> Model:
    """Put packed modules in their places, and pack what is left: a tied head."""
    left = [place for place in places(model) if _tied(model, place)]
    for place, module in zip(alone, made, strict=True):
        setattr(place.parent, place.name, module)
    for place in left:
        setattr(place.parent, place.name, packed(place, format))
    model.requires_grad_(False)
    return model.eval()


def _packed_linear(linear: nn.Linear, format: Format) -> PackedLinear:
    bias_O = None if linear.bias is None else linear.bias.detach().float().clone()
    return PackedLinear(native_cpu.pack_matrix(_packable(linear.weight), format), bias_O)


def _packed_experts(experts: StackedWeights, format: Format) -> PackedWeights:
    num_experts, dim, hidden_dim = experts.down.shape
    activation = experts.activation
    size = native_cpu.slab_bytes(dim, hidden_dim, activation, format)
    data = native_cpu.aligned(num_experts * size)

    def one(expert: int) -> None:
        up_HD, down_DF = _packable(experts.gate_up[expert]), _packable(experts.down[expert])
        slab = data[expert * size : (expert + 1) * size]
        native_cpu.pack_expert(up_HD, down_DF, activation, format, slab)

    with ThreadPoolExecutor(torch.get_num_threads()) as packers:
        list(packers.map(one, range(num_experts)))
    biases = tuple(each.detach().float().clone() for each in experts.biases or ()) or (None, None)
    weights = packing.PackedExperts(data, num_experts, dim, hidden_dim, activation, format, *biases)
    return (PackedFeedForward if isinstance(experts, FeedForward) else PackedExperts)(weights)


def _packable(weight: Tensor) -> Tensor:
    """fp16 and fp64 go through fp32."""
    weight = weight.detach()
    return weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.float()
