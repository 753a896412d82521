"""Checkpoints on disk: whole or not there at all, every byte verified, every key accounted for.

A checkpoint is a folder with a manifest of sizes and SHA-256 sums. It is written under another
name, flushed, read back and then renamed, so a crash at any moment leaves the old one untouched.
Only safetensors and JSON are read.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro.checkpoints.tensor_files import Stored, open_file, read, read_into
from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import CheckpointError, ConfigError
from moestro.files import UNFINISHED, write_json
from moestro.models.build import Model, build_model
from moestro.models.count import count
from moestro.models.materialize import materialize, without_memory
from moestro.strictjson import read_object

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Write a folder so that `target` is either complete and verified, or untouched.

    Yields:
        An empty folder beside `target` to write into. When the block ends, a manifest is added,
        everything is flushed to disk and read back, and the folder is renamed to `target`. When
        the block raises, the folder is removed.

    Raises:
        CheckpointError: what was read back differs from what was written, or target exists.
        OSError: the disk is full or the place cannot be written.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f"{UNFINISHED}{target.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, {"files": files})
        for path in folder.iterdir():
            _flush(path)
        _flush(folder)
        verify_folder(folder)
        folder.rename(target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint: what a kill leaves of it is not taken for one, and swept up later."""
    leaving = folder.with_name(f"{UNFINISHED}{folder.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object that belongs to a checkpoint.

    Args:
        path: the file.
        finite: refuse NaN and Infinity, which some published files hold.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no object.
    """
    return read_object(
        path, CheckpointError, "use another checkpoint, or fetch this one again", finite=finite
    )


def verify_folder(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: names the file that is missing, truncated or altered.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {MANIFEST}. "
            "Give a run's folder, or one of its checkpoints"
        )
    for name, written in _manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks the file {name}; use another checkpoint")
        size = path.stat().st_size
        if size != written["bytes"]:
            raise CheckpointError(
                f"{path} has {size} bytes instead of {written['bytes']}: it is truncated or "
                "altered; use another checkpoint"
            )
        if _fingerprint(path) != written:
            raise CheckpointError(
                f"{path} does not match its checksum: it was altered after it was saved; "
                "use another checkpoint"
            )


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, by name."""
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not files or not all(map(_is_record, files.values())):
        raise CheckpointError(
            f"{folder / MANIFEST} does not list the checkpoint's files with their sizes and "
            "checksums: it was altered; use another checkpoint"
        )
    return files


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("bytes"), int)
        and isinstance(value.get("sha256"), str)
    )


def step_folders(run: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by step, oldest first; good or not, but all finished."""
    folder = run / CHECKPOINTS
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return list(step_folders(run).values())


def newest_checkpoint(path: Path, known: Callable[[Path], bool] | None = None) -> Path:
    """The checkpoint that `path` means: itself, or the newest good one of a run.

    Args:
        path: a run's folder or a checkpoint's.
        known: whether a checkpoint is known to be good, so that its files are not read through.

    Raises:
        CheckpointError: there is none, or none is whole; says what is wrong with each.
    """

    def verify(folder: Path) -> None:
        if known is None or not known(folder):
            verify_folder(folder)

    if (path / MANIFEST).is_file():
        verify(path)
        return path
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run's folder or a checkpoint's")
    troubles = []
    for folder in reversed(checkpoints(path)):
        try:
            verify(folder)
        except CheckpointError as error:
            troubles.append(str(error))
        else:
            return folder
    if troubles:
        raise CheckpointError(f"no checkpoint in {path} is whole: {'; '.join(troubles)}")
    raise CheckpointError(f"{path} holds no checkpoint; give a run's folder or a checkpoint's")


def save_model(model: Model, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder."""
    write_json(folder / CONFIG, model.cfg.model_dump(mode="json"))
    save_tensors(model.state_dict(), folder / WEIGHTS)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; of names for the same tensor only the first is kept."""
    seen: set[object] = set()
    unique = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        unique[name] = tensor.detach().contiguous()
    save_file(unique, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or something else than safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path} as safetensors: {error}. Only safetensors is read, never pickle"
        ) from None


def load_model(path: Path, device: str = "cpu", backend: str = "auto") -> Model:
    """Load a model in evaluation mode.

    Args:
        path: a run's folder (its newest good checkpoint is taken) or a checkpoint's.
        device: where to put it.
        backend: a kernel's name, or "auto".

    Raises:
        CheckpointError: it is incomplete or altered, or a key or shape does not fit.
    """
    folder = newest_checkpoint(path)
    model, stored = open_own(folder, backend)
    materialize(model, stored["embed.weight"].dtype, device)
    load_weights(model, folder)
    return model.eval()


def open_own(folder: Path, backend: str = "auto") -> tuple[Model, dict[str, Stored]]:
    """A checkpoint's model without memory, and the stored tensors that fit it, by name.

    Raises:
        CheckpointError: the settings are not valid, or a key or shape does not fit them.
    """
    cfg, stored = read_own_config(folder / CONFIG), open_file(folder / WEIGHTS)
    check_room(folder, cfg, stored)
    with without_memory():
        model = build_model(cfg, backend)
    _check_fit(model, folder, stored)
    return model, stored


def check_room(folder: Path, cfg: ModelConfig | EncDecConfig, stored: Mapping[str, Stored]) -> None:
    """Refuse settings of a far larger model than the files hold, before it is built.

    Raises:
        CheckpointError: a parameter would have less than half a byte, or a layer no tensor.
    """
    size, parameters = sum(one.bytes for one in stored.values()), count(cfg).total
    layers = sum(len(stack.layers) for stack in cfg.stacks())
    if parameters > 2 * size or layers > len(stored):
        raise CheckpointError(
            f"{folder} does not fit its {CONFIG}: that describes {parameters:,} parameters in "
            f"{layers:,} layers, and the weights are {len(stored):,} tensors of {size:,} bytes in "
            "all; use another checkpoint"
        )


def read_own_config(path: Path) -> ModelConfig | EncDecConfig:
    """The model's settings in a checkpoint's config.json.

    Raises:
        CheckpointError: it is missing, or holds no valid settings.
    """
    values = read_json(path)
    try:
        return EncDecConfig(**values) if "encoder_layers" in values else ModelConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_weights(model: Model, folder: Path) -> None:
    """Read a checkpoint's weights into a model of the same settings, which takes their dtype.

    Raises:
        CheckpointError: a key is missing or unknown, or a shape differs; all are named.
    """
    stored = open_file(folder / WEIGHTS)
    _check_fit(model, folder, stored)
    model.to(stored["embed.weight"].dtype)
    head = stored.get("head.weight") if model.cfg.head.tied else None
    own = model.state_dict()
    for name, one in stored.items():
        if one is not head:
            read_into(one, own[name])
    if head is not None and not torch.equal(read(head), own["embed.weight"].cpu()):
        raise CheckpointError(
            f"{folder / WEIGHTS} holds a head.weight that differs from embed.weight, but the "
            "settings tie them; set head.tied = false"
        )


def _check_fit(model: Model, folder: Path, stored: dict[str, Stored]) -> None:
    """Refuse a file whose keys or shapes are not the model's."""
    own = model.state_dict()
    wanted = own.keys() - ({"head.weight"} if model.cfg.head.tied else set())
    problems = [f"missing {name}" for name in wanted - stored.keys()]
    problems += [f"unknown {name}" for name in stored.keys() - own.keys()]
    problems += [
        f"{name} is {list(stored[name].shape)} instead of {list(own[name].shape)}"
        for name in own.keys() & stored.keys()
        if own[name].shape != stored[name].shape
    ]
    if problems:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit: {', '.join(sorted(problems))}")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    """Force a file or a folder's entries onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
