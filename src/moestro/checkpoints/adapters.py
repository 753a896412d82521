"""A run's own adapters on disk, and the checkpoint that they were trained over."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from moestro.checkpoints.fingerprints import digest
from moestro.checkpoints.gguf.folder import given_path
from moestro.checkpoints.tensor_files import TensorFile, Written, read_tensors, some
from moestro.config import LoraConfig
from moestro.errors import CheckpointError
from moestro.models.adapters import attach, tensors

OWN_FILE = "adapter.safetensors"


def own_file(model: nn.Module, cfg: LoraConfig) -> TensorFile:
    """A model's adapters as a run's checkpoint has them, by our names."""
    found = [Written.of(name, each) for name, each in tensors(model)]
    return TensorFile(OWN_FILE, found, {"lora": cfg.model_dump_json()})


def own_settings(folder: Path) -> LoraConfig | None:
    """How the adapters of a run's checkpoint were made; None: it holds a whole model."""
    path = folder / OWN_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            return LoraConfig(**json.loads(file.metadata()["lora"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint") from None


@torch.no_grad()
def load_own(model: nn.Module, cfg: LoraConfig, folder: Path, base: Path) -> None:
    """Attach a run's adapters to the model that they were trained on.

    Args:
        model: Of `base`.
        cfg: The run's settings.
        folder: The run's checkpoint.
        base: The folder of the checkpoint that the model is of.

    Raises:
        CheckpointError: they belong to another model, or to what `cfg.base` was.

    Warns:
        UserWarning: they were trained over another checkpoint, of maybe the same weights.
    """
    attach(model, cfg)
    stored, own = read_tensors(folder / OWN_FILE), dict(tensors(model))
    shapes = {name: tuple(each.shape) for name, each in own.items()}
    if shapes != {name: tuple(each.shape) for name, each in stored.items()}:
        wrong = sorted(shapes.keys() ^ stored.keys()) or ["shapes differ"]
        raise CheckpointError(
            f"{folder} holds adapters of another model than {cfg.base}: {some(wrong)}"
        )
    _check_base(cfg, folder, base)
    for name, parameter in own.items():
        parameter.copy_(stored[name])


def _check_base(cfg: LoraConfig, folder: Path, base: Path) -> None:
    """See what `load_own` raises and warns; runs of before have no digest to compare."""
    if not cfg.base_digest or digest(base) == cfg.base_digest:
        return
    if given_path(Path(cfg.base)).resolve() == given_path(base).resolve():
        raise CheckpointError(
            f"{cfg.base} has other weights or settings than those that the adapters in {folder} "
            "were trained over; put back what it had, or tune again"
        )
    warnings.warn(
        f"the adapters in {folder} were trained over {cfg.base}, whose files are not those of "
        f"{base}; they fit only if its weights are the same",
        UserWarning,
        stacklevel=2,
    )
