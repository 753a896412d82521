"""Settings of a run that tunes a checkpoint on conversations, and how it begins.

From its step 0 on it is a run like any other: the Trainer takes it, and it resumes by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from moestro.checkpoints.folders import read_json
from moestro.checkpoints.reading import open_unread, origin, read_settings
from moestro.config import BalanceConfig, ModelConfig, RunConfig
from moestro.errors import ConfigError
from moestro.models.adapters import attach
from moestro.models.build import Model
from moestro.models.decoder import cannot_pack
from moestro.moe.balance import COEFFICIENTS, converted
from moestro.settings import read_values
from moestro.train import state
from moestro.train.initial import claimed, initial_settings, keep_origin, save_step_zero

# The weight of the balance loss where a family's configuration names none, as transformers counts.
USUAL_BALANCE = 0.001
LORA_LR = 2e-4


def tuning_settings(
    base: Path,
    run: Path,
    default: Path,
    config: Path | None,
    assignments: Sequence[str],
    accept_fields: Collection[str] = (),
) -> RunConfig:
    """Settings of a tuning run: the checkpoint's model, and what is not given as suits it.

    Args:
        base: The checkpoint's folder.
        run: The run's folder.
        default: Settings where `config` is None.
        config: The person's own settings.
        assignments: `a.b=value` over them.
        accept_fields: See `checkpoints.reading.read_settings`.

    Raises:
        ConfigError: see `initial_settings`; or the model is an encoder-decoder, one that cannot
            pack conversations is to, or one without routers is to keep them.
    """
    model = read_settings(base, accept_fields).cfg
    if not isinstance(model, ModelConfig):
        raise ConfigError(f"{base} is an encoder-decoder; only decoders learn conversations")
    stated = state.dotted(read_values(config, assignments))
    usual: dict[str, Any] = {"data.chat.pack": cannot_pack(model) is None}
    if config is None:
        context = model.attention.context
        usual["data.seq_len"] = min(read_values(default)["data"]["seq_len"], context)
        if "lora.base" in stated:
            usual["optim.lr"] = LORA_LR
    balance = _own_balance(base, model)
    if "lora.base" in stated:  # adapters are all that is kept of such a run
        balance["bias_rate"] = 0.0
    usual |= {f"balance.{name}": value for name, value in balance.items()}
    derived = [
        f"{name}={json.dumps(value)}" for name, value in usual.items() if not _covers(stated, name)
    ]
    # After what is stated: one assignment may replace a whole part, as in balance={z = 0.0}.
    cfg = initial_settings(
        base, run, default, config, [*assignments, *derived], tuple(accept_fields)
    )
    chat = cfg.data.chat
    if chat is None:
        raise ConfigError("data.chat is null, but conversations are what is learned; leave it out")
    why = cannot_pack(model)
    if why is not None and chat.pack:
        raise ConfigError(f"{why}, so conversations cannot be packed; set data.chat.pack = false")
    if "router" in cfg.optim.freeze and not any(map(model.is_moe_layer, range(model.num_layers))):
        raise ConfigError(
            f"{base} is a dense model, with no router to freeze; leave --freeze (optim.freeze) out"
        )
    return without_frozen(cfg)


def _covers(stated: Collection[str], name: str) -> bool:
    """Whether a setting, or the part that it belongs to, is stated."""
    part, _, _ = name.rpartition(".")
    return name in stated or (bool(part) and _covers(stated, part))


def without_frozen(cfg: RunConfig) -> RunConfig:
    """The settings without adapters on routers that are not trained."""
    if cfg.lora is None or "router" not in cfg.optim.freeze:
        return cfg
    targets = tuple(each for each in cfg.lora.targets if each != "router")
    if not targets:
        raise ConfigError(
            "lora.targets is the router alone, which optim.freeze leaves as it is; name another "
            "target, or train the router"
        )
    return cfg.model_copy(update={"lora": cfg.lora.model_copy(update={"targets": targets})})


def _own_balance(base: Path, model: ModelConfig) -> dict[str, Any]:
    """The balance losses that the checkpoint was made with, in this project's measure."""
    if model.moe is None:
        return BalanceConfig().model_dump(mode="json")
    if (base / "run.json").exists():
        return state.read_run_settings(base).balance.model_dump(mode="json")
    place = origin(base)
    fields = read_json(place, finite=False) if place.is_file() else {}
    named = next((fields[name] for name in COEFFICIENTS if fields.get(name) is not None), None)
    # Routers with a selection bias were balanced by it, without a loss.
    usual = 0.0 if model.moe.router.selection_bias else USUAL_BALANCE
    mixtures = sum(model.is_moe_layer(n) for n in range(model.num_layers))
    coefficient = converted(usual if named is None else named, model.moe.top_k, mixtures)
    return {"switch": coefficient, "z": 0.0}


def new_adapters(base: Path, cfg: RunConfig) -> Model:
    """The checkpoint's model without its weights, with adapters drawn by the run's seed.

    Raises:
        ConfigError, CheckpointError: see `checkpoints.reading.open_unread`.
    """
    assert cfg.lora is not None
    model = open_unread(base, accept_fields=cfg.lora.accept_fields).model
    torch.manual_seed(cfg.train.seed)
    attach(model, cfg.lora)
    return model


def begin(
    cfg: RunConfig,
    base: Path,
    run: Path,
    opened: Callable[[], Model],
    epochs: float | None = None,
) -> RunConfig:
    """Prepare the conversations and save step 0; what is made for a run that fails here is removed.

    Args:
        cfg: From `tuning_settings`.
        base: The checkpoint's folder.
        run: The run's folder.
        opened: Reads the model; called once the data is known to be good.
        epochs: Passes over the conversations; None: `cfg.train.steps` says how long.

    Returns:
        The settings with the number of steps.
    """
    with claimed(run):
        keep_origin(base, run)
        corpus = state.corpus_of(run / "data", cfg.data, None)
        if epochs is not None:
            steps = math.ceil(epochs * corpus.windows_per_epoch / cfg.train.batch_size)
            train = cfg.train.model_copy(update={"steps": max(1, steps)})
            cfg = cfg.model_copy(update={"train": train})
        save_step_zero(run, cfg, opened(), corpus)
    return cfg
