"""A model over several ranks: experts split, all else sharded, by torch's FSDP2.

Two meshes lie over the same ranks: one for what is no expert, one for the experts. FSDP2 gathers a
block's weights before it computes and sums its gradients after. It never averages: the loss is a
sum over the whole step, so the gradients of the ranks add up to its gradient.

The model is spread while it has no memory, so a rank never holds more than its own rows, and one
module's while weights are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moestro.checkpoints.families.slices import TensorSlice
from moestro.checkpoints.reading import open_unread
from moestro.checkpoints.tensor_files import Source
from moestro.config import EncDecConfig, Layout, ModelConfig
from moestro.models.blocks import Block
from moestro.models.build import Model, build_model
from moestro.models.materialize import without_memory
from moestro.moe.experts import Experts
from moestro.moe.parallel import ParallelExperts


class Place(NamedTuple):
    """Which rows of a parameter this rank holds.

    Attributes:
        first: number of the first.
        total: rows of the whole parameter.
        copies: ranks that hold these same rows.
        saves: whether this rank is the one of them that saves.
    """

    first: int
    total: int
    copies: int
    saves: bool


class Runs(NamedTuple):
    """Where a model lies, the dtype of its parameters, and the longest wait for another rank."""

    device: torch.device
    dtype: torch.dtype
    timeout_s: int


def local(x: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, not copied; without gradients."""
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def build(
    cfg: ModelConfig | EncDecConfig,
    backend: str,
    checkpoint: Path | None,
    layout: Layout,
    runs: Runs,
) -> Model:
    """The model with this rank's rows: those of a checkpoint, or drawn by torch's global seed.

    Called by all ranks together, with a layout that splits.
    """
    unread = None if checkpoint is None else open_unread(checkpoint, backend)
    if unread is not None:
        model = unread.model
    else:
        with without_memory():
            model = build_model(cfg, backend)
    spread(model.to(runs.dtype), layout, runs)
    if unread is None:
        draw(model)
    else:
        load(model, unread.sources, layout)
    return model


def spread(model: Model, layout: Layout, runs: Runs) -> None:
    """Split and shard a model that has no memory yet; then give it memory for this rank's rows.

    Called by all ranks together, with a layout that splits.
    """
    dense = _mesh(runs, ("replicate", "shard"), layout.replicas, layout.shard)
    if layout.expert > 1:
        sizes = (layout.expert_replicas, layout.expert_shard, layout.expert)
        sparse = _mesh(runs, ("replicate", "shard", "expert"), *sizes)
        for mixture in model.mixtures():
            assert isinstance(mixture.experts, Experts)
            mixture.experts = ParallelExperts(mixture.experts, sparse.get_group("expert"))
            fully_shard(mixture.experts, mesh=_sharding(sparse))
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=_sharding(dense))
    fully_shard(model, mesh=_sharding(dense), reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=runs.device)


def draw(model: Model) -> None:
    """Fill a spread model with the weights that `new_model` draws from the same seed.

    Every rank draws all numbers, and keeps its own.
    """
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is None or module is model:
            continue
        with torch.no_grad(), _on_cpu(module):
            reset()


def load(model: Model, sources: Sequence[tuple[TensorSlice, Source]], layout: Layout) -> None:
    """Fill a spread model from a checkpoint in our own layout: each rank reads its own rows.

    Raises:
        CheckpointError: a file cannot be read.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    places = places_of(model, layout)
    for tensor_slice, source in sources:
        name = tensor_slice.ours
        if name in buffers:
            source.load_into(buffers[name])
        else:
            load_rows(local(parameters[name]), places[name], source)


def load_rows(mine: Tensor, place: Place, source: Source) -> None:
    """Fill this rank's rows."""
    if mine.numel():
        source.part(place.first, place.first + len(mine)).load_into(mine)


def places_of(model: nn.Module, layout: Layout, rank: int = 0) -> dict[str, Place]:
    """Where each parameter's rows of this rank lie, by name; all of them where it is not spread."""
    found = {}
    for prefix, module in model.named_modules():
        split = module if isinstance(module, ParallelExperts) else None
        for name, parameter in module.named_parameters(prefix, recurse=False):
            found[name] = _place(parameter, split, layout, rank)
    return found


def _place(parameter: Tensor, split: ParallelExperts | None, layout: Layout, rank: int) -> Place:
    if not isinstance(parameter, DTensor):
        return Place(0, len(parameter), layout.ranks, rank == 0)
    mesh, rows = parameter.device_mesh, len(parameter)
    shards = mesh.size(-1)
    first = _first(parameter)
    saves = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
    if split is None:
        return Place(first, rows, layout.ranks // shards, saves)
    copies = layout.ranks // (shards * layout.expert)
    return Place(split.first + first, split.num_experts, copies, saves)


def _first(parameter: Tensor) -> int:
    """Number of a rank's first row of what FSDP2 shards: pieces of equal size, the last smaller."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, rows = parameter.device_mesh, len(parameter)
    return min(rows, mesh.get_local_rank(mesh.ndim - 1) * -(-rows // mesh.size(-1)))


def square(gradients: Mapping[str, Tensor], places: Mapping[str, Place]) -> Tensor:
    """This rank's part of the squared norm of all gradients, which the ranks' parts add up to.

    torch's own norm refuses gradients of several meshes.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for name, gradient in gradients.items():
        by_copies.setdefault(places[name].copies, []).append(local(gradient))
    norms = [
        nn.utils.get_total_norm(mine).double().square() / copies
        for copies, mine in by_copies.items()
    ]
    return torch.stack(norms).sum()


def scale(gradients: Iterable[Tensor], factor: float) -> None:
    """Multiply gradients in place."""
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)


@contextmanager
def synced(model: nn.Module, last: bool) -> Iterator[None]:
    """Sums over replicas travel with a step's last micro-batch only.

    Sums over shards travel with each, or a rank would hold the gradients of whole weights.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_all_reduce(last)
    model.set_is_last_backward(last)
    yield


def _mesh(runs: Runs, names: tuple[str, ...], *sizes: int) -> DeviceMesh:
    """All ranks as a grid; `init_device_mesh` would give its groups torch's timeout, not ours."""
    grid, timeout = torch.arange(math.prod(sizes)).view(sizes), timedelta(seconds=runs.timeout_s)
    groups = []
    for dim, size in enumerate(sizes):
        lines = grid.movedim(dim, -1).reshape(-1, size).tolist()
        group = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
            lines, timeout=timeout
        )[0]
        groups.append(group)
    return DeviceMesh.from_group(groups, runs.device.type, mesh=grid, mesh_dim_names=names)


def _sharding(mesh: DeviceMesh) -> DeviceMesh:
    """The axes that FSDP2 gets: without copies no axis of copies."""
    return mesh["shard"] if mesh["replicate"].size() == 1 else mesh["replicate", "shard"]


@contextmanager
def _on_cpu(module: nn.Module) -> Iterator[None]:
    """Give a spread module plain fp32 parameters of its own to draw; keep its rows of them."""
    spread_ = dict(module.named_parameters(recurse=False))
    experts = module if isinstance(module, ParallelExperts) else None
    share = experts.first if experts is not None else 0
    for name, parameter in spread_.items():
        rows = local(parameter) if experts is not None else parameter
        drawn = torch.empty(rows.shape, dtype=torch.float32, device="cpu")
        module._parameters[name] = nn.Parameter(drawn)
    if experts is not None:
        experts.first += _first(next(iter(spread_.values())))
    try:
        yield
    finally:
        for name, parameter in spread_.items():
            mine, drawn = local(parameter), getattr(module, name).detach()
            first = 0 if experts is not None else _first(parameter)
            mine.copy_(drawn[first : first + len(mine)])
            module._parameters[name] = parameter
        if experts is not None:
            experts.first = share
