"""The optimizer with its parameter groups, and the learning rate of each step.

Weight decay pulls on matrices only: the weights of linear layers, routers and experts. Norms,
biases, also those of stacked experts and of relative positions, gates of one row and the token
embedding (also where it is tied to the output) are free.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from moestro.config import OptimConfig, RunConfig
from moestro.models.build import new_model
from moestro.models.relative import RelativeBias
from moestro.train import muon
from moestro.train.task import train_flops

FUSED_DEVICES = ("cpu", "cuda")

Parameters = dict[str, nn.Parameter]
# Modules whose matrices AdamW updates where Muon updates others.
_NOT_MUONS = {"router", "head"}


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """Build AdamW over all trainable parameters of `model`, fused where torch has it.

    With `cfg.matrices` = "muon" the matrices that decay follow Muon, but for those of routers and
    the output head: scores, not maps of one vector to another.
    """
    decayed, free = split_parameters(model)
    fused = all(p.device.type in FUSED_DEVICES for p in model.parameters())
    if cfg.matrices == "muon":
        adamw = {
            name: decayed.pop(name) for name in list(decayed) if _NOT_MUONS & {*name.split(".")}
        }
        groups = [
            _group(decayed, cfg.weight_decay) | {"matrices": True},
            _group(adamw, cfg.weight_decay) | {"matrices": False},
            _group(free, 0.0) | {"matrices": False},
        ]
        groups = [each for each in groups if each["params"]]
        return muon.Muon(groups, cfg.lr, cfg.betas, fused)
    groups = [_group(decayed, cfg.weight_decay), _group(free, 0.0)]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=fused)


def step_flops(cfg: RunConfig) -> float:
    """FLOPs of one step: of the model, forward and backward, and of Muon's products.

    AdamW's are a few for each parameter and not counted.
    """
    flops = cfg.train.batch_size * train_flops(cfg.model, cfg.data.seq_len)
    if cfg.optim.matrices == "muon":
        with torch.device("meta"):
            model = new_model(cfg.model)
        groups = make_optimizer(model, cfg.optim).param_groups
        flops += sum(muon.flops(group["params"]) for group in groups if group["matrices"])
    return flops


def _group(parameters: Parameters, weight_decay: float) -> dict[str, Any]:
    return {"params": list(parameters.values()), "weight_decay": weight_decay}


def split_parameters(model: nn.Module) -> tuple[Parameters, Parameters]:
    """Split the trainable parameters by name into those that decay and those that do not."""
    tables = (nn.Embedding, RelativeBias)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, tables)}
    decayed: Parameters = {}
    free: Parameters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # The biases of stacked experts are [E, O].
            bias = name.rpartition(".")[2].endswith("bias")
            matrix = parameter.ndim >= 2 and min(parameter.shape[-2:]) > 1 and not bias
            group = decayed if matrix and id(parameter) not in looked_up else free
            group[name] = parameter
    return decayed, free


def learning_rate(step: int, steps: int, cfg: OptimConfig) -> float:
    """Learning rate of step number `step` (from 0) of `steps`.

    Warm-up rises in a line and reaches `lr` at its last step. Cosine then falls to
    `final_lr * lr` at the last step of all; wsd stays at `lr` and falls there in a line over the
    last `decay` share of the steps.
    """
    warmup_steps = round(cfg.warmup * steps)
    if step < warmup_steps:
        return cfg.lr * (step + 1) / warmup_steps
    if cfg.schedule == "cosine":
        fall = _share(step, warmup_steps, steps)
        height = 0.5 * (1.0 + math.cos(math.pi * fall))
    else:
        decay_steps = max(1, round(cfg.decay * steps))
        height = 1.0 - _share(step, max(warmup_steps, steps - decay_steps) - 1, steps)
    return cfg.lr * (cfg.final_lr + (1.0 - cfg.final_lr) * height)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


def _share(step: int, start: int, steps: int) -> float:
    """How far `step` has come from `start` (0) to the last step (1)."""
    return min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
