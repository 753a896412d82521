"""Open a model of transformers within an amount of memory: its experts stay in a packed file.

transformers builds the model and loads all but the experts, which it never sees: their parameters
are taken away before it loads. They come from the packed file that `moestro generate --weights
int8 --memory` uses too.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moestro.checkpoints import packed_files, streamed
from moestro.checkpoints.folders import is_pretrained
from moestro.checkpoints.hub import find_checkpoint
from moestro.errors import BackendError, CheckpointError
from moestro.foreign import layouts
from moestro.hf.forward import PACKED
from moestro.hf.packed import refuse_odd, refuse_saving
from moestro.hf.plug import use
from moestro.kernels import backends
from moestro.kernels.packing import ExpertSlabs, Format, check_format
from moestro.kernels.residency import Reads
from moestro.machine import resident_bytes, return_freed
from moestro.models.budget import Budget, Use, fit, needs
from moestro.plan.sizes import memory_of

_EXPERTS = r"\.experts\."
_CONTEXT = 4096
_ENDLESS = 1 << 62


class Sizes(NamedTuple):
    """What experts are, before they are taken away."""

    experts: int
    dim: int
    hidden_dim: int
    activation: str | None


def offload(
    name: str | Path,
    memory: str | int = "auto",
    kind: str = "int8",
    group: int = 32,
    *,
    texts: Use | None = None,
    packed: Path | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Open a model of which as many experts are in memory as an amount of it holds.

    Outputs are, bit for bit, those of `quantize(model, kind, group)` with all experts in memory.

    Args:
        name: a folder of Hugging Face's layout, or `org/model`, of a family that `docs/models.md`
            lists.
        memory: of the whole process: bytes, an amount such as 6GiB, or auto for what is free. What
            transformers computes with, beyond what a step of ours takes, is not known to it.
        kind: how experts are packed: int8, int4, bfloat16 or float32.
        group: inputs that share a scale (int8, int4): 32 or 64.
        texts: how long and how many texts are, and tokens that pass together, by default all of
            all prompts; `scored` where logits of all are wanted. None: one of up to 4096 tokens.
        packed: the file of packed experts, written if it is missing with one packed module and its
            numbers in memory at a time; None: see `packed_files.default_path`.
        options: of transformers' `from_pretrained`.

    Raises:
        ConfigError: the memory is too small; says the smallest that works.
        CheckpointError: the checkpoint or the packed file cannot be used.
        BackendError: there is no native library, or experts that it has no form for.
    """
    format = Format(kind, group)
    check_format(format)
    backends.choose("auto", backends.PACKED)
    folder = find_checkpoint(name)
    if not is_pretrained(folder):
        raise CheckpointError(
            f"{folder} is not of Hugging Face's layout; `moestro generate {folder} --memory` "
            "runs it, and `moestro convert` writes it in that layout"
        )
    amount = memory_of(memory) if isinstance(memory, str) else memory
    config = AutoConfig.from_pretrained(folder)
    base = _class_of(config)
    use_, dense = texts or Use(_CONTEXT), _dense(base, config, options)
    fitted = partial(_fitted, dense, use_, _ENDLESS if amount is None else amount)
    path, source = packed_files.converted(
        folder, format, packed, check=lambda *blank: fitted(streamed.sizes_of(*blank))
    )
    return_freed()
    budget = fitted(streamed.sizes(path))
    model, sizes = _without_experts(base, folder, options)
    stored = streamed.stored_experts(path, budget.kept, source)
    _check_same(path, sizes, stored)
    for module, slabs in zip(use(model).values(), stored, strict=True):
        setattr(module, PACKED, slabs)
        # torch leaves it without annotations.
        module.register_state_dict_pre_hook(refuse_saving)  # type: ignore[no-untyped-call]
    model.requires_grad_(False).train(False)
    return model


def reads(model: nn.Module) -> Reads:
    """What the experts of an offloaded model were wanted and read until now.

    Raises:
        BackendError: it is not offloaded.
    """
    for module in model.modules():
        slabs: ExpertSlabs | None = vars(module).get(PACKED)
        if slabs is not None and slabs.stored is not None:
            return slabs.stored.residency.reads()
    raise BackendError(f"{type(model).__name__} has all experts in memory; see moestro.hf.offload")


def _class_of(config: PreTrainedConfig) -> Any:
    """The class with a language model's head."""
    try:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise BackendError(
            f"transformers has no causal language model for {config.model_type}; only such are "
            "offloaded"
        ) from None


class _Dense(NamedTuple):
    """All parameters but experts."""

    bytes: int
    number: int  # bytes of one


def _fitted(dense: _Dense, texts: Use, memory: int, sizes: tuple[Any, ...]) -> Budget:
    """What the memory holds of a packed file of these sizes, by `streamed.sizes`."""
    cfg, _, _, mixtures = sizes
    if texts.tokens is None:  # transformers passes whole prompts
        most = texts.prompt or texts.context or cfg.attention.context
        texts = texts._replace(tokens=texts.texts * min(most, cfg.attention.context))
    return fit(needs(cfg, dense.number, dense.bytes, mixtures, texts, resident_bytes()), memory)


def _dense(base: Any, config: PreTrainedConfig, options: dict[str, Any]) -> _Dense:
    """What transformers will load."""
    kind = options.get("dtype", options.get("torch_dtype", "auto"))
    if kind in ("auto", None):
        kind = getattr(config, "dtype", None) or torch.float32
    number = (getattr(torch, kind) if isinstance(kind, str) else kind).itemsize
    if not isinstance(config, base.config_class):  # of text and images
        config = config.get_text_config()
    with torch.device("meta"):
        blank = base(config)
    for module in layouts.find(blank).values():
        _take_weights(module)
    return _Dense(sum(each.numel() for each in blank.parameters()) * number, number)


def _without_experts(
    base: Any, folder: Path, options: dict[str, Any]
) -> tuple[PreTrainedModel, list[Sizes]]:
    """The model as transformers loads it where there are no experts' parameters to fill."""
    sizes: list[Sizes] = []

    def post_init(self: PreTrainedModel) -> None:
        """Between construction, which takes no memory, and loading."""
        base.post_init(self)
        for module in layouts.find(self).values():
            weights = layouts.read(module)
            refuse_odd(module, weights)
            experts, dim, hidden_dim = weights.down_EDF.shape
            sizes.append(Sizes(experts, dim, hidden_dim, weights.activation))
            _take_weights(module)

    ignored = [*(base._keys_to_ignore_on_load_unexpected or ()), _EXPERTS]
    own = {"post_init": post_init, "_keys_to_ignore_on_load_unexpected": ignored}
    bare: Any = type(base.__name__, (base,), {**own, "__module__": base.__module__})
    model = bare.from_pretrained(folder, **options)
    model.__class__ = base
    return model, sizes


def _take_weights(module: Any) -> None:
    for name in list(module._parameters):
        if name.endswith(("_proj", "_proj_bias")):
            del module._parameters[name]
    module._is_hf_initialized = True  # there is nothing left to draw


def _check_same(path: Path, sizes: list[Sizes], stored: tuple[ExpertSlabs, ...]) -> None:
    """Refuse a packed file whose mixtures are not the model's."""
    found = [Sizes(e.num_experts, e.dim, e.hidden_dim, e.activation) for e in stored]
    if found != sizes:
        raise CheckpointError(
            f"{path} has {len(found)} mixtures {found[:1]}, and transformers' model "
            f"{len(sizes)} {sizes[:1]}; remove the file to pack the checkpoint again"
        )
