"""`--accept-field`: every verb that opens a checkpoint takes it, and refuses without it."""

import json
import shutil

import pytest

from moestro.cli.main import main

# What follows PATH or stands before it, and beside it.
VERBS = {
    "generate": ["generate", "PATH", "hi", "--max-tokens", "2"],
    "generate packed": ["generate", "PATH", "hi", "--max-tokens", "2", "--weights", "int8"],
    "eval": ["eval", "PATH", "--source", "TEXT", "--tokens", "300", "--weights", "as-is"],
    "eval packed": ["eval", "PATH", "--source", "TEXT", "--tokens", "300", "--weights", "int8"],
    "bench": ["bench", "PATH", "--prompt", "2", "--tokens", "2", "--rounds", "1"],
    "probe": ["probe", "PATH", "--source", "TEXT", "--tokens", "300", "--out", "OUT"],
    "plan": ["plan", "PATH"],
    "convert": ["convert", "PATH", "OUT", "--to", "hf"],
    "train": [
        "train", "--init", "PATH", "--source", "TEXT", "--out", "OUT", "--set", "train.steps=1",
        "--set", "data.seq_len=16", "--set", "train.batch_size=2", "--set", "data.domains=folder",
    ],
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb(verb, published, tmp_path, capsys):
    if verb.endswith("packed"):
        native_cpu = pytest.importorskip("moestro.kernels.native_cpu")
        if (reason := native_cpu.available()) is not None:
            pytest.skip(reason)
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"frob": 1, "knob": 2}))
    for domain in ("first", "second"):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for number in range(4):
            text = f"{domain} {number} some words and more. " * 20
            (tmp_path / "text" / domain / f"{number}.txt").write_text(text)
    places = {"PATH": folder, "TEXT": tmp_path / "text", "OUT": tmp_path / "out"}
    words = [str(places.get(word, word)) for word in VERBS[verb]]
    assert main(words) == 2
    assert "unknown field frob, knob for model_type mixtral" in capsys.readouterr().err
    assert main([*words, "--accept-field", "frob"]) == 2
    assert "unknown field knob for" in capsys.readouterr().err
    assert main([*words, "--accept-field", "frob", "--accept-field", "knob"]) == 0


def test_train_takes_it_with_weights_alone(tmp_path, capsys):
    assert main(["train", "--accept-field", "frob", "--out", str(tmp_path / "run")]) == 2
    assert "--accept-field is about the weights of --init" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
