"""`moestro generate` with published checkpoints, chats, remote names and encoder-decoders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moestro.cli.main import main
from moestro.config import EncDecConfig
from moestro.models.checkpoint import atomic_folder, save_model
from moestro.models.encdec import EncDec
from moestro.models.pretrained import read_pretrained
from moestro.text import ByteTokenizer, load_tokenizer

SRC = Path(__file__).parents[2] / "src"
GREEDY = ["--temperature", "0", "--max-tokens", "32", "--json"]


def tokens_of(words, capsys):
    assert main(["generate", *words, *GREEDY]) == 0
    return json.loads(capsys.readouterr().out)


def greedy(model, tokens, ends, steps=32):
    """The likeliest continuation without a cache, up to an end."""
    made = []
    while len(made) < steps and not (made and made[-1] in ends):
        output = model(torch.tensor([[*tokens, *made]]))
        made.append(int(output.logits[0, -1].argmax()))
    return made


def test_a_prompt_begins_as_the_tokenizer_says(published, capsys):
    model, tokenizer = read_pretrained(published).model, load_tokenizer(published)
    prompt = tokenizer.encode_prompt("hello")
    assert prompt[0] == 256  # <s>
    answer = tokens_of([str(published), "hello"], capsys)
    assert answer["tokens"] == greedy(model, prompt, tokenizer.ends)


def test_every_stated_end_ends_the_text(published, tmp_path, capsys):
    made = tokens_of([str(published), "hello"], capsys)["tokens"]
    folder = shutil.copytree(published, tmp_path / "copy")
    stops = {"eos_token_id": [257, made[3]]}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    answer = tokens_of([str(folder), "hello"], capsys)
    first = made.index(made[3])
    assert (answer["tokens"], answer["finish_reason"]) == (made[: first + 1], "end_of_text")


def test_a_chat_is_that_of_transformers(published, capsys):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(published)
    tokenizer = transformers.AutoTokenizer.from_pretrained(published)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi </s>é"}]
    tokens_BS = tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    made = model.generate(
        tokens_BS, attention_mask=torch.ones_like(tokens_BS), max_new_tokens=32,
        do_sample=False, pad_token_id=257,
    )  # fmt: skip
    words = [str(published), "Hi </s>é", "--chat", "--system", "Be brief."]
    answer = tokens_of(words, capsys)
    assert answer["tokens"] == made[0, tokens_BS.shape[1] :].tolist()
    assert answer["prompt_tokens_dropped"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hi", "--system", "x"], "add --chat"),
        (["", "--chat"], "needs a message"),
        (["hi", "--dtype", "int4"], "--dtype int4 is no number type"),
        (["hi", "--show-experts", "--layer", "5"], "mixtures are 0, 1"),
    ],
)
def test_bad_options(published, capsys, words, message):
    assert main(["generate", str(published), *words]) == 2
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True)


def test_a_model_without_a_template_cannot_chat(published, tmp_path, capsys):
    folder = shutil.copytree(published, tmp_path / "base")
    (folder / "tokenizer_config.json").write_text("{}")
    assert main(["generate", str(folder), "hi", "--chat"]) == 2
    assert "without --chat" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert main(["generate", str(folder), "hi"]) == 2
    assert "no tokenizer in" in capsys.readouterr().err


def test_number_types(published, capsys):
    assert main(["generate", str(published), "hi", "--dtype", "bf16", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().err == ""


def test_a_remote_name(published, tmp_path):
    """Another process, since huggingface_hub reads its settings when it is imported."""
    pytest.importorskip("huggingface_hub")
    commit = "f" * 40
    home = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(published, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    env = os.environ | {
        "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1",
        "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    words = [sys.executable, "-m", "moestro", "generate", "org/tiny", "hi", *GREEDY]
    found = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    model, tokenizer = read_pretrained(published).model, load_tokenizer(published)
    wanted = greedy(model, tokenizer.encode_prompt("hi"), tokenizer.ends)
    assert json.loads(found.stdout)["tokens"] == wanted


def test_an_encoder_decoder_answers(tmp_path, capsys):
    positions = {"kind": "relative", "shared": True}
    cfg = EncDecConfig(
        vocab_size=300, dim=16, encoder_layers=2, decoder_layers=2, moe_every=2,
        attention={"num_heads": 2, "context": 16, "positions": positions},
        moe={"hidden_dim": 16, "num_experts": 4, "top_k": 1},
    )  # fmt: skip
    with atomic_folder(tmp_path / "model") as inside:
        save_model(EncDec(cfg), inside)
        ByteTokenizer().save(inside)
    folder = str(tmp_path / "model")
    answer = tokens_of([folder, "a <extra_id_0> b", "--top-k", "1"], capsys)
    assert answer["layers"] == [3]
    assert {len(experts) for experts in answer["experts"]} <= {0, 1}
    assert main(["generate", folder, "hi", "--show-experts", "--max-tokens", "4"]) == 0
    assert "first expert in layer 3" in capsys.readouterr().out
    assert main(["generate", folder, "x" * 40, "--max-tokens", "4"]) == 0
    assert "the last 25 are left out" in capsys.readouterr().err
