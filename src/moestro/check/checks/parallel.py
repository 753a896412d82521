"""Checks of several processes: data, fully sharded and expert parallel training give what one does.

Each rank takes its share of the batch. DDP's and FSDP2's gradients are averages over ranks: times
their number they are the whole batch's. Skipped where no group of several ranks is initialised.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moestro.check.checks.check import Check
from moestro.check.compare import difference
from moestro.check.report import Finding, skipped, wrong
from moestro.check.subject import Run
from moestro.check.trial import Result, Trial
from moestro.errors import MoestroError


def replicated(trial: Trial) -> Finding:
    """DistributedDataParallel."""
    return _compared(trial, DistributedDataParallel, idle=False)


def sharded(trial: Trial) -> Finding:
    """FSDP2's fully_shard, and the norm of its gradients."""
    return _compared(trial, _fully_sharded, idle=False)


def idle(trial: Trial) -> Finding:
    """DistributedDataParallel, where all ranks but the first have no token."""
    return _compared(trial, DistributedDataParallel, idle=True)


def no_sync(trial: Trial) -> Finding:
    """Two micro-batches under DDP, gradients reduced after the second only: both are in the sum."""
    alone = _alone(trial)
    if alone is not None:
        return alone
    world = dist.get_world_size()
    x_TD, up_TD = (each.flatten(0, 1)[_share(False)] for each in (trial.x, trial.up))
    inner = _Calling(trial.subject.copied(), lambda m, x: trial.subject.run(m, x, None).y)
    module, half = DistributedDataParallel(inner), len(x_TD) // 2
    for part, context in ((slice(None, half), module.no_sync), (slice(half, None), nullcontext)):
        with context():
            y = module(x_TD[part][None].float())
            torch.autograd.backward(y, up_TD[part][None].float())
    floor = 0.1 * float(trial.exact.y.norm())
    return trial.verdict(
        difference(
            f"the gradient of {name}", None if p.grad is None else p.grad * world, exact, floor
        )
        for name, p in inner.inner.named_parameters()
        if (exact := trial.expected.grads.get(name)) is not None
    )


def spread(trial: Trial) -> Finding:
    """Experts spread over the ranks: the output and every gradient."""
    return _spread(trial, idle=False)


def spread_idle(trial: Trial) -> Finding:
    """The same, where all ranks but the first have no token."""
    return _spread(trial, idle=True)


def balanced(trial: Trial) -> Finding:
    """Losses of the ranks' own tokens, under DDP: the mean of their gradients."""
    alone = _alone(trial)
    if alone is not None:
        return alone
    if trial.ran.balance is None or not trial.ran.balance.requires_grad:
        return skipped("no balance loss with a gradient is described")
    subject, world = trial.subject, dist.get_world_size()
    x_TD = trial.x.flatten(0, 1)
    losses = _Losses(subject.run)
    module = DistributedDataParallel(_Calling(subject.copied(), losses))
    torch.autograd.backward(module(x_TD[_share(False)][None].float()))
    exact, defined = subject.copied(torch.float64), _Losses(lambda m, x, _: subject.define(m, x))
    for rank in range(world):
        torch.autograd.backward(defined(exact, x_TD[rank::world][None]) / world)
    floor = 0.1 * float(trial.x.norm()) / len(x_TD)
    return trial.verdict(
        difference(f"the gradient of {name}", got.grad, meant.grad, floor)
        for (name, meant), got in zip(exact.named_parameters(), module.parameters(), strict=True)
        if meant.grad is not None and name in trial.names("router")
    )


class _Losses:
    """What a pass of a module says its balance and z-losses are, together."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        ran = self.run(module, x, None)
        assert ran.balance is not None
        loss = ran.balance if ran.z is None else ran.balance + ran.z
        return loss + 0 * ran.y.sum()  # DDP waits for the gradient of every parameter


class _Calling(nn.Module):
    """A module whose forward is a function of another: what DDP wants to be called itself."""

    def __init__(self, inner: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor) -> Tensor:
        """What the function gives."""
        return self.function(self.inner, x)


def _together(function: Callable[[Trial], Finding]) -> Callable[[Trial], Finding]:
    """A check that ends the group where a rank is lost: what came after would be of no meaning."""

    def checked(trial: Trial) -> Finding:
        try:
            return function(trial)
        except RuntimeError as error:
            if "gloo" not in str(error):
                raise
        gc.collect()  # wrappers have threads that would end the process with the group
        dist.destroy_process_group()
        return wrong("a rank did not take part, and the others waited for it in vain")

    return checked


def _alone(trial: Trial) -> Finding | None:
    """Why there is nothing to compare; None: there is."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MoestroError(
            "there is no process group; where a rank was lost in an earlier check, which ends it, "
            "run this one alone (--only)"
        )
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return skipped("needs several processes: torchrun --nproc-per-node 2 -m moestro check …")
    return skipped("with a capacity, tokens depend on each other") if trial.subject.drops else None


def _share(idle: bool) -> slice:
    """This rank's tokens."""
    if idle:
        return slice(None) if dist.get_rank() == 0 else slice(0, 0)
    return slice(dist.get_rank(), None, dist.get_world_size())


def _compared(trial: Trial, wrap: Callable[[nn.Module], nn.Module], *, idle: bool) -> Finding:
    alone = _alone(trial)
    if alone is not None:
        return alone
    world, share = dist.get_world_size(), _share(idle)
    x_TD, up_TD = trial.x.flatten(0, 1), trial.up.flatten(0, 1)
    inner = _Calling(trial.subject.copied(), lambda m, x: trial.subject.run(m, x, None).y)
    module = wrap(inner)  # kept: with it go the hooks that reduce gradients
    y = module(x_TD[share][None].float())
    torch.autograd.backward(y, up_TD[share][None].float())
    found, squares = [], 0.0
    for name, each in inner.inner.named_parameters():
        exact = trial.expected.grads.get(name)
        if exact is not None:
            got = _whole(each.grad)
            got = None if got is None else got * world
            squares += 0.0 if got is None else float(got.double().square().sum())
            floor = 0.1 * float(trial.exact.y.norm())
            found.append(difference(f"the gradient of {name}", got, exact, floor))
    total = nn.utils.get_total_norm([p.grad for p in inner.parameters() if p.grad is not None])
    norm = _whole(total)
    assert norm is not None
    exact_norm = trial.x.new_tensor(math.sqrt(squares))
    found.append(difference("the norm of all gradients", norm * world, exact_norm))
    return trial.verdict(found)


def spread_norm(trial: Trial) -> Finding:
    """With experts spread: the norm of all gradients, by which training clips."""
    if (alone := _unspread(trial)) is not None:
        return alone
    if trial.subject.norm is None:
        return skipped("it is not described how the norm of all gradients is computed")
    module = _spread_pass(trial, _share(False))[0]
    for name, each in module.named_parameters():
        if each.grad is not None and trial.subject.part(name) != "experts":
            dist.all_reduce(each.grad)
    known = [each for name, each in trial.expected.grads.items()
             if each is not None and name != "input"]  # fmt: skip
    meant = nn.utils.get_total_norm(known)
    return trial.verdict([difference("the norm", trial.subject.norm(module), meant)])


def _unspread(trial: Trial) -> Finding | None:
    """Why experts cannot be spread here; None: they can."""
    if (alone := _alone(trial)) is not None:
        return alone
    if trial.subject.spread is None:
        return skipped("it is not described how its experts are spread over ranks")
    experts, world = trial.subject.num_experts, dist.get_world_size()
    return (
        skipped(f"{experts} experts do not split over {world} ranks") if experts % world else None
    )


def _spread_pass(trial: Trial, share: slice) -> tuple[nn.Module, Result]:
    """The module with its experts spread, and what it gives of this rank's tokens."""
    assert trial.subject.spread is not None
    module = trial.subject.spread(trial.subject.copied())
    x_TD, up_TD = (each.flatten(0, 1)[share] for each in (trial.x, trial.up))
    return module, trial.tested(x_TD[None], up_TD[None], module)


def _spread(trial: Trial, *, idle: bool) -> Finding:
    if (alone := _unspread(trial)) is not None:
        return alone
    rank, world, share, subject = (
        dist.get_rank(),
        dist.get_world_size(),
        _share(idle),
        trial.subject,
    )
    got = _spread_pass(trial, share)[1]
    exact_TD = trial.expected.y.flatten(0, 1)[share]
    floor = 0.1 * float(trial.exact.y.norm())
    found = [difference("the output", got.y[0], exact_TD, floor)]
    for name, grad in got.grads.items():
        exact = trial.expected.grads.get(name)
        if exact is None or name == "input" or subject.part(name) == "other":
            continue
        if subject.part(name) == "experts":  # the exchange has brought the tokens of all ranks
            count = len(exact) // world
            exact = exact[rank * count : (rank + 1) * count]
        elif grad is not None:
            dist.all_reduce(grad)
        found.append(difference(f"the gradient of {name}", grad, exact, floor))
    return trial.verdict(found)


def _fully_sharded(module: nn.Module) -> nn.Module:
    fully_shard(module)  # in place
    return module


def _whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


_CHECKS = (
    Check("data-parallel", "Ranks that share a batch (DDP) get the whole batch's gradients.",
          "gradients doubled or divided twice (pytorch#160285, Megatron-LM#7452)", replicated),
    Check("no-sync", "Under DDP, micro-batches before the last are not lost (no_sync).",
          "gradients of the last micro-batch alone; sums divided twice (megablocks#86)", no_sync),
    Check("sharded", "Fully sharded parameters (FSDP2) get the whole batch's gradients and norm.",
          "norms that omit experts (Megatron-LM#5916, torchtitan#649)", sharded),
    Check("expert-parallel", "Experts spread over ranks give what one process does.",
          "gradients times the ranks (pytorch#160285); a router cut off (Automodel#2995)",
          spread),
    Check("expert-parallel-idle", "The same, where a rank has no token of its own.",
          "an exchange that a rank without tokens skips (Megatron-LM#4851)", spread_idle),
    Check("expert-parallel-norm", "The norm of all gradients has every rank's experts, once.",
          "norms that omit experts (Megatron-LM#5916), or count copies", spread_norm),
    Check("parallel-balance", "Balance losses of ranks' own tokens: their gradients' mean (DDP).",
          "auxiliary losses times or over the ranks (Megatron-LM#3769, Automodel#1408)", balanced),
    Check("idle-rank", "A rank without tokens takes part: nothing hangs, gradients are right.",
          "a rank without tokens that hangs (DeepSpeed#4808, Megatron-LM#4851)", idle),
)  # fmt: skip
CHECKS = tuple(each._replace(function=_together(each.function)) for each in _CHECKS)
