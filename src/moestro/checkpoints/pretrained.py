"""Checkpoint folders in Hugging Face's layout: read into our models, and written back.

Config and tensors go through their family's table. Everything in a folder is accounted for before
a byte of a tensor is read: an unknown, missing, misshapen or surplus one is refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.families.slices import TensorSlice
from moestro.checkpoints.families.table import Config, Family
from moestro.checkpoints.families.translate import (
    fields_with_meaning,
    to_fields,
    to_settings,
)
from moestro.checkpoints.folders import (
    CONFIG,
    atomic_folder,
    check_room,
    checkpoints,
    load_model,
    open_own,
    read_json,
    read_own_config,
)
from moestro.checkpoints.quantized import quantisation
from moestro.checkpoints.tensor_files import open_folder, some, write_folder
from moestro.checkpoints.transfer import (
    Matched,
    Progress,
    Source,
    find_sources,
    match,
    outgoing,
    pour,
)
from moestro.errors import ConfigError
from moestro.files import write_json
from moestro.models.build import Model, build_model
from moestro.models.materialize import materialize, without_memory

HF_CONFIG = "hf_config.json"

_DTYPE_FIELDS = ("dtype", "torch_dtype")


class Described(NamedTuple):
    """What a config.json says: our settings, its family's name, and its own fields."""

    cfg: Config
    family: str
    hf_config: dict[str, Any]


class Pretrained(NamedTuple):
    """A model, and where it came from: its family and config.json, where it had them."""

    model: Model
    family: str | None
    hf_config: dict[str, Any] | None


class Unread(NamedTuple):
    """A checkpoint that fits, before a byte of a tensor is read: to be read part by part.

    Attributes:
        model: built without memory.
        matched: the sources of its tensors.
        described: what a config.json of Hugging Face's layout says; None for our own.
    """

    model: Model
    matched: Matched
    described: Described | None

    def part(self, names: Container[str], *, last: bool = False) -> Matched:
        """What fills the tensors of these names; the last part checks what repeats another."""
        sources = [pair for pair in self.matched.sources if pair[0].ours in names]
        return self.matched._replace(sources=sources, copies=self.matched.copies if last else [])


def is_pretrained(folder: Path) -> bool:
    """Whether a folder's config.json is of Hugging Face's layout: it names a model_type."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    return "model_type" in read_json(path, finite=False)


def read_config(path: Path, accept_fields: Collection[str] = ()) -> Described:
    """Our settings for a checkpoint, without its weights.

    Args:
        path: the folder, or its config.json.
        accept_fields: fields of config.json that are not known here, and change nothing of what
            the model computes.

    Raises:
        CheckpointError: there is no readable config.json.
        ConfigError: its model_type or a field is not known, or a value cannot be expressed; or a
            field that is to be accepted has a meaning.
    """
    path = path / CONFIG if path.is_dir() else path
    fields = read_json(path, finite=False)
    if "model_type" not in fields:
        raise ConfigError(f"{path} names no model_type, so it is not of Hugging Face's layout")
    family = _family(fields["model_type"], str(path))
    meant = sorted(fields_with_meaning(family) & set(accept_fields))
    if meant:
        raise ConfigError(
            f"{meant[0]} says what a model of {family.model_type} computes, so it is read and not "
            "only accepted; leave it out of the fields to accept"
        )
    try:
        cfg = to_settings(family, fields, accept_fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Described(cfg, family.model_type, fields)


def settings_of(folder: Path, accept_fields: Collection[str] = ()) -> Config:
    """The settings of a checkpoint of either layout whose weights will be read.

    Raises:
        CheckpointError, ConfigError: see `read_config`; or its quantisation is not read here.
    """
    if not is_pretrained(folder):
        return read_own_config(folder / CONFIG)
    described = read_config(folder, accept_fields)
    _check_quantisation(folder, described)
    return described.cfg


def read_pretrained(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    progress: Progress | None = None,
    accept_fields: Collection[str] = (),
) -> Pretrained:
    """Load a checkpoint in evaluation mode; memory peaks at the model and one tensor.

    Args:
        folder: config.json and safetensors.
        dtype: of the parameters; None: that of the checkpoint's embedding.
        device: where they go.
        backend: a kernel's name, or "auto".
        progress: called with (bytes read so far, bytes in all) after each tensor.
        accept_fields: see `read_config`.

    Raises:
        ConfigError: see `read_config`; or its quantisation is not read here.
        CheckpointError: a file is missing, truncated or pickle, or a tensor is missing, unknown,
            or of another shape or dtype than its family has; names file and key.

    Warns:
        UserWarning: `dtype` is unset, and some tensors are stored wider than the embedding.
    """
    described = read_config(folder, accept_fields)
    model, matched, _ = _unread(folder, described, backend)
    if dtype is None and (rounded := matched.rounded(model, matched.dtype)):
        warnings.warn(
            f"{folder} holds tensors that are rounded to {matched.dtype}, the dtype of its "
            f"embedding: {some(rounded)}. Ask for float32 to keep them as they are",
            UserWarning,
            stacklevel=2,
        )
    materialize(model, dtype or matched.dtype, device)
    pour(matched, model, progress)
    return Pretrained(model.eval(), described.family, described.hf_config)


def open_unread(folder: Path, backend: str = "auto", accept_fields: Collection[str] = ()) -> Unread:
    """Check a checkpoint of either layout against its model; read nothing of its tensors yet.

    Raises:
        ConfigError, CheckpointError: see `read_pretrained` and `folders.open_own`.
    """
    if is_pretrained(folder):
        return _unread(folder, read_config(folder, accept_fields), backend)
    model, stored = open_own(folder, backend)
    tied = stored.pop("head.weight", None) if model.cfg.head.tied else None
    sources = [
        (TensorSlice(name, name, None, None, "same", one.shape), Source(one))
        for name, one in stored.items()
    ]
    copies = [] if tied is None else [(Source(tied), "embed.weight")]
    dtype = stored["embed.weight"].dtype
    return Unread(model, Matched(sources, copies, dtype, model.cfg), None)


def _unread(folder: Path, described: Described, backend: str) -> Unread:
    _check_quantisation(folder, described)
    family, stored = FAMILIES[described.family], open_folder(folder)
    check_room(folder, described.cfg, stored)
    sources = find_sources(stored, described.hf_config)
    with without_memory():
        model = build_model(described.cfg, backend)
    return Unread(model, match(folder, family, model, sources), described)


def _check_quantisation(folder: Path, described: Described) -> None:
    """Refuse weights in a form that is not read for this family."""
    family, stated = FAMILIES[described.family], quantisation(described.hf_config)
    if stated is not None and stated.method not in family.quantised:
        raise ConfigError(
            f"{folder / CONFIG}: the weights are quantised by {stated.words}; read for "
            f"{family.model_type}: {_names(family.quantised)}, or not quantised. Take the "
            "checkpoint in bfloat16 that this one was made from; --weights int4 packs that here"
        )


def write_pretrained(
    model: Model,
    folder: Path,
    *,
    family: str | None = None,
    hf_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers loads: config.json and safetensors, whole or not at all.

    Args:
        model: what to write.
        folder: a new folder.
        family: its model_type; None: that of `hf_config`, or the only one that fits.
        hf_config: the config.json that the model came from. What it says beyond our settings stays.
        dtype: of the parameters; None: as they are.
        shard_bytes: most bytes of tensors in one file.

    Raises:
        ConfigError: no family, several, or not the named one can express the model's settings.
        CheckpointError: the folder exists, or what was read back differs.
        OSError: the disk is full or the place cannot be written.
    """
    original = dict(hf_config or {})
    name = family or original.get("model_type") or _only_family(model.cfg)
    if original and original.get("model_type") != name:
        raise ConfigError(
            f"hf_config is of {original.get('model_type')!r}, but the model is to be written as "
            f"{name!r}; leave hf_config out to change the family"
        )
    table = _family(name, "family")
    fields = to_fields(table, model.cfg, original)
    kind = dtype or model.embed.weight.dtype
    says = [field for field in _DTYPE_FIELDS if field in fields] or ["dtype"]
    fields |= dict.fromkeys(says, str(kind).removeprefix("torch."))
    tensors = outgoing(table, model, dtype)
    with atomic_folder(folder) as inner:
        write_json(inner / CONFIG, fields)
        write_folder(inner, tensors, shard_bytes)


def open_model(
    path: Path,
    *,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    accept_fields: Collection[str] = (),
) -> Pretrained:
    """Load a model from either layout: a run or checkpoint of ours, or Hugging Face's.

    Raises:
        CheckpointError, ConfigError: see `read_pretrained` and `folders.load_model`.
    """
    if is_pretrained(path):
        return read_pretrained(
            path,
            dtype=dtype,
            device=device,
            backend=backend,
            progress=progress,
            accept_fields=accept_fields,
        )
    model = load_model(path, str(device), backend)
    if dtype is not None:
        model.to(dtype)
    # The same in every checkpoint of a run.
    places = (folder / HF_CONFIG for folder in (path, *checkpoints(path)))
    found = next((place for place in places if place.is_file()), None)
    fields = None if found is None else read_json(found, finite=False)
    return Pretrained(model, None if fields is None else fields.get("model_type"), fields)


def _family(name: Any, where: str) -> Family:
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {name!r} is not known; known: {_names(FAMILIES)}. transformers "
            "runs others: load it there, and moestro.hf.install() speeds up its experts"
        )
    return FAMILIES[name]


def _only_family(cfg: Config) -> str:
    """The one family that can express these settings."""
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
        raise ConfigError(f"these settings fit {_names(able)}; choose one as the family")
    raise ConfigError(
        f"no family can express these settings; name one of {_names(FAMILIES)} to see what is in "
        "the way, or save in this project's own layout"
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
