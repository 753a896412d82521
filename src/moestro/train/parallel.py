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
from torch.distributed.tensor import DTensor, Shard

from moestro.checkpoints.families.slices import TensorSlice
from moestro.checkpoints.pieces import load_block
from moestro.checkpoints.reading import open_unread
from moestro.checkpoints.tensor_files import Source
from moestro.config import EncDecConfig, Layout, ModelConfig
from moestro.models.blocks import Block
from moestro.models.build import Model, build_model
from moestro.models.materialize import without_memory
from moestro.moe.experts import Experts
from moestro.moe.parallel import ParallelExperts


class Place(NamedTuple):
    """Which block of a parameter this rank holds.

    Attributes:
        first: where it begins, on the first axis and the second.
        shape: of the whole parameter.
        copies: ranks that hold this same block.
        saves: whether this rank is the one of them that saves.
    """

    first: tuple[int, int]
    shape: tuple[int, ...]
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
            _shard(mixture.experts, sparse)
    for module in model.modules():
        if isinstance(module, Block):
            if module.cross is not None:  # the network calls it before the block's forward
                _shard(module.cross.kv, dense)
            _shard(module, dense)
    _shard(model, dense)
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
    """Fill a spread model from a checkpoint in our own layout: each rank reads its own blocks.

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
            load_block(source, places[name].first, local(parameters[name]))


def places_of(model: nn.Module, layout: Layout, rank: int = 0) -> dict[str, Place]:
    """Which block of each parameter is here, by name; all of it where the model is not spread."""
    found = {}
    for prefix, module in model.named_modules():
        split = module if isinstance(module, ParallelExperts) else None
        for name, parameter in module.named_parameters(prefix, recurse=False):
            found[name] = _place(parameter, split, layout, rank)
    return found


def _place(parameter: Tensor, split: ParallelExperts | None, layout: Layout, rank: int) -> Place:
    shape, first = list(parameter.shape), [0, 0]
    if not isinstance(parameter, DTensor):
        return Place((0, 0), tuple(shape), layout.ranks, rank == 0)
    mesh, axis = parameter.device_mesh, _axis(parameter)
    first[axis] = _start(parameter)
    saves = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
    copies = layout.ranks // mesh.size(-1)
    if split is not None:
        first[0] += split.first
        shape[0], copies = split.num_experts, copies // layout.expert
    return Place((first[0], first[1]), tuple(shape), copies, saves)


def _axis(parameter: DTensor) -> int:
    """The axis that FSDP2 shards it along."""
    placement = parameter.placements[-1]
    assert isinstance(placement, Shard)
    return placement.dim


def _start(parameter: DTensor) -> int:
    """Where a rank's part begins on that axis: parts are of equal size, the last smaller."""
    mesh, size = parameter.device_mesh, parameter.shape[_axis(parameter)]
    return min(size, mesh.get_local_rank(mesh.ndim - 1) * -(-size // mesh.size(-1)))


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
    grid = torch.arange(math.prod(sizes), device="cpu").view(sizes)
    timeout = timedelta(seconds=runs.timeout_s)
    groups = []
    for dim, size in enumerate(sizes):
        lines = grid.movedim(dim, -1).reshape(-1, size).tolist()
        group = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
            lines, timeout=timeout
        )[0]
        groups.append(group)
    return DeviceMesh.from_group(groups, runs.device.type, mesh=grid, mesh_dim_names=names)


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """By FSDP2; along the second axis what does not split evenly along the first, as one expert."""
    shards = mesh["shard"].size()

    def axis(parameter: nn.Parameter) -> Shard:
        second = parameter.dim() > 1 and parameter.shape[1] % shards == 0
        return Shard(1 if second and len(parameter) % shards else 0)

    with_copies = mesh["replicate"].size() > 1  # else FSDP2 gets no axis of copies
    fully_shard(
        module,
        mesh=mesh["replicate", "shard"] if with_copies else mesh["shard"],
        reshard_after_forward=True,
        shard_placement_fn=axis,
    )


@contextmanager
def _on_cpu(module: nn.Module) -> Iterator[None]:
    """Give a module plain fp32 parameters of its own to draw; keep this rank's part of them."""
    spread_over = dict(module.named_parameters(recurse=False))
    for name, parameter in spread_over.items():
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        module._parameters[name] = nn.Parameter(drawn)
    try:
        yield
    finally:
        for name, parameter in spread_over.items():
            assert isinstance(parameter, DTensor)
            mine, axis = local(parameter), _axis(parameter)
            drawn = getattr(module, name).detach()
            mine.copy_(drawn.narrow(axis, _start(parameter), mine.shape[axis]))
            module._parameters[name] = parameter
