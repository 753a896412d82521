"""Checkpoint folders of every layout, read: settings first, then tensors.

Config and tensors go through the table of their family, this project's own layout being one.
Everything in a folder is accounted for before a byte of a tensor is read: an unknown, missing,
misshapen or surplus tensor is refused by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moestro.checkpoints.adapters import OWN_FILE
from moestro.checkpoints.families import OWN, family_of, names, text_part
from moestro.checkpoints.families.table import Config, Family
from moestro.checkpoints.families.translate import fields_with_meaning, to_settings
from moestro.checkpoints.folders import CONFIG, is_pretrained, read_json
from moestro.checkpoints.gguf.folder import headers_of
from moestro.checkpoints.gguf.header import is_gguf, read_parts
from moestro.checkpoints.gguf.names import with_names
from moestro.checkpoints.gguf.settings import config_json
from moestro.checkpoints.gguf.sources import sources
from moestro.checkpoints.pieces import WEIGHTS, in_pieces, open_pieces
from moestro.checkpoints.quantised.methods import find_sources, quantisation
from moestro.checkpoints.tensor_files import Source, open_folder, some
from moestro.checkpoints.transfer import Progress, Unread, load_tensors, match, unique_tensors
from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import CheckpointError, ConfigError
from moestro.models.build import Model, build_model
from moestro.models.count import count
from moestro.models.materialize import materialize, without_memory

# In a checkpoint of our own layout: the config.json that its weights came with.
HF_CONFIG = "hf_config.json"


class Described(NamedTuple):
    """What a config.json says: our settings, the table that translates it, and its own fields."""

    cfg: Config
    family: Family
    fields: dict[str, Any]


def origin(folder: Path) -> Path:
    """The config.json of Hugging Face's layout that weights came with; it may not exist."""
    return folder / (CONFIG if is_pretrained(folder) else HF_CONFIG)


def read_settings(
    path: Path, accept_fields: Collection[str] = (), *, for_weights: bool = True
) -> Described:
    """The settings of a checkpoint of either layout.

    Args:
        path: the folder, its config.json, or a GGUF file.
        accept_fields: fields of config.json that are not known here, and change nothing of what
            the model computes.
        for_weights: the weights will be read too; a quantisation that cannot be read is refused.

    Raises:
        CheckpointError: there is no readable config.json, or settings of ours are not valid.
        ConfigError: a model_type, field or quantisation is not known, a value cannot be expressed,
            or a field that is to be accepted has a meaning.
    """
    path = path / CONFIG if path.is_dir() else path
    fields = config_json(read_parts(path)[0]) if is_gguf(path) else read_json(path, finite=False)
    if "model_type" not in fields:
        kind = EncDecConfig if "encoder_layers" in fields else ModelConfig
        try:
            return Described(kind(**fields), OWN, fields)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None
    try:
        fields = text_part(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    family = family_of(fields["model_type"], str(path))
    meant = sorted(fields_with_meaning(family) & set(accept_fields))
    if meant:
        raise ConfigError(
            f"{meant[0]} says what a model of {family.model_type} computes, so it is read and not "
            "only accepted; leave it out of the fields to accept"
        )
    stated = quantisation(fields)
    if for_weights and stated is not None and stated.method not in family.quantised:
        raise ConfigError(
            f"{path}: the weights are quantised by {stated.words}; read for "
            f"{family.model_type}: {names(family.quantised)}, or not quantised. Take the "
            "checkpoint in bfloat16 that this one was made from; --weights int4 packs that here"
        )
    try:
        return Described(to_settings(family, fields, accept_fields), family, fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def open_unread(folder: Path, backend: str = "auto", accept_fields: Collection[str] = ()) -> Unread:
    """Check a checkpoint of either layout against its model; read nothing of its tensors yet.

    Args:
        folder: from `moestro.checkpoints.hub.find_checkpoint`.
        backend: a kernel's name, or "auto".
        accept_fields: see `read_settings`.

    Raises:
        ConfigError: see `read_settings`.
        CheckpointError: see `read_settings`; or a file is missing, truncated or pickle, or a
            tensor is missing, unknown, or of a different shape or dtype; names file and key.
    """
    described = read_settings(folder, accept_fields)
    headers, family = headers_of(folder), described.family
    stored: Mapping[str, Source]
    found: Mapping[str, Source]
    if headers is not None:
        stored = found = sources(headers)
        family = with_names(family)
    elif in_pieces(folder, WEIGHTS):
        stored = found = open_pieces(folder, WEIGHTS)
    elif (folder / OWN_FILE).exists():
        raise CheckpointError(
            f"{folder} holds adapters and not the weights that they belong to; add them together "
            f"first: moestro convert {folder} OUT --to hf"
        )
    else:
        stored = plain = open_folder(folder)
        found = find_sources(plain, described.fields)
    _check_size(folder, described.cfg, stored)
    with without_memory():
        model = build_model(described.cfg, backend)
    return match(folder, family, model, found)._replace(of_gguf=headers is not None)


def read_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    progress: Progress | None = None,
    accept_fields: Collection[str] = (),
) -> Model:
    """Load a checkpoint in evaluation mode; memory peaks at the model and one tensor.

    Args:
        folder: see `open_unread`.
        dtype: of the parameters; None: that of the checkpoint's embedding.
        device: where they go.
        backend: a kernel's name, or "auto".
        progress: called with (bytes read so far, bytes in all) after each tensor.
        accept_fields: see `read_settings`.

    Raises:
        ConfigError, CheckpointError: see `open_unread`.

    Warns:
        UserWarning: `dtype` is unset, and some tensors are stored wider than the embedding.
    """
    unread = open_unread(folder, backend, accept_fields)
    materialize(unread.model, dtype or _kept_in(folder, unread), device)
    load_tensors(unread, progress)
    return unread.model.eval()


def stream_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    accept_fields: Collection[str] = (),
) -> tuple[Model, Callable[[str], Tensor]]:
    """A checkpoint's model without memory, and what reads one of its tensors by name.

    Only the tensor that was read last is kept, so whoever takes it apart reads it once.

    Args:
        folder: see `open_unread`.
        dtype: see `read_model`.
        progress: called with (bytes read so far, bytes in all) after each tensor.
        accept_fields: see `read_settings`.

    Raises:
        ConfigError, CheckpointError: see `open_unread`.

    Warns:
        UserWarning: see `read_model`.
    """
    unread = open_unread(folder, accept_fields=accept_fields)
    materialize(unread.model, dtype or _kept_in(folder, unread), "meta")
    shapes, kept, done = unique_tensors(unread.model), dict[str, Tensor](), 0
    seen = set[str]()

    def read(name: str) -> Tensor:
        nonlocal done
        if name not in kept:
            kept.clear()
            kept[name] = torch.empty_like(shapes[name], device="cpu")
            part = unread.part({name})
            load_tensors(part, into=kept)
            done += 0 if name in seen else part.bytes
            seen.add(name)
            if progress is not None:
                progress(done, unread.bytes)
        return kept[name]

    return unread.model.eval(), read


def _kept_in(folder: Path, unread: Unread) -> torch.dtype:
    """The dtype of parameters where none is asked for; warns of what it rounds."""
    rounded = () if unread.of_gguf else unread.rounded()
    if rounded:
        warnings.warn(
            f"{folder} holds tensors that are rounded to {unread.dtype}, the dtype of its "
            f"embedding: {some(rounded)}. Ask for float32 to keep them as they are",
            UserWarning,
            stacklevel=3,
        )
    return unread.dtype


def _check_size(folder: Path, cfg: Config, stored: Mapping[str, Source]) -> None:
    """Refuse settings of a far larger model than the files hold, before it is built.

    Raises:
        CheckpointError: a parameter would have less than half a byte, or a layer no tensor.
    """
    size, parameters = sum(one.bytes for one in stored.values()), count(cfg).total
    most = sum(max(2 * one.bytes, math.prod(one.shape)) for one in stored.values())
    layers = sum(len(stack.layers) for stack in cfg.stacks())
    if parameters > most or layers > len(stored):
        raise CheckpointError(
            f"{folder} does not fit its {CONFIG}: that describes {parameters:,} parameters in "
            f"{layers:,} layers, and the weights are {len(stored):,} tensors of {size:,} bytes in "
            "all; use another checkpoint"
        )
