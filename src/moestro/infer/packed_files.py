"""Packed models on disk: one file, mapped into memory instead of read.

The file is a line that says what it is, the length of a JSON header, the header, and every tensor
on a page of its own: packed weights as the kernels stream them, other parameters as they are. The
header holds the model's settings, the place of each tensor, and the checkpoint's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import CheckpointError, ConfigError, ShapeError
from moestro.infer.quantize import places
from moestro.kernels import native_cpu
from moestro.kernels.packing import PAGE, Format, PackedExperts, PackedMatrix, check_format
from moestro.models.build import Model, build_model
from moestro.models.checkpoint import CONFIG, MANIFEST
from moestro.models.linear import PackedLinear
from moestro.models.materialize import without_memory
from moestro.moe import packed as modules
from moestro.moe.experts import StackedWeights

MAGIC = b"moestro packed model\n"
VERSION = 1
# What the bytes of packed tensors mean: `moestro.kernels.packing`.
LAYOUT = 1
_START = len(MAGIC) + 8
_MOST_HEADER = 1 << 30
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


class _Section(NamedTuple):
    """A tensor and where it stands in the file."""

    tensor: Tensor
    offset: int


def default_path(folder: Path, format: Format) -> Path:
    """Where the packed form of a checkpoint is kept: beside its weights.

    Or, where that is a folder of the Hugging Face hub's cache or cannot be written, in a cache of
    our own: $XDG_CACHE_HOME/moestro, or ~/.cache/moestro, under the checkpoint's fingerprint.
    """
    group = "" if format.kind == "bfloat16" else f"-{format.group}"
    name = f"packed-{format.kind}{group}.moestro"
    inner = folder.absolute()
    of_hub = inner.parent.name == "snapshots" and inner.parent.parent.name.startswith("models--")
    if (folder / name).exists() or (not of_hub and os.access(folder, os.W_OK)):
        return folder / name
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = stated if stated.is_absolute() else Path.home() / ".cache"
    key = hashlib.sha256(json.dumps(fingerprint(folder)).encode()).hexdigest()
    return cache / "moestro" / key[:32] / name


def fingerprint(folder: Path) -> dict[str, str]:
    """What tells one checkpoint from another: a SHA-256 for each file that holds its weights.

    Of a large file only its size and 16 pieces of 64 KiB count, so that a start stays quick; one of
    ours has a manifest with the sums of all its files, which is taken.
    """
    manifest = folder / MANIFEST
    wanted = [manifest] if manifest.is_file() else sorted(folder.glob("*.safetensors"))
    files = [*wanted, folder / CONFIG]
    return {path.name: _sampled(path) for path in files if path.is_file()}


def is_of(path: Path, folder: Path) -> bool:
    """Whether a file is the packed form of this very checkpoint, as far as its header says."""
    try:
        return path.is_file() and bool(_read_header(path)[0]["source"] == fingerprint(folder))
    except (CheckpointError, KeyError, OSError):
        return False


def save(model: Model, path: Path, format: Format, source: dict[str, str]) -> None:
    """Write a packed model, whole or not at all.

    Args:
        model: packed.
        path: the new file; one that is there is replaced.
        format: that it was packed in.
        source: the checkpoint's `fingerprint`.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    tensors = dict(_plain(model)) | dict(_packed_tensors(model))
    header: dict[str, Any] = {
        "version": VERSION,
        "layout": LAYOUT,
        "weights": format._asdict(),
        "source": source,
        "model": model.cfg.model_dump(mode="json"),
        "packed": {name: _described(module) for name, module in _packed_modules(model)},
    }
    # The header's own length decides where tensors begin, so offsets count from there.
    at, sections = 0, {}
    for name, tensor in tensors.items():
        sections[name] = _Section(tensor, at)
        at += -(-tensor.numel() * tensor.element_size() // PAGE) * PAGE
    header["tensors"] = {
        name: {"offset": offset, "dtype": _name(tensor.dtype), "shape": list(tensor.shape)}
        for name, (tensor, offset) in sections.items()
    }
    text = json.dumps(header).encode()
    begin = -(-(_START + len(text)) // PAGE) * PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-", delete=False) as file:
        try:
            file.write(MAGIC + len(text).to_bytes(8, "little") + text)
            for tensor, offset in sections.values():
                file.seek(begin + offset)
                _write(file, tensor)
            file.truncate(begin + at)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def load(path: Path, source: dict[str, str] | None = None) -> Model:
    """Map a packed model; the system reads ahead of its use.

    Args:
        path: from `save`. It must not be written to while the model lives.
        source: the `fingerprint` of the checkpoint that it must be of; None: any.

    Raises:
        CheckpointError: it is missing, no packed model, truncated, of another version of this
            program, or of another checkpoint.
    """
    header, begin = _read_header(path)
    if source is not None and header["source"] != source:
        raise CheckpointError(
            f"{path} is the packed form of another checkpoint than the one beside it, or that one "
            "has changed; remove the file to pack it again"
        )
    with path.open("rb") as file:
        # Private: a write to a parameter stays in this process instead of ending it.
        memory = mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_WILLNEED)
    try:
        return _built(header, memory, begin)
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError, ShapeError) as error:
        raise _broken(path, f"its header does not fit together ({error!r})") from None


def stored_format(path: Path) -> Format:
    """The format that a file's weights are packed in.

    Raises:
        CheckpointError: see `load`.
    """
    header, _ = _read_header(path)
    try:
        return Format(**header["weights"])
    except (KeyError, TypeError) as error:
        raise _broken(path, f"its header does not fit together ({error!r})") from None


def _built(header: dict[str, Any], memory: mmap.mmap, begin: int) -> Model:
    """The model of a header, its tensors in the mapped memory."""
    tensors = {
        name: _mapped(memory, begin + place["offset"], place["dtype"], place["shape"])
        for name, place in header["tensors"].items()
    }
    settings = header["model"]
    encdec = "encoder_layers" in settings
    cfg: ModelConfig | EncDecConfig = (
        EncDecConfig(**settings) if encdec else ModelConfig(**settings)
    )
    with without_memory():
        model = build_model(cfg)
    found = {place.path: place for place in places(model)}
    if found.keys() != header["packed"].keys():
        raise ValueError("other modules are packed than this version packs")
    for path, facts in header["packed"].items():
        place = found[path]
        module = _module(path, facts, tensors)
        _check_sizes(module, place.module)
        setattr(place.parent, place.name, module)
    made: dict[Tensor, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        for name, old in list(module.named_parameters(recurse=False)):
            tensor = tensors[f"{path}.{name}" if path else name]
            if tensor.shape != old.shape:
                raise ValueError(f"{path}.{name} has another shape than the settings give it")
            made.setdefault(old, nn.Parameter(tensor, requires_grad=False))
            setattr(module, name, made[old])
        for name, _ in list(module.named_buffers(recurse=False)):
            setattr(module, name, tensors[f"{path}.{name}"])
    return model.eval()


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where its tensors begin."""
    try:
        with path.open("rb") as file:
            start = file.read(_START)
            if not start.startswith(MAGIC):
                raise CheckpointError(
                    f"{path} is no packed model of moestro; remove it to pack the checkpoint again"
                )
            length = int.from_bytes(start[len(MAGIC) :], "little")
            text = file.read(length) if length < _MOST_HEADER else b""
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if len(start) < _START or len(text) < length:
        raise _broken(path, "it ends within its header")
    try:
        header = json.loads(text)
        version, layout = header["version"], header["layout"]
    except (ValueError, KeyError, TypeError):
        raise _broken(path, "its header is no JSON") from None
    if (version, layout) != (VERSION, LAYOUT):
        raise CheckpointError(
            f"{path} was packed by another version of moestro (format {version}, layout {layout}; "
            f"this one reads {VERSION} and {LAYOUT}); remove it to pack the checkpoint again"
        )
    begin = -(-(_START + length) // PAGE) * PAGE
    ends = [begin]
    with suppress(KeyError, TypeError, AttributeError):
        ends += [begin + place["offset"] + _bytes(place) for place in header["tensors"].values()]
    if size < max(ends):
        raise _broken(path, f"it has {size} bytes of {max(ends)}")
    return header, begin


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated or altered: {why}; remove it to pack the checkpoint again"
    )


def _bytes(place: dict[str, Any]) -> int:
    dtype: torch.dtype = getattr(torch, place["dtype"])
    return int(math.prod(place["shape"])) * dtype.itemsize


def _mapped(memory: mmap.mmap, offset: int, dtype: str, shape: list[int]) -> Tensor:
    kind = getattr(torch, dtype)
    count = math.prod(shape)
    if not isinstance(kind, torch.dtype) or offset < 0:
        raise ValueError(f"no tensor is {dtype} at {offset}")
    if count == 0:
        return torch.empty(shape, dtype=kind, device="cpu")
    return torch.frombuffer(memory, dtype=kind, count=count, offset=offset).view(shape)


def _write(file: IO[bytes], tensor: Tensor) -> None:
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel():
        file.write(flat.view(torch.uint8).numpy().data)


def _plain(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that are not packed."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _packed_modules(model: Model) -> Iterator[tuple[str, modules.Packed]]:
    for name, module in model.named_modules():
        if isinstance(module, modules.Packed):
            yield name, module


def _packed_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Packed bytes and the fp32 biases beside them, by the module's name and theirs."""
    for name, module in _packed_modules(model):
        if isinstance(module, PackedLinear):
            parts = {"packed": module.weights.data, "bias_O": module.bias_O}
        else:
            assert isinstance(module, modules.PackedWeights)
            weights = module.weights
            parts = {
                "packed": weights.data, "up_bias": weights.up_bias, "down_bias": weights.down_bias
            }  # fmt: skip
        for part, tensor in parts.items():
            if tensor is not None:
                yield f"{name}.{part}", tensor


def _described(module: modules.Packed) -> dict[str, Any]:
    """What the header says of a packed module."""
    if isinstance(module, PackedLinear):
        weights = module.weights
        return {"rows": weights.rows, "columns": weights.columns, **weights.format._asdict()}
    assert isinstance(module, modules.PackedWeights)
    packed = module.weights
    return {
        "experts": packed.num_experts,
        "dim": packed.dim,
        "hidden_dim": packed.hidden_dim,
        "activation": packed.activation,
        "dense": isinstance(module, modules.PackedFeedForward),
        **packed.format._asdict(),
    }


def _module(name: str, facts: dict[str, Any], tensors: dict[str, Tensor]) -> modules.Packed:
    """A packed module from what the header says of it."""
    format, data = Format(facts["kind"], facts["group"]), tensors[f"{name}.packed"]
    check_format(format)
    if "rows" in facts:
        matrix = PackedMatrix(data, facts["rows"], facts["columns"], format)
        return PackedLinear(matrix, tensors.get(f"{name}.bias_O"))
    weights = PackedExperts(
        data, facts["experts"], facts["dim"], facts["hidden_dim"], facts["activation"], format,
        tensors.get(f"{name}.up_bias"), tensors.get(f"{name}.down_bias"),
    )  # fmt: skip
    return (modules.PackedFeedForward if facts["dense"] else modules.PackedExperts)(weights)


def _check_sizes(module: modules.Packed, replaced: nn.Module) -> None:
    """Refuse packed bytes and biases that are not what the kernels would read."""
    biases: list[tuple[Tensor | None, Tensor | None]]
    given: tuple[object, ...]
    wanted: tuple[object, ...]
    if isinstance(module, PackedLinear) and isinstance(replaced, nn.Linear):
        weights, (rows, columns) = module.weights, replaced.weight.shape
        data, size = weights.data, native_cpu.matrix_bytes(rows, columns, weights.format)
        given, wanted = (weights.rows, weights.columns), (rows, columns)
        biases = [(module.bias_O, replaced.bias)]
    elif isinstance(module, modules.PackedWeights) and isinstance(replaced, StackedWeights):
        packed, (num_experts, dim, hidden_dim) = module.weights, replaced.down.shape
        slab = native_cpu.slab_bytes(dim, hidden_dim, packed.activation, packed.format)
        data, size = packed.data, num_experts * slab
        given = (packed.num_experts, packed.dim, packed.hidden_dim, packed.activation)
        wanted = (num_experts, dim, hidden_dim, replaced.activation)
        own = replaced.biases or (None, None)
        biases = [(packed.up_bias, own[0]), (packed.down_bias, own[1])]
    else:
        raise ValueError(f"{type(replaced).__name__} is packed as {type(module).__name__}")
    fits = (data.dtype, data.numel()) == (torch.uint8, size) and given == wanted
    for bias, like in biases:
        fits = fits and (bias is None) == (like is None)
        if bias is not None and like is not None:
            fits = fits and bias.dtype == torch.float32 and bias.shape == like.shape
    if not fits:
        raise ValueError(f"packed weights are {given} where the settings need {wanted}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
