"""Data parallelism: which rank this process is, and sums over all ranks.

torchrun starts the processes and gives each its rank through the environment. Alone, every call
here does nothing, so that the loop reads the same with one process or many.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from moestro.config import TrainConfig
from moestro.errors import CheckpointError, ConfigError, MoestroError, TrainingError


class Ranks(NamedTuple):
    """This process's place among those that train together.

    Attributes:
        rank: Number of this process, 0 for the one that writes.
        world: How many processes there are.
        local_rank: Number of this process on its machine, which picks its GPU.
        group: What they exchange through; None: torch's default.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def writes(self) -> bool:
        """Whether this process saves, prints and logs."""
        return self.rank == 0

    def sum_(self, x: Tensor) -> Tensor:
        """Replace `x` (any shape) by its sum over all ranks, and return it."""
        if self.world > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gathered(self, value: Any) -> list[Any]:
        """What every rank gives, the first rank's first; small, and the same on all."""
        everything = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(everything, value, group=self.group)
        return everything

    def first(self, found: str | None) -> str | None:
        """What the first rank that found something says; the same on all."""
        return next((one for one in self.gathered(found) if one is not None), None)

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.world > 1:
            dist.barrier(group=self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that every rank runs, without exchanges; what fails on one fails on all.

        Raises:
            CheckpointError: another rank's block failed; says where and why.
        """
        try:
            yield
        except Exception as error:
            self.first(f"{error} (rank {self.rank})")
            raise
        found = self.first(None)
        if found is not None:
            raise CheckpointError(found)

    def apart(self, timeout_s: int) -> Ranks:
        """The same ranks through a new group on the CPU, for another thread; all call it."""
        if self.world == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return self._replace(group=group)

    def leave(self) -> None:
        """Give up a group that `apart` made."""
        if self.group is not None:
            dist.destroy_process_group(self.group)


ALONE = Ranks()
_POLL_S = 0.02
# What torch's errors say where another process is to blame: gloo's, nccl's, the store's.
_OF_OTHERS = ("gloo", "NCCL", "Connection closed", "Connection reset", "wait timeout", "Timed out")


def ranks_from(environment: Mapping[str, str]) -> Ranks:
    """Read the place that torchrun gave this process; alone where it gave none."""
    if "WORLD_SIZE" not in environment:
        return ALONE
    try:
        world = int(environment["WORLD_SIZE"])
        rank = int(environment.get("RANK", "0" if world == 1 else ""))
        return Ranks(rank, world, int(environment.get("LOCAL_RANK", str(rank))))
    except ValueError:
        given = {k: environment.get(k) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        raise ConfigError(
            f"the environment says {given}; start several processes with "
            "`torchrun --nproc-per-node N -m moestro train …`, which sets all three"
        ) from None


def check_split(cfg: TrainConfig, ranks: Ranks) -> None:
    """Refuse a batch that the ranks and their micro-batches cannot share evenly.

    Raises:
        ConfigError: says which sizes can be.
    """
    pieces = cfg.accumulate * ranks.world
    if cfg.batch_size % pieces:
        raise ConfigError(
            f"train.batch_size {cfg.batch_size} does not split into {cfg.accumulate} "
            f"micro-batches on each of {ranks.world} processes; use a multiple of {pieces}"
        )


def _store(ranks: Ranks, timeout: timedelta) -> Any:
    """Where the processes find each other, under names that no start before has used.

    torchrun keeps its store over restarts, and in it the addresses of those that were killed, which
    gloo would try; and each machine counts its restarts for itself. So the first rank makes up a
    name, and hands it to every rank that comes with a word of its own.
    """
    found, _, _ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=timeout))
    if ranks.writes:
        name = _welcome(found, ranks.world, timeout)
    else:
        word = uuid4().hex
        found.set(f"hello {ranks.rank}", word)
        name = found.get(f"welcome {word}").decode()
        found.set(f"joined {name} {ranks.rank}", "")
    return dist.PrefixStore(name, found)  # type: ignore[attr-defined]


def _welcome(store: Any, world: int, timeout: timedelta) -> str:
    """Hand out a new name until all have it: what a killed rank had said is answered in vain."""
    name, waiting = f"start {uuid4().hex}", set(range(1, world))
    until = time.monotonic() + timeout.total_seconds()
    while waiting:
        if time.monotonic() > until:
            raise RuntimeError(f"wait timeout: no word of ranks {sorted(waiting)}")
        for rank in sorted(waiting):
            if store.check([f"hello {rank}"]):
                store.set(f"welcome {store.get(f'hello {rank}').decode()}", name)
        time.sleep(_POLL_S)
        waiting = {rank for rank in waiting if not store.check([f"joined {name} {rank}"])}
    return name


@contextmanager
def joined(
    device: torch.device, environment: Mapping[str, str] | None = None, timeout_s: int = 600
) -> Iterator[Ranks]:
    """Join the other processes while the block runs, on CUDA by nccl, elsewhere by gloo.

    Args:
        device: that this process computes on.
        environment: torchrun's variables; None: the process's own.
        timeout_s: longest wait for another rank.
    """
    ranks = ranks_from(os.environ if environment is None else environment)
    if ranks.world == 1:
        yield ranks
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store(ranks, timeout),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timeout,
        )
        yield ranks
    except RuntimeError as error:
        if isinstance(error, MoestroError) or not any(w in str(error) for w in _OF_OTHERS):
            raise
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"another process of the run ended, or did not answer within {timeout_s} s; its own "
            f"output says why. Go on from the last checkpoint with --resume ({reason})"
        ) from error
    finally:
        gc.collect()  # works still held by a reference cycle abort gloo when they outlive the group
        if dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Turn the setting `train.runtime.device` into a device that is here.

    'auto' is CUDA if there is one, else the CPU; 'cuda' the GPU of the process's local rank.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"train.runtime.device = {name!r} is not a device; use auto, cpu, cuda or cuda:NUMBER"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"train.runtime.device = {name!r} is not supported; use auto, cpu, cuda or cuda:NUMBER"
        )
    if device.type == "cpu":
        return device
    index = ranks.local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"train.runtime.device = {name!r} needs CUDA device {index}, but "
            f"{torch.cuda.device_count()} are here; use cpu, or fewer processes per machine"
        )
    return torch.device("cuda", index)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn the setting `train.dtype` into what matrices are multiplied in.

    'auto' is bfloat16 where the hardware has instructions for it (CUDA; a CPU with AMX or
    AVX512-BF16) and float32 elsewhere. Weights and optimizer state are float32 in any case but
    'float64', which is for proofs.
    """
    if name == "float64":
        return torch.float64
    has_instructions = (
        device.type == "cuda"
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu._is_avx512_bf16_supported()
    )
    chosen = name == "bfloat16" or (name == "auto" and has_instructions)
    return torch.bfloat16 if chosen else torch.float32
