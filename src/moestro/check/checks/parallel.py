"""Checks of several processes: data parallel and fully sharded training give what one process does.

Each rank takes its share of the batch, and gradients are averages over ranks: times their number
they are the whole batch's. Skipped where no process group with several ranks is initialised.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moestro.check.checks.check import Check
from moestro.check.compare import difference
from moestro.check.report import Finding, skipped
from moestro.check.trial import Trial


def replicated(trial: Trial) -> Finding:
    """DistributedDataParallel."""
    return _compared(trial, DistributedDataParallel, idle=False)


def sharded(trial: Trial) -> Finding:
    """FSDP2's fully_shard, and the norm of its gradients."""
    return _compared(trial, _fully_sharded, idle=False)


def idle(trial: Trial) -> Finding:
    """DistributedDataParallel, where all ranks but the first have no token."""
    return _compared(trial, DistributedDataParallel, idle=True)


def _compared(trial: Trial, wrap: Callable[[nn.Module], nn.Module], *, idle: bool) -> Finding:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return skipped("needs several processes: torchrun --nproc-per-node 2 -m moestro check …")
    if trial.subject.drops:
        return skipped("with a capacity, tokens depend on each other")
    rank, world = dist.get_rank(), dist.get_world_size()
    x_TD, up_TD = trial.x.flatten(0, 1), trial.up.flatten(0, 1)
    share = slice(rank, None, world)
    if idle:
        share = slice(None) if rank == 0 else slice(0, 0)
    module = wrap(trial.subject.copied())
    y = trial.subject.run(module, x_TD[share][None].float(), None).y
    torch.autograd.backward(y, up_TD[share][None].float())
    found, squares = [], 0.0
    for name, each in module.named_parameters():
        name = name.removeprefix("module.")
        exact = trial.expected.grads.get(name)
        if exact is not None:
            got = _whole(each.grad)
            got = None if got is None else got * world
            squares += 0.0 if got is None else float(got.double().square().sum())
            floor = 0.1 * float(trial.exact.y.norm())
            found.append(difference(f"the gradient of {name}", got, exact, floor))
    total = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    norm = _whole(total)
    assert norm is not None
    exact_norm = trial.x.new_tensor(math.sqrt(squares))
    found.append(difference("the norm of all gradients", norm * world, exact_norm))
    return trial.verdict(found)


def _fully_sharded(module: nn.Module) -> nn.Module:
    fully_shard(module)  # in place
    return module


def _whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


CHECKS = (
    Check("data-parallel", "Ranks that share a batch (DDP) get the whole batch's gradients.",
          "gradients doubled or divided twice (pytorch#160285, Megatron-LM#7452)", replicated),
    Check("sharded", "Fully sharded parameters (FSDP2) get the whole batch's gradients and norm.",
          "norms that omit experts (Megatron-LM#5916, torchtitan#649)", sharded),
    Check("idle-rank", "A rank without tokens takes part: nothing hangs, gradients are right.",
          "a rank without tokens that hangs (DeepSpeed#4808, Megatron-LM#4851)", idle),
)  # fmt: skip
