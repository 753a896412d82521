import json
import random

import pytest
import torch

from moestro.checkpoints.opening import open_checkpoint
from moestro.cli.main import main
from moestro.train.metrics import read_metrics

SMALL = [
    "data.seq_len=48",
    "data.held_out=0.2",
    "train.batch_size=2",
    "train.eval_every=4",
    "train.eval_tokens=96",
    "train.save_every=2",
    "train.dtype=float32",
    "train.runtime.device=cpu",
    "optim.lr=0.01",
]
SETS = [word for each in SMALL for word in ("--set", each)]


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """Conversations of two turns: what follows a letter in the alphabet."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = []
    for _ in range(24):
        letters = [rng.choice("abcdefgh") for _ in range(2)]
        turns = [
            turn
            for letter in letters
            for turn in (
                {"role": "user", "content": letter},
                {"role": "assistant", "content": chr(ord(letter) + 1) * 3},
            )
        ]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines))
    return path


def tensors(folder):
    return dict(open_checkpoint(folder).model.state_dict())


def test_a_published_checkpoint_is_tuned_resumed_bitwise_and_written_back(
    published, chats, tmp_path, capsys
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [str(published), "--data", str(chats), *SETS, "--freeze", "router"]
    assert main(["tune", *options, "--steps", "8", "--out", str(whole)]) == 0
    losses = [point["bits_per_byte"]["all"] for point in read_metrics(whole / "metrics.jsonl")
              if "bits_per_byte" in point]  # fmt: skip
    assert losses[-1] < losses[0]
    assert main(["tune", *options, "--steps", "8", "--out", str(cut)]) == 0
    for step in ("000008", "000006"):
        folder = cut / "checkpoints" / f"step-{step}"
        if folder.exists() and step == "000008":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    assert main(["tune", "--resume", "--out", str(cut)]) == 0
    before, first, second = map(tensors, (published, whole, cut))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor, before[name]) == ("router" in name), name
    assert main(["convert", str(whole), str(tmp_path / "hf"), "--to", "hf"]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "hf"), "a", "--chat", "--max-tokens", "3"]) == 0
