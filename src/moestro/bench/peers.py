"""What `moestro bench` compares with: transformers in this process, llama.cpp in its own."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from moestro.bench.speed import Round
from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.families.translate import to_fields
from moestro.checkpoints.folders import is_pretrained
from moestro.config import ModelConfig
from moestro.errors import ConfigError
from moestro.machine import Energy, run_watched
from moestro.strictjson import parse

if TYPE_CHECKING:
    from moestro.checkpoints.gguf.header import Kind

# transformers' own experts implementations; not for dense models.
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
    """llama.cpp's weight formats by ours.

    Raises:
        ConfigError: the package that writes its files is not installed.
    """
    return cast("Mapping[str, Kind]", _gguf().KINDS)


def _gguf() -> Any:
    """The writer of llama.cpp's files; it needs an optional package."""
    try:
        return import_module("moestro.checkpoints.gguf.random_model")
    except ImportError:
        raise ConfigError("--compare llama.cpp needs gguf: pip install 'moestro[gguf]'") from None


@contextlib.contextmanager
def llama_bench(
    words: Sequence[str], cfg: ModelConfig, kind: Kind, prompt: int, tokens: int, threads: int
) -> Iterator[Callable[[], Round]]:
    """Rounds of a llama-bench, over random weights of this shape, kept as long as the context.

    Args:
        words: the program, and options of its own.
        cfg: the model's settings.
        kind: of its weights.
        prompt: tokens of the prompt.
        tokens: tokens decoded.
        threads: as many as ours.

    Raises:
        ConfigError: the program cannot be run, fails, or cannot take the model.
    """
    with tempfile.TemporaryDirectory(prefix="moestro-") as folder:
        path = Path(folder) / "model.gguf"
        _gguf().write_random(cfg, kind, path)
        yield llama_rounds(words, path, prompt, tokens, threads)


def llama_rounds(
    words: Sequence[str], path: Path, prompt: int, tokens: int, threads: int
) -> Callable[[], Round]:
    """Rounds of a llama-bench over a GGUF file.

    Tokens are decoded after the prompt where the program has an option for that (`-gp` or `-d`),
    else from an empty cache. Arguments and errors are those of `llama_bench`.
    """
    common = [*words, "-m", str(path.resolve()), "-r", "1", "-t", str(threads), "-o", "json"]
    (options, _), after = _run([words[0], "--help"], strict=False), ["-n", str(tokens)]
    if " -gp " in options:
        after = ["-n", "0", "-gp", f"{prompt},{tokens}"]
    elif " -d, " in options:
        after = ["-n", str(tokens), "-d", str(prompt)]

    def run() -> Round:
        read, read_peak = _run([*common, "-p", str(prompt), "-n", "0"])
        written, peak = _run([*common, "-p", "0", *after])
        prefill_s = prompt / _rate(words[0], read, "n_prompt")
        decode_s = tokens / _rate(words[0], written, "n_gen")
        return Round(prefill_s, prefill_s, decode_s, peak_bytes=max(read_peak, peak))

    return run


def _run(words: list[str], strict: bool = True) -> tuple[str, int]:
    """What the program prints, and its peak; `strict`: it must end well. Files are not kept."""
    program = Path(words[0])
    words = [str(program.resolve()) if program.exists() else words[0], *words[1:]]
    try:
        with tempfile.TemporaryDirectory() as folder:
            done, peak = run_watched(words, folder, LONGEST_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot run {words[0]}: {error}; give the path of llama-bench") from None
    if done.returncode and strict:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise ConfigError(f"{words[0]} failed with code {done.returncode}: {last}")
    return done.stdout, peak


def _rate(program: str, printed: str, field: str) -> float:
    """Tokens per second of the row that measured `n_prompt` or `n_gen`."""
    with contextlib.suppress(ValueError, TypeError):
        for row in parse(printed):
            if isinstance(row, dict) and row.get(field) and row.get("samples_ts"):
                return float(statistics.median(row["samples_ts"]))
    raise ConfigError(f"{program} printed no result for {field}; is it llama-bench?")
