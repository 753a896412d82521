"""How runs begin, and those that begin from a checkpoint's weights: their step 0 is saved first.

From then on it is a run like any other: it resumes from its own checkpoints, and no longer needs
the folder that it began from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moestro.checkpoints.reading import read_settings
from moestro.checkpoints.sidecar_files import keep_sidecar_files
from moestro.config import EncDecConfig, ModelConfig, RunConfig
from moestro.data.rows import ChatCorpus
from moestro.data.windows import Corpus
from moestro.errors import ConfigError
from moestro.models.build import Model
from moestro.settings import read_values
from moestro.text import ByteTokenizer, load_tokenizer
from moestro.train import state
from moestro.train.health import CollapseWatch
from moestro.train.optim import make_optimizer
from moestro.train.snapshot import of_whole
from moestro.train.task import vocabulary


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Claim a new run's folder; what is put into it is removed if this ends with an error.

    Raises:
        ConfigError: it holds a run, or cannot be written.
    """
    made = not run.exists()
    there = set() if made or not run.is_dir() else {path.name for path in run.iterdir()}
    state.claim_folder(run, resume=False)
    try:
        yield
    except BaseException:
        for path in [run] if made else [run / name for name in {state.ORIGIN, "data"} - there]:
            shutil.rmtree(path, ignore_errors=True)
        raise


def initial_settings(
    init: Path,
    run: Path,
    default: Path,
    config: Path | None,
    assignments: Sequence[str],
    accept_fields: Sequence[str] = (),
) -> RunConfig:
    """Settings of a run that begins from a checkpoint: its model and its tokenizer, the rest given.

    Args:
        init: The checkpoint's folder, of either layout.
        run: The run's folder.
        default: Settings where `config` is None; what they say about the model does not count.
        config: The person's own settings.
        assignments: `a.b=value` over them.
        accept_fields: see `checkpoints.reading.read_settings`.

    Raises:
        ConfigError: they state a different model or tokenizer, or a rate for biases that its
            routers do not have; windows are longer than the model's context, or its vocabulary is
            too small for the tokenizer.
    """
    model = read_settings(init, accept_fields).cfg
    stated = read_values(config, assignments)
    _check_stated(stated, model, init)
    tokenizer = load_tokenizer(init)
    values = read_values(config or default, assignments)
    name = "bytes" if isinstance(tokenizer, ByteTokenizer) else str((run / state.ORIGIN).absolute())
    values["model"] = model.model_dump(mode="json")
    values["data"] = {**values.get("data", {}), "tokenizer": name}
    cfg = RunConfig(**values)
    needed = vocabulary(cfg.model, tokenizer, cfg.data.seq_len)
    if cfg.model.vocab_size < needed:
        raise ConfigError(
            f"{init}: the model has a vocabulary of {cfg.model.vocab_size}, its tokenizer and "
            f"windows of {cfg.data.seq_len} need {needed}; shorten data.seq_len if it is an "
            "encoder-decoder, else give a folder whose tokenizer is the model's"
        )
    return cfg


def keep_origin(init: Path, run: Path) -> None:
    """Copy what comes with the weights into the run's folder, from where each checkpoint gets it.

    Raises:
        ConfigError: it cannot be written, or files of somebody else are there.
    """
    folder = run / state.ORIGIN
    state.clear_origin(run)
    try:
        folder.mkdir()
        keep_sidecar_files(init, folder)
    except OSError as error:
        raise ConfigError(
            f"cannot copy the tokenizer's files to {folder}: {error.strerror or error}; choose "
            "another folder with --out"
        ) from None


def save_step_zero(run: Path, cfg: RunConfig, model: Model, corpus: Corpus | ChatCorpus) -> Path:
    """Write a run's first checkpoint, before any step.

    Args:
        run: The run's folder, claimed.
        cfg: Its settings.
        model: With the weights to begin from, in fp32.
        corpus: What it will be trained on.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: it cannot be written.
    """
    moe = cfg.model.moe
    watch = CollapseWatch(
        len(model.mixtures()), moe.num_experts if moe else 0, moe.top_k if moe else 1
    )
    numbers = state.Numbers(0, 0.0, (), watch.window_WLE, corpus.fingerprint)
    optimizer = make_optimizer(model, cfg.optim)
    what = state.Saved(run, cfg, corpus.tokenizer)
    return state.save(what, of_whole(model, optimizer, cfg.lora), numbers)


def _check_stated(stated: Mapping[str, Any], model: ModelConfig | EncDecConfig, init: Path) -> None:
    """Refuse settings that name a model or tokenizer other than the checkpoint's."""
    given = stated.get("model", {})
    if not isinstance(given, Mapping):
        raise ConfigError(f"model is {given!r}, but it comes from {init}; leave it out")
    own = state.dotted(model.model_dump(mode="json"), "model.")
    differing = [
        f"{name} = {value!r} (there: {own.get(name)!r})"
        for name, value in state.dotted(given, "model.").items()
        if name not in own or own[name] != value
    ]
    if differing:
        raise ConfigError(
            f"the model comes from {init}; these settings differ: {'; '.join(differing)}. "
            "Leave them out"
        )
    balance = stated.get("balance", {})
    rate = balance.get("bias_rate") if isinstance(balance, Mapping) else None
    router = model.moe.router if isinstance(model, ModelConfig) and model.moe else None
    if rate and router and not router.selection_bias:
        raise ConfigError(
            f"balance.bias_rate is {rate}, but the routers of {init} have no selection bias that "
            "it could change; leave balance.bias_rate out"
        )
    data = stated.get("data", {})
    if isinstance(data, Mapping) and data.get("tokenizer") is not None:
        raise ConfigError(
            f"the tokenizer comes from {init}, with the model that was trained on its tokens; "
            "leave data.tokenizer out"
        )
