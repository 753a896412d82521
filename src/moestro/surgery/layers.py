"""A decoder on disk of which one block at a time is in memory: read, run on text, changed, written.

Letters: C changes, N windows, S sequence, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.checkpoints.families import OWN, family_of
from moestro.checkpoints.families.translate import QUANTISATION, SPECIAL, to_fields
from moestro.checkpoints.folders import read_json
from moestro.checkpoints.reading import open_unread, origin, read_settings
from moestro.checkpoints.transfer import Progress, Unread, load_tensors
from moestro.checkpoints.writing import only_family, write_pretrained
from moestro.config import ModelConfig
from moestro.errors import ConfigError
from moestro.models.blocks import Block
from moestro.models.build import build_model
from moestro.models.decoder import Decoder
from moestro.models.materialize import materialize, without_memory
from moestro.models.norms import LayerNorm, RMSNorm
from moestro.moe.routers import Router

Tensors = Mapping[str, Tensor]  # of one module, by their names in it
Watch = Callable[[int, nn.Module], None]
BATCH = 8  # windows in one forward pass
_NETWORK = "ffn."
_NO_FAMILY = "give a model that one can express: surgery writes Hugging Face's layout alone"


class Change(NamedTuple):
    """What becomes of a model.

    Attributes:
        cfg: its new settings.
        block: (layer, the tensors of its block) → the new ones, the same each time it is called.
        head: the tensors of the head, with a weight of its own or the embedding's → the new ones.
            What else is outside the blocks stays.
    """

    cfg: ModelConfig
    block: Callable[[int, Tensors], Tensors]
    head: Callable[[Tensors], Tensors] = lambda tensors: tensors

    @classmethod
    def of_networks(cls, cfg: ModelConfig, network: Callable[[int, Tensors], Tensors]) -> Self:
        """A change of feed-forward networks alone, given their tensors by the names in them."""

        def block(layer: int, tensors: Tensors) -> Tensors:
            own = {name for name in tensors if name.startswith(_NETWORK)}
            inner = {name.removeprefix(_NETWORK): tensors[name] for name in own}
            rest = {name: one for name, one in tensors.items() if name not in own}
            return rest | {_NETWORK + name: one for name, one in network(layer, inner).items()}

        return cls(cfg, block)


class Layers:
    """A checkpoint, checked against its model; nothing of its tensors is kept.

    Attributes:
        folder: from `moestro.checkpoints.hub.find_checkpoint`.
        cfg: the settings.
        dtype: the widest that a parameter is stored in, except those of norms and routers, which
            compute in fp32 anyway: what the rest is computed in.
        stored: the dtype of each parameter by name, in which it is written too: the widest of its
            parts; of a quantised one the embedding's, or bf16 if that is quantised. A GGUF file
            holds norms and routers in fp32 whatever they were: of one whose numbers are in the
            embedding's dtype, that.
        hf_config: the config.json of Hugging Face's layout that the weights came with, or {}.
    """

    def __init__(self, folder: Path, accept_fields: Collection[str] = ()) -> None:
        """Open it.

        Raises:
            CheckpointError: see `open_unread`.
            ConfigError: see there; or the model is no decoder.
        """
        cfg, family, fields = read_settings(folder, accept_fields)
        if not isinstance(cfg, ModelConfig):
            raise ConfigError(
                f"{folder} is an encoder-decoder; decoders can be upcycled, pruned and merged"
            )
        self._unread = open_unread(folder, accept_fields=accept_fields)
        self.folder, self.cfg = folder, cfg
        self.stored = _stored(self._unread)
        alone = _in_own_dtype(self._unread.model)
        self.dtype = _widest(
            dtype for name, dtype in self.stored.items() if name.rpartition(".")[0] not in alone
        )
        _in_dtypes(self._unread.model, self.stored.__getitem__)
        if family is OWN:
            came_with = origin(folder)
            fields = read_json(came_with, finite=False) if came_with.is_file() else {}
        self.hf_config: dict[str, Any] = {
            name: value for name, value in fields.items() if name not in QUANTISATION
        }

    def unchanged(self) -> Change:
        """The model as it is."""
        return Change(self.cfg, lambda _, tensors: tensors)

    def tensors(self, path: str) -> Tensors:
        """The tensors of the module at `path`, as stored, in memory that is nobody else's.

        Raises:
            CheckpointError: a file cannot be read.
        """
        module = self._unread.model.get_submodule(path)
        materialize(module, None, "cpu")
        found = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        load_tensors(self._unread.part({f"{path}.{name}" for name in found}))
        module.to_empty(device="meta")
        if path == "head" and self.cfg.head.tied:
            found["weight"] = self.tensors("embed")["weight"]
        return found

    @torch.no_grad()
    def block(self, layer: int, change: Change) -> Tensors:
        """The tensors of one block after a change."""
        return change.block(layer, self.tensors(f"blocks.{layer}"))

    @torch.no_grad()
    def bits(
        self,
        tokens_NS: Tensor,
        changes: Sequence[Change],
        watch: Watch | None = None,
        memory_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Bits of the predicted tokens of each window under each change. float64 [C, N].

        Each block is read once, made into that of one change after the other, of which each runs
        on all windows and goes: in memory are the block as it is and one that is changed.

        Args:
            tokens_NS: int64 [N, S + 1].
            changes: of this model.
            watch: called with (layer, block) before a block of the first change runs, and with
                (L, the model without blocks) before its head does.
            memory_bytes: most for hidden states; where those of all windows need more, the
                windows go in several passes, each of which reads the checkpoint again.
            progress: called with (blocks so far, blocks in all).
        """
        size = len(changes) * (tokens_NS.shape[1] - 1) * self.cfg.dim * self.dtype.itemsize
        most = len(tokens_NS) if memory_bytes is None else max(1, memory_bytes // size)
        starts, found = range(0, len(tokens_NS), most), []
        for number, start in enumerate(starts):
            first = number * self.cfg.num_layers

            def moved(layer: int, first: int = first) -> None:
                if progress is not None:
                    progress(first + layer + 1, len(starts) * self.cfg.num_layers)

            group_NS = tokens_NS[start : start + most]
            found.append(self._pass(group_NS, changes, watch, moved))
        return torch.cat(found, dim=1)

    def _pass(
        self,
        tokens_NS: Tensor,
        changes: Sequence[Change],
        watch: Watch | None,
        moved: Callable[[int], None],
    ) -> Tensor:
        """`bits` of windows whose hidden states are in memory together."""
        models = [skeleton(each.cfg) for each in changes]
        outer = {path: self.tensors(path) for path in _outer(models[0])}
        for change, model in zip(changes, models, strict=True):
            for path, tensors in outer.items():
                made = change.head(tensors) if path == "head" else tensors
                self._run_on(model.get_submodule(path), made)
        inputs_NS = tokens_NS[:, :-1]
        first_NSD = models[0].embedded(inputs_NS)
        states = [first_NSD, *(first_NSD.clone() for _ in changes[1:])]
        batches = [slice(start, start + BATCH) for start in range(0, len(tokens_NS), BATCH)]
        for layer in range(self.cfg.num_layers):
            stored = self.tensors(f"blocks.{layer}")
            for change, model, x_NSD in zip(changes, models, states, strict=True):
                block = model.blocks[layer]
                assert isinstance(block, Block)
                self._run_on(block, change.block(layer, stored))
                if watch is not None and model is models[0]:
                    watch(layer, block)
                for rows in batches:
                    x_BSD = x_NSD[rows]
                    shared = model.shared(x_BSD, inputs_NS[rows])
                    x_NSD[rows] = block(x_BSD, shared, None, None)[0]
                model.blocks[layer] = torch.nn.Identity()
                del block  # before the next is made
            del stored
            moved(layer)
        if watch is not None:
            watch(self.cfg.num_layers, models[0])
        return torch.stack(
            [
                # One window at a time: a large vocabulary makes logits larger than all else.
                torch.cat(
                    [
                        _bits(model, x_SD[None], tokens_S[None, 1:])
                        for x_SD, tokens_S in zip(x_NSD, tokens_NS, strict=True)
                    ]
                )
                for model, x_NSD in zip(models, states, strict=True)
            ]
        )

    def _run_on(self, module: torch.nn.Module, tensors: Tensors) -> None:
        """Give a module these tensors, in the dtypes that it computes with."""
        alone = _in_own_dtype(module)
        cast = {
            name: tensors[name].to(self.dtype)
            for name, _ in module.named_parameters()
            if name.rpartition(".")[0] not in alone
        }
        module.load_state_dict({**tensors, **cast}, assign=True)

    def _written(self, name: str) -> torch.dtype:
        """The dtype to write a parameter in: as stored, or one that holds those it is made of."""
        if name in self.stored:
            return self.stored[name]
        place = name[: name.index(_NETWORK) + len(_NETWORK)]
        return _widest(self.stored[one] for one in self.stored if one.startswith(place))

    def fields(self, cfg: ModelConfig, family: str | None = None) -> dict[str, Any]:
        """The config.json for changed settings.

        Args:
            cfg: the settings.
            family: its model_type; None: as the checkpoint came, or the only one that fits.

        Raises:
            ConfigError: no family can express the settings, or several can, or not this one.
        """
        name = family or self.hf_config.get("model_type") or only_family(cfg, _NO_FAMILY)
        table, before = family_of(name, "family"), self.hf_config
        if before.get("model_type") == name:
            return to_fields(table, cfg, before)
        kept = {key: before[key] for key in SPECIAL if key in before}
        return {**to_fields(table, cfg, {}), **kept}

    def write(self, change: Change, target: Path, family: str | None = None) -> None:
        """Write the changed model in Hugging Face's layout, whole or not at all.

        Args:
            change: of this model.
            target: a new folder.
            family: see `fields`.

        Raises:
            ConfigError, CheckpointError, OSError: see `write_pretrained`.
        """

        @lru_cache(maxsize=1)
        def other(path: str) -> Tensors:
            found = self.tensors(path)
            return change.head(found) if path == "head" else found

        @lru_cache(maxsize=1)
        def made(layer: int) -> Tensors:
            made.cache_clear()  # the last one goes before this one is made
            return self.block(layer, change)

        def tensor(ours: str) -> Tensor:
            way = ours.split(".")
            if way[0] == "blocks":
                return made(int(way[1]))[".".join(way[2:])]
            return other(way[0])[".".join(way[1:])]

        model = skeleton(change.cfg)
        _in_dtypes(model, self._written)
        write_pretrained(
            model,
            target,
            hf_config=self.fields(change.cfg, family),
            sidecar_files=self.folder,
            tensors=tensor,
        )


def skeleton(cfg: ModelConfig) -> Decoder:
    """A decoder of these settings without memory, for evaluation."""
    with without_memory():
        model = build_model(cfg)
    assert isinstance(model, Decoder)
    return model.requires_grad_(False).eval()


def _stored(unread: Unread) -> dict[str, torch.dtype]:
    """The dtype of each parameter by name; the widest of those that it consists of."""
    found = dict[str, list[torch.dtype]]()
    for place, source in unread.sources:
        found.setdefault(place.ours, []).append(source.dtype or unread.dtype)
    stored = {name: _widest(found[name]) for name, _ in unread.model.named_parameters()}
    tied = unread.model.cfg.head.tied
    for name in [
        name for name, dtype in stored.items() if unread.of_gguf and dtype != unread.dtype
    ]:
        shape = unread.model.get_parameter(name).shape
        numbers = torch.empty(shape, dtype=stored[name], device="cpu")
        load_tensors(unread.part({name}), into={name: numbers})
        if torch.equal(numbers.to(unread.dtype).to(numbers.dtype), numbers):
            stored[name] = unread.dtype
    return {**stored, "head.weight": stored["embed.weight"]} if tied else stored


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest that holds the numbers of all exactly."""
    return reduce(torch.promote_types, dtypes)


def _in_own_dtype(module: torch.nn.Module) -> set[str]:
    """The paths of what computes in fp32 and takes parameters of any dtype: norms and routers."""
    kinds = (RMSNorm, LayerNorm, Router)
    return {path for path, each in module.named_modules() if isinstance(each, kinds)}


def _in_dtypes(model: torch.nn.Module, of: Callable[[str], torch.dtype]) -> None:
    """Give each parameter of a model without memory its dtype."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(of(name))


def _outer(model: Decoder) -> list[str]:
    """The paths of everything but the blocks."""
    return [name for name, _ in model.named_children() if name != "blocks"]


def _bits(model: Decoder, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """Bits of each window's targets; float64 [B]."""
    logits_BSV = model.logits(model.norm(x_BSD))
    logits_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    nats_BS = F.cross_entropy(logits_BSV.transpose(1, 2), targets_BS, reduction="none")
    return nats_BS.double().sum(1) / math.log(2)
