"""Packing a model: modules of packed weights replace its matrices, one after another.

Attention's projections, dense networks, experts, shared experts and the head are packed.
Embeddings, norms, routers and gates stay as they are; so does latent attention's `kv_up`, since
decoding multiplies by parts of it in both directions.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moestro.checkpoints.reading import open_unread
from moestro.checkpoints.stored_modules import StoredModule, stored_module
from moestro.checkpoints.transfer import Progress, Unread, load_tensors
from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import ConfigError, MoestroError, ShapeError
from moestro.kernels import backends
from moestro.kernels.formats import WEIGHTS, Format
from moestro.models.build import Model, build_model
from moestro.models.materialize import materialize, without_memory
from moestro.moe.packed import Packable, Packed

AS_IS = "as-is"
# An error of packing that one would rather not have: int8 adds half of it, int4 nine times as much.
_MUCH = 0.01
# Each matrix in the form that keeps the numbers of its file, where those are quantised already.
AS_STORED = Format("stored")

Taken = Callable[[str, Packed], None]
Begin = Callable[[Model], Taken]


def format_of(name: str) -> Format | None:
    """The format that --weights names; None: weights stay as they are.

    Raises:
        ConfigError: there is no such format.
    """
    if name == AS_IS:
        return None
    if name not in WEIGHTS:
        raise ConfigError(f"weights are {', '.join((*WEIGHTS, AS_IS))}; given {name!r}")
    return WEIGHTS[name]


def packable(model: nn.Module) -> dict[str, Packable]:
    """The modules of a model that packing replaces, by their full names."""
    return {path: each for path, each in model.named_modules() if isinstance(each, Packable)}


def packed(
    path: str, module: Packable, format: Format, stored: StoredModule | None = None
) -> Packed:
    """The packed form of a module.

    Raises:
        ShapeError, BackendError: see `Packable.to_packed`; names the module.
    """
    if format == AS_STORED:
        assert stored is not None, path
        format = stored.format
    try:
        return module.to_packed(format, stored)
    except ShapeError as error:
        raise ShapeError(f"{path}: {error}") from None


def blank_model(cfg: ModelConfig | EncDecConfig, format: Callable[[str], Format]) -> Model:
    """A packed model without memory; `format` is that of the module of some name."""
    with without_memory():
        model = build_model(cfg)
    for path, module in packable(model).items():
        model.set_submodule(path, module.to_packed(format(path)))
    return model.eval()


def is_packed(model: nn.Module) -> bool:
    """Whether any part of the model is packed."""
    return any(isinstance(module, Packed) for module in model.modules())


def pack(model: Model, format: Format) -> None:
    """Pack a model in place; the original tensor of each module is freed immediately.

    It is then for inference only: no parameter of it takes gradients any more.

    Args:
        model: on CPU, in evaluation mode; changed in place.
        format: of all packed weights.

    Raises:
        MoestroError: the model is in training mode, on another device, or packed already.
        ShapeError: weights hold NaN or infinity, or what the format cannot express.
        BackendError: there is no native library; says why.
    """
    if model.training:
        raise MoestroError("the model is in training mode; call model.eval() before packing")
    if is_packed(model):
        raise MoestroError("the model is packed already; open it again to pack it otherwise")
    device = model.embed.weight.device
    if device.type != "cpu":
        raise MoestroError(f"packed weights compute on CPU; the model is on {device}")
    backends.choose("auto", backends.PACKED)
    waiting = packable(model)
    while waiting:  # nothing here keeps what has been packed alive
        path = next(iter(waiting))
        model.set_submodule(path, packed(path, waiting.pop(path), format))
    model.requires_grad_(False)


def read_packed(
    folder: Path,
    format: Format,
    progress: Progress | None = None,
    accept_fields: Collection[str] = (),
    begin: Begin | None = None,
) -> Model:
    """Load a checkpoint straight into packed form, module by module and expert by expert.

    Memory peaks at the packed model and numbers of a few experts or rows; where packed modules are
    taken away, at one and those that the taker still holds, or at what is not packed.

    Args:
        folder: from `moestro.checkpoints.hub.find_checkpoint`.
        format: of all packed weights.
        progress: called with (bytes read so far, bytes in all).
        accept_fields: see `reading.read_settings`.
        begin: given the packed model without memory before anything is read, it returns what is
            called with each packed module and its name, and may take its tensors away.

    Raises:
        CheckpointError, ConfigError: see `reading.open_unread`.
        ShapeError, BackendError: see `pack`.

    Warns:
        UserWarning: weights are rounded that were quantised in another form; by how much.
    """
    backends.choose("auto", backends.PACKED)
    unread = open_unread(folder, accept_fields=accept_fields)
    model, total, done, rounded = unread.model, unread.bytes, 0, Rounding()
    rounds_to = None if unread.quantised else unread.dtype  # plain numbers beside others do not

    def moved(part: Unread) -> None:
        nonlocal done
        done += part.bytes
        if progress is not None:
            progress(done, total)

    def fill(names: Iterable[str]) -> None:
        part, before = unread.part(set(names)), done
        load_tensors(part, progress and (lambda now, _: progress(before + now, total)))
        moved(part)

    def from_file(path: str, module: Packable, names: Sequence[str]) -> Packed:
        """Packed as it is stored, without numbers of its own on the way."""
        part = unread.part(set(names))
        own = names[0].rpartition(".")[0]
        stored, others = stored_module(part.sources, own, model.cfg, _chosen(format), rounds_to)
        if others:
            fill(others)
        made = packed(path, module, format, stored)
        if path != "head" or not model.cfg.head.tied:  # else the embedding's, which is read again
            moved(part.part(set(names) - set(others)))
        rounded.add(stored)
        return made

    taken = begin and begin(_blank(unread, format))
    made = _pack_in_turn(model, unread.dtype, format, fill, from_file, taken)
    rounded.warn(folder.name)
    return made


def blank_packed(folder: Path, format: Format, accept_fields: Collection[str] = ()) -> Model:
    """What `read_packed` makes, without memory; raises as `reading.open_unread` does."""
    return _blank(open_unread(folder, accept_fields=accept_fields), format)


def _chosen(format: Format) -> Format | None:
    """What is asked for; None: what each module is stored in."""
    return None if format == AS_STORED else format


def _blank(unread: Unread, format: Format) -> Model:
    """The packed model that an unread one will be, without memory."""
    model = unread.model

    def own(path: str) -> Format:
        if format != AS_STORED:
            return format
        name = "embed" if path == "head" and model.cfg.head.tied else path
        names = {f"{name}.{each}" for each, _ in model.get_submodule(name).named_parameters()}
        return stored_module(unread.part(names).sources, name, model.cfg, None)[0].format

    blank = blank_model(model.cfg, own)
    materialize(blank, unread.dtype, "meta")
    return blank


def random_model(cfg: ModelConfig | EncDecConfig, format: Format | None) -> Model:
    """A model of random weights, for measuring; straight in packed form, or plain bf16.

    Every matrix is uniform with variance 1 / fan-in, so that activations stay of order one.

    Raises:
        BackendError: there is no native library to pack with; says why.
    """
    with without_memory():
        model = build_model(cfg)
    if format is not None:
        backends.choose("auto", backends.PACKED)
        return _pack_in_turn(model, torch.bfloat16, format, partial(_draw, model))
    materialize(model, torch.bfloat16, "cpu")
    _draw(model, model.state_dict())
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _draw(model: Model, names: Iterable[str]) -> None:
    """Random numbers for some of a model's tensors; gains are one, biases zero."""
    tensors = model.state_dict()
    for name in names:
        weight = tensors[name]
        if weight.dim() > 1:
            bound = (3 / weight.shape[-1]) ** 0.5
            weight.uniform_(-bound, bound)
        else:
            module = name.rpartition(".")[0].rpartition(".")[2]
            weight.fill_(1.0 if "norm" in module else 0.0)


def _pack_in_turn(
    model: Model,
    dtype: torch.dtype,
    format: Format,
    fill: Callable[[Iterable[str]], None],
    from_file: Callable[[str, Packable, Sequence[str]], Packed] | None = None,
    taken: Taken | None = None,
) -> Model:
    """Give a model without memory its numbers, and pack each module before the next has any.

    Args:
        model: without memory.
        dtype: of what is not packed.
        format: of what is.
        fill: writes the tensors of some names.
        from_file: packs a module whose numbers need not be written before; given its path, the
            module and the full names of its tensors.
        taken: is given each packed module.
    """
    alone: dict[str, Any] = packable(model)
    tied = model.cfg.head.tied
    if tied:
        del alone["head"]
    names, made = dict.fromkeys(model.state_dict()), {}
    for path, module in alone.items():
        materialize(module, dtype, "cpu")  # memory that nothing is written to costs none
        own = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if from_file is None:
            fill(own)
            made[path] = packed(path, module, format)
        else:
            made[path] = from_file(path, module, own)
        if taken is not None:
            taken(path, made[path])
        names = {name: None for name in names if name not in own}
        module.to_empty(device="meta")
    materialize(model, dtype, "cpu", without=alone.values())
    fill(names)
    for path, module in made.items():
        model.set_submodule(path, module)
    if tied:  # beside the embedding, which stays
        head = from_file("head", model.head, ["embed.weight"]) if from_file else None
        head = head or packed("head", model.head, format)
        if taken is not None:
            taken("head", head)
        model.set_submodule("head", head)
    model.requires_grad_(False)
    return model.eval()


class Rounding:
    """What packing has rounded, of numbers that were quantised in another form."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.sums = torch.zeros(2, dtype=torch.float64, device="cpu")

    def add(self, stored: StoredModule) -> None:
        """Count a packed module."""
        if stored.rounding[0] > 0 and (kinds := stored.kinds()):
            self.kinds += kinds
            self.sums += stored.rounding

    def warn(self, model: str) -> None:
        """Say it, if anything was rounded that was quantised before."""
        names = ", ".join(name for name, _ in self.kinds.most_common())
        if not names:
            return
        error = float((self.sums[0] / self.sums[1]).sqrt())
        words = (
            f"{model}: weights in {names} are packed in another form, which adds an error of "
            f"{100 * error:.2f} % (root mean square, of the weights')"
            + ("; --weights int8, or as-is, stays far closer to them" if error > _MUCH else "")
        )
        warnings.warn(words, UserWarning, stacklevel=3)
