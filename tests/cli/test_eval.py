import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.checkpoints import streamed
from moestro.cli import eval as eval_module
from moestro.cli.main import main
from moestro.infer.native_decoder import AsDecoded
from moestro.kernels import native_cpu
from moestro.models import budget

NEEDS_NATIVE = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)


@pytest.fixture
def text(tmp_path: Path) -> str:
    for name in ("first", "second"):
        lines = (f"{name} says that line {number} is here\n" for number in range(400))
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    return str(tmp_path)


@NEEDS_NATIVE
def test_every_kind_of_weights_on_the_same_text(
    published: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(published), "--source", text, "--tokens", "1000"]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["weights"] for row in facts["rows"]] == ["bf16", "int8", "int4"]
    assert facts["tokens"] > 500
    first = facts["rows"][0]
    assert first["over_first"] == 0
    assert {"all", "first", "second"} == set(first["bits_per_byte"])
    bits = [row["bits_per_byte"]["all"] for row in facts["rows"]]
    assert len(set(bits)) == 3
    assert abs(bits[1] / bits[0] - 1) < 0.01
    for row in facts["rows"]:
        assert row["over_first"] == pytest.approx(row["bits_per_byte"]["all"] / bits[0] - 1)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"{bits[2]:.4f}" in out
    assert "second" in out
    # Nothing is left beside the checkpoint.
    assert not list(published.glob("*.moestro"))


@NEEDS_NATIVE
def test_within_a_budget_the_bits_are_the_same(
    published: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(published, tmp_path / "model")  # beside which experts are kept
    words = ["eval", str(folder), "--source", text, "--tokens", "500", "--json"]
    words += ["--weights", "int8", "--cache", "int8"]
    rows = []
    for memory in ("none", "64GiB"):
        assert main([*words, "--memory", memory]) == 0
        rows.append(json.loads(capsys.readouterr().out)["rows"])
    assert rows[0] == rows[1]
    assert [row["weights"] for row in rows[0]] == ["int8", "int8, int8 cache"]


@NEEDS_NATIVE
def test_an_amount_is_enough_for_all_rows_before_the_first_is_measured(
    published: Path,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what the first model leaves behind nothing is counted again."""
    folder = shutil.copytree(published, tmp_path / "model")
    words = ["eval", str(folder), "--source", text, "--tokens", "500", "--cache", "int8"]
    words += ["--weights", "int8", "--weights", "int4", "--json", "--memory"]
    measured, measure = [], eval_module.measure

    def counted(*given: Any, **options: Any) -> dict[str, float]:
        measured.append(given[1])
        monkeypatch.setattr(streamed, "resident_bytes", lambda: 1 << 50)
        return measure(*given, **options)

    monkeypatch.setattr(eval_module, "measure", counted)
    monkeypatch.setattr(budget, "_read_back", lambda *_: 1 << 30)
    assert main([*words, "64MiB"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert not measured
    assert not list(folder.glob("*.moestro"))
    least = re.search(r"give at least (\d+)MiB", told)
    assert least is not None
    assert int(least[1]) > 8 << 10  # 8 texts of a batch
    assert main([*words, f"{least[1]}MiB"]) == 0
    assert measured == ["int8", "int8", "int4", "int4"]


def test_as_is_needs_no_native_library(
    published: Path, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise AssertionError

    monkeypatch.setattr(native_cpu, "library", refuse)
    monkeypatch.setattr(native_cpu, "available", lambda: "there is no library")
    words = ["eval", str(published), "--source", text, "--tokens", "500", "--weights", "as-is"]
    assert main([*words, "--json"]) == 0
    bits = json.loads(capsys.readouterr().out)["rows"][0]["bits_per_byte"]["all"]
    assert 0 < bits < 100
    assert torch.tensor(bits).isfinite()


@NEEDS_NATIVE
def test_text_is_read_as_decoding_reads_it(
    published: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the model's own forward, which rounds to bf16 between packed matrices."""
    models: list[Any] = []

    def look(model: Any, *_: Any, **__: Any) -> dict[str, float]:
        models.append(model)
        return {"all": 1.0}

    monkeypatch.setattr("moestro.train.evaluate.evaluate", look)
    words = ["eval", str(published), "--source", text, "--tokens", "500"]
    assert main([*words, "--weights", "int8", "--weights", "as-is"]) == 0
    assert [type(model) for model in models] == [AsDecoded, AsDecoded]


@NEEDS_NATIVE
def test_a_cache_of_bytes_has_a_line_of_its_own(
    published: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(published), "--source", text, "--tokens", "500", "--weights", "int8"]
    assert main([*words, "--cache", "int8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["weights"] for row in rows] == ["int8", "int8, int8 cache"]
    assert 0 < abs(rows[1]["over_first"]) < 0.01
    assert main([*words, "--cache", "int4"]) == 2
    assert "--cache" in capsys.readouterr().err


def test_only_text_with_a_token_that_the_model_does_not_know_is_refused(
    larger: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(larger), "--tokens", "500", "--weights", "as-is", "--source"]
    assert main([*words, text]) == 0
    calls = tmp_path / "calls.txt"
    calls.write_text("[PAD] and <tool>\n" * 200)
    assert main([*words, str(calls)]) == 2
    assert "the text of calls has token 261, '<tool>', but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "int5"], "weights are fp32, bf16, int8"),
        (["--source", "nowhere"], "nowhere"),
        (["--tokens", "0"], "greater than or equal to 1"),
    ],
)
def test_bad_options(
    words: list[str], message: str, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(published), *words]) == 2
    assert message in capsys.readouterr().err


TINY = [
    "--set", "model.dim=16", "--set", "model.num_layers=1", "--set", "model.moe.hidden_dim=8",
    "--set", "model.moe.num_experts=4", "--set", "data.seq_len=16", "--set", "data.held_out=0.3",
    "--set", "train.batch_size=4", "--set", "train.steps=2", "--set", "train.eval_tokens=300",
]  # fmt: skip


def test_what_a_run_held_out_is_made_again_only_if_it_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, run = tmp_path / "text", tmp_path / "run"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"text {number} says {number * number} " * 20)
    assert main(["train", "--out", str(run), "--source", str(text), *TINY]) == 0
    words = ["eval", str(run), "--weights", "fp32", "--json"]
    capsys.readouterr()
    assert main(words) == 0
    before = capsys.readouterr().out
    shutil.rmtree(run / "data")
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before)
    (text / "3.txt").write_text("another text " * 30)
    assert main(words) == 2
    told = capsys.readouterr()
    assert "has changed since" in told.err
    assert "give --source" in told.err
    assert main([*words, "--source", str(text)]) == 0


def test_built_in_text_is_named_where_no_run_held_any_out(
    published: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(published), "--weights", "fp32", "--tokens", "300"]
    assert main(words) == 0
    assert "measured on built-in text" in capsys.readouterr().err
    assert main([*words, "--source", text]) == 0
    assert "built-in" not in capsys.readouterr().err
