"""What people name that stands for a model: settings, files, folders, the hub; built tiny."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from moestro.check.filling import SPREAD, is_choice_bias
from moestro.check.foreign_models import has_loss, subjects
from moestro.check.subject import Subject
from moestro.check.targets import of_moe, refuse_implementation
from moestro.checkpoints.folders import is_pretrained, read_json
from moestro.checkpoints.gguf.header import is_gguf, read_parts
from moestro.checkpoints.gguf.settings import config_json
from moestro.checkpoints.hub import find_settings, settings_of
from moestro.config import ModelConfig, MoEConfig
from moestro.errors import CheckpointError, ConfigError, MoestroError
from moestro.foreign.classes import kind
from moestro.moe.layer import MoE
from moestro.plan.subject import from_file

# Widths that settings may have, and what they are made: multiples of 8, as grouped_mm wants them
# in bf16, none of them equal to another.
WIDTHS: dict[str, int | None] = {
    "hidden_size": 40, "d_model": 40, "intermediate_size": 24, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 8, "shared_intermediate_size": 8, "ffn_hidden_size": 16,
    "expert_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 8, "moe_hidden_size": 16,
    "router_hidden_size": 16, "share_expert_dim": 8,
}  # fmt: skip
# Of a whole model, so that nothing of it is large; its experts, K and rules stay.
NARROW: dict[str, int | None] = {
    "vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
    "num_hidden_layers": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None, "first_k_dense_replace": 1, "num_dense_layers": 1, "sliding_window": 16,
}  # fmt: skip
# Families whose layouts differ, for an implementation alone.
LAYOUTS = ("mixtral", "gpt_oss", "deepseek_v3", "nemotron_h")


def of_foreign(target: Any, implementation: str = "", title: str = "") -> list[Subject]:
    """A model of transformers, its settings, or a file, folder or name of the hub with them.

    Args:
        target: one of these.
        implementation: experts_implementation; empty: eager, or what the model is set to.
        title: of the report.

    Raises:
        MoestroError: it has no mixture that can be checked.
    """
    if isinstance(target, nn.Module):
        set_to = getattr(getattr(target, "config", None), "_experts_implementation", None)
        return subjects(target, implementation or set_to or "eager", title)
    if isinstance(target, str | Path):
        return _of_file(find_config(str(target)), implementation, title)
    return of_settings(target, implementation or "eager", title)


def find_config(name: str) -> Path:
    """A file of settings, or that of a folder, a run or a model on the hub; GGUF too.

    Raises:
        ConfigError, CheckpointError: there is none.
    """
    path = Path(name)
    if path.exists():
        return settings_of(path)
    if "/" in name and path.suffix != ".json":
        return find_settings(name)
    raise ConfigError(f"there is no {path}; give a config.json, its folder or module:factory")


def _of_file(path: Path, implementation: str, title: str) -> list[Subject]:
    if not (is_gguf(path) or (path.suffix == ".json" and is_pretrained(path))):
        refuse_implementation(implementation)
        return _of_ours(path, title)
    fields = config_json(read_parts(path)[0]) if is_gguf(path) else read_json(path, finite=False)
    if fields["model_type"] not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no model_type {fields['model_type']!r}; "
            "describe its layer, and give it as module:factory"
        )
    try:
        settings = transformers.AutoConfig.for_model(**fields)
    except Exception as error:  # each class of settings refuses in its own way
        first = str(error).split("\n")[0]
        raise CheckpointError(f"transformers cannot read {path}: {first}") from error
    return of_settings(settings, implementation or "eager", title)


def _of_ours(path: Path, title: str) -> list[Subject]:
    """The mixture of a model of this project, or of a run's."""
    cfg = from_file(path).cfg
    if not isinstance(cfg, ModelConfig) or cfg.moe is None:
        raise MoestroError(f"{path} describes no decoder with a mixture of experts")
    made = MoE(MoEConfig(**{**cfg.moe.model_dump(), "dim": 40, "hidden_dim": 16}))
    randomise(made)
    return [of_moe(made, title or f"{path.parent.name}: MoE, {made.experts.backend}")]


def of_layouts(implementation: str) -> list[Subject]:
    """Families that store experts differently, to check an implementation by itself."""
    settings = [transformers.AutoConfig.for_model(name) for name in LAYOUTS]
    return [each for one in settings for each in of_settings(one, implementation)]


def of_settings(settings: Any, implementation: str = "eager", title: str = "") -> list[Subject]:
    """Those of the model that settings describe: tiny widths, random weights.

    Experts, choices and rules are as the settings say; nothing of the model is read.

    Raises:
        CheckpointError: transformers cannot build it.
        MoestroError: see `subjects`; or a block cannot be built alone.
    """
    title = title or settings.model_type
    if settings.is_encoder_decoder:
        raise MoestroError(
            f"{title} is an encoder-decoder, whose mixtures are not looked for; describe its "
            "layer, and give it as module:factory"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            text = settings.get_text_config()
            with torch.device("meta"):
                auto: Any = transformers.AutoModel
                model = auto.from_config(text)
        except Exception as error:  # as above
            first = str(error).split("\n")[0]
            raise CheckpointError(f"transformers cannot build {title}: {first}") from error
        made = [
            _tiny(each, implementation, model, text)
            for each in subjects(model, implementation, title)
        ]
        made[0] = _with_whole(made[0], text)
        return made


def randomise(module: nn.Module) -> None:
    """Weights and biases that tell tokens and experts apart."""
    with torch.no_grad():
        for name, each in module.named_parameters():
            fan_in = each.shape[-1] if each.dim() > 1 else 1
            each.normal_(0, 2 * fan_in**-0.5 if each.dim() > 1 else 0.3)
            if each.dim() == 1 and "norm" in name:
                each.add_(1.0)
        for name, buffer in module.named_buffers():
            if is_choice_bias(name) or name == "router.bias":  # transformers', or of an MoE
                buffer.normal_(0, SPREAD)


def _tiny(subject: Subject, implementation: str, model: nn.Module, settings: Any) -> Subject:
    """The same block, built from narrow settings: its own, or else the model's."""
    block = subject.module
    holders = (
        each for each in block.modules() if hasattr(getattr(each, "config", None), "to_dict")
    )
    config = _narrowed(getattr(next(holders, None), "config", settings), WIDTHS)
    place = {}
    if "layer_idx" in inspect.signature(type(block)).parameters:
        name = next(name for name, each in model.named_modules() if each is block)
        place = {"layer_idx": next(int(part) for part in name.split(".") if part.isdigit())}
    try:
        with torch.device("cpu"):
            made = type(block)(config, **place)
    except Exception as error:
        raise MoestroError(
            f"{kind(block)} cannot be built from its settings alone ({error}); build a tiny model "
            "and call moestro.check.check(model)"
        ) from error
    made = made.float().eval()
    randomise(made)
    holder = nn.Module()
    holder.layer = made
    return subjects(holder, implementation, subject.title.partition(":")[0])[0]


def _with_whole(subject: Subject, settings: Any) -> Subject:
    """With a narrow model around it, where it has a balance loss; else why it cannot be built."""
    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(settings) not in mapping or not has_loss(mapping[type(settings)]):
        return subject
    auto: Any = transformers.AutoModelForCausalLM
    try:
        model = auto.from_config(_narrowed(settings, WIDTHS | NARROW)).float().eval()
        randomise(model)
        with torch.no_grad():
            model(torch.ones(1, 2, dtype=torch.int64, device="cpu"), use_cache=False)
    except Exception as error:  # settings that only fit each other as published
        first = str(error).strip().split("\n")[0][:200]
        lost = (
            f"a narrow model of these settings does not run ({first}); build a tiny one and call "
            "moestro.check.check(model)"
        )
        return dataclasses.replace(subject, lost=lost)
    return dataclasses.replace(subject, whole=model)


def _narrowed(settings: Any, widths: dict[str, int | None]) -> Any:
    settings = copy.deepcopy(settings)
    for name, width in widths.items():
        if isinstance(getattr(settings, name, None), int):
            setattr(settings, name, width)
    layers = getattr(settings, "layer_types", None)
    if isinstance(layers, list) and "num_hidden_layers" in widths:
        with contextlib.suppress(AttributeError):  # some settings derive it
            settings.layer_types = layers[: settings.num_hidden_layers]
    settings._experts_implementation = "eager"
    return settings
