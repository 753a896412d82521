"""Tensors on their way between a checkpoint's files and a model, by the rules of its family.

All of them are matched first. Then each is read into its place, a few at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moestro.checkpoints.families.slices import FUSED, TensorSlice, fused, key_pattern, slices
from moestro.checkpoints.families.table import LAYOUTS, Family, Rule
from moestro.checkpoints.quantized import Scheme, pairs, scheme
from moestro.checkpoints.tensor_files import Stored, Written, read, read_into, some
from moestro.errors import CheckpointError, ShapeError

Progress = Callable[[int, int], None]

_MOST_READERS = 4  # one reads while others convert, or wait for their memory
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Source(NamedTuple):
    """What a tensor is made from: its stored values, and their scales where it is quantised."""

    values: Stored
    scales: Stored | None = None
    scheme: Scheme | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, not of its packed values."""
        return self.values.shape if self.scheme is None else self.scheme.shape(self.values.shape)

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return self.values.bytes + (0 if self.scales is None else self.scales.bytes)

    def entry(self, index: int) -> Source:
        """Entry `index` of the first axis."""
        scales = None if self.scales is None else self.scales.rows(index)
        return Source(self.values.rows(index), scales, self.scheme)

    def load(self, dtype: torch.dtype) -> Tensor:
        """The tensor: a quantised one in `dtype`, another as it is stored."""
        if self.scheme is None or self.scales is None:
            return read(self.values)
        try:
            return self.scheme.dequantize(read(self.values), read(self.scales), dtype)
        except ShapeError as error:
            raise CheckpointError(f"{self.values.file}: {self.values.key}: {error}") from None


class Matched(NamedTuple):
    """A checkpoint that fits: the source of each piece, and tensors that repeat another.

    Attributes:
        sources: in the order of files and bytes.
        copies: (source, name of our tensor that it must equal).
        dtype: of the embedding.
        settings: of the model.
    """

    sources: list[tuple[TensorSlice, Source]]
    copies: list[tuple[Source, str]]
    dtype: torch.dtype
    settings: Any

    def rounded(self, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """Keys of plain tensors that parameters of `dtype` cannot hold exactly."""
        buffers = dict(model.named_buffers())
        return [
            source.values.key
            for piece, source in self.sources
            if source.scheme is None
            and piece.ours not in buffers
            and torch.promote_types(source.values.dtype, dtype) != dtype
        ]


def find_sources(stored: Mapping[str, Stored], hf_config: Mapping[str, Any]) -> dict[str, Source]:
    """Sources by key, quantised pairs joined under the key of the tensor that they stand for.

    Raises:
        CheckpointError: an unknown quantisation, or values without scales.
    """
    if not hf_config.get("quantization_config"):
        return {key: Source(one) for key, one in stored.items()}
    method = scheme(hf_config["quantization_config"])
    joined = pairs(stored, method)
    used = {key for pair in joined.values() for key in pair}
    sources = {key: Source(one) for key, one in stored.items() if key not in used}
    for key, (values, scales) in joined.items():
        sources[key] = Source(stored[values], stored[scales], method)
    return sources


def match(folder: Path, family: Family, model: Any, sources: Mapping[str, Source]) -> Matched:
    """Give every tensor of the model its sources; reads nothing.

    Args:
        folder: for messages.
        family: whose rules apply.
        model: may be on meta.
        sources: of the checkpoint, by key.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype; names them.

    Warns:
        UserWarning: a part of the checkpoint is left out; with its size.
    """
    sources = _without_left_out(folder, family, model.cfg, sources)
    own = unique_tensors(model)
    rules: Sequence[Rule] = family.rules
    if any(key.endswith(FUSED) for key in sources):
        rules = fused(rules, family.renamed)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    wanted = {piece.theirs: piece for piece in slices(rules, shapes, model.cfg)}
    copies = {**family.copies, **_tied(model, rules, wanted)}
    harmless = [key_pattern(name) for name in family.ignored]
    missing = [key for key in wanted if key not in sources]
    problems = [f"missing {key}" for key in missing]
    for key, source in sources.items():
        piece = wanted.get(copies.get(key, key))
        if piece is None:
            if not any(pattern.fullmatch(key) for pattern in harmless):
                problems.append(f"unknown {key} in {source.values.file.name}")
        else:
            problems += _misfits(key, piece, source)
    if problems:
        raise CheckpointError(
            f"{folder} does not fit its config.json ({family.model_type}): {some(problems)}"
        )
    found = [(wanted[key], source) for key, source in sources.items() if key in wanted]
    found.sort(key=lambda pair: (pair[1].values.file, pair[1].values.offset))
    again = [(source, wanted[copies[key]].ours) for key, source in sources.items() if key in copies]
    embed = next(source for piece, source in found if piece.ours == "embed.weight")
    return Matched(found, again, embed.values.dtype, model.cfg)


def _without_left_out(
    folder: Path, family: Family, settings: Any, sources: Mapping[str, Source]
) -> dict[str, Source]:
    """The sources that are not of a part that this project does not run."""
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
                UserWarning,
                stacklevel=4,
            )
    return kept


def pour(matched: Matched, model: nn.Module, progress: Progress | None = None) -> None:
    """Read every tensor into its place.

    Args:
        matched: from `match` for a model of the same settings.
        model: with memory.
        progress: called with (bytes read so far, bytes in all) after each tensor.

    Raises:
        CheckpointError: a file cannot be read, or a tensor that should repeat another differs.
    """
    own = unique_tensors(model)
    total = sum(source.bytes for _, source in matched.sources)
    done = 0

    def one(pair: tuple[TensorSlice, Source]) -> int:
        piece, source = pair
        _place(piece, source, piece.of(own[piece.ours]), matched.settings)
        return source.bytes

    with ThreadPoolExecutor(min(_MOST_READERS, torch.get_num_threads())) as readers:
        try:
            for count in readers.map(one, matched.sources):
                done += count
                if progress is not None:
                    progress(done, total)
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise
    for source, name in matched.copies:
        tensor = own[name]
        if not torch.equal(source.load(tensor.dtype).to(tensor.device, tensor.dtype), tensor):
            key = source.values.key
            raise CheckpointError(
                f"{source.values.file}: {key} differs from the tensor that config.json says it is "
                f"tied to; if {key} is right, set tie_word_embeddings to false there"
            )


def outgoing(family: Family, model: nn.Module, dtype: torch.dtype | None) -> list[Written]:
    """The tensors of a checkpoint of this model, each made when it is written.

    Args:
        family: whose rules apply.
        model: what to write.
        dtype: of the parameters; None: as they are. Buffers stay as they are.
    """
    own = unique_tensors(model)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}

    def written(piece: TensorSlice) -> Written:
        tensor = own[piece.ours]
        to = dtype if dtype is not None and piece.ours in parameters else tensor.dtype
        layout = LAYOUTS[piece.layout]

        def make() -> Tensor:
            return layout.save(piece.of(tensor), model.cfg)

        return Written(piece.theirs, to, piece.shape, make)

    found = slices(family.rules, shapes, model.cfg)
    if family.copied(model.cfg):
        keys = {piece.theirs: piece for piece in found}
        found += [keys[of]._replace(theirs=key) for key, of in family.copies.items()]
    return [written(piece) for piece in found]


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, detached; of tied names only the first."""
    state = model.state_dict()
    found: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.named_parameters()}
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in state}
    return found | buffers


def _tied(model: Any, rules: Sequence[Rule], wanted: Mapping[str, TensorSlice]) -> dict[str, str]:
    """Their keys of tied parameters → the key under which the tensor is read."""
    first: dict[Tensor, str] = {}
    found = {}
    by_name = {piece.ours: key for key, piece in wanted.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(parameter, name)
        if owner != name:
            for piece in slices(rules, {name: tuple(parameter.shape)}, model.cfg):
                found[piece.theirs] = by_name[owner]
    return found


def _misfits(key: str, piece: TensorSlice, source: Source) -> list[str]:
    """What is wrong with the shape and dtype of a source."""
    place = f"{key} in {source.values.file.name}"
    if source.shape != piece.shape:
        return [f"{place} is {list(source.shape)} instead of {list(piece.shape)}"]
    if source.scheme is None and source.values.dtype not in _FLOATS:
        return [f"{place} is {source.values.dtype}, not a float of 16 bits or more"]
    return []


@torch.no_grad()
def _place(piece: TensorSlice, source: Source, part: Tensor, settings: Any) -> None:
    """Read one tensor into its part; a stack that is changed on the way, entry by entry."""
    if source.scheme is None and piece.layout == "same":
        read_into(source.values, part)
        return
    layout = LAYOUTS[piece.layout]
    if len(source.shape) < 3:
        part.copy_(layout.load(source.load(part.dtype), settings))
        return
    for index, entry in enumerate(part):
        entry.copy_(layout.load(source.entry(index).load(part.dtype), settings))
