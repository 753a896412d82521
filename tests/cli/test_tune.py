import json
import random
import shutil
from contextlib import nullcontext

import pytest
import safetensors.torch
import torch

from moestro.checkpoints.adapters import own_settings
from moestro.checkpoints.hub import find_checkpoint
from moestro.checkpoints.opening import open_checkpoint
from moestro.cli.main import main
from moestro.cli.probe_model import open_probed
from moestro.kernels import native_cpu
from moestro.text import load_tokenizer
from moestro.train import distributed, restarts
from moestro.train.distributed import Ranks
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
    written = tensors(tmp_path / "hf")
    assert all(torch.equal(tensor, written[name]) for name, tensor in first.items())
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "hf"), "a", "--chat", "--max-tokens", "3"]) == 0


def test_adapters_are_trained_resumed_merged_and_given_to_peft(published, chats, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [str(published), "--data", str(chats), *SETS, "--lora", "3", "--freeze", "router"]
    options += ["--set", "lora.dropout=0.3"]  # drawn again as it was, after the resume
    assert main(["tune", *options, "--steps", "6", "--out", str(whole)]) == 0
    options += ["--set", "train.runtime.save=background"]
    assert main(["tune", *options, "--steps", "6", "--out", str(cut)]) == 0
    for file in (cut / "checkpoints" / "step-000006").iterdir():
        file.unlink()
    (cut / "checkpoints" / "step-000006").rmdir()
    assert main(["tune", "--resume", "--out", str(cut)]) == 0
    step = whole / "checkpoints" / "step-000006"
    # What works on weights needs those.
    assert main(["tune", str(whole), "--data", str(chats), "--lora", "2", "--show", "1"]) == 0
    again = ["--out", str(tmp_path / "again"), *SETS]
    assert main(["tune", str(whole), "--data", str(chats), "--lora", "2", *again]) == 2
    assert main(["prune", str(whole), str(tmp_path / "less"), "--keep", "0.75"]) == 2
    assert "moestro convert" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert not (step / "model.safetensors").exists()
    first, second = (
        safetensors.torch.load_file(run / "checkpoints/step-000006/adapter.safetensors")
        for run in (whole, cut)
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    states = safetensors.torch.load_file(step / "optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in states} == first.keys()
    assert not any("router" in name for name in first)
    # Opened as a run, as a base with the run's adapters, and as PEFT's both ways: one model.
    targets = {"own": ["--adapter", str(whole)]}
    for name, more in {"flat": [], "single": ["--per-expert"]}.items():
        assert main(["convert", str(whole), str(tmp_path / name), "--to", "peft", *more]) == 0
        targets[name] = ["--adapter", str(tmp_path / name)]
    command = ["convert", str(whole), str(tmp_path / "no"), "--to", "peft", "--dtype", "bf16"]
    assert main(command) == 2
    assert "leave out --adapter, --dtype and --accept-field" in capsys.readouterr().err
    wanted = tensors(whole)
    before = tensors(published)
    assert any(not torch.equal(before[name], tensor) for name, tensor in wanted.items())
    for name, more in targets.items():
        folder = tmp_path / f"merged-{name}"
        assert main(["convert", str(published), str(folder), "--to", "hf", *more]) == 0
        for key, tensor in tensors(folder).items():
            torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=1e-6)
    capsys.readouterr()
    ask = ["a", "--chat", "--max-tokens", "3", "--temperature", "0", "--special"]
    texts = set()
    for model in ([str(whole)], [str(published), *targets["flat"]]):
        assert main(["generate", *model, *ask]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


@pytest.mark.skipif(native_cpu.available() is not None, reason="no native library")
def test_packed_weights_are_tuned_and_generate_with_their_adapters(published, chats, tmp_path):
    base = shutil.copytree(published, tmp_path / "base")  # beside which the packed form is kept
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"router_jitter_noise": 0.1}))
    options = [str(base), "--data", str(chats), *SETS, "--lora", "3", "--qlora", "int8"]
    assert main(["tune", *options, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert (
        main(["generate", str(tmp_path / "run"), "a", "--weights", "int8", "--max-tokens", "2"])
        == 0
    )


def test_what_torchrun_starts_again_goes_on_with_the_same_options_only(
    published, chats, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    config = tmp_path / "own.toml"  # the number of steps follows from --epochs
    config.write_text("[data]\nseq_len = 48\n[train]\nsteps = 300")
    more = ["--set", 'lora.targets=["attention", "router"]', "--freeze", "router"]
    command = ["tune", str(published), "--data", str(chats), "--out", str(tmp_path / "run")]
    command += ["--config", str(config), *SETS, "--lora", "2", *more]
    assert main([*command, "--epochs", "0.2", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*command, "--epochs", "0.2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == first["step"]
    for other, words in (
        (["--epochs", "2"], "--epochs = 2.0 (then: 0.2)"),
        (["--epochs", "0.2", "--lora", "3"], "lora.rank = 3 (saved: 2)"),
        (["--epochs", "0.2", "--set", "data.seq_len=32"], "data.seq_len = 32 (saved: 48)"),
    ):
        assert main([*command, *other]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", "1", "--steps", "2"], "--epochs, more than 0, or --steps"),
        (["--qlora", "int4"], "needs --lora"),
        (["--steps", "2", "--set", "train.steps=3"], "train.steps=3 and an option that makes it 2"),
        (["--lora", "2", "--set", "lora={rank=3}"], "lora.rank=3 and an option that makes it 2"),
        (["--set", "data.chat.turns=some"], "data.chat.turns"),
        (["--lora", "2", "--set", 'lora.targets=["dense"]'], "nothing of the kind"),
        (["--lora", "2", "--set", 'lora.targets=["router"]', "--freeze", "router"], "router alone"),
        (["--set", "model.dim=8"], "model.dim"),
        (["--show", "-1"], "--show"),
        (["--show", "1", "--json"], "have no --json"),
        (["--set", "balance.bias_rate=0.1"], "leave balance.bias_rate out"),
        (["--set", "parallel.shard=2"], "parallel.shard = 2 does not fit 1 processes"),
        (["--set", "train.runtime.backend=none"], "unknown kernel backend"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    options, words, published, chats, tmp_path, capsys
):
    out = tmp_path / "run"
    command = ["tune", str(published), "--data", str(chats), "--out", str(out), *SETS, *options]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_what_two_processes_cannot_do_leaves_nothing(
    published, chats, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(distributed, "joined", lambda *_, **__: nullcontext(Ranks(0, 2)))
    monkeypatch.setattr(restarts, "goes_on", lambda *_: False)
    out = ["--out", str(tmp_path / "run"), *SETS, "--set", "parallel.shard=2"]
    for command, words in (
        (["tune", str(published), "--data", str(chats), "--lora", "2"], "trained on whole models"),
        (["train", "--init", str(published), "--source", __file__, "--set",
          "optim.matrices=muon"], "Muon needs whole matrices"),
    ):  # fmt: skip
        assert main([*command, *out]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_packed_weights_on_a_gpu_leave_nothing(published, chats, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    words = ["--lora", "2", "--qlora", "int4", *SETS, "--set", "train.runtime.device=auto"]
    command = ["tune", str(published), "--data", str(chats), "--out", str(tmp_path / "run"), *words]
    assert main(command) == 2
    assert "train.runtime.device = cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", "3"], "leave --epochs out"),
        (["--config", "own.toml"], "leave --config out"),
        (["--accept-field", "frob", "--show", "2"], "leave --show, --accept-field out"),
        (["--steps", "3"], "train.steps = 3 (saved: 2)"),
        (["--set", "train.steps=3"], "train.steps = 3 (saved: 2)"),
        (["--lora", "2"], "lora.rank"),
    ],
)
def test_what_a_run_that_goes_on_does_not_take_is_refused(options, words, tuned, capsys):
    assert main(["tune", "--resume", "--out", str(tuned), *options]) == 2
    assert words in capsys.readouterr().err


def test_steps_are_those_that_are_given_anywhere(published, chats, tmp_path, capsys):
    config = tmp_path / "own.toml"
    config.write_text("[train]\nsteps = 1\n")
    command = ["tune", str(published), "--data", str(chats), *SETS]
    for name, given, steps in (
        ("set", ["--set", "train.steps=1"], 1),
        ("file", ["--config", str(config)], 1),
        ("passes", ["--config", str(config), "--epochs", "0.4"], 2),
    ):
        run = tmp_path / name
        assert main([*command, *given, "--out", str(run), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["step"] == steps
    both = ["--set", "train.steps=1", "--epochs", "1", "--out", str(tmp_path / "both")]
    assert main([*command, *both]) == 2
    assert "--epochs, more than 0, or --steps" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_settings_were_written_goes_on(tuned, tmp_path, capsys):
    run = shutil.copytree(tuned, tmp_path / "run")
    (run / "config.json").unlink()
    assert main(["tune", "--resume", "--out", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2


def test_several_processes_share_a_folder_that_is_named(published, chats, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for command in (["tune", str(published), "--data", str(chats)], ["train"]):
        assert main(command) == 2
        assert "several processes need --out FOLDER" in capsys.readouterr().err


def test_a_wrong_line_stops_before_anything_is_written(published, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    out = tmp_path / "run"
    assert main(["tune", str(published), "--data", str(path), "--out", str(out)]) == 2
    assert "bad.jsonl, line 1: nothing to learn" in capsys.readouterr().err
    assert not out.exists()
    assert main(["tune", str(published)]) == 2
    assert main(["tune", str(published), "--data", str(path), "--resume"]) == 2
    capsys.readouterr()
    assert main(["tune", "--resume", "--out", str(out)]) == 2
    assert "holds no run to go on with" in capsys.readouterr().err


def test_a_settings_file_asks_for_adapters_and_their_base_must_stay(
    published, chats, tmp_path, capsys
):
    config, run = tmp_path / "lora.toml", tmp_path / "run"
    base = shutil.copytree(published, tmp_path / "base")
    config.write_text("[lora]\nrank = 2\n")
    words = ["--data", str(chats), "--config", str(config), *SETS, "--steps", "1"]
    assert main(["tune", str(base), *words, "--out", str(run)]) == 0
    kept = own_settings(find_checkpoint(run))
    assert (kept.rank, kept.base) == (2, str(base))
    weights = safetensors.torch.load_file(base / "model.safetensors")
    weights["lm_head.weight"] += 1
    safetensors.torch.save_file(weights, base / "model.safetensors", {"format": "pt"})
    commands = (
        ["tune", "--resume", "--out", str(run)],
        ["eval", str(run)],
        ["generate", str(run), "a"],
        ["generate", str(base), "a", "--adapter", str(run)],
        ["convert", str(run), str(tmp_path / "peft"), "--to", "peft"],
    )
    for command in commands:
        assert main(command) == 2, command
        assert "base has other weights or settings than" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("folder", ["data", "init"])
def test_what_was_in_the_folder_before_stays(folder, published, chats, tmp_path, capsys):
    """A project's own folders, where tuning fails: on bad data, or since they are in the way."""
    kept = tmp_path / folder / "chats.jsonl"
    kept.parent.mkdir()
    lines = chats.read_text() if folder == "init" else '{"messages": [{"role": "user"}]}'
    kept.write_text(lines)
    assert main(["tune", str(published), "--data", str(kept), "--out", str(tmp_path), *SETS]) == 2
    assert ("no run has put there" in capsys.readouterr().err) == (folder == "init")
    assert kept.read_text() == lines
    assert [path.name for path in tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize("where", ["--set", "--config"])
def test_a_rank_among_the_settings_is_enough_for_packed_weights(where, published, chats, tmp_path):
    (tmp_path / "lora.toml").write_text("[lora]\nrank = 2\n")
    given = {"--set": "lora.rank=2", "--config": str(tmp_path / "lora.toml")}[where]
    words = [where, given, "--qlora", "int8", "--show", "1", *SETS]
    assert main(["tune", str(published), "--data", str(chats), *words]) == 0


def test_the_preview_marks_what_is_learned(published, chats, capsys):
    assert main(["tune", str(published), "--data", str(chats), "--show", "2"]) == 0
    shown = capsys.readouterr().out
    first = json.loads(chats.read_text().splitlines()[0])["messages"]
    text = "<s>" + "".join(
        f"<|user|>{ask['content']}<|reply|>«{answer['content']}»"
        for ask, answer in zip(first[::2], first[1::2], strict=True)
    )
    assert text in shown
    assert "line 2" in shown


@pytest.fixture(scope="module")
def tuned(published, chats, tmp_path_factory):
    """A run of two steps."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    options = ["--data", str(chats), *SETS, "--steps", "2", "--out", str(run)]
    assert main(["tune", str(published), *options]) == 0
    return run


def json_of(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def bits_of(capsys, *words):
    (row,) = json_of(capsys, "eval", *words, "--weights", "as-is")["rows"]
    return row["bits_per_byte"]["all"]


def test_eval_reads_the_conversations_that_a_run_held_out(tuned, chats, tmp_path, capsys):
    (trained,) = [point["bits_per_byte"]["all"] for point in read_metrics(tuned / "metrics.jsonl")
                  if "bits_per_byte" in point]  # fmt: skip
    same = pytest.approx(trained, abs=1e-5)  # computed one row at a time there
    assert bits_of(capsys, tuned, "--tokens", "96") == same
    # The same ones after the prepared data is gone; text and other conversations on request.
    moved = shutil.copytree(tuned, tmp_path / "moved")
    shutil.rmtree(moved / "data")
    assert bits_of(capsys, moved, "--tokens", "96") == same
    others = bits_of(capsys, tuned, "--chats", chats)
    as_text = bits_of(capsys, tuned, "--source", __file__)
    assert len({trained, others, as_text}) == 3
    assert main(["eval", str(tuned), "--source", "a", "--chats", "b"]) == 2
    assert "--source, text, or --chats, conversations" in capsys.readouterr().err


def test_probe_reads_each_conversation_for_itself(tuned, chats):
    passages = open_probed(tuned).passages((), 96)
    tokenizer = load_tokenizer(tuned / "init")
    read = [tokenizer.decode(passage.tokens.tolist()) for passage in passages]  # without marks
    lines = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    assert set(read) < {"".join(turn["content"] for turn in turns) for turns in lines}
    assert len(passages) == len({passage.document for passage in passages}) > 4
    assert {passage.domain for passage in passages} == {"chats"}


def test_experts_are_not_judged_on_conversations(tuned, tmp_path, capsys):
    assert main(["prune", str(tuned), str(tmp_path / "less"), "--keep", "0.75"]) == 2
    assert "give some with --text" in capsys.readouterr().err
    assert not (tmp_path / "less").exists()
