"""`moestro compare` end to end on a tiny mixture, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moestro.cli.main import main

TINY = [
    "--set", "model.dim=16", "--set", "model.num_layers=1", "--set", "model.moe.hidden_dim=8",
    "--set", "model.moe.num_experts=4", "--set", "data.seq_len=16",
    "--set", "data.domain_bytes=20_000", "--set", "train.batch_size=4", "--set", "train.steps=6",
    "--set", "train.eval_every=2", "--set", "train.eval_tokens=300",
]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> str:
    for domain in ("one", "two"):
        for number in range(6):
            path = tmp_path / "text" / domain / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{domain} {number} " * 60)
    return str(tmp_path / "text")


@pytest.fixture
def compared(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, dict[str, Any]]:
    """A finished comparison's folder, and what was printed."""
    out = tmp_path / "out"
    assert main(["compare", "--out", str(out), "--source", text, "--json", *TINY]) == 0
    return out, json.loads(capsys.readouterr().out)


def test_compare_trains_both_and_says_what_it_measured(
    compared: tuple[Path, dict[str, Any]],
) -> None:
    out, result = compared
    assert result == json.loads((out / "compare.json").read_text())
    assert {curve["kind"] for curve in result["curves"]} == {"moe", "dense"}
    for curve in result["curves"]:
        assert [point["step"] for point in curve["points"]] == [2, 4, 6]
        assert set(curve["points"][0]["bits_per_byte"]) == {"all", "one", "two"}
    assert (out / "compare.png").is_file()


def test_a_domain_may_be_called_as_markup_is(tmp_path, capsys) -> None:
    lines = [
        {"text": f"{domain} {number} " * 60, "domain": domain}
        for domain in ("[/b]", "fine")
        for number in range(6)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["compare", "--out", str(tmp_path / "out"), "--source", str(tmp_path / "text.jsonl")]
    assert main([*words, *TINY, "--set", "data.domains=field", "--set", "train.steps=2"]) == 0
    assert "│ [/b] " in capsys.readouterr().out


def test_several_processes_are_refused(text, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["compare", "--out", str(tmp_path / "out"), "--source", text, *TINY]) == 2
    assert "in one process, not in 2; start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


GROUPS = "model.moe.router={num_groups=4, top_groups=2}"
ENCODER_DECODER = """
[model]
dim = 16
encoder_layers = 1
decoder_layers = 1
[model.attention]
positions = {kind = "relative", shared = true}
num_heads = 2
context = 64
[model.moe]
num_experts = 4
top_k = 2
hidden_dim = 8
[data]
seq_len = 32
[train]
steps = 4
batch_size = 4
eval_every = 2
eval_tokens = 300
"""


@pytest.mark.parametrize("kind", ["muon", "encoder-decoder"])
def test_the_compute_of_a_token_is_what_training_counts(
    kind: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.toml").write_text(ENCODER_DECODER)
    own = ["--config", str(tmp_path / "own.toml")]
    words = [*TINY, "--set", "optim.matrices=muon"] if kind == "muon" else own
    out = ["--out", str(tmp_path / "out"), "--source", text, "--json"]
    assert main(["compare", *out, *words]) == 0
    result = json.loads(capsys.readouterr().out)
    for curve in result["curves"]:
        last, made = curve["points"][-1], result["models"][curve["kind"]]
        counted = made["train_flops_per_token"] * last["tokens"]
        assert counted == pytest.approx(last["train_flops"], rel=1e-9)
        assert made["steps"] == last["step"]


def test_several_mixtures_share_a_twin_and_get_their_laws(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["compare", "--out", str(out), "--source", text, "--experts", "4,8", *TINY]
    assert main([*words, "--granularity", "1, 2", "--set", "train.steps=2"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "compare.json").read_text())
    kinds = [curve["kind"] for curve in result["curves"]]
    assert kinds == [
        "experts4", "experts4-granularity2", "experts8", "experts8-granularity2", "dense"
    ]  # fmt: skip
    axes = [(law["axis"], law["fixed"]) for law in result["laws"]]
    assert axes == [("experts", 1), ("experts", 2), ("granularity", 4), ("granularity", 8)]
    assert printed.count("law of ") == 4
    assert (out / "scaling.png").is_file()
    assert main(["compare", "--out", str(out), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_resume_reads_what_is_done_and_gives_the_same_result(
    compared: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, first = compared
    assert main(["compare", "--out", str(out), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_resume_begins_again_what_was_killed_before_its_first_save(
    compared: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = compared
    for save in (out / "dense" / "checkpoints").iterdir():
        shutil.rmtree(save)
    assert main(["compare", "--out", str(out), "--resume", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    ends = [
        {curve["kind"]: curve["points"][-1]["bits_per_byte"] for curve in each["curves"]}
        for each in (result, again)
    ]
    assert ends[0] == ends[1]


def test_resume_refuses_runs_of_other_settings(
    compared: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = compared
    path = out / "compare-settings.json"
    saved = json.loads(path.read_text())
    saved["run"]["optim"]["lr"] = 0.5
    path.write_text(json.dumps(saved))
    assert main(["compare", "--out", str(out), "--resume"]) == 2
    assert "optim.lr = 0.5 (saved: 0.002)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "nowhere"], "no comparison to go on with"),
        (["--resume", "--out", "nowhere", "--seeds", "4"], "takes the saved settings"),
        (["--resume", "--out", "nowhere", "--minutes", "4"], "takes the saved settings"),
        (["--out", "x", "--set", "model.moe=null"], "nothing to compare"),
        (["--out", "x", "--set", "model.moe.top_k=99"], "only 16 experts"),
        (["--out", "x", "--source", "empty.txt"], "there is no text in empty.txt"),
        (["--out", "x", "--set", "train.runtime.device=toaster"], "is not a device"),
        (["--out", "x", "--budget", "1e-9"], "is the least, for 20 steps"),
        (["--out", "x", "--budget", "1e300"], "1,000,000,000 is the most"),
        (
            ["--out", "x", "--experts", "8,10", "--set", GROUPS],
            "experts10 (--experts 10, --granularity 1): 10 experts do not split",
        ),
        (["--out", "x", "--set", "model.moe.topk=2"], "did you mean top_k?"),
        (["--out", "x", "--seeds", "0"], "seeds"),
        (["--out", "x", "--experts", "8,x"], "takes numbers above 0"),
        (["--out", "x", "--granularity", "0"], "takes numbers above 0"),
        (["--out", "x", "--budget", "0"], "a number of TFLOP above 0"),
        (["--out", "x", "--budget", "1", "--minutes", "1"], "both choose the steps"),
        (
            ["--out", "x", "--budget", "1", "--set", "train.steps=7"],
            "leave --set train.steps=7 out",
        ),
        (["--out", "x", "--minutes", "1", "--set", "train.eval_every=7"], "--minutes chooses"),
        (["--resume", "--out", "x", "--experts", "8"], "takes the saved settings"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    assert main(["compare", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
    assert captured.out == ""


def test_a_folder_with_a_comparison_is_not_overwritten(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", "--out", str(out), "--source", text, *TINY]) == 0
    before = (out / "compare.json").read_bytes()
    capsys.readouterr()
    assert main(["compare", "--out", str(out), "--source", text, *TINY]) == 2
    assert "holds a comparison already" in capsys.readouterr().err
    assert (out / "compare.json").read_bytes() == before


def test_a_run_of_train_is_not_overwritten(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--out", str(run), "--source", text, *TINY]) == 0
    before = {path.name: path.read_bytes() for path in (run / "data").iterdir()}
    capsys.readouterr()
    assert main(["compare", "--out", str(run), "--source", text, *TINY]) == 2
    assert "holds a run of moestro train" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (run / "data").iterdir()} == before


def test_altered_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compare-settings.json").write_text("{}")
    assert main(["compare", "--resume", "--out", str(tmp_path)]) == 2
    assert "was altered" in capsys.readouterr().err
