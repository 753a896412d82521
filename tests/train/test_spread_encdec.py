"""Encoder-decoders spread over two ranks: the numbers of one process."""

import json

import pytest

from moestro.config import EncDecConfig
from moestro.train.loop import Trainer

from ..ranks import run_ranks
from .gaps import gap

RANK = "from tests.train.spread import main; main()"
STACKS = {
    "dim": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 300,
    "attention": {"num_heads": 2, "positions": {"kind": "relative", "shared": True}},
}  # fmt: skip
MIXTURE = {"hidden_dim": 16, "num_experts": 4, "top_k": 1, "router": {"selection_bias": True}}
NETWORKS = {
    "experts": EncDecConfig(**STACKS, moe=MIXTURE),
    "dense": EncDecConfig(**STACKS, dense={"hidden_dim": 16}),
}
# Of each network: how it is spread, and micro-batches over ranks and accumulation.
RUNS = {"experts": ({"expert": 2, "shard": 2}, 4), "dense": ({"shard": 2}, 2)}


@pytest.fixture(scope="module")
def settings(tiny_settings):
    """A function: the network's name, and whether it is spread → settings."""

    def make(name, ranks):
        parallel, pieces = RUNS[name]
        cfg = tiny_settings(
            train={
                "steps": 2, "batch_size": 8, "dtype": "float64", "accumulate": pieces // ranks,
                "eval_every": 2, "eval_tokens": 16 * 7, "save_every": 2,
                "runtime": {"device": "cpu", "checkpoint_activations": name == "experts"},
            },
            parallel=parallel if ranks > 1 else {},
            balance={"scope": "micro"},
            optim={"clip": 0.1},
        )  # fmt: skip
        return cfg.model_copy(update={"model": NETWORKS[name]})

    return make


@pytest.fixture(scope="module")
def spread(settings, tiny_data_folder, tiny_corpus, tmp_path_factory):
    """A folder with the runs of two processes."""
    root = tmp_path_factory.mktemp("spread")
    for name in NETWORKS:
        (root / f"{name}.json").write_text(settings(name, 2).model_dump_json())
    cases = [{"run": n, "settings": n, "bug": None, "resume": None, "step": None} for n in NETWORKS]
    (root / "cases.json").write_text(json.dumps(cases))
    run_ranks(2, RANK, root, tiny_data_folder)
    return root


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_give_the_numbers_of_one(spread, settings, tiny_corpus, tmp_path, name):
    Trainer(settings(name, 1), tmp_path / "alone", tiny_corpus).train()
    assert gap(spread / name, tmp_path / "alone") <= 1e-12
