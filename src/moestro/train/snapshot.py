"""What a checkpoint holds of the model and its optimizer: as they are, or copied to write later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moestro.checkpoints.adapters import own_file
from moestro.checkpoints.families import OWN
from moestro.checkpoints.tensor_files import SINGLE, TensorFile, Written
from moestro.checkpoints.transfer import outgoing
from moestro.config import EncDecConfig, LoraConfig, ModelConfig
from moestro.errors import CheckpointError
from moestro.models.build import Model
from moestro.train.muon import MOMENTUM_STATE

OPTIMIZER = "optimizer"  # the stem of its file


class Snapshot(NamedTuple):
    """The files that one rank writes, and the settings of the model."""

    cfg: ModelConfig | EncDecConfig
    files: tuple[TensorFile, ...]

    def copied(self) -> Snapshot:
        """The same with the numbers of now, on the CPU: what it writes no later step changes."""
        return self._replace(files=tuple(file.copied() for file in self.files))

    def write(self, folder: Path) -> list[Path]:
        """Write the files; their paths.

        Raises:
            OSError: the disk is full or the place cannot be written.
        """
        return [file.write(folder) for file in self.files]


def of_whole(model: Model, optimizer: torch.optim.Optimizer, lora: LoraConfig | None) -> Snapshot:
    """Of a model that is whole here; of adapters their tensors, the weights stay where they are."""
    weights = TensorFile(SINGLE, outgoing(OWN, model)) if lora is None else own_file(model, lora)
    state = optimizer_tensors(model, optimizer).items()
    moments = TensorFile(f"{OPTIMIZER}.safetensors", [Written.of(*pair) for pair in state])
    return Snapshot(model.cfg, (weights, moments))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State as `{parameter name}.{exp_avg | exp_avg_sq | step}`, not copied.

    Of matrices under Muon `{parameter name}.momentum_buffer`.
    """
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put a copy of `optimizer_tensors` back, on each parameter's device.

    Raises:
        CheckpointError: a tensor belongs to no parameter, has another shape, or is the average of
            a matrix under Muon where the parameter is AdamW's, or the other way round.
    """
    parameters = dict(model.named_parameters())
    muons = {
        id(parameter)
        for group in optimizer.param_groups
        if group.get("matrices")
        for parameter in group["params"]
    }
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        parameter = parameters.get(name)
        if parameter is None or (value.ndim and value.shape != parameter.shape):
            raise misfit(full_name, tuple(value.shape))
        if (key == MOMENTUM_STATE) != (id(parameter) in muons):
            raise CheckpointError(
                f"the optimizer's tensor {full_name} is not what updates {name} now: with "
                "optim.matrices = muon, versions before this one gave Muon the biases of experts "
                "too; begin a run from the weights with --init"
            )
        optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def misfit(name: str, shape: tuple[int, ...]) -> CheckpointError:
    """The error for an optimizer's tensor that has no place."""
    return CheckpointError(
        f"the optimizer's tensor {name} {list(shape)} fits no parameter of the model; the "
        "checkpoint was made by another model"
    )
