"""The header of a packed file: made for a model, read, and held against its own settings.

A file is not trusted. Its settings say which tensors it has, of which shape and dtype; a header
that says otherwise, or puts them outside the file or over each other, is refused before they are
used.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moestro.checkpoints.quantize import AS_STORED, blank_model
from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import CheckpointError, ShapeError
from moestro.kernels.addresses import FLOATS
from moestro.kernels.packing import PAGE, Format, check_format
from moestro.models.build import Model
from moestro.models.count import count
from moestro.moe.packed import Packed

MAGIC = b"moestro packed model\n"
VERSION = 1
# What the bytes of packed tensors mean: `moestro.kernels.packing`.
LAYOUT = 1
FIELDS = ("weights", "source", "model", "packed", "tensors")
_START = len(MAGIC) + 8
_MOST_BYTES = 1 << 22
_LAYERS = {"num_layers", "encoder_layers", "decoder_layers"}
# What a header of wrong types or sizes may raise in the checks and settings that it meets.
_UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Section(NamedTuple):
    """A tensor, perhaps without memory, and where it stands, counted from the header's end."""

    tensor: Tensor
    offset: int


def make(
    model: Model, format: Format, source: dict[str, str]
) -> tuple[bytes, dict[str, Section], int]:
    """The first bytes of a model's file, where each tensor follows, and their length in all.

    Raises:
        ShapeError: the parameters are not of one dtype.
    """
    _check_dtypes(model, tensors(model))
    at, sections = 0, {}
    for name, tensor in tensors(model).items():
        sections[name] = Section(tensor, at)
        at += -(-tensor.nbytes // PAGE) * PAGE
    header = {
        "version": VERSION,
        "layout": LAYOUT,
        "weights": format.described(),
        "source": source,
        "model": model.cfg.model_dump(mode="json"),
        "packed": _described(model),
        "tensors": {
            name: {"offset": offset, "dtype": _name(tensor), "shape": list(tensor.shape)}
            for name, (tensor, offset) in sections.items()
        },
    }
    text = json.dumps(header).encode()
    start = MAGIC + len(text).to_bytes(8, "little") + text
    return start.ljust(-(-len(start) // PAGE) * PAGE, b"\0"), sections, at


def read(path: Path) -> tuple[dict[str, Any], int]:
    """The header, which has all its fields, and where its tensors begin.

    Raises:
        CheckpointError: there is none, or one of another version of this program.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_START)
            if not start.startswith(MAGIC):
                raise CheckpointError(
                    f"{path} is not a packed model; remove it to pack the checkpoint again"
                )
            length = int.from_bytes(start[len(MAGIC) :], "little")
            text = file.read(length) if length < _MOST_BYTES else b""
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if len(start) < _START or len(text) < length:
        raise broken(path, "it ends within its header")
    try:
        header = json.loads(text, parse_int=_whole, parse_float=_float)
        version, layout = header["version"], header["layout"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise broken(path, "its header is not JSON, or has numbers beyond any size") from None
    if (version, layout) != (VERSION, LAYOUT):
        raise CheckpointError(
            f"{path} was packed by another version of moestro (format {version!r:.40}, layout "
            f"{layout!r:.40}; this one reads {VERSION} and {LAYOUT}); remove it to pack the "
            "checkpoint again"
        )
    for field in FIELDS:
        if not isinstance(header.get(field), dict):
            raise broken(path, f"its header does not fit together: it has no {field}")
    return header, -(-(_START + length) // PAGE) * PAGE


def format_of(path: Path, header: dict[str, Any]) -> Format:
    """The format of all packed weights.

    Raises:
        CheckpointError: there is none like this.
    """
    try:
        format = Format(**header["weights"])
        if format != AS_STORED:
            check_format(format)
    except _UNFIT as error:
        raise broken(path, f"its header does not fit together: {error}") from None
    return format


def unfilled(path: Path, header: dict[str, Any], nbytes: int) -> tuple[Model, dict[str, Section]]:
    """The packed model of a header's settings, without memory, and where its tensors are.

    `nbytes` is the length of the file after its header.

    Raises:
        CheckpointError: the header says what its settings do not, or more than the file has.
    """
    format = format_of(path, header)
    try:
        model = _model(header["model"], format, header["packed"], nbytes)
        if header["packed"] != _described(model):
            raise ValueError("its modules are not packed as its settings say")
        return model, _sections(header["tensors"], model, nbytes)
    except _UNFIT as error:
        why = " ".join(str(error).split())[:300]
        raise broken(path, f"its header does not fit together: {why}") from None


def broken(path: Path, why: str) -> CheckpointError:
    """What is said of a file that cannot be used."""
    return CheckpointError(
        f"{path} is truncated or altered: {why}; remove it to pack the checkpoint again"
    )


def tensors(model: Model) -> dict[str, Tensor]:
    """All that a packed model's file holds: parameters, buffers, packed bytes and their biases."""
    found: dict[str, Tensor] = dict((*model.named_parameters(), *model.named_buffers()))
    for path, module in model.named_modules():
        if isinstance(module, Packed):
            found |= {f"{path}.{part}": tensor for part, tensor in module.parts().items()}
    return found


def _model(settings: dict[str, Any], format: Format, packed: dict[str, Any], nbytes: int) -> Model:
    # Before anything is built as large as they say: a tensor has a page, and a weight four bits.
    for name in _LAYERS & settings.keys():
        if type(settings[name]) is not int or settings[name] > nbytes // PAGE:
            raise ValueError(f"{name} is {settings[name]!r} in {nbytes} bytes")
    cfg = (EncDecConfig if "encoder_layers" in settings else ModelConfig)(**settings)
    total = count(cfg).total
    if total > 2 * nbytes:
        raise ValueError(f"its settings have {total} parameters, which {nbytes} bytes do not hold")

    def own(path: str) -> Format:
        if format != AS_STORED:
            return format
        return Format(packed[path]["kind"], packed[path]["group"], packed[path].get("down"))

    return blank_model(cfg, own)


def _described(model: Model) -> dict[str, dict[str, Any]]:
    """What the header says of each packed module."""
    modules = model.named_modules()
    return {path: module.described() for path, module in modules if isinstance(module, Packed)}


def _sections(given: dict[str, Any], model: Model, nbytes: int) -> dict[str, Section]:
    """Where the file has each tensor of the model; refuses what does not fit by a ValueError."""
    wanted, found = tensors(model), {}
    if given.keys() != wanted.keys():
        raise ValueError(f"its tensors are not the settings': {given.keys() ^ wanted.keys()}")
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for name, like in wanted.items():
        offset, dtype, shape = (given[name][key] for key in ("offset", "dtype", "shape"))
        dtypes = FLOATS if name in own and like.is_floating_point() else (like.dtype,)
        made = {_name(each): each for each in (like.to(kind) for kind in dtypes)}
        if dtype not in tuple(made) or shape != list(like.shape):
            raise ValueError(
                f"{name} is {dtype} {shape} where the settings have {' or '.join(made)} "
                f"{list(like.shape)}"
            )
        end = offset + made[dtype].nbytes
        if type(offset) is not int or offset < 0 or offset % PAGE or end > nbytes:
            raise ValueError(f"{name} is at {offset} to {end} of {nbytes} bytes")
        found[name] = Section(made[dtype], offset)
    _check_dtypes(model, {name: section.tensor for name, section in found.items()})
    spans = sorted((at, at + tensor.nbytes, name) for name, (tensor, at) in found.items())
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise ValueError(f"{name} and {other} overlap")
    return found


def _check_dtypes(model: Model, given: dict[str, Tensor]) -> None:
    dtypes = {_name(given[name]) for name, _ in model.named_parameters()}
    if len(dtypes) > 1:
        raise ShapeError(f"the parameters of a packed model have one dtype; given {dtypes}")


def _whole(text: str) -> int:
    if len(text) > 16:
        raise ValueError(f"{text[:16]}… is too large")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if abs(number) > 1e12:
        raise ValueError(f"{number} is too large")
    return number


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
