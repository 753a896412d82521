"""What two processes saved in pieces, read by one: eval, generate, probe and convert."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.pieces import WEIGHTS, Piece, file_of_pieces
from moestro.cli.main import main
from moestro.config import ModelConfig
from moestro.models.build import new_model

from ..ranks import run_ranks, run_two_ranks

RANK_OF_TWO = """
import json, sys
from pathlib import Path
import torch
from moestro.config import RunConfig
from moestro.data.windows import prepare
from moestro.train.distributed import joined
from moestro.train.loop import Trainer

root = Path(sys.argv[1])
cfg = RunConfig(**json.loads((root / "settings.json").read_text()))
with joined(torch.device("cpu")) as ranks:
    if ranks.writes:
        prepare(cfg.data, root / "data")
    ranks.wait()
    Trainer(cfg, root / "run", prepare(cfg.data, root / "data"), ranks=ranks).train()
"""
SETTINGS = {
    "model": {
        "dim": 16, "num_layers": 2, "attention": {"num_heads": 2, "context": 16},
        "moe": {"hidden_dim": 16, "num_experts": 4}, "vocab_size": 257, "head": {"tied": False},
    },
    "data": {"seq_len": 16},
    "train": {
        "steps": 2, "batch_size": 4, "dtype": "float32", "eval_every": 2, "eval_tokens": 64,
        "save_every": 2, "runtime": {"device": "cpu"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a text, and a run of two processes in `run`."""
    root = tmp_path_factory.mktemp("spread")
    (root / "text").mkdir()
    for number in range(12):
        (root / "text" / f"{number}.txt").write_text(f"text number {number} " * 30)
    data = {**SETTINGS["data"], "sources": [str(root / "text")]}
    cfg = {**SETTINGS, "data": data, "parallel": {"expert": 2, "shard": 2}}
    (root / "settings.json").write_text(json.dumps(cfg))
    run_two_ranks(RANK_OF_TWO, root)
    assert list((root / "run").glob("checkpoints/*/model-rank-*"))
    return root


@pytest.fixture(scope="module")
def whole(root):
    """The folder of the same weights in one file, by `convert`."""
    assert main(["convert", str(root / "run"), str(root / "whole"), "--to", "moestro"]) == 0
    return root / "whole"


def test_convert_to_our_layout_keeps_every_weight(root, whole):
    wanted = open_checkpoint(root / "run").model.state_dict()
    found = load_file(whole / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_convert_to_hugging_faces_layout(root, whole, tmp_path):
    for source, target in ((root / "run", "a"), (whole, "b")):
        words = ["convert", str(source), str(tmp_path / target), "--to", "hf"]
        assert main([*words, "--family", "mixtral"]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in one
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


CONVERT = """
import sys
from pathlib import Path
import moestro.checkpoints.opening, moestro.checkpoints.writing, moestro.plan.sizes, rich.progress
from moestro.cli.main import main

def memory(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(name + ":")[1].split()[0])

held = memory("VmRSS")
assert main(["convert", *sys.argv[1:]]) == 0
print("grown by", memory("VmHWM") - held)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 90 MB in two ranks' pieces; no tensor is larger than 3 MB."""
    moe = {"hidden_dim": 96, "num_experts": 32, "shared": {"hidden_dim": 32, "gate": True}}
    cfg = ModelConfig(vocab_size=64, dim=128, num_layers=20, moe=moe, attention={"num_heads": 2})
    model, target = new_model(cfg), tmp_path_factory.mktemp("large") / "whole"
    with atomic_folder(target) as folder:
        (folder / "config.json").write_text(cfg.model_dump_json())
        for rank in range(2):
            pieces = []
            for name, tensor in model.named_parameters():
                rows, first = tensor.detach().chunk(2), rank * -(-len(tensor) // 2)
                pieces += [Piece(name, rows[rank], (first, 0))] if rank < len(rows) else []
            file_of_pieces(WEIGHTS, pieces, rank, 2).write(folder)
    return target


@pytest.mark.parametrize("how", [["hf", "--family", "qwen2_moe"], ["moestro"]])
def test_convert_holds_a_tensor_and_not_the_model(how, large, tmp_path):
    size = sum(path.stat().st_size for path in large.iterdir())
    (printed,) = run_ranks(1, CONVERT, large, tmp_path / "new", "--to", *how)
    assert size > 90e6
    assert int(printed.split()[-1]) < size / 2  # a third is modules and headers
    (path,) = (tmp_path / "new").glob("*.safetensors")
    assert path.stat().st_size == pytest.approx(size, rel=0.01)


TEXT = ["--source", "TEXT", "--tokens", "64", "--json"]


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "MODEL", "--weights", "fp32", *TEXT],
        ["generate", "MODEL", "text", "--max-tokens", "6", "--temperature", "0"],
        pytest.param(["probe", "MODEL", "--out", "OUT", *TEXT], marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0],
)
def test_commands_say_the_same_of_pieces_and_whole(words, root, whole, tmp_path, capsys):
    said = []
    for place in (root / "run", whole):
        names = {"MODEL": place, "TEXT": root / "text", "OUT": tmp_path / place.name}
        assert main([str(names.get(word, word)) for word in words]) == 0
        printed = capsys.readouterr().out
        newest = next(iter((root / "run" / "checkpoints").iterdir()))
        for path in (newest, *names.values()):
            printed = printed.replace(str(path), "HERE")
        said.append(printed)
    assert said[0].strip()
    assert said[0] == said[1]
