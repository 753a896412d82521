"""Tensors on their way between a checkpoint's sources and a model, by the rules of its family.

All of them are matched first. Then each is read into its place, a few at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moestro.checkpoints.families.slices import FUSED, TensorSlice, fused, key_pattern, slices
from moestro.checkpoints.families.table import LAYOUTS, Family, Rule
from moestro.checkpoints.tensor_files import LeftOut, Source, Written, some
from moestro.errors import CheckpointError
from moestro.models.build import Model

Progress = Callable[[int, int], None]

_MOST_READERS = 4  # one reads while others convert, or wait for their memory
_FLOATS = (None, torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Unread(NamedTuple):
    """A checkpoint that fits its model, before a byte of a tensor is read.

    Attributes:
        model: without memory.
        dtype: of the stored embedding; bf16 if that is quantised.
        sources: what fills each slice of the model's tensors, in the order of files and bytes.
        copies: (source, name of our tensor that it must equal).
        of_gguf: whether they are of a GGUF file, whose norms and routers are always fp32.
    """

    model: Model
    dtype: torch.dtype
    sources: list[tuple[TensorSlice, Source]]
    copies: list[tuple[Source, str]]
    of_gguf: bool = False

    @property
    def bytes(self) -> int:
        """Bytes on disk of all sources."""
        return sum(source.bytes for _, source in self.sources)

    @property
    def quantised(self) -> bool:
        """Whether any source is, or they are of a GGUF file."""
        return self.of_gguf or any(source.stored_in for _, source in self.sources)

    def part(self, names: Container[str]) -> Unread:
        """What fills the tensors of these names, and repeats them."""
        return self._replace(
            sources=[pair for pair in self.sources if pair[0].ours in names],
            copies=[pair for pair in self.copies if pair[1] in names],
        )

    def rounded(self) -> list[str]:
        """Keys of plain tensors that parameters of `dtype` cannot hold exactly."""
        buffers = dict(self.model.named_buffers())
        return [
            source.key
            for place, source in self.sources
            if source.dtype is not None
            and place.ours not in buffers
            and torch.promote_types(source.dtype, self.dtype) != self.dtype
        ]


def match(folder: Path, family: Family, model: Model, sources: Mapping[str, Source]) -> Unread:
    """Give every tensor of the model its sources; reads nothing.

    Args:
        folder: for messages.
        family: whose rules apply.
        model: may be without memory.
        sources: of the checkpoint, by key, in the order of files and bytes.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of a different shape or dtype; names them.

    Warns:
        LeftOut: a part of the checkpoint is not run here; with its size.
    """
    sources = {_plain_key(key, family.beginnings): source for key, source in sources.items()}
    sources = _without_left_out(folder, family, model.cfg, sources)
    rules: Sequence[Rule] = family.rules
    if any(key.endswith(FUSED) for key in sources):
        rules = fused(rules, family.renamed)
    shapes = {name: tuple(tensor.shape) for name, tensor in unique_tensors(model).items()}
    wanted = {place.theirs: place for place in slices(rules, shapes, model.cfg)}
    copies = {**family.copies, **_tied(model, rules, wanted)}
    ignored = [key_pattern(name) for name in family.ignored]
    problems = [f"missing {key}" for key in wanted if key not in sources]
    for key, source in sources.items():
        place = wanted.get(copies.get(key, key))
        if place is not None:
            problems += _misfits(key, place, source)
        elif not any(pattern.fullmatch(key) for pattern in ignored) and not _adds_nothing(
            key, source, sources
        ):
            problems.append(f"unknown {key} in {source.file.name}")
    if problems:
        raise CheckpointError(
            f"{folder} does not fit its config.json ({family.model_type}): {some(problems)}"
        )
    found = [(wanted[key], source) for key, source in sources.items() if key in wanted]
    again = [(source, wanted[copies[key]].ours) for key, source in sources.items() if key in copies]
    embed = next(source for place, source in found if place.ours == "embed.weight")
    return Unread(model, embed.dtype or torch.bfloat16, found, again)


def _plain_key(key: str, beginnings: Mapping[str, str]) -> str:
    for theirs, plain in beginnings.items():
        if key.startswith(theirs):
            return plain + key.removeprefix(theirs)
    return key


def _without_left_out(
    folder: Path, family: Family, settings: Any, sources: Mapping[str, Source]
) -> dict[str, Source]:
    """The sources without those of a part that this project does not run."""
    kept = dict(sources)
    for what, names in family.left_out(settings).items():
        patterns = [key_pattern(name) for name in names]
        keys = [key for key in kept if any(pattern.fullmatch(key) for pattern in patterns)]
        left = [kept.pop(key) for key in keys]
        if left:
            warnings.warn(
                f"{folder} also holds {what}, which moestro does not run: {len(left)} tensors with "
                f"{sum(math.prod(source.shape) for source in left):,} numbers, "
                f"{sum(source.bytes for source in left):,} bytes. They are left out, also when the "
                "model is written again",
                LeftOut,
                stacklevel=4,
            )
    return kept


def load_tensors(
    unread: Unread, progress: Progress | None = None, into: Mapping[str, Tensor] | None = None
) -> None:
    """Read every tensor into its place.

    Args:
        unread: from `match`, or a part of it.
        progress: called with (bytes read so far, bytes in all) after each tensor.
        into: tensors by name; None: those of the model, which has memory by now.

    Raises:
        CheckpointError: a file cannot be read, or a tensor that should repeat another differs.
    """
    own, total, done = into or unique_tensors(unread.model), unread.bytes, 0

    def one(pair: tuple[TensorSlice, Source]) -> int:
        place, source = pair
        _load_slice(place, source, place.of(own[place.ours]), unread.model.cfg)
        return source.bytes

    with ThreadPoolExecutor(_MOST_READERS) as readers:
        try:
            for count in readers.map(one, unread.sources):
                done += count
                if progress is not None:
                    progress(done, total)
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise
    for source, name in unread.copies:
        tensor = own[name]
        if not torch.equal(source.load(tensor.dtype).to(tensor.device, tensor.dtype), tensor):
            raise CheckpointError(
                f"{source.file}: {source.key} differs from the tensor that config.json says it is "
                f"tied to; if {source.key} is right, untie them there: set tie_word_embeddings "
                "(head.tied in this project's layout) to false"
            )


def outgoing(
    family: Family,
    model: Model,
    dtype: torch.dtype | None = None,
    fused_experts: bool = False,
    tensors: Callable[[str], Tensor] | None = None,
) -> list[Written]:
    """The tensors of a checkpoint of this model, each made when it is written.

    Args:
        family: whose rules apply.
        model: what to write.
        dtype: of the parameters; None: as they are. Buffers stay as they are.
        fused_experts: all experts of a layer in one tensor, where each has tensors of its own.
        tensors: what makes one of the model's by name, which then may be without memory; called
            again for each tensor of theirs, in the order of ours.
    """
    rules = fused(family.rules, family.renamed) if fused_experts else family.rules
    own = unique_tensors(model)
    made = tensors or own.__getitem__
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}

    def written(place: TensorSlice) -> Written:
        kind = own[place.ours].dtype
        to = dtype if dtype is not None and place.ours in parameters else kind
        save = LAYOUTS[place.layout].save
        return Written(
            place.theirs, to, place.shape, lambda: save(place.of(made(place.ours)), model.cfg)
        )

    found = slices(rules, shapes, model.cfg)
    if family.copied(model.cfg):
        keys = {place.theirs: place for place in found}
        found += [keys[of]._replace(theirs=key) for key, of in family.copies.items()]
    return [written(place) for place in found]


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, detached; of tied names only the first."""
    state = model.state_dict()
    found: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.named_parameters()}
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in state}
    return found | buffers


def _tied(model: Model, rules: Sequence[Rule], wanted: Mapping[str, TensorSlice]) -> dict[str, str]:
    """Their keys of tied parameters → the key under which the tensor is read."""
    first: dict[Tensor, str] = {}
    found = {}
    by_name = {place.ours: key for key, place in wanted.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(parameter, name)
        if owner != name:
            for place in slices(rules, {name: tuple(parameter.shape)}, model.cfg):
                found[place.theirs] = by_name[owner]
    return found


def _adds_nothing(key: str, source: Source, sources: Mapping[str, Source]) -> bool:
    """Whether this is a bias of zeros beside a quantised matrix, as AutoGPTQ wrote for all."""
    weight = sources.get(key.removesuffix(".bias") + ".weight") if key.endswith(".bias") else None
    if weight is None or weight.dtype is not None or source.shape != weight.shape[:1]:
        return False
    return source.dtype in _FLOATS[1:] and not source.load(torch.float32).any()


def _misfits(key: str, place: TensorSlice, source: Source) -> list[str]:
    """What is wrong with the shape and dtype of a source."""
    where = f"{key} in {source.file.name}"
    if source.shape != place.shape:
        return [f"{where} is {list(source.shape)} instead of {list(place.shape)}"]
    if source.dtype not in _FLOATS:
        return [f"{where} is {source.dtype}, not a float of 16 bits or more"]
    return []


@torch.no_grad()
def _load_slice(place: TensorSlice, source: Source, part: Tensor, settings: Any) -> None:
    """Read one tensor into its slice; a stack whose layout changes, entry by entry."""
    load = LAYOUTS[place.layout].load
    if place.layout == "same":
        source.load_into(part)
    elif len(source.shape) < 3:
        part.copy_(load(source.load(part.dtype), settings))
    else:
        for index, entry in enumerate(part):
            entry.copy_(load(source.entry(index).load(part.dtype), settings))
