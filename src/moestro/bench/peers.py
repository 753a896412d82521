"""What `moestro bench` measures beside us: transformers in this process, llama.cpp in its own."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from moestro.bench.speed import Round, Speed
from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.families.translate import to_fields
from moestro.checkpoints.reading import is_pretrained
from moestro.config import ModelConfig
from moestro.errors import ConfigError
from moestro.machine import Energy, children_peak_bytes
from moestro.models.count import count
from moestro.strictjson import parse

if TYPE_CHECKING:
    from moestro.checkpoints.gguf.header import Kind

# transformers' own ways to run experts; dense models have none.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
LONGEST_S = 1800


def transformers_model(cfg: ModelConfig, folder: Path | None) -> Any:
    """The model in transformers, bf16: the folder's, or one of random weights of that shape.

    Raises:
        ConfigError: transformers is not installed, or has no family of this shape.
    """
    try:
        transformers: Any = import_module("transformers")
    except ImportError:
        raise ConfigError("--compare transformers needs it: pip install 'moestro[hf]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    loader = transformers.AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if folder is not None and is_pretrained(folder):
            return loader.from_pretrained(folder, dtype=torch.bfloat16).eval()
        fields = _fields(cfg)
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        return loader.from_config(config, dtype=torch.bfloat16).eval()


def _fields(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of the first family that can express the settings."""
    for family in FAMILIES.values():
        with contextlib.suppress(ConfigError):
            return to_fields(family, cfg, {})
    raise ConfigError(
        "--compare transformers: no family there has these settings; compare llama.cpp, or change "
        "the settings to those of one of its models"
    )


def transformers_rounds(
    model: Any, implementation: str, prompt: int, tokens: int, seed: int = 0
) -> Callable[[], Round]:
    """Rounds as `moestro.bench.speed.rounds_of`, with transformers' own cache.

    Args:
        model: from `transformers_model`.
        implementation: one of `IMPLEMENTATIONS`; empty for a dense model.
        prompt: tokens of the prompt.
        tokens: tokens decoded after it.
        seed: of the tokens.
    """
    energy = Energy()
    generator = torch.Generator().manual_seed(seed)
    shape = (1, prompt + tokens)
    vocab = model.config.vocab_size
    ids_1S = torch.randint(0, vocab, shape, generator=generator, device="cpu")
    later = [ids_1S[:, place : place + 1] for place in range(prompt, prompt + tokens)]

    @torch.inference_mode()
    def run() -> Round:
        if implementation:
            model.set_experts_implementation(implementation)
        start = time.perf_counter()
        output = model(ids_1S[:, :prompt], use_cache=True, logits_to_keep=1)
        prefilled = time.perf_counter()
        output.logits[:, -1].argmax(-1).item()
        first = time.perf_counter()
        joules = energy.joules()
        begun = time.perf_counter()
        for token_11 in later:
            output = model(token_11, use_cache=True, **cache_of(output))
        decode_s = time.perf_counter() - begun
        return Round(prefilled - start, first - start, decode_s, energy.since(joules))

    return run


def cache_of(output: Any) -> dict[str, Any]:
    """The keyword that hands the cache of an output of transformers on to the next call.

    Named `past_key_values` before transformers 5.24, and `cache` since.
    """
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


def llama_kinds() -> Mapping[str, Kind]:
    """llama.cpp's kinds of weights by ours.

    Raises:
        ConfigError: the package that writes its files is not installed.
    """
    return cast("Mapping[str, Kind]", _gguf().KINDS)


def _gguf() -> Any:
    """What writes llama.cpp's files: it needs a package that not everybody has."""
    try:
        return import_module("moestro.checkpoints.gguf.random_model")
    except ImportError:
        raise ConfigError("--compare llama.cpp needs gguf: pip install 'moestro[gguf]'") from None


def llama_bench(
    program: Path, cfg: ModelConfig, kind: Kind, prompt: int, tokens: int, rounds: int, threads: int
) -> Speed:
    """What llama.cpp's own llama-bench says of a model of random weights of this shape.

    Args:
        program: llama-bench.
        cfg: the model's settings.
        kind: of its weights.
        prompt: tokens of the prompt.
        tokens: tokens decoded, from an empty cache, as llama-bench does.
        rounds: that count.
        threads: as many as ours.

    Raises:
        ConfigError: the program cannot be run, fails, or cannot take the model.
    """
    with tempfile.TemporaryDirectory(prefix="moestro-") as folder:
        path = Path(folder) / "model.gguf"
        _gguf().write_random(cfg, kind, path)
        words = ["-m", path, "-p", prompt, "-n", tokens, "-r", rounds, "-t", threads, "-o", "json"]
        found = list(_rows(_run(program, [str(word) for word in words])))
    prefill = _rate(program, found, "n_prompt")
    size = count(cfg).matmul * kind.bytes / kind.length
    return Speed(
        prefill_per_s=prefill,
        decode_per_s=_rate(program, found, "n_gen"),
        first_s=prompt / prefill,
        weight_bytes=size,
        read_per_s=None,
        share=None,
        peak_bytes=children_peak_bytes(),
        joules=None,
    )


def _run(program: Path, words: list[str]) -> str:
    """What the program prints."""
    try:
        done = subprocess.run(
            [str(program), *words], capture_output=True, text=True, timeout=LONGEST_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot run {program}: {error}; give the path of llama-bench") from None
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise ConfigError(f"{program} failed with code {done.returncode}: {last}")
    return done.stdout


def _rows(text: str) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(ValueError, TypeError):
        yield from (row for row in parse(text) if isinstance(row, dict))


def _rate(program: Path, rows: list[dict[str, Any]], field: str) -> float:
    """Tokens per second of the row that measures `n_prompt` or `n_gen` alone."""
    other = "n_gen" if field == "n_prompt" else "n_prompt"
    for row in rows:
        if row.get(field) and not row.get(other) and row.get("samples_ts"):
            return float(statistics.median(row["samples_ts"]))
    raise ConfigError(f"{program} printed no result for {field}; is it llama-bench?")
