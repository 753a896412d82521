import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch

from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import save_model
from moestro.cli.main import main
from moestro.config import EncDecConfig
from moestro.models.encdec import EncDec
from moestro.text import ByteTokenizer, load_tokenizer
from moestro.train.initial import keep_origin
from moestro.train.metrics import read_metrics

TINY = [
    "model.dim=16",
    "model.num_layers=2",
    "model.attention={num_heads = 2, context = 16}",
    "model.moe={hidden_dim = 16, num_experts = 4}",
    "data.seq_len=16",
    "data.held_out=0.2",
    "train.steps=6",
    "train.batch_size=4",
    "train.eval_every=3",
    "train.eval_tokens=64",
    "train.save_every=3",
    "train.dtype=float32",
    "train.runtime.device=cpu",
]


@pytest.fixture
def words(tmp_path):
    """Arguments of a tiny run in tmp_path/run; more settings are appended."""
    for domain in ("one", "two"):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for number in range(6):
            text = f"{domain} {number} " * 60
            (tmp_path / "text" / domain / f"{number}.txt").write_text(text)

    def make(*more, out="run"):
        settings = [word for value in TINY for word in ("--set", value)]
        source = ["--source", str(tmp_path / "text")]
        return ["train", "--out", str(tmp_path / out), *source, *settings, *more]

    return make


def test_a_run_says_what_it_reached_and_what_to_do_next(words, tmp_path, capsys):
    assert main(words()) == 0
    out, err = capsys.readouterr()
    assert "held-out bits per byte after step 6" in out
    assert {line.split()[0] for line in out.splitlines()} >= {"one", "two"}
    assert f"moestro generate {tmp_path / 'run'}" in out
    assert f"moestro probe {tmp_path / 'run'}" in out
    assert "4 experts, 2 per token" in err
    assert "step 6/6" in err


def test_json_is_one_object_on_stdout(words, tmp_path, capsys):
    assert main(words("--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == str(tmp_path / "run")
    assert found["checkpoint"].endswith("step-000006")
    assert (found["step"], found["stopped_by"]) == (6, None)
    assert found["evaluation"]["bits_per_byte"].keys() == {"all", "one", "two"}


def test_settings_come_from_a_file_and_set_overrides_it(words, tmp_path, capsys):
    (tmp_path / "run.toml").write_text("[train]\nseed = 7\nsteps = 99\n")
    assert main(words("--config", str(tmp_path / "run.toml"), "--json")) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["train"]["seed"], saved["train"]["steps"]) == (7, 6)
    assert json.loads(capsys.readouterr().out)["step"] == 6


def test_the_vocabulary_follows_the_tokenizer(words, tmp_path, capsys):
    assert main(words("--set", "data.tokenizer=bpe:300", "--set", "train.steps=1")) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    vocab_size = saved["model"]["vocab_size"]
    assert vocab_size > 256
    assert f"model.vocab_size = {vocab_size}" in capsys.readouterr().err


def test_a_second_run_in_the_folder_needs_resume(words, tmp_path, capsys):
    assert main(words("--set", "train.steps=1")) == 0
    capsys.readouterr()
    assert main(words("--set", "train.steps=1")) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--set", "optim.lr=9"]) == 2
    assert "optim.lr = 9.0 (saved: 0.002)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "optim.lrr=1"], "did you mean lr?"),
        (["--set", "model.moe.top_k=9"], "only 4 experts"),
        (["--set", "train.runtime.device=toaster"], "is not a device"),
        (["--source", "nowhere.txt"], "no such file or folder"),
        (["--config", "nowhere.toml"], "cannot read the settings file"),
        (["--resume"], "holds no run"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_run(words, tmp_path, capsys, more, message):
    assert main(words(*more)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_what_was_in_the_folder_stays_where_a_run_does_not_begin(words, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("")
    assert main(words("--source", "nowhere.txt")) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_an_unwritable_place_is_bad_input(words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(words(out="file/run")) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_resume_needs_a_folder(capsys):
    assert main(["train", "--resume"]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_run_that_fails_exits_with_1(words, tmp_path, capsys):
    assert main(words("--set", "optim.lr=1e30", "--set", "optim.warmup=0")) == 1
    err = capsys.readouterr().err
    assert "is not finite" in err
    assert "good checkpoint" in err


def saved_after(words, run, ask):
    """Start a long run in a process of its own, ask it to stop once it has begun, and wait."""
    many = ["--set", "train.steps=100000", "--set", "train.save_every=100000"]
    child = subprocess.Popen(
        [sys.executable, "-m", "moestro", *words(*many)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (metrics.exists() and read_metrics(metrics)):
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ask(child)
        child.wait(timeout=60)
        out, err = (
            "" if stream.closed else stream.read() for stream in (child.stdout, child.stderr)
        )
    finally:
        child.kill()
        child.stdout.close()
        child.stderr.close()
    steps = len(read_metrics(metrics))
    assert (run / "checkpoints" / f"step-{steps:06d}").is_dir(), err
    return child.returncode, out, err, steps


@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_another_process_goes_on(which, code, words, tmp_path):
    run = tmp_path / "run"
    returned, out, err, steps = saved_after(words, run, lambda child: child.send_signal(which))
    assert returned == code, err
    assert f"moestro train --resume --out {run}" in err
    assert f"trained {steps} of 100000 steps" in out


def test_a_display_that_nobody_reads_saves(words, tmp_path):
    """As in `moestro train … 2>&1 | head -c 1`."""

    def leave(child):
        child.stdout.close()
        child.stderr.close()

    returned, _, _, _ = saved_after(words, tmp_path / "run", leave)
    assert returned == 141


def held_text(run):
    return {path.name: path.read_bytes() for path in (run / "data").iterdir()}


def test_a_refused_resume_leaves_the_text_alone(words, tmp_path, capsys):
    assert main(words()) == 0
    before = held_text(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("something else " * 200)
    assert main(words("--resume", "--source", str(tmp_path / "other"))) == 2
    assert "these differ: data.sources" in capsys.readouterr().err
    assert held_text(tmp_path / "run") == before


def test_a_run_goes_on_when_its_sources_are_gone(words, tmp_path, capsys):
    assert main(words()) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    shutil.rmtree(tmp_path / "text")
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert "trained 6 of 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", ""], "an empty one was given"),
        (["--source", ""], "an empty one was given"),
        (["--source", "caf\udce9"], r"the path 'caf\udce9' is not text in UTF-8"),
    ],
)
def test_names_that_are_refused_before_anything_is_made(
    more, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *more]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def start(tmp_path, init, *more, out="run"):
    """Words of a tiny run that begins from a checkpoint; the model is left to it."""
    rest = [value for value in TINY if not value.startswith("model.")]
    settings = [word for value in rest for word in ("--set", value)]
    source = ["--source", str(tmp_path / "text"), "--init", str(init)]
    return ["train", "--out", str(tmp_path / out), *source, *settings, *more]


def weights(folder):
    return open_checkpoint(folder).model.state_dict()


def equal(left, right):
    return all(torch.equal(left[name], right[name]) for name in left.keys() | right.keys())


def test_a_published_checkpoint_goes_on_and_back(words, published, tmp_path, capsys):
    init = shutil.copytree(published, tmp_path / "init")
    assert main(start(tmp_path, init, "--set", "train.keep=9")) == 0
    run = tmp_path / "run"
    first, last = (run / "checkpoints" / f"step-00000{step}" for step in (0, 6))
    theirs = open_checkpoint(init).model.state_dict()
    assert equal(weights(first), theirs)
    assert not equal(weights(last), theirs)
    data = load_tokenizer(run / "data")
    assert data.vocab_size == load_tokenizer(init).vocab_size
    # The folder that it began from may go, and the prepared text too.
    shutil.rmtree(init)
    reference = weights(last)
    for number in (3, 6):
        shutil.rmtree(run / "checkpoints" / f"step-00000{number}")
    shutil.rmtree(run / "data")
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert equal(weights(last), reference)
    capsys.readouterr()
    back = tmp_path / "back"
    assert main(["convert", str(run), str(back), "--to", "hf"]) == 0
    config = json.loads((published / "config.json").read_text())
    assert json.loads((back / "config.json").read_text()) == config
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (published / name).read_bytes()
    assert equal(open_checkpoint(back).model.state_dict(), reference)
    assert main(["generate", str(run), "hi", "--chat", "--max-tokens", "2"]) == 0


def test_a_run_goes_on_in_another_run(words, tmp_path, capsys):
    assert main(words("--set", "data.tokenizer=bpe:300", "--set", "train.steps=3")) == 0
    assert main(start(tmp_path, tmp_path / "run", "--set", "train.steps=3", out="next")) == 0
    old, new = (tmp_path / name / "checkpoints" / "step-00000" for name in ("run", "next"))
    assert equal(weights(Path(f"{new}0")), weights(Path(f"{old}3")))
    assert load_tokenizer(tmp_path / "next" / "data").name == "bpe:300"
    assert main(words("--set", "train.steps=1", out="bytes")) == 0
    assert main(start(tmp_path, tmp_path / "bytes", "--set", "train.steps=1", out="more")) == 0
    saved = json.loads((tmp_path / "more" / "config.json").read_text())
    assert saved["data"]["tokenizer"] == "bytes"


def test_an_encoder_decoder_goes_on(words, tmp_path):
    positions = {"kind": "relative", "shared": True}
    cfg = EncDecConfig(
        vocab_size=300, dim=16, encoder_layers=1, decoder_layers=1,
        attention={"num_heads": 2, "context": 16, "positions": positions},
    )  # fmt: skip
    with atomic_folder(tmp_path / "init") as inside:
        save_model(EncDec(cfg), inside)
        ByteTokenizer().save(inside)
    assert main(start(tmp_path, tmp_path / "init", "--set", "train.steps=2")) == 0
    first = tmp_path / "run" / "checkpoints" / "step-000000"
    assert equal(weights(first), weights(tmp_path / "init"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "model.dim=32"], "model.dim = 32 (there: 16)"),
        (["--set", "model.moe.top_k=1"], "model.moe.top_k = 1 (there: 2)"),
        (["--set", "model.rope=1"], "model.rope = 1 (there: None)"),
        (["--set", "model=3"], "model is 3"),
        (["--set", "data.tokenizer=bytes"], "leave data.tokenizer out"),
        (["--set", "data.seq_len=128"], "model.attention.context is only 64"),
        (["--resume"], "leave --init out"),
        (["--init", "{tmp}/nowhere"], "nowhere does not exist"),
        (["--init", "{tmp}/text"], "holds no checkpoint"),
        (["--config", "{tmp}/own.toml"], "model.num_layers = 9 (there: 2)"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(
    words, published, tmp_path, capsys, more, message
):
    (tmp_path / "own.toml").write_text("[model]\nnum_layers = 9\ndim = 16\n")
    more = [word.format(tmp=tmp_path) if "{tmp}" in word else word for word in more]
    assert main(start(tmp_path, published, *more)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_settings_that_agree_with_the_checkpoint_are_fine(words, published, tmp_path):
    more = ["--set", "model.dim=16", "--set", "model.moe.top_k=2", "--set", "train.steps=1"]
    assert main(start(tmp_path, published, *more)) == 0


def test_a_vocabulary_too_small_for_its_tokenizer_is_refused(words, published, tmp_path, capsys):
    init = shutil.copytree(published, tmp_path / "init")
    inner = tokenizers.Tokenizer.from_file(str(init / "tokenizer.json"))
    inner.add_special_tokens(["<more>"])
    inner.save(str(init / "tokenizer.json"))
    assert main(start(tmp_path, init)) == 2
    assert "a vocabulary of 260, its tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_stopped_before_its_first_save_starts_anew(words, published, tmp_path, capsys):
    """Such a run must never go on from random weights."""
    run = tmp_path / "run"
    assert main(start(tmp_path, published, "--source", "nowhere")) == 2
    assert not run.exists()
    capsys.readouterr()
    run.mkdir()
    keep_origin(published, run)  # killed after that
    assert main(["train", "--resume", "--out", str(run)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (run / "checkpoints").mkdir()
    assert main(words("--resume")) == 2
    assert "start again with --init" in capsys.readouterr().err
    (run / "checkpoints").rmdir()
    assert main(words("--set", "train.steps=1")) == 0
    assert not (run / "init").exists()
    assert not (run / "checkpoints" / "step-000001" / "hf_config.json").exists()


def test_what_torchrun_starts_again_begins_or_goes_on(
    words, published, tmp_path, capsys, monkeypatch
):
    """Killed during step 0 it begins again; later it needs the weights no more."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    init, run = shutil.copytree(published, tmp_path / "weights"), tmp_path / "run"
    config = tmp_path / "own.toml"  # says nothing of the model
    config.write_text("[optim]\nlr = 0.5")
    command = start(tmp_path, init, "--config", str(config))

    def fail(*_):
        shutil.copytree(run, tmp_path / "killed")  # what a kill would leave now
        Path("nothing").stat()

    with monkeypatch.context() as patched:
        patched.setattr("moestro.train.state.seal", fail)
        assert main(command) == 1
    assert not run.exists()
    (tmp_path / "killed").rename(run)
    assert (run / "checkpoints").exists()
    assert main(command) == 0
    shutil.rmtree(init)
    assert main(command) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert main(words()) == 2
    assert "already holds a run" in capsys.readouterr().err
