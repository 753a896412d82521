import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import save_model
from moestro.cli.generate import PICTURES
from moestro.cli.main import main
from moestro.cli.painting import expert_style
from moestro.config import ModelConfig
from moestro.infer.engine import stream
from moestro.infer.sampling import SamplingConfig
from moestro.models.decoder import Decoder
from moestro.text import ByteTokenizer, load_tokenizer

SRC = Path(__file__).parents[2] / "src"
ESCAPE = "\x1b["


def saved(folder: Path, *, moe: bool) -> Path:
    torch.manual_seed(0)
    cfg = ModelConfig(
        dim=16,
        num_layers=3,
        attention={"num_heads": 2, "context": 16},
        moe={"hidden_dim": 16, "num_experts": 4, "top_k": 2} if moe else None,
        dense_first=1 if moe else 0,
        head={"tied": False},
    )
    model = Decoder(cfg)
    # The end of text gets logit 0, so that greedy text, some logit being positive, never ends.
    torch.nn.init.zeros_(model.head.weight[0].detach())
    with atomic_folder(folder) as inside:
        save_model(model, inside)
        ByteTokenizer().save(inside)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("run") / "checkpoints" / "step-000001", moe=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("dense") / "model", moe=False)


def continuation(folder: Path, prompt: str, **sampling: object) -> str:
    model, tokenizer = open_checkpoint(folder).model, load_tokenizer(folder)
    pieces = stream(model, tokenizer, prompt, SamplingConfig(**sampling))
    return "".join(piece.text for piece in pieces)


def test_prints_the_continuation_and_nothing_else(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(checkpoint), "hello", "--max-tokens", "20"]) == 0
    out, err = capsys.readouterr()
    assert out == continuation(checkpoint, "hello", max_tokens=20) + "\n"
    assert err == ""


def test_a_run_folder_gives_its_newest_checkpoint(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(checkpoint), "hello", "--max-tokens", "8"]) == 0
    assert main(["generate", str(checkpoint.parents[1]), "hello", "--max-tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]


def test_json_has_every_sampling_option(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--max-tokens 30 --temperature 1.5 --top-k 40 --top-p 0.9 --seed 7 --stop zq --stop e"
    assert main(["generate", str(checkpoint), "hi", "--json", *options.split()]) == 0
    answer = json.loads(capsys.readouterr().out)
    wanted = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 7, "stop": ("zq", "e")}
    assert answer["text"] == continuation(checkpoint, "hi", max_tokens=30, **wanted)
    assert answer["layers"] == [1, 2]
    assert len(answer["experts"]) == len(answer["tokens"]) <= 30
    assert {len(experts) for experts in answer["experts"]} <= {0, 2}
    assert answer["finish_reason"] in ("length", "stop", "end_of_text")
    assert answer["tokens_per_s"] > 0
    assert answer["prompt_tokens_dropped"] == 0


def test_the_help_states_the_defaults_that_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    default = SamplingConfig()
    for option, value in [
        ("max-tokens", default.max_tokens),
        ("temperature", default.temperature),
        ("top-k", "all" if default.top_k is None else default.top_k),
        ("top-p", default.top_p),
        ("min-p", default.min_p),
        ("repetition-penalty", default.repetition_penalty),
        ("presence-penalty", default.presence_penalty),
        ("frequency-penalty", default.frequency_penalty),
        ("seed", default.seed),
    ]:
        assert re.search(rf"--{option} [^-]*default {re.escape(str(value))}\b", text), option


def test_the_prompt_comes_from_stdin(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("né".encode())))
    assert main(["generate", str(checkpoint), "-", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == continuation(checkpoint, "né", max_tokens=5) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert main(["generate", str(checkpoint), "-"]) == 2
    assert "byte 0xff at position 2" in capsys.readouterr().err


def test_a_long_prompt_is_cut_and_says_so(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(checkpoint), "x" * 20, "--max-tokens", "2"]) == 0
    assert "20 tokens long" in (err := capsys.readouterr().err)
    assert "first 4 are left out" in err


def test_experts_without_colour(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(checkpoint), "hi", "--max-tokens", "12", "--top-k", "1"]
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert main([*words, "--show-experts", "--layer", "1"]) == 0
    out = capsys.readouterr().out
    assert ESCAPE not in out
    text, _, legend = out.rpartition("\nfirst expert in layer 1, ")
    firsts = [experts[0] for experts in answer["experts"] if experts]
    assert text.startswith(f"[{firsts[0]}]")
    for expert in set(firsts):
        assert f"[{expert}] {firsts.count(expert) / len(firsts):.0%}" in legend
    assert f"share of {len(firsts)} tokens" in legend
    plain = re.sub(r"\[\d\]", "", text).rstrip("\n")
    assert plain == answer["text"].translate(PICTURES)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_experts_in_colour(
    no_color: str,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    assert main(["generate", str(checkpoint), "hi", "--show-experts", "--max-tokens", "9"]) == 0
    out = capsys.readouterr().out
    assert ("[38;2;0;0;0;48;2;" in out) == (not no_color)
    assert bool(re.search(r"^\[\d\]", out)) == bool(no_color)
    assert "first expert in layer 2" in out


def test_each_expert_has_its_own_readable_colour() -> None:
    styles = [expert_style(expert, 32) for expert in range(32)]
    assert len(set(styles)) == 32
    for style in styles:
        red, green, blue = (int(style[-6:][i : i + 2], 16) / 255 for i in (0, 2, 4))
        # WCAG's contrast of black text on the colour; 4.5 is its bound for body text.
        linear = [
            c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
        ]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert (luminance + 0.05) / 0.05 > 4.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--show-experts", "--layer", "7"], "mixtures are 1, 2"),
        (["--show-experts", "--layer", "0"], "mixtures are 1, 2"),
        (["--layer", "1"], "add --show-experts"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--stop", ""], "empty string"),
        (["--device", "warp"], "--device warp cannot be used here"),
        (["--device", "meta"], "--device meta cannot be used here"),
    ],
)
def test_bad_options(
    options: list[str], said: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(checkpoint), "hi", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err


def test_a_dense_model_has_no_experts_to_show(
    dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(dense), "hi", "--show-experts"]) == 2
    assert "dense" in capsys.readouterr().err
    assert main(["generate", str(dense), "hi", "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == []


def test_bad_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = tmp_path / "note.txt"
    note.write_text("not a checkpoint")
    for path in (tmp_path / "nowhere", tmp_path, note):
        assert main(["generate", str(path), "hi"]) == 2
        assert str(path) in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process there")
def test_ctrl_c_ends_the_line(checkpoint: Path) -> None:
    words = [sys.executable, "-m", "moestro", "generate", str(checkpoint), "hi"]
    words += ["--max-tokens", "1000000", "--temperature", "0"]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        rest, err = process.stdout.read(), process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert rest.endswith(b"\n")
    assert err == b""


def test_keys_and_values_may_be_bytes(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []
    new = Decoder.new_cache
    monkeypatch.setattr(
        Decoder,
        "new_cache",
        lambda self, batch=1: kinds.append(self.cache_kind) or new(self, batch),
    )
    words = ["generate", str(checkpoint), "a", "--max-tokens", "3", "--temperature", "0"]
    for cache in ("as-is", "int8"):
        assert main([*words, "--cache", cache]) == 0
    assert kinds == ["as-is", "int8"]
    assert len(capsys.readouterr().out) > 0
