"""Files of others, damaged at random: they are read, or refused in one sentence."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
import torch

from moestro.chat import load_chat
from moestro.checkpoints.folders import verify_folder
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.reading import read_settings
from moestro.checkpoints.tensor_files import open_folder
from moestro.checkpoints.writing import write_pretrained
from moestro.config import ModelConfig, RunConfig
from moestro.data.windows import Corpus
from moestro.errors import MoestroError
from moestro.infer.sampling import stated_sampling
from moestro.models.decoder import Decoder
from moestro.plan.subject import from_file
from moestro.probe.recording.tracefile import read_trace, write_parts
from moestro.settings import load_settings
from moestro.text import load_tokenizer, train_bpe
from moestro.train import state
from moestro.train.loop import Trainer
from moestro.train.metrics import cut_after, history, read_metrics
from moestro.train.optim import make_optimizer

from .probe.traces import make_trace

MUTATIONS = 60
NASTY = (
    "null", "true", "[]", "{}", '""', "0", "-1", "1e300", "0.5", "9" * 40, "9" * 5000, "1e999",
    "NaN", "[" * 50 + "]" * 50, "[" * 5000, '{"a":' * 5000, '{"self": 1}', '{"a": 1, "a": 2}',
    r'"\ud800"', '"../../etc/passwd"', '"\\u0000"', "[[1]]", '[null, "x"]', "4294967296",
    "9223372036854775808", '"' + "x" * 3000 + '"',
)  # fmt: skip


class Reader(NamedTuple):
    """A file, and what reads it."""

    path: Path
    read: Callable[[], object]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A damaged form of a file: some of its bytes, or one value where it is JSON."""
    lines = [content]
    at = 0
    if chance.random() < 0.5:
        return _other_bytes(content, chance)
    try:
        value = json.loads(content)
    except ValueError:
        lines = content.split(b"\n")
        at = chance.randrange(len(lines))
        try:
            value = json.loads(lines[at])
        except ValueError:
            return _other_bytes(content, chance)
    lines[at] = _other_value(value, chance).encode()
    return b"\n".join(lines)


def _other_bytes(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    until = min(at + chance.choice((1, 1, 4, 100)), len(content))
    if chance.random() < 0.1:
        return content[:at]
    old = content[at:until]
    new = chance.choice((b"", old * 2, chance.randbytes(len(old)), chance.choice(NASTY).encode()))
    return content[:at] + new + content[until:]


def _other_value(value: object, chance: random.Random) -> str:
    """JSON with one value replaced, added or left out, or one key changed."""
    spots = list(_spots(value))
    if not spots:
        return chance.choice(NASTY)
    owner, key = chance.choice(spots)
    kind = chance.random()
    if isinstance(owner, dict) and kind < 0.2:
        changed = owner.pop(key)
        if kind < 0.1:
            owner[f"{key}x"] = changed
    else:
        owner[key] = "\0"
    return json.dumps(value).replace(json.dumps("\0"), chance.choice(NASTY))


def _spots(value: object) -> Iterator[tuple]:
    inner = enumerate(value) if isinstance(value, list) else dict(value or {}).items()
    for key, one in list(inner):
        yield value, key
        if isinstance(one, dict | list):
            yield from _spots(one)


def a_run(folder: Path) -> Path:
    """A run of two steps."""
    text = folder / "text"
    text.mkdir()
    for number in range(9):
        (text / f"{number}.txt").write_text("some words, and a few more of them\n" * 20)
    cfg = RunConfig(
        model={
            "dim": 8, "num_layers": 1, "attention": {"num_heads": 1, "context": 16},
            "moe": {"hidden_dim": 8, "num_experts": 2, "top_k": 1},
        },
        data={"sources": (str(text),), "seq_len": 16, "held_out": 0.2},
        train={
            "steps": 2, "batch_size": 2, "dtype": "float32", "eval_every": 1, "eval_tokens": 64,
            "save_every": 2, "runtime": {"device": "cpu"},
        },
    )  # fmt: skip
    state.prepare(cfg.data, folder / "data")
    Trainer(cfg, folder / "run", Corpus(folder / "data")).train()
    return folder / "run"


def a_published_folder(folder: Path) -> Path:
    """A tiny Mixtral in two shards, with a trained tokenizer and a chat template."""
    cfg = ModelConfig(
        vocab_size=300,
        dim=8,
        num_layers=1,
        attention={"num_heads": 1, "context": 16},
        moe={"hidden_dim": 8, "num_experts": 4, "top_k": 2},
        head={"tied": False},
    )
    write_pretrained(Decoder(cfg), folder, family="mixtral", shard_bytes=8000)
    train_bpe(["some words and more of them " * 9], 280).save(folder)
    (folder / "moestro_tokenizer.json").unlink()
    end = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() - 1
    for name, values in {
        "tokenizer_config": {"eos_token": {"content": "<|end_of_text|>"}, "chat_template": "{{1}}"},
        "generation_config": {"eos_token_id": [end], "top_k": 3, "temperature": 0.5},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, Reader]:
    """Every file that is read, whole, and its reader."""
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("whole")
    run = a_run(base)
    step, data = run / "checkpoints" / "step-000002", base / "data"
    folder = a_published_folder(base / "published")
    model, fingerprint = open_checkpoint(step).model, Corpus(data).fingerprint
    trace, settings = base / "trace.npz", base / "model.toml"
    write_parts(trace, [make_trace()])
    settings.write_text("[model]\ndim = 8\nnum_layers = 1\n[train]\nsteps = 3\n")

    def restore() -> None:
        state.restore(step, model, make_optimizer(model, RunConfig().optim), fingerprint)

    def own_weights() -> None:
        open_checkpoint(step, verified=True)

    def metrics() -> None:
        history(read_metrics(run / "metrics.jsonl"))
        cut_after(run / "metrics.jsonl", 1)

    def corpus() -> None:
        found = Corpus(data)
        found.batch(0, 2)
        found.held_out(64)

    def tokenizer() -> None:
        found = load_tokenizer(folder)
        found.decode(found.encode_prompt("some words, ünd more"))

    def chat() -> None:
        found = load_chat(folder)
        load_tokenizer(folder).encode_prompt(found.render([{"role": "user", "content": "hi"}]))

    return {
        "own config": Reader(step / "config.json", lambda: read_settings(step)),
        "own weights": Reader(
            step / "model.safetensors", lambda: open_checkpoint(step, verified=True)
        ),
        "manifest": Reader(step / "manifest.json", lambda: verify_folder(step)),
        "run settings": Reader(step / "run.json", lambda: state.read_run_settings(step)),
        "trainer state": Reader(step / "trainer.json", restore),
        "optimizer": Reader(step / "optimizer.safetensors", restore),
        "metrics": Reader(run / "metrics.jsonl", metrics),
        "tokens": Reader(data / "meta.json", corpus),
        "tokenizer note": Reader(step / "moestro_tokenizer.json", lambda: load_tokenizer(step)),
        "tokenizer": Reader(folder / "tokenizer.json", tokenizer),
        "tokenizer settings": Reader(folder / "tokenizer_config.json", tokenizer),
        "chat": Reader(folder / "tokenizer_config.json", chat),
        "ends": Reader(folder / "generation_config.json", tokenizer),
        "sampling": Reader(folder / "generation_config.json", lambda: stated_sampling(folder)),
        "index": Reader(folder / "model.safetensors.index.json", lambda: open_folder(folder)),
        "config": Reader(folder / "config.json", lambda: read_settings(folder)),
        "trace": Reader(trace, lambda: read_trace(trace)),
        "settings": Reader(settings, lambda: load_settings(RunConfig, settings)),
        "plan": Reader(settings, lambda: from_file(settings)),
    }


READERS = (
    "own config", "own weights", "manifest", "run settings", "trainer state", "optimizer",
    "metrics", "tokens", "tokenizer note", "tokenizer", "tokenizer settings", "chat", "ends",
    "sampling", "index", "config", "trace", "settings", "plan",
)  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(readers, name):
    path, read = readers[name]
    whole, chance = path.read_bytes(), random.Random(name)
    read()
    said = []
    try:
        for _ in range(MUTATIONS):
            path.write_bytes(mutated(whole, chance))
            try:
                read()
            except MoestroError as error:
                said.append(str(error))
    finally:
        path.write_bytes(whole)
    assert len(said) > MUTATIONS / 9
