import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moestro.bench.peers import llama_kinds
from moestro.cli import bench
from moestro.cli.main import main
from moestro.errors import ConfigError
from moestro.kernels import native_cpu

NEEDS_NATIVE = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)
SETTINGS = """
vocab_size = 64
dim = 32
num_layers = 1
attention = { num_heads = 2, context = 40 }
moe = { hidden_dim = 32, num_experts = 4, top_k = 2 }
head = { tied = false }
"""
SHORT = ["--prompt", "6", "--tokens", "2", "--rounds", "1"]


@pytest.fixture
def settings(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SETTINGS)
    return str(path)


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading half a gigabyte in a test says nothing more."""
    from moestro.bench import speed

    monkeypatch.setattr(speed.ReadBandwidth.__init__, "__defaults__", (1 << 20,))


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["bench", *words, *SHORT, "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_the_kind_of_cache_is_said(settings: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert measured(capsys, settings, "--cache", "int8")["cache"] == "int8"
    assert measured(capsys, settings)["cache"] == "as-is"


@NEEDS_NATIVE
def test_random_weights_of_a_file_of_settings(
    settings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["--weights", "as-is", "--weights", "int4"]
    facts = measured(capsys, settings, *kinds)
    assert facts["random_weights"]
    assert facts["parameters"]["total"] > facts["parameters"]["active"]
    assert [row["weights"] for row in facts["rows"]] == ["as-is", "int4"]
    plain, packed = facts["rows"]
    assert packed["weight_bytes"] < plain["weight_bytes"]
    for row in facts["rows"]:
        assert row["name"] == "moestro"
        assert min(row[name] for name in ("prefill_per_s", "decode_per_s", "first_s")) > 0
        assert 0 < row["share"] < 1
    assert main(["bench", settings, *SHORT, *kinds]) == 0
    out = capsys.readouterr().out
    assert "random weights, 2 tokens after a prompt of 6" in out
    assert "int4" in out


def test_a_checkpoint(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = measured(capsys, str(published))
    assert not facts["random_weights"]
    if native_cpu.available() is None:
        facts = measured(capsys, str(published), "--weights", "int8")
        assert facts["rows"][0]["weights"] == "int8"


def test_beside_transformers(settings: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    facts = measured(capsys, settings, "--compare", "transformers")
    names = [row["name"] for row in facts["rows"]]
    assert names[1:] == [f"transformers {kind}" for kind in ("eager", "grouped_mm", "batched_mm")]
    assert all(row["decode_per_s"] > 0 for row in facts["rows"])


def program(path: Path, body: str) -> Path:
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    path.chmod(0o755)
    return path


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("usage", "after"),
    [
        ("", ["-n", "2"]),
        ("  -d, --n-depth <n>", ["-n", "2", "-d", "6"]),
        ("  -gp <pp,tg>", ["-n", "0", "-gp", "6,2"]),
    ],
)
def test_beside_llama_cpp(
    usage: str,
    after: list[str],
    settings: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = program(
        tmp_path / "llama-bench",
        f"words, after = sys.argv[1:], {after}\n"
        f"if words == ['--help']: sys.exit(print({usage!r}))\n"
        "assert words[:2] == ['-rtr', '1']\n"
        "assert open(words[words.index('-m') + 1], 'rb').read(4) == b'GGUF'\n"
        "prompt = words[-4:] == ['-p', '6', '-n', '0']\n"
        "assert prompt or words[-2 - len(after):] == ['-p', '0', *after], words\n"
        "field, rates = ('n_prompt', [3.0, 5.0, 4.0]) if prompt else ('n_gen', [2.5])\n"
        "print(json.dumps([{field: 2, 'samples_ts': rates}]))",
    )
    kinds = ["--weights", "int8", "--weights", "int4-64"]
    rows = measured(capsys, settings, *kinds, "--compare", f"ik={fake} -rtr 1")["rows"][2:]
    assert [(row["name"], row["weights"]) for row in rows] == [("ik", "Q8_0"), ("ik", "Q4_0")]
    assert rows[0]["prefill_per_s"] == 4
    assert rows[0]["decode_per_s"] == 2.5
    assert rows[0]["weight_bytes"] > rows[1]["weight_bytes"]
    assert rows[0]["share"] is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('hello')", "is it llama-bench?"),
        ("sys.exit('out of luck')", "failed with code 1: out of luck"),
    ],
)
def test_a_program_that_is_no_llama_bench(
    body: str, message: str, settings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = program(tmp_path / "fake", body)
    assert main(["bench", settings, *SHORT, "--compare", f"llama.cpp={fake}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "int5"], "weights are fp32, bf16, int8"),
        (["--compare", "vllm"], "choose transformers, or NAME=PROGRAM"),
        (["--compare", "llama.cpp="], "choose transformers, or NAME=PROGRAM"),
        (["--compare", "llama.cpp='"], "No closing quotation"),
        (["--compare", "llama.cpp=nowhere"], "nowhere is not a program"),
        (["--prompt", "39", "--tokens", "2"], "exceed the model's context of 40"),
    ],
)
def test_bad_options(
    words: list[str], message: str, settings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", settings, *SHORT, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        ("nowhere.toml", "there is no file"),
        ("grok-1", "not known or cannot be expressed"),
        ("switch-base-8", "encoder-decoder"),
    ],
)
def test_bad_models(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", name, *SHORT]) == 2
    assert message in capsys.readouterr().err


def test_a_model_beyond_the_memory_is_refused_before_it_is_built(
    settings: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "memory_bytes", lambda: 10_000)
    assert main(["bench", settings, *SHORT]) == 2
    assert "choose smaller --weights" in capsys.readouterr().err


def test_llama_cpp_without_the_package_that_writes_its_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "moestro.checkpoints.gguf.random_model", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'moestro\[gguf\]'"):
        llama_kinds()
