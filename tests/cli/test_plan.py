"""`moestro plan`: what a model may be, what is printed, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moestro.cli.main import main
from moestro.config import EncDecConfig, ModelConfig
from moestro.models.count import count
from moestro.plan.devices import Device
from moestro.plan.presets import names, preset

MIXTRAL = 46_702_792_704
SMALL = ModelConfig(dim=32, num_layers=2, moe={"hidden_dim": 16, "num_experts": 4, "top_k": 2})
HUGGING_FACE = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32_000,
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]):
    def run(*words: str) -> dict:
        assert main(["plan", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_one_json_object_for_a_preset(told) -> None:
    answer = told("Mixtral-8x7B", "--context", "1024", "--batch", "3")
    assert answer["question"]["batch"] == 3
    (model,) = answer["models"]
    assert (model["total"], model["active"]) == (MIXTRAL, 12_879_925_248)
    assert model["weights_bytes"]["bf16"] == 2 * MIXTRAL
    assert model["cache_bytes"] == 3 * 1024 * 32 * 2 * 8 * 128 * 2
    assert [dense["name"] for dense in model["dense"]] == ["dense, equal cost", "dense, equal size"]


def test_the_convention_is_an_argument(told) -> None:
    totals = {
        name: told("mixtral-8x7b", "--convention", name)["models"][0]["total"]
        for name in ("all", "no-input-embedding", "non-embedding")
    }
    embedding = 32_000 * 4096
    assert totals["all"] - totals["no-input-embedding"] == embedding
    assert totals["all"] - totals["non-embedding"] == 2 * embedding


@pytest.mark.parametrize(
    "kind", ["folder", "run", "json", "toml", "run toml", "encdec toml", "encdec model"]
)
def test_a_model_is_settings_anywhere(kind: str, tmp_path: Path, told) -> None:
    cfg, path = SMALL, tmp_path / "mine"
    path.mkdir()
    if kind == "folder":
        (path / "config.json").write_text(json.dumps(cfg.model_dump(mode="json")))
    elif kind == "run":
        for step, model in ((1, ModelConfig()), (12, cfg)):
            folder = path / "checkpoints" / f"step-{step:06d}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(model.model_dump(mode="json")))
    elif kind == "json":
        path = path / "any.json"
        path.write_text(json.dumps(cfg.model_dump(mode="json")))
    else:
        lines = ["dim = 32", "num_layers = 2", "[moe]", "hidden_dim = 16", "num_experts = 4"]
        if kind == "run toml":
            lines = ["[train]", "steps = 3", "[model]", *lines[:2], "[model.moe]", *lines[3:]]
        if kind == "encdec toml":
            lines = ["encoder_layers = 2", "decoder_layers = 2", *lines[:1], *lines[2:]]
            moe = {"hidden_dim": 16, "num_experts": 4}
            cfg = EncDecConfig(encoder_layers=2, decoder_layers=2, dim=32, moe=moe)
        if kind == "encdec model":
            lines = ["[model]", "decoder_layers = 2", "dim = 32"]
            cfg = EncDecConfig(decoder_layers=2, dim=32)
        path = path / "any.toml"
        path.write_text("\n".join(lines))
    assert told(str(path))["models"][0]["total"] == count(cfg).total


def test_settings_of_one_folder_have_titles_of_their_own(tmp_path: Path, told) -> None:
    for name in ("one.json", "two.json", "a/m/config.json", "b/m/config.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(HUGGING_FACE))
    one, two = str(tmp_path / "one.json"), str(tmp_path / "two.json")
    assert [m["name"] for m in told(one, "--against", two)["models"]] == ["one", "two"]
    paths = [str(tmp_path / side / "m") for side in "ab"]
    assert [m["name"] for m in told(paths[0], "--against", paths[1])["models"]] == paths


def test_a_model_of_the_hub_by_its_settings_alone(tmp_path: Path, monkeypatch, told) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "cache" / "models--org--tiny"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    (home / "blobs").mkdir()
    (home / "blobs" / "1").write_text(json.dumps(HUGGING_FACE))
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (tmp_path / "org").mkdir()
    (model,) = told("org/tiny")["models"]
    assert (model["name"], model["total"]) == ("org/tiny", MIXTRAL)
    (model,) = told(str(snapshot))["models"]
    assert model["name"] == "0" * 40


def test_what_is_found_of_quantisation_is_a_note(tmp_path: Path, told, capsys) -> None:
    path = tmp_path / "mine.json"
    stored = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(HUGGING_FACE | stored))
    (model,) = told(str(path))["models"]
    assert (model["total"], model["note"]) == (
        MIXTRAL, "Its weights are stored quantised by GPTQ in 4 bits.",
    )  # fmt: skip
    assert "stored quantised by GPTQ in 4 bits" in " ".join(said(capsys, str(path)).split())


def test_a_context_that_the_model_cannot_see_is_said(told, capsys) -> None:
    (model,) = told("mixtral-8x7b", "--context", "100000")["models"]
    assert model["context"] == 32_768
    clipped = "Planned for 32,768 tokens, the most that it looks back on."
    assert model["note"].endswith(f"say. {clipped}")
    assert clipped in " ".join(said(capsys, "mixtral-8x7b", "--context", "100000").split())
    assert "Planned" not in told("mixtral-8x7b", "--context", "32768")["models"][0]["note"]


@pytest.mark.parametrize("huge", [10**9, 2**40, 2**41, 2**62, 10**400])
def test_sizes_beyond_any_model_are_planned_or_refused_at_once(
    huge: int, tmp_path: Path, capsys
) -> None:
    path, start = tmp_path / "mine.json", time.process_time()
    for name in (key for key, value in HUGGING_FACE.items() if type(value) is int):
        path.write_text(json.dumps(HUGGING_FACE | {name: huge}))
        assert main(["plan", str(path), "--memory", "24GiB", "--device", "h100"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert time.process_time() - start < 10


def test_any_context_is_planned_at_once(told) -> None:
    """Counted in closed form: the attention of 24 layers has four million blocks of queries."""
    start = time.process_time()
    (model,) = told("t5-base", "--context", str(10**9))["models"]
    assert model["context"] == 10**9
    assert time.process_time() - start < 5


@pytest.mark.parametrize("how", [["--ep", "2"], ["--shard", "2"], ["--parallel", "expert"]])
def test_what_is_left_out_of_a_plan_of_ranks_is_said(how: list[str], told, capsys) -> None:
    words = ["mixtral-8x7b", "--against", "dbrx", "--against", "llama-2-7b", "--ranks", "4", *how]
    known, counted, dense = told(*words)["models"]
    assert known["rank"] is not None
    assert "its ranks" not in known["note"]
    assert counted["rank"] is None
    left_out = "what its ranks hold and send is left out"
    assert counted["note"].endswith(f"With counts alone, {left_out}.")
    if how[0] == "--parallel":
        assert dense["note"] == f"Without experts to split, {left_out}."
    else:
        assert (dense["rank"] is None, dense["note"]) == (False, "")
    assert left_out in " ".join(said(capsys, *words).split())
    (counted,) = told("dbrx", "--ranks", "4", "--parallel", "fsdp")["models"]
    assert counted["rank"] is not None
    assert left_out not in counted["note"]


@pytest.mark.parametrize("name", ["mistral", "mistral/config.json"])
def test_a_hugging_face_folder(name: str, tmp_path: Path, told) -> None:
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral" / "config.json").write_text(json.dumps(HUGGING_FACE))
    (model,) = told(str(tmp_path / name))["models"]
    assert (model["name"], model["total"]) == ("mistral", MIXTRAL)


def test_side_by_side(told) -> None:
    """The two sides of the field's best known comparison, from the command line."""
    models = told("glam-64b-64e", "--against", "gpt-3", "--against", "t5-base")["models"]
    assert [model["name"] for model in models] == ["glam-64b-64e", "gpt-3", "t5-base"]
    flops = [model["forward_flops"] / 1e9 for model in models]
    assert flops[:2] == [pytest.approx(180, rel=0.1), pytest.approx(350, rel=0.02)]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_table_is_as_wide_as_the_terminal(columns: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    others = [word for name in ("gpt-4-rumour", "gpt-3", "t5-base") for word in ("--against", name)]
    out = said(
        capsys, "mixtral-8x7b", *others, "--device", "rtx4090", "--price-per-hour", "0.4",
        "--ranks", "8", "--parallel", "expert", "--convention", "no-input-embedding",
        "--memory", "24GiB",
    )  # fmt: skip
    lines = out.splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert "gpt-4-rumour (RUMOUR)" in out
    # No number is cut or wrapped: each row of cells starts with its label.
    assert not [line for line in lines if line.startswith("   ") and line.strip()[:1].isdigit()]


def test_a_mixture_stands_beside_its_dense_models(capsys) -> None:
    out = said(capsys, "mixtral-8x7b")
    assert "dense, equal cost" in out
    row = next(line for line in out.splitlines() if line.strip().startswith("active per token"))
    assert row.split()[-3:] == ["12.9B", "12.9B", "46.7B"]


def test_what_fits_and_what_would_have_to_give(capsys) -> None:
    out = said(capsys, "mixtral-8x7b", "--memory", "48GiB", "--context", "1000")
    assert "mixtral-8x7b in 48.0 GiB" in out
    assert "weights in int8" in out
    assert "% of the experts in other memory" in out
    assert "fully sharded" in " ".join(out.split())
    assert "weights in" not in said(capsys, "mixtral-8x7b", "--memory", "1TiB").split("fits")[-1]


def test_all_to_all_of_expert_parallelism(told) -> None:
    (model,) = told("mixtral-8x7b", "--ranks", "8", "--parallel", "expert", "--context", "1024")[
        "models"
    ]
    rows = 1024 * 2
    assert model["rank"]["all_to_all_per_layer"] == 4 * rows * 4096 * 2 * 7 / 8
    assert 4 * MIXTRAL / 8 < model["rank"]["weights"] < 4 * MIXTRAL / 6


def test_this_machine_is_measured(monkeypatch, told) -> None:
    from moestro.plan import measured

    monkeypatch.setattr(measured, "measure", lambda: Device("this machine", 2**30, 1e9, 1e12, "x"))
    answer = told("qwen3-0.6b", "--device", "this")
    (model,) = answer["models"]
    assert answer["question"]["device"]["name"] == "this machine"
    assert model["decode"]["limit"] == "bandwidth"
    assert model["decode"]["tokens_per_s"] == pytest.approx(1e9 / model["decode"]["read_bytes"])


def test_the_list(capsys, told) -> None:
    out = said(capsys, "--list")
    assert all(name in out for name in names())
    assert "gpt-4-rumour (RUMOUR)" in out
    listed = {entry["name"]: entry for entry in told("--list")["presets"]}
    assert set(listed) == set(names())
    assert [name for name, entry in listed.items() if entry["rumour"]] == ["gpt-4-rumour"]
    assert listed["mixtral-8x7b"]["total"] == preset("mixtral-8x7b").count.total


def test_a_figure(tmp_path: Path, capsys) -> None:
    path = tmp_path / "plan.png"
    out = said(capsys, "mixtral-8x7b", "--against", "gpt-4-rumour", "--figure", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "plan.png" in out.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--list"),
        (["gpt-3", "--list"], "leave out MODEL, --against and --figure, or --list"),
        (["--list", "--figure", "plan.png"], "leave out MODEL, --against and --figure"),
        (["mixtral-8x7"], "did you mean mixtral-8x7b"),
        (["mixtral-8x7b", "--against", "nothing-like-it"], "no preset 'nothing-like-it'"),
        (["nowhere.toml"], "there is no file nowhere.toml"),
        (["."], "no config.json, no GGUF file and no checkpoints"),
        (["bad.toml"], "unknown setting dims: did you mean dim?"),
        (["broken.toml"], "broken.toml is not valid TOML"),
        (["broken.json"], "broken.json cannot be read"),
        (["ggufs/x.gguf"], "x.gguf is truncated or altered"),
        (["ggufs"], "x.gguf is truncated or altered"),
        (["gpt-3", "--memory", "plenty"], "'plenty' is not a number of bytes"),
        (["gpt-3", "--device", "h1000"], "did you mean h100"),
        (["gpt-3", "--price-per-hour", "2"], "name it with --device"),
        (["gpt-3", "--device", "h100", "--price-per-hour", "0"], "must be more than 0"),
        (["gpt-3", "--device", "h100", "--price-per-hour", "nan"], "must be more than 0"),
        (["gpt-3", "--parallel", "fsdp"], "add --ranks N"),
        (["gpt-3", "--parallel", "expert", "--ranks", "2"], "gpt-3 has no experts"),
        (["gpt-3", "--ep", "2", "--ranks", "8"], "gpt-3 has no experts to split; leave --ep out"),
        (["gpt-3", "--against", "t5-base", "--ep", "2", "--ranks", "8"], "gpt-3 has no experts"),
        (["mixtral-8x7b", "--parallel", "expert", "--ranks", "9"], "lower --ranks to 8"),
        (["gpt-3", "--figure", "plan.jpg"], "writes a .png file"),
        (["gpt-3", "--figure", "no/such/folder.png"], "cannot write"),
        (["gpt-3", "--dtype", "int3"], "int4"),
        (["gpt-3", "--batch", "0"], "--batch"),
        (["gpt-3", "--context", "many"], "--context"),
    ],
)
def test_what_is_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("dims = 3")
    (tmp_path / "broken.toml").write_text("dim = = 3")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "x.gguf").write_bytes(b"GGUF")
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_a_preset_needs_no_torch() -> None:
    code = (
        "import sys; from moestro.cli.main import main;"
        "assert main(['plan', 'mixtral-8x7b', '--device', 'h100', '--memory', '24GiB']) == 0;"
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_cache_of_bytes_takes_a_byte_a_number_and_four_a_row(capsys):
    for words, row in (([], 2 * 128), (["--cache", "int8"], 128 + 4)):
        assert main(["plan", "mixtral-8x7b", "--context", "1000", *words, "--json"]) == 0
        (model,) = json.loads(capsys.readouterr().out)["models"]
        assert model["cache_bytes"] == 1000 * 32 * 2 * 8 * row
