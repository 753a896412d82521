"""Writes docs/settings.md from the settings classes: `python docs/settings.py`."""

import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from moestro.config import EncDecConfig, ModelConfig, MoEConfig, RunConfig
from moestro.config.number import MOST
from moestro.settings import Settings, settings_classes

PAGE = Path(__file__).with_suffix(".md")

# What a setting means where its class leaves it to the name. By class, so that each is said once.
MEANINGS = {
    "RouterConfig.kind": "How tokens and experts find each other; see "
    "[Routers](mixture-of-experts.md#the-router).",
    "RouterConfig.num_groups": "Equal groups the experts are cut into (group-limited selection, "
    "DeepSeek-V2 and V3). 1 is off.",
    "RouterConfig.top_groups": "Groups a token may choose its experts from.",
    "RouterConfig.group_score": "A group's score: its best expert's (DeepSeek-V2) or the sum of "
    "its two best (V3).",
    "RouterConfig.scale": "Every weight is multiplied by it (DeepSeek-V3's routed scaling).",
    "RouterConfig.jitter": "In training the router's input is multiplied by random numbers "
    "between 1 − jitter and 1 + jitter (Switch).",
    "SharedConfig.hidden_dim": "Its hidden width.",
    "CapacityConfig.factor": "The factor while training.",
    "CapacityConfig.eval_factor": "The factor while evaluating and generating.",
    "CapacityConfig.priority": "Who gets the room: first choices in the order of the tokens "
    "(arrival), or the highest weights (router).",
    "MoEConfig.num_experts": "E, experts of a layer.",
    "MoEConfig.top_k": "K, experts that one token passes.",
    "MoEConfig.activation": "The experts' non-linearity; swiglu and geglu have a gate.",
    "DenseConfig.hidden_dim": "Its hidden width.",
    "DenseConfig.activation": "Its non-linearity.",
    "DataConfig.text_field": "The field of a .jsonl line that holds the text.",
    "DataConfig.domain_field": 'The field that holds the label, with domains = "field".',
    "DataConfig.seq_len": "S, tokens of one training sequence.",
    "DataConfig.seed": "Seed of the order of the text, and of the generated arithmetic.",
    "BalanceConfig.switch": "Coefficient of the Switch loss.",
    "BalanceConfig.importance": "Coefficient of the importance loss (CV² of summed weights); "
    "0 at balance.",
    "BalanceConfig.z": "Coefficient of the router z-loss, which keeps logits small.",
    "OptimConfig.lr": "Highest learning rate.",
    "OptimConfig.schedule": "After the warm-up: a cosine, or constant and then a decay (wsd: "
    "warm-up, stable, decay).",
    "OptimConfig.betas": "AdamW's two averages.",
    "OptimConfig.weight_decay": "AdamW's decay, of matrices only.",
    "OptimConfig.clip": "Largest norm of all gradients together.",
    "RuntimeConfig.device": "auto, cpu, cuda or cuda:N.",
    "RuntimeConfig.compile": "Run the model through torch.compile.",
    "RuntimeConfig.checkpoint_activations": "Recompute each block in the backward pass: less "
    "memory, more time, the same numbers.",
    "RuntimeConfig.tensorboard": "Write TensorBoard files too (needs the extra `tensorboard`).",
    "TrainConfig.steps": "Optimiser steps.",
    "TrainConfig.dtype": "Number type of the autocast; auto takes what is fast on the device.",
    "TrainConfig.eval_every": "Steps between evaluations.",
    "TrainConfig.eval_tokens": "Held-out tokens of one evaluation, shared evenly by the domains.",
    "TrainConfig.save_every": "Steps between checkpoints.",
    "TrainConfig.seed": "Seed of the weights and of all that is random in training.",
}

HEAD = """# Settings

Everything a run can be told. This page is written by `python docs/settings.py` from
`src/moestro/config/`; do not edit it by hand.

A run's settings come from a TOML or JSON file (`moestro train --config run.toml`), and single ones
from `--set NAME=VALUE`, as in `moestro train --set train.steps=200`. What a file leaves out has the
default below. Without `--config`, `moestro train` and `moestro compare` start from
[demo.toml](../src/moestro/demo.toml), which sets some of them otherwise. `--set model.moe=null`
unsets a table. A `model` that sets `encoder_layers` or `decoder_layers` is an encoder-decoder. A
name that does not exist is an error, and the message names the nearest one that does. The settings
as used are saved in the run's folder and in every checkpoint. No whole number may be above 2^40.

In Python the same names are classes: `RunConfig(train={"steps": 200})`.
"""


def tables(kind: type[Settings], path: str) -> Iterator[tuple[str, type[Settings], bool]]:
    """(dotted path, class, may be unset) of every nested settings class, in order."""
    for name, field in kind.model_fields.items():
        inner = settings_classes(field.annotation)
        for each in inner:
            here = f"{path}.{name}" if path else name
            title = f"{here} ({tag_of(each)})" if len(inner) > 1 else here
            yield title, each, field.default is None
            if each is not EncDecConfig:  # its tables are a decoder's
                yield from tables(each, here if each is ModelConfig else title)


def tag_of(kind: type[Settings]) -> str:
    """What tells one of several classes from the others, for a heading."""
    if kind in (ModelConfig, EncDecConfig):
        return "decoder" if kind is ModelConfig else "encoder-decoder"
    return str(kind.model_fields["kind"].default)


def values_of(annotation: object) -> str:
    """What may be written: the choices, or the kind of value with its limits."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return values_of(inner[0]) + limits(inner[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("unset" if kind is type(None) else values_of(kind) for kind in inner)
    if origin is tuple:
        return f"list of {values_of(inner[0])}" if inner[-1] is Ellipsis else "two numbers"
    return {bool: "true, false", int: "whole number", float: "number", str: "text"}[annotation]


def limits(metadata: Iterable[object]) -> str:
    """The limits of a number, as in ` ≥ 1`; without the one that all whole numbers have."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    single = [part for item in metadata for part in (item, *getattr(item, "metadata", ()))]
    found = [
        f"{sign} {limit:,g}"
        for part in single
        for name, sign in signs.items()
        if (limit := getattr(part, name, None)) is not None and limit != MOST
    ]
    return f" {', '.join(found)}" if found else ""


def default_of(kind: type[Settings], name: str, field: FieldInfo) -> str:
    """The default as TOML would say it."""
    if field.is_required():
        follows = (kind, name) == (MoEConfig, "dim")
        return "`model.dim`" if follows else "required"
    value = field.default
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`".replace("'", '"')
    return f'`"{value}"`' if isinstance(value, str) else f"`{value:_}`"


def meaning(kind: type[Settings], name: str, field: FieldInfo) -> str:
    """Its description, or the line above."""
    if name == "kind" and len(typing.get_args(field.annotation)) == 1:
        return "Says which kind this is."
    return field.description or MEANINGS[f"{kind.__name__}.{name}"]


def section(path: str, kind: type[Settings], may_be_unset: bool) -> str:
    """One heading, the class's own sentence, and a table."""
    about = (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
    about = about.removesuffix(" See `moestro.moe.routers`.")
    if may_be_unset:
        dense = kind is MoEConfig and "; the model is then dense"
        about += f" Unset by default{dense or ''}."
    rows = [
        f"| `{name}` | {values_of(field.annotation)}{limits(field.metadata)} | "
        f"{default_of(kind, name, field)} | {meaning(kind, name, field)} |"
        for name, field in kind.model_fields.items()
        if not settings_classes(field.annotation)
    ]
    head = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {path}", "", about, "", *head, *rows, ""])


def page() -> str:
    """The whole page."""
    parts = [section(*found) for found in tables(RunConfig, "")]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
