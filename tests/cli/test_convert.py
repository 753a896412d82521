"""`moestro convert`: there and back, byte for byte, and nothing half-written."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moestro.chat import load_chat
from moestro.checkpoints import opening
from moestro.checkpoints.adapters import own_file
from moestro.checkpoints.folders import atomic_folder, verify_folder
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.reading import open_unread
from moestro.checkpoints.writing import save_model
from moestro.cli.main import main
from moestro.config import LoraConfig, ModelConfig
from moestro.models.adapters import attach
from moestro.models.decoder import Decoder
from moestro.text import ByteTokenizer, load_tokenizer


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(left, right):
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def test_there_and_back(published, tmp_path, capsys):
    own, back = tmp_path / "own", tmp_path / "deep" / "back"
    assert main(["convert", str(published), str(own), "--to", "moestro"]) == 0
    assert f"{own}: " in (out := capsys.readouterr().out)
    assert "float32" in out
    verify_folder(own)
    assert load_tokenizer(own).ends == load_tokenizer(published).ends
    assert load_tokenizer(own).end_of_text == load_tokenizer(published).end_of_text
    assert load_chat(own) == load_chat(published)
    assert main(["convert", str(own), str(back), "--to", "hf"]) == 0
    assert same(tensors(back), tensors(published))
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    for name in names:
        assert json.loads((back / name).read_text()) == json.loads((published / name).read_text())
    assert load_tokenizer(back).ends == load_tokenizer(published).ends


def test_number_types_and_shards(published, tmp_path):
    target = tmp_path / "half"
    words = ["convert", str(published), str(target), "--to", "hf", "--dtype", "bf16"]
    assert main([*words, "--shard-size", "8KB"]) == 0
    assert len(list(target.glob("*.safetensors"))) > 1
    whole = {key: value.to(torch.bfloat16) for key, value in tensors(published).items()}
    assert same(tensors(target), whole)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert open_checkpoint(target).model.embed.weight.dtype == torch.bfloat16


def test_transformers_loads_what_is_written(published, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "out"
    assert main(["convert", str(published), str(folder), "--to", "hf"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens_BS = torch.tensor([load_tokenizer(folder).encode_prompt("hello there")])
    ours = open_checkpoint(folder).model
    torch.testing.assert_close(theirs(tokens_BS).logits, ours(tokens_BS).logits, rtol=0, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(folder)("hi").input_ids == load_tokenizer(
        folder
    ).encode_prompt("hi")


def test_fused_experts(published, tmp_path):
    folder = tmp_path / "out"
    assert main(["convert", str(published), str(folder), "--to", "hf", "--fused-experts"]) == 0
    keys = load_file(folder / "model.safetensors").keys()
    assert sum(key.endswith("experts.gate_up_proj") for key in keys) == 2
    assert not [key for key in keys if "experts.0." in key]


@pytest.fixture
def own(tmp_path):
    """A checkpoint of ours that no family of Hugging Face's can express."""
    cfg = ModelConfig(
        dim=16, num_layers=2, attention={"num_heads": 2, "context": 16}, moe_every=2,
        moe={"hidden_dim": 16, "num_experts": 4, "top_k": 2, "router": {"kind": "hash"}},
    )  # fmt: skip
    with atomic_folder(tmp_path / "own") as inside:
        save_model(Decoder(cfg), inside)
        ByteTokenizer().save(inside)
    return tmp_path / "own"


def test_our_own_in_another_type(own, tmp_path, capsys):
    words = ["convert", str(own), str(tmp_path / "b"), "--to", "moestro", "--dtype", "fp16"]
    assert main(words) == 0
    assert open_checkpoint(tmp_path / "b").model.embed.weight.dtype == torch.float16
    assert load_tokenizer(tmp_path / "b").name == "bytes"


def listing(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{own}", "{new}", "--to", "hf"], "no family can express"),
        (["{own}", "{new}", "--to", "hf", "--family", "mixtral"], "mixtral"),
        (["{own}", "{new}", "--to", "hf", "--family", "parrot"], "'parrot' is not known"),
        (["{own}", "{new}", "--to", "moestro", "--family", "mixtral"], "add --to hf"),
        (["{own}", "{new}", "--to", "moestro", "--fused-experts"], "add --to hf"),
        (["{own}", "{own}", "--to", "moestro"], "nothing is overwritten"),
        (["{own}", "{own}/config.json/new", "--to", "moestro"], "is not a folder"),
        (["{own}", "", "--to", "moestro"], "an empty one was given"),
        (["{own}", "{new}", "--to", "gguf"], "no family can express"),
        (
            ["{own}", "{new}", "--to", "gguf", "--family", "switch_transformers"],
            "GGUF is written for",
        ),
        (["{own}", "{new}", "--to", "hf", "--kind", "q8_0"], "--kind q8_0 is for --to gguf"),
        (["{own}", "{new}", "--to", "moestro", "--shard-size", "1MB"], "add --to hf"),
        (["{own}", "{new}", "--to", "gguf", "--shard-size", "1MB"], "add --to hf"),
        (["{own}", "{new}-00001-of-00002.gguf", "--to", "gguf"], "one of several files"),
        (["{own}", "{new}", "--to", "onnx"], "'onnx'"),
        (["{own}", "{new}", "--to", "hf", "--dtype", "int3"], "choose fp32, bf16 or fp16"),
        (["{own}", "{new}", "--to", "hf", "--shard-size", "big"], "'big' is not a number of bytes"),
        (["{own}", "{new}", "--to", "hf", "--shard-size", "0GB"], "'0GB' is not a number of bytes"),
        (["{own}/nowhere", "{new}", "--to", "hf"], "does not exist"),
    ],
)
def test_bad_input_writes_nothing(own, tmp_path, capsys, words, message):
    before = listing(tmp_path)
    words = [word.format(own=own, new=tmp_path / "new") for word in words]
    assert main(["convert", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert listing(tmp_path) == before


def test_adapters_are_written_with_the_names_of_their_base(published, tmp_path, capsys):
    net = open_unread(published).model
    lora = LoraConfig(base=str(published), rank=1)
    attach(net, lora)
    with atomic_folder(tmp_path / "run") as inner:
        own_file(net, lora).write(inner)
        (inner / "config.json").write_text(net.cfg.model_dump_json())
    words = ["convert", str(tmp_path / "run"), str(tmp_path / "new"), "--to", "peft", "--family"]
    assert main([*words, "olmoe"]) == 2
    assert "a mixtral, whose names PEFT looks for; leave --family out" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main([*words, "mixtral"]) == 0


def test_a_source_that_cannot_be_read_is_named(own, tmp_path, capsys, monkeypatch):
    gone, real = own / "model.safetensors", opening.open_streamed

    def lost(*given, **options):
        found = real(*given, **options)
        gone.unlink()
        return found

    monkeypatch.setattr(opening, "open_streamed", lost)
    assert main(["convert", str(own), str(tmp_path / "new"), "--to", "moestro"]) == 2
    assert f"of {gone}: " in (err := capsys.readouterr().err)
    assert "cannot write" not in err


def test_a_truncated_source_writes_nothing(published, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in published.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    before = listing(tmp_path)
    assert main(["convert", str(broken), str(tmp_path / "new"), "--to", "moestro"]) == 2
    assert weights.name in capsys.readouterr().err
    assert listing(tmp_path) == before
