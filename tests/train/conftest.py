"""A tiny text and tiny settings, for tests that train."""

import random

import pytest

from moestro.config import DataConfig, RunConfig
from moestro.data.windows import prepare

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "fox", "run", "far")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """A folder of texts in two domains."""
    root = tmp_path_factory.mktemp("texts")
    random_words = random.Random(0)
    for domain in ("words", "sums"):
        (root / domain).mkdir()
        for number in range(20):
            if domain == "words":
                text = " ".join(random_words.choices(WORDS, k=60))
            else:
                pairs = [
                    (random_words.randrange(50), random_words.randrange(50)) for _ in range(20)
                ]
                text = "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)
            (root / domain / f"{number}.txt").write_text(text)
    return root


@pytest.fixture(scope="session")
def tiny_data_folder(tmp_path_factory):
    """Where `tiny_corpus` lies on disk."""
    return tmp_path_factory.mktemp("data") / "tokens"


@pytest.fixture(scope="session")
def tiny_corpus(tiny_text, tiny_data_folder):
    """That text as tokens, in windows of 16."""
    cfg = DataConfig(sources=(str(tiny_text),), seq_len=16, held_out=0.2)
    return prepare(cfg, tiny_data_folder)


@pytest.fixture(scope="session")
def tiny_settings(tiny_text):
    """A function: nested changes → the RunConfig of a run that takes well under a second."""

    def make(moe=None, **changes) -> RunConfig:
        mixture = {"hidden_dim": 16, "num_experts": 4, "top_k": 2, **(moe or {})}
        values = {
            "model": {
                "dim": 16,
                "num_layers": 2,
                "attention": {"num_heads": 2, "context": 16},
                "moe": mixture,
            },
            "data": {"sources": (str(tiny_text),), "seq_len": 16, "held_out": 0.2},
            "balance": {},
            "optim": {},
            "train": {
                "steps": 6,
                "batch_size": 4,
                "dtype": "float32",
                "eval_every": 3,
                "eval_tokens": 256,
                "save_every": 3,
                "runtime": {"device": "cpu"},
            },
        }
        for part, change in changes.items():
            values[part] = {**values.get(part, {}), **change}
        return RunConfig(**values)

    return make
