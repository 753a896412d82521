"""Adapters in PEFT's format, written and read.

PEFT keeps all experts of a stacked weight in two matrices (peft's tuners/lora/layer.py,
ParamWrapper): lora_A [E · N, I] with the expert slowest, lora_B [O, N · E] with the expert fastest.
The wrapper of gate_up lies inside that of down where there are both; a lone wrapper says in
adapter_config.json alone which of the two it is. Other programs read one matrix per expert.

I and O are those of the product. Where transformers stores a weight as [E, I, O] and its class does
not say so (`is_transposed`), PEFT takes one for the other: A then has O columns, and B I rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moestro.checkpoints.families.slices import TensorSlice, fused, slices
from moestro.checkpoints.families.table import LAYOUTS, OF_ROWS, Family, apart, together
from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.peft_settings import PEFT_CONFIG, PeftSettings, read_peft_settings
from moestro.checkpoints.tensor_files import read_tensors, some
from moestro.checkpoints.transfer import unique_tensors
from moestro.errors import CheckpointError, ConfigError
from moestro.files import write_json
from moestro.models.adapters import Place, places
from moestro.models.build import Model, build_model
from moestro.models.materialize import without_memory
from moestro.moe.lora import Adapter

PEFT_FILE = "adapter_model.safetensors"
_BEGINS, _ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(?:[AB]\.weight|embedding_[AB])")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Families whose class of experts does not say that its weights are transposed.
_UNSAID = frozenset({"llama4_text"})


class Pair(NamedTuple):
    """An adapter of a slice of a weight: A [.., N, I], B [.., O, N], and its scale."""

    a: Tensor
    b: Tensor
    scale: float

    def turned(self) -> Pair:
        """Of the transposed weight."""
        return Pair(self.b.mT, self.a.mT, self.scale)


def write_peft(
    model: Model, family: Family, folder: Path, base: str, per_expert: bool = False
) -> None:
    """Write a model's adapters as PEFT does: a new folder, whole or not at all.

    Args:
        model: With adapters; its weights are not looked at.
        family: Whose names to write.
        folder: New.
        base: What the config calls the model.
        per_expert: Matrices for each expert, by the names that the family is published with.

    Raises:
        ConfigError: the family's experts are published in one tensor, so there are no such names.
    """
    pairs: dict[str, Pair] = {}
    inner = _wrapped_twice(model)
    modules, parameters, keys = set(), set(), {}
    for place in places(model):
        if place.adapter is None:
            continue
        for part in _slices(place, family, model.cfg, per_expert):
            stack = place.kind == "experts" and part.entry is None
            if stack and per_expert:
                raise ConfigError(
                    f"{family.model_type} is published with all experts in one tensor, so it has "
                    "no names for each; leave --per-expert out"
                )
            name = _module(part.theirs, place, stack, inner)
            pair = _outgoing(place.adapter, part, model.cfg)
            pairs[name] = pair.turned() if stack and family.model_type in _UNSAID else pair
            # Of mixtures PEFT takes modules called gate_proj and the like for those of experts.
            if place.kind != "attention" and model.cfg.moe is not None:
                parameters.add(_of_any_layer(part.theirs))
                keys[name] = part.theirs
            else:
                keys[name] = part.theirs.removesuffix(".weight")
                modules.add(keys[name])
    ranks = {name: pair.a.shape[-2] for name, pair in pairs.items()}
    alphas = {name: pair.scale * ranks[name] for name, pair in pairs.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "inference_mode": True, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "lora_dropout": 0.0, "r": rank, "lora_alpha": alpha,
        "target_modules": sorted(modules), "target_parameters": sorted(parameters) or None,
        "rank_pattern": {keys[name]: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {keys[name]: each for name, each in alphas.items() if each != alpha},
    }  # fmt: skip
    stored = {}
    for name, pair in pairs.items():
        for end, flat in zip(_ENDS, _flat(pair), strict=True):
            stored[f"{_BEGINS}{name}{end}"] = flat.contiguous()
    with atomic_folder(folder) as inside:
        write_json(inside / PEFT_CONFIG, config)
        save_file(stored, inside / PEFT_FILE, {"format": "pt"})


def read_peft(model: Model, family: Family, folder: Path) -> None:
    """Attach PEFT's adapters, flat or for each expert, to the model that they belong to.

    Raises:
        CheckpointError: they belong to another model, or cannot be read.
        ConfigError: they are of a kind, or for a weight, that is not read.
    """
    settings = read_peft_settings(folder)
    stored = read_tensors(folder / PEFT_FILE)
    odd = sorted(name for name, tensor in stored.items() if tensor.dtype not in _DTYPES)
    if odd:
        raise CheckpointError(
            f"{folder / PEFT_FILE} has {some(odd)} as {stored[odd[0]].dtype}; read are adapters in "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}"
        )
    left = {
        name[len(_BEGINS) :] for name in stored if name.startswith(_BEGINS) and name.endswith(_ENDS)
    }
    strange = {name for name in stored if name.removeprefix(_BEGINS) not in left}
    for place in places(model):
        found: dict[TensorSlice, Pair] = {}
        for part, module, stack in _readable(place, family, model.cfg, settings, left):
            names = [f"{module}{end}" for end in _ENDS]
            if not left.issuperset(names):
                continue
            a, b = (stored[f"{_BEGINS}{name}"] for name in names)
            turned = stack and family.model_type in _UNSAID
            pair = _incoming(a, b, part, place, stack, turned, model.cfg)
            if pair is None:
                continue
            key = part.theirs if stack else settings.key(part.theirs)
            rank = len(a) // (place.shape[0] if stack else 1)
            if rank != settings.rank(key):
                raise CheckpointError(
                    f"{folder}: {module} has rank {rank} in {PEFT_FILE}, and "
                    f"{settings.rank(key)} by {PEFT_CONFIG}; the two are not of one adapter"
                )
            found[part] = pair._replace(scale=settings.scale(key))
            left = left.difference(names)
        if found:
            _attach(place, found)
    if not stored or left or strange:
        raise _misfit(
            folder, family, model, stored, strange | {f"{_BEGINS}{each}" for each in left}
        )


def _misfit(
    folder: Path, family: Family, model: Model, stored: Mapping[str, Tensor], left: Iterable[str]
) -> CheckpointError | ConfigError:
    """What is wrong with tensors that nothing takes: they are of weights without adapters, or not.

    Args:
        folder: the adapter's.
        family: the model's.
        model: as it is here.
        stored: all tensors.
        left: names of those that nothing takes.
    """
    with without_memory():
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in unique_tensors(build_model(model.cfg)).items()
        }
    for place in places(model):
        shapes.pop(place.path, None)
    plain = [
        part.theirs.removesuffix(".weight")
        for rules in (family.rules, fused(family.rules, family.renamed))
        for part in slices(rules, shapes, model.cfg)
    ]
    without = {*plain, "lm_head"}  # which has no weight of its own where it is tied
    strange, known = [], []
    for name in sorted(left):
        match = _NAME.fullmatch(name)
        if match is not None and match[1] in without:
            known.append(_of_any_layer(match[1]))
        else:
            strange.append(f"{name.removeprefix(_BEGINS)} {list(stored[name].shape)}")
    if known and not strange:
        return ConfigError(
            f"the adapter {folder} changes {some(dict.fromkeys(known))}: no adapters are taken "
            "there (docs/tuning.md says where); train one without"
        )
    return CheckpointError(
        f"the adapter {folder} is of another model than this one ({family.model_type}), in "
        f"which nothing takes {some(strange or ['no adapter at all'])}"
    )


def _of_any_layer(name: str) -> str:
    return re.sub(r"^.*layers\.\d+\.", "", name)


def _slices(place: Place, family: Family, cfg: Any, per_expert: bool) -> list[TensorSlice]:
    """The published tensors that a weight is, those of experts one by one or stacked."""
    rules = family.rules if per_expert else fused(family.rules, family.renamed)
    stacked = place.path.endswith(("gate_up", "down"))
    return slices(rules, {place.path: place.shape if stacked else place.shape[1:]}, cfg)


def _wrapped_twice(model: nn.Module) -> bool:
    """Whether both weights of experts have adapters, so that one wrapper lies in the other."""
    kinds = {place.name for place in places(model) if place.kind == "experts" and place.adapter}
    return len(kinds) == 2


def _module(theirs: str, place: Place, stack: bool, inner: bool) -> str:
    """What PEFT calls the module of an adapter."""
    if not stack:
        return theirs.removesuffix(".weight")
    parent = theirs.rpartition(".")[0]
    return f"{parent}.base_layer" if inner and place.name == "gate_up" else parent


def _readable(
    place: Place, family: Family, cfg: Any, settings: PeftSettings, left: Container[str]
) -> Iterator[tuple[TensorSlice, str, bool]]:
    """Every slice of a weight that may have an adapter, its name in the file, whether stacked."""
    for part in _slices(place, family, cfg, per_expert=False):
        if place.kind == "experts":
            # A lone wrapper has the name of the outer one, whichever weight it is of.
            inner = f"{part.theirs.rpartition('.')[0]}.base_layer{_ENDS[0]}" in left
            if inner or not settings.parameters or settings.is_named(part.theirs):
                yield part, _module(part.theirs, place, True, inner), True
        else:
            yield part, part.theirs.removesuffix(".weight"), False
    for part in _slices(place, family, cfg, per_expert=True):
        if place.kind != "experts" or part.entry is not None:
            yield part, part.theirs.removesuffix(".weight"), False


def _outgoing(adapter: Adapter, part: TensorSlice, cfg: Any) -> Pair:
    """A slice's adapter: that of the part of the weight that it lies in, or of all of them."""
    entry = part.entry or 0
    start, stop = part.rows or (0, adapter.b.shape[1])
    a_parts, b_parts, at = [], [], 0
    for rows, a_ENI in zip(
        adapter.rows, torch.split(adapter.a.detach(), adapter.rank, 1), strict=True
    ):
        first, last = max(start, at), min(stop, at + rows)
        if first < last:
            a_parts.append(a_ENI)
            b_parts.append(adapter.b.detach()[:, first:last])
        at += rows
    a_ENI = torch.cat(a_parts, 1)
    # [E, O, P · N]: the rows of each part multiply its own A alone.
    b_EON, first = a_ENI.new_zeros(len(a_ENI), stop - start, a_ENI.shape[1]), 0
    for place, b_EPN in enumerate(b_parts):
        columns = slice(place * adapter.rank, (place + 1) * adapter.rank)
        b_EON[:, first : first + b_EPN.shape[1], columns] = b_EPN
        first += b_EPN.shape[1]
    pair = Pair(a_ENI, b_EON, adapter.scale)
    if part.entry is not None or len(a_ENI) == 1:
        pair = pair._replace(a=a_ENI[entry], b=b_EON[entry])
    return pair._replace(b=_reordered(pair.b, part.layout, cfg, outgoing=True))


def _flat(pair: Pair) -> tuple[Tensor, Tensor]:
    """The two matrices that PEFT stores."""
    if pair.a.dim() == 2:
        return pair.a, pair.b
    return pair.a.flatten(0, 1), pair.b.permute(1, 2, 0).flatten(1)


def _incoming(
    a: Tensor, b: Tensor, part: TensorSlice, place: Place, stack: bool, turned: bool, cfg: Any
) -> Pair | None:
    """The adapter of a slice from the two matrices that PEFT stores; None if they do not fit."""
    experts, outputs, inputs = place.shape
    if part.rows is not None:
        outputs = part.rows[1] - part.rows[0]
    if turned:
        outputs, inputs = inputs, outputs
    count = experts if stack else 1
    if a.dim() != 2 or b.dim() != 2 or len(a) % count or len(a) != b.shape[1]:
        return None
    if (a.shape[1], len(b)) != (inputs, outputs):
        return None
    if stack:
        a = a.view(experts, -1, inputs)
        b = b.view(outputs, -1, experts).permute(2, 0, 1)
    pair = Pair(a, b, 1.0).turned() if turned else Pair(a, b, 1.0)
    return pair._replace(b=_reordered(pair.b, part.layout, cfg, outgoing=False))


def _reordered(b: Tensor, layout: str, cfg: Any, *, outgoing: bool) -> Tensor:
    """The rows of B in the order of the other side; a transposed weight has A and B as they are."""
    if layout == "interleaved_transposed":
        return together(b, -2) if outgoing else apart(b, -2)
    if layout in ("same", "transposed"):
        return b
    if layout not in OF_ROWS:
        raise ConfigError(f"adapters of weights with the layout {layout!r} are not read or written")
    way = LAYOUTS[layout].save if outgoing else LAYOUTS[layout].load
    return way(b, cfg)


@torch.no_grad()
def _attach(place: Place, found: Mapping[TensorSlice, Pair]) -> None:
    """One adapter of all slices: a part for each slice of rows, of the largest rank.

    Its scale is theirs, so that numbers in 16 bits stay what they are; B of a slice whose scale is
    another is multiplied in fp32.
    """
    spans = sorted({part.rows or (0, place.shape[1]) for part in found})
    covered: list[tuple[int, int]] = []
    for span in spans:  # rows between them have an adapter of zeros
        last = covered[-1][1] if covered else 0
        covered += [(last, span[0])] * (last < span[0]) + [span]
    if covered[-1][1] < place.shape[1]:
        covered.append((covered[-1][1], place.shape[1]))
    rank = max(pair.a.shape[-2] for pair in found.values())
    scale = max((pair.scale for pair in found.values()), key=abs)
    dtype = reduce(
        torch.promote_types, (each.dtype for pair in found.values() for each in pair[:2])
    )
    if any(pair.scale != scale for pair in found.values()):
        dtype = torch.promote_types(dtype, torch.float32)
    adapter = place.attach(tuple(stop - start for start, stop in covered), rank, scale)
    adapter.to(dtype)
    adapter.a.zero_()
    adapter.b.zero_()
    for part, pair in found.items():
        start, stop = part.rows or (0, place.shape[1])
        experts = slice(None) if part.entry is None else slice(part.entry, part.entry + 1)
        own, first = pair.a.shape[-2], covered.index((start, stop)) * rank
        adapter.a[experts, first : first + own] = pair.a
        share = 1.0 if pair.scale == scale else pair.scale / scale
        adapter.b[experts, start:stop, :own] = pair.b.to(dtype) * share
    adapter.requires_grad_(False)
