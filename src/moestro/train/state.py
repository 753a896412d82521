"""Everything a run needs to go on, saved and read back: only safetensors and JSON, never pickle.

    checkpoints/step-000500/
        config.json, model.safetensors     the model, loadable on its own
    adapter.safetensors                in the weights' place: adapters, and whose they are
        tokenizer files                    what turns text into its tokens
        run.json                           the settings of the run
        hf_config.json and others          what came with the weights that the run began from
        optimizer.safetensors              its state by parameter name
        trainer.safetensors, trainer.json  step, seconds, the routing watch, the text's fingerprint
        manifest.json                      size and sha256 of every file

Noise (dropout, jitter) needs no saved generator: it is a function of the run's seed and of the
sequence's place in all that the run reads (`moestro.moe.noise`); that of adapters, of the step and
the rank.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moestro.checkpoints.folders import (
    CHECKPOINTS,
    CONFIG,
    atomic_folder,
    newest_checkpoint,
    read_json,
    remove_folder,
    seal,
    step_folders,
    unfinished,
)
from moestro.checkpoints.reading import HF_CONFIG
from moestro.checkpoints.sidecar_files import NAMES, keep_sidecar_files
from moestro.checkpoints.tensor_files import read_tensors, some
from moestro.config import DataConfig, RunConfig
from moestro.data.rows import ChatCorpus, prepare_chats
from moestro.data.windows import Corpus, prepare
from moestro.errors import CheckpointError, ConfigError, DataError, TrainingError
from moestro.files import UNFINISHED, write_json
from moestro.models.build import Model
from moestro.text import NOTE_FILE, ByteTokenizer, Tokenizer
from moestro.train.distributed import ALONE, Ranks
from moestro.train.metrics import METRICS_NAME
from moestro.train.sharded_state import Share, open_optimizer
from moestro.train.snapshot import Snapshot, load_optimizer_tensors

SETTINGS_NAME = "config.json"
# In a run that began from a checkpoint: the files that came with its weights.
ORIGIN = "init"
OF_ORIGIN = frozenset({*NAMES, NOTE_FILE, HF_CONFIG})
FORMAT = 1
# These change when something is looked at or written, or how fast, never what is learned.
MAY_DIFFER = (
    "train.eval_every", "train.eval_tokens", "train.save_every", "train.keep", "lora.base",
)  # fmt: skip
MAY_DIFFER_UNDER = ("train.runtime.", "parallel.")


class Numbers(NamedTuple):
    """The loop's own state at the end of a step.

    Attributes:
        step: Steps done.
        seconds: Seconds spent in them, evaluation and saving not counted.
        collapsed: Mixtures whose collapse has been reported.
        window_WLE: int64, the routing watch's counts of the last steps.
        corpus: Fingerprint of the text.
    """

    step: int
    seconds: float
    collapsed: tuple[int, ...]
    window_WLE: Tensor
    corpus: str


class Saved(NamedTuple):
    """What every checkpoint of a run is made of, beside the numbers of its step.

    Attributes:
        run: The run's folder.
        cfg: Its settings.
        tokenizer: That of its text.
        ranks: Those that write: all of a spread model, else one alone.
    """

    run: Path
    cfg: RunConfig
    tokenizer: Tokenizer
    ranks: Ranks = ALONE


def save(what: Saved, snapshot: Snapshot, numbers: Numbers, last: Path | None = None) -> Path:
    """Write one checkpoint, whole or not at all, then delete those beyond `cfg.train.keep`.

    Every one of `what.ranks` calls it with its own snapshot, and returns when it is whole, or
    raises with all others. `last` is the newest good checkpoint of the run; it has gone behind
    those of later steps, which are damaged, and removes them.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; nothing older was touched.
    """
    run, cfg, _, ranks = what
    target = checkpoint_folder(run, numbers.step)
    files: dict[str, Any] = {}
    try:
        with ExitStack() as making:
            with ranks.together():
                if ranks.writes:
                    _make_way(run, numbers.step, last)
                    making.enter_context(atomic_folder(target, files))
            folder = unfinished(target)
            with ranks.together():
                own = seal(snapshot.write(folder))
            for found in ranks.gathered(own):
                files |= found
            with ranks.together():
                if ranks.writes:
                    _write_rest(folder, what, snapshot, numbers)
                    making.close()
    except (OSError, SafetensorError, CheckpointError) as error:
        raise TrainingError(
            f"could not save the checkpoint of step {numbers.step} in {target.parent}: {error}. "
            f"{describe_last_good(last)} Make room there, or make it writable"
        ) from error
    if ranks.writes:
        try:
            prune(run, numbers.step, cfg.train.keep)
        except OSError as error:  # what is new is whole
            warnings.warn(f"an old checkpoint cannot be removed: {error}", stacklevel=2)
    return target


def _make_way(run: Path, step: int, last: Path | None) -> None:
    """Remove the damaged checkpoints that a run has passed."""
    (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    good = -1 if last is None else int(last.name.removeprefix("step-"))
    for number, damaged in step_folders(run).items():
        if good < number <= step:
            remove_folder(damaged)


def _write_rest(folder: Path, what: Saved, snapshot: Snapshot, numbers: Numbers) -> None:
    """All that one rank writes for all."""
    run, cfg, tokenizer, _ = what
    write_json(folder / CONFIG, snapshot.cfg.model_dump(mode="json"))
    tokenizer.save(folder)
    if (run / ORIGIN).is_dir():
        keep_sidecar_files(run / ORIGIN, folder)
    write_json(folder / "run.json", cfg.model_dump(mode="json"))
    save_file({"window": numbers.window_WLE}, folder / "trainer.safetensors")
    tokens = numbers.step * cfg.train.batch_size * cfg.data.seq_len
    values = {"format": FORMAT, "tokens": tokens, **numbers._asdict()}
    del values["window_WLE"]
    write_json(folder / "trainer.json", values)


def restore(
    checkpoint: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    corpus: str,
    share: Share | None = None,
) -> Numbers:
    """Read everything but the model from a verified checkpoint, into `optimizer` and Numbers."""
    try:
        values = read_json(checkpoint / "trainer.json")
        numbers = Numbers(
            int(values["step"]), float(values["seconds"]), tuple(values["collapsed"]),
            read_tensors(checkpoint / "trainer.safetensors")["window"].clone(),
            str(values["corpus"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot go on from {checkpoint}: {error!r}; use an older checkpoint of the run"
        ) from None
    if numbers.corpus != corpus:
        raise ConfigError(
            f"the text is not the one that {checkpoint} was trained on (fingerprint {corpus}, "
            f"saved {numbers.corpus}); put the files back, or start a new run in another folder"
        )
    if share is not None:
        share.restore(checkpoint)
    else:
        stored = open_optimizer(checkpoint).items()
        tensors = {name: one.load(torch.float32) for name, one in stored}
        load_optimizer_tensors(model, optimizer, tensors)
    return numbers


def read_run_settings(folder: Path, name: str = "run.json") -> RunConfig:
    """The RunConfig saved in a checkpoint.

    Raises:
        CheckpointError: it is missing or no valid settings.
    """
    path = folder / name
    try:
        return RunConfig(**read_json(path))
    except ConfigError as error:
        raise CheckpointError(f"cannot read the settings {path}: {error}") from None


def check_settings(saved: RunConfig, given: RunConfig, checkpoint: Path) -> None:
    """Refuse settings that make it a different run; the error names each with both values."""
    old, new = (dotted(cfg.model_dump(mode="json")) for cfg in (saved, given))
    differing = [
        f"{name} = {new.get(name)!r} (saved: {old.get(name)!r})"
        for name in sorted(old.keys() | new.keys())
        if new.get(name) != old.get(name)
        and name not in MAY_DIFFER
        and not name.startswith(MAY_DIFFER_UNDER)
    ]
    if differing:
        raise ConfigError(
            f"the run goes on with the settings of {checkpoint}; these differ: "
            f"{'; '.join(differing)}. Set them back, or start a new run in another folder "
            f"(free to change: {', '.join(MAY_DIFFER)}, {'*, '.join(MAY_DIFFER_UNDER)}*)"
        )


def corpus_of(data: Path, cfg: DataConfig, checkpoint: Path | None) -> Corpus | ChatCorpus:
    """The text that a run goes on with: as it left it in its folder `data`, else prepared again.

    Nothing is written where `cfg` is not what the checkpoint was trained with.
    """
    # Bytes have no folder in which a chat template could be.
    model = data.parent / ORIGIN if cfg.tokenizer == ByteTokenizer.name else None
    if checkpoint is None:
        return prepare(cfg, data) if cfg.chat is None else prepare_chats(cfg, data, model=model)
    saved = read_run_settings(checkpoint)
    check_settings(saved, saved.model_copy(update={"data": cfg}), checkpoint)
    if cfg.chat is not None:
        return prepare_chats(cfg, data, corpus_fingerprint(checkpoint), model)
    with suppress(DataError):
        corpus = Corpus(data)
        if corpus.fingerprint == corpus_fingerprint(checkpoint):
            return corpus
    return prepare(cfg, data)


def corpus_fingerprint(checkpoint: Path) -> str | None:
    """The fingerprint of the text that a checkpoint was trained on; None for a bare model."""
    path = checkpoint / "trainer.json"
    return str(read_json(path).get("corpus")) if path.exists() else None


def holds_run(run: Path) -> bool:
    """Whether a folder already holds a run, finished or not."""
    return any((run / name).exists() for name in (SETTINGS_NAME, METRICS_NAME, CHECKPOINTS))


def claim_folder(run: Path, resume: bool) -> None:
    """Make a run's folder if missing; it must hold a run if and only if `resume`."""
    if holds_run(run) and not resume:
        raise ConfigError(
            f"{run} already holds a run; add --resume to go on with it, or choose another folder "
            "with --out"
        )
    if resume and not holds_run(run):
        raise ConfigError(
            f"{run} holds no run to go on with; check --out, or leave --resume out to start one"
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise _unwritable(run, error) from None


def newest_or_none(run: Path) -> Path | None:
    """The newest good checkpoint of a run; None if it has saved none; an error if all are bad."""
    return newest_checkpoint(run) if step_folders(run) else None


def open_run(
    run: Path, cfg: RunConfig, resume: bool, newest: Callable[[Path], Path | None] = newest_or_none
) -> Path | None:
    """Make a run folder ready: check that it may be used, write the settings, clear leftovers.

    Args:
        run: the folder.
        cfg: the run's settings.
        resume: whether it holds the run.
        newest: finds its newest good checkpoint.

    Returns:
        The newest good checkpoint to go on from; None to begin at step 0, also where a resumed
        run was stopped before its first checkpoint.
    """
    claim_folder(run, resume)
    checkpoint = newest(run)
    if resume and checkpoint is None and (run / ORIGIN).exists():
        raise ConfigError(
            f"{run} was to begin from a checkpoint's weights and has none saved, so it cannot go "
            "on; remove it, and start again with --init"
        )
    if not resume:
        clear_origin(run)
    if checkpoint is not None:
        check_settings(read_run_settings(checkpoint), cfg, checkpoint)
    elif (run / SETTINGS_NAME).exists():
        check_settings(read_run_settings(run, SETTINGS_NAME), cfg, run)
    try:
        (run / CHECKPOINTS).mkdir(exist_ok=True)
        clear_leftovers(run)
        write_json(run / SETTINGS_NAME, cfg.model_dump(mode="json"))
    except OSError as error:
        raise _unwritable(run, error) from None
    return checkpoint


def clear_origin(run: Path) -> None:
    """Remove what a start that came to nothing left of the checkpoint that it began from.

    Raises:
        ConfigError: there are other files, which no run has put there.
    """
    folder = run / ORIGIN
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if others := names - OF_ORIGIN:
        raise ConfigError(
            f"{folder} holds {some(sorted(others))}, which no run has put there; choose another "
            "folder with --out"
        )
    shutil.rmtree(folder, ignore_errors=True)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def prune(run: Path, step: int, keep: int) -> None:
    """Delete the oldest checkpoints up to `step`, which was just verified, beyond `keep`."""
    upto = [path for number, path in step_folders(run).items() if number <= step]
    for path in upto[:-keep]:
        remove_folder(path)


def clear_leftovers(run: Path) -> None:
    """Remove the temporary folders that killed saves left behind."""
    for path in (run / CHECKPOINTS).glob(f"{UNFINISHED}*"):
        # A thread of this process may be writing there still, after a second Ctrl-C.
        shutil.rmtree(path, ignore_errors=True)


def describe_last_good(checkpoint: Path | None) -> str:
    """One sentence that names a run's newest good checkpoint, or says that there is none."""
    if checkpoint is None:
        return "There is no good checkpoint yet."
    return f"The last good checkpoint is {checkpoint}."


def _unwritable(run: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write to {run}: {error.strerror}; choose another folder with --out, or change "
        "its permissions"
    )


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
