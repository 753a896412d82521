"""Every verb that takes a checkpoint takes a GGUF file."""

import json
from pathlib import Path

import pytest
import torch

from moestro.checkpoints.adapters import own_file
from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.gguf.header import read
from moestro.checkpoints.gguf.writing import write_gguf
from moestro.checkpoints.hub import find_checkpoint
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.reading import open_unread
from moestro.cli.main import main
from moestro.config import LoraConfig, ModelConfig
from moestro.models.adapters import attach, attached
from moestro.models.decoder import Decoder
from moestro.text import train_bpe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = train_bpe(["some text to cut into tokens, and a few words more"] * 4, 288)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        num_layers=2,
        attention={"num_heads": 4, "num_kv_heads": 2, "context": 128},
        moe={"hidden_dim": 32, "num_experts": 4, "top_k": 2},
        head={"tied": False},
    )
    target = tmp_path / "tiny.gguf"
    place = tmp_path / "tokenizer"
    write_gguf(Decoder(cfg), target, family="mixtral", kind="q8_0", tokenizer=place)
    (tmp_path / "text.txt").write_text("some text that a model reads, line by line\n" * 200)
    return target


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "{file}", "some text", "--max-tokens", "4"],
        ["plan", "{file}"],
        ["bench", "{file}", "--prompt", "8", "--tokens", "4", "--rounds", "1"],
        ["eval", "{file}", "--source", "{text}"],
        ["probe", "{file}", "--source", "{text}", "--tokens", "256", "--out", "{new}"],
        ["convert", "{file}", "{new}", "--to", "hf"],
        ["convert", "{file}", "{new}", "--to", "moestro"],
        ["convert", "{file}", "{new}", "--to", "gguf", "--kind", "q4_0"],
    ],
    ids=lambda words: " ".join(words[:1] + words[3:5]),
)
@pytest.mark.filterwarnings("ignore:.*packed in another form")
def test_it_is_taken(
    words: list[str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"file": file, "text": tmp_path / "text.txt", "new": tmp_path / "new"}
    code = main([word.format(**given) for word in words])
    assert code == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    if "{new}" in words:
        assert given["new"].exists()


def test_what_was_converted_says_the_same(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GGUF → Hugging Face's layout → GGUF, in bf16 all the way."""
    plain = str(tmp_path / "plain.gguf")
    assert main(["convert", str(file), plain, "--to", "gguf", "--kind", "bf16"]) == 0
    assert main(["convert", plain, str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "b.gguf"), "--to", "gguf"]) == 0
    assert (tmp_path / "b.gguf").read_bytes() == Path(plain).read_bytes()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "kinds"), [(["q4_0"], "Q4_0 and F32"), (["f32", "--dtype", "fp16"], "F32")]
)
def test_what_is_said_of_the_weights_is_how_they_are_stored(
    words: list[str], kinds: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.gguf"
    assert main(["convert", str(file), str(new), "--to", "gguf", "--kind", *words]) == 0
    assert f"parameters in {kinds}, " in capsys.readouterr().out
    assert {info.kind.name for info in read(new).tensors} == set(kinds.split(" and "))


@pytest.mark.filterwarnings("ignore:.*packed in another form")
def test_a_run_of_adapters_over_it_is_merged_or_given_to_peft(file: Path, tmp_path: Path) -> None:
    base = find_checkpoint(file)
    net = open_unread(base).model
    lora = LoraConfig(base=str(base), rank=1)  # a folder of ours, which says nothing to others
    attach(net, lora)
    for adapter in attached(net).values():
        torch.nn.init.normal_(adapter.b)
    with atomic_folder(tmp_path / "run") as inner:
        own_file(net, lora).write(inner)
        (inner / "config.json").write_text(net.cfg.model_dump_json())
    texts = [str(tmp_path / name) for name in ("hf", "moestro", "gguf", "peft")]
    for text in texts:
        assert main(["convert", str(tmp_path / "run"), text, "--to", Path(text).name]) == 0
    plain, merged = (
        open_checkpoint(name, dtype="bf16").model.state_dict() for name in (file, texts[0])
    )
    for name, adapter in attached(net).items():
        delta = adapter.delta().detach().view(plain[name].shape)
        assert torch.equal(merged[name], (plain[name].float() + delta).bfloat16()), name
        assert not torch.equal(merged[name], plain[name])
    for text in texts[1:3]:
        again = open_checkpoint(text, dtype="bf16").model.state_dict()
        assert all(torch.equal(again[key], merged[key]) for key in merged)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(file)
