"""Models written to disk: in this project's layout, or in that of a family of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.checkpoints.families import FAMILIES, OWN, family_of, names
from moestro.checkpoints.families.table import Config
from moestro.checkpoints.families.translate import to_fields
from moestro.checkpoints.folders import CONFIG, atomic_folder
from moestro.checkpoints.sidecar_files import copy_sidecar_files
from moestro.checkpoints.tensor_files import SINGLE, write_file, write_folder
from moestro.checkpoints.transfer import outgoing
from moestro.errors import ConfigError
from moestro.files import write_json
from moestro.models.build import Model

_DTYPE_FIELDS = ("dtype", "torch_dtype")


def save_model(model: Model, folder: Path, tensors: Callable[[str], Tensor] | None = None) -> None:
    """Write `config.json` and `model.safetensors` in our layout into an existing folder.

    Args:
        model: what to write.
        folder: where to.
        tensors: what makes one of the model's tensors by name; see `transfer.outgoing`.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    write_json(folder / CONFIG, model.cfg.model_dump(mode="json"))
    write_file(folder / SINGLE, outgoing(OWN, model, tensors=tensors))


def write_pretrained(
    model: Model,
    folder: Path,
    *,
    family: str | None = None,
    hf_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
    sidecar_files: Path | None = None,
    fused_experts: bool = False,
    tensors: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a folder that transformers loads: config.json and safetensors, whole or not at all.

    Args:
        model: what to write.
        folder: a new folder.
        family: its model_type; None: that of `hf_config`, or the only one that fits.
        hf_config: the config.json that the model came from. What it says beyond our settings stays.
        dtype: of the parameters; None: as they are.
        shard_bytes: most bytes of tensors in one file.
        sidecar_files: a folder whose tokenizer and chat templates are copied.
        fused_experts: all experts of a layer in one tensor, as transformers 5 has them in memory;
            False: as the family is published.
        tensors: what makes one of the model's tensors by name; see `transfer.outgoing`.

    Raises:
        ConfigError: no family, several, or not the named one can express the model's settings.
        CheckpointError: the folder exists, or what was read back differs.
        OSError: the disk is full or the place cannot be written.
    """
    original = dict(hf_config or {})
    name = family or original.get("model_type") or only_family(model.cfg)
    if original and original.get("model_type") != name:
        raise ConfigError(
            f"hf_config is of {original.get('model_type')!r}, but the model is to be written as "
            f"{name!r}; leave hf_config out to change the family"
        )
    table = family_of(name, "family")
    fields = to_fields(table, model.cfg, original)
    kind = dtype or model.embed.weight.dtype
    says = [field for field in _DTYPE_FIELDS if field in fields] or ["dtype"]
    fields |= dict.fromkeys(says, str(kind).removeprefix("torch."))
    written = outgoing(table, model, dtype, fused_experts, tensors)
    with atomic_folder(folder) as inner:
        write_json(inner / CONFIG, fields)
        write_folder(inner, written, shard_bytes)
        if sidecar_files is not None:
            copy_sidecar_files(sidecar_files, inner)


def only_family(cfg: Config, otherwise: str = "save in this project's own layout") -> str:
    """The one family that can express these settings.

    Args:
        cfg: the settings.
        otherwise: what to do where none can.

    Raises:
        ConfigError: none can, or several.
    """
    able = []
    for name, family in FAMILIES.items():
        try:
            to_fields(family, cfg, {})
        except ConfigError:
            continue
        able.append(name)
    if len(able) == 1:
        return able[0]
    if able:
        raise ConfigError(f"these settings fit {names(able)}; choose one as the family")
    raise ConfigError(
        f"no family can express these settings; name one of {names(FAMILIES)} to see what is in "
        f"the way, or {otherwise}"
    )
