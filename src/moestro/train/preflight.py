"""What the settings of a run ask of this machine and its processes, checked before a step 0 exists.

Whatever begins a run calls it before it writes anything; the Trainer once more, for itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moestro.config import Layout, RunConfig
from moestro.errors import ConfigError
from moestro.kernels import backends
from moestro.train.distributed import ALONE, Ranks, check_split, pick_device, pick_dtype
from moestro.train.metrics import tensorboard_module


class Placing(NamedTuple):
    """Where a run computes, in what dtype, and which rank holds what."""

    device: torch.device
    dtype: torch.dtype
    layout: Layout


def check_run(cfg: RunConfig, ranks: Ranks = ALONE) -> Placing:
    """Where and how a run of these settings is trained by these processes.

    Raises:
        ConfigError: the device is not here, the batch, the experts or the weights cannot be
            shared as asked, adapters or Muon are to work on a part of the weights, packed
            weights are to lie on a GPU or to compute in float64, or TensorBoard is not installed.
        BackendError: the kernel backend is not known, or cannot run here; or there is none for
            packed weights.
    """
    runtime = cfg.train.runtime
    check_split(cfg.train, ranks)
    device = pick_device(runtime.device, ranks)
    dtype = pick_dtype(cfg.train.dtype, device)
    layout = cfg.parallel.layout(ranks.world, cfg.model.moe.num_experts if cfg.model.moe else None)
    if layout.splits and cfg.optim.matrices == "muon":
        raise ConfigError(
            "Muon needs whole matrices: set parallel.expert and .shard to 1, or "
            "optim.matrices to adamw"
        )
    if layout.splits and cfg.lora is not None:
        raise ConfigError(
            "adapters are trained on whole models: set parallel.expert and .shard to "
            "1, or leave --lora out"
        )
    if cfg.lora is not None and cfg.lora.weights != "as-is":
        if device.type != "cpu":
            raise ConfigError(
                f"lora.weights = {cfg.lora.weights}: packed weights compute on the CPU, but "
                f"train.runtime.device = {runtime.device} is {device.type} here; set "
                "train.runtime.device = cpu, or leave --qlora out"
            )
        if dtype == torch.float64:
            raise ConfigError(
                f"lora.weights = {cfg.lora.weights}: packed weights do not compute in float64; set "
                "train.dtype = float32, or leave --qlora out"
            )
        backends.choose(runtime.backend, backends.PACKED)
    else:
        backends.choose(runtime.backend, backends.Work(device.type, dtype))
    if runtime.tensorboard and ranks.writes:
        tensorboard_module()
    return Placing(device, dtype, layout)
