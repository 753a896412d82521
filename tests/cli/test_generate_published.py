"""`moestro generate` with published checkpoints, chats, remote names and encoder-decoders."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import save_model
from moestro.cli.main import main
from moestro.config import EncDecConfig, ModelConfig
from moestro.infer import writing
from moestro.infer.engine import stream
from moestro.infer.sampling import SamplingConfig
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.text import ByteTokenizer, SubwordTokenizer, load_tokenizer

from ..vocabularies import byte_fallback

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
    model, tokenizer = open_checkpoint(published).model, load_tokenizer(published)
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
        (["hi", "--dtype", "int4"], "--dtype int4 is not known; choose fp32"),
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


def test_a_template_without_a_system_role_names_the_option(published, tmp_path, capsys):
    folder = shutil.copytree(published, tmp_path / "copy")
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}a"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    assert main(["generate", str(folder), "hi", "--chat", "--system", "x", *GREEDY]) == 2
    err = capsys.readouterr().err
    assert "refuses these messages: no system; not every template takes" in err
    assert "--system" in err
    assert main(["generate", str(folder), "hi", "--chat", *GREEDY]) == 0


def test_the_checkpoints_settings_are_the_defaults(published, tmp_path, capsys):
    folder = shutil.copytree(published, tmp_path / "copy")
    stated = {"temperature": 0.0, "repetition_penalty": 1.7, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    words = ["generate", str(folder), "hello", "--max-tokens", "20", "--json"]

    def tokens(*more):
        assert main([*words, *more]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["tokens"], err

    made, said = tokens()
    note = "moestro: as generation_config.json states: "
    assert said == f"{note}temperature 0.0, repetition_penalty 1.7\n"
    own = stream(
        open_checkpoint(folder).model,
        load_tokenizer(folder),
        "hello",
        SamplingConfig(temperature=0.0, repetition_penalty=1.7, max_tokens=20),
    )
    assert made == [piece.token for piece in own]
    greedy, said = tokens("--repetition-penalty", "1")
    assert (said, greedy == made) == (f"{note}temperature 0.0\n", False)
    options = ["--temperature", "0", "--repetition-penalty", "1.7", "--min-p", "0.1"]
    assert tokens(*options) == (made, "")
    fond, _ = tokens("--frequency-penalty", "-2", "--presence-penalty", "-2")
    assert fond[1:] == [made[0]] * 19


def test_a_tokenizer_with_more_tokens_than_the_model(larger, published, capsys):
    wanted = tokens_of([str(published), "hello"], capsys)
    found = tokens_of([str(larger), "hello"], capsys)
    assert (found["tokens"], found["text"]) == (wanted["tokens"], wanted["text"])
    assert main(["generate", str(larger), "hello [PAD]"]) == 2
    assert "the prompt has token 260, '[PAD]', but the model's" in capsys.readouterr().err


REPLY = "<|channel|>analysis<|message|>hm 😀<|end|><|start|>assistant<|channel|>final<|message|>hi"


@pytest.fixture
def talker(tmp_path, monkeypatch):
    """A checkpoint with gpt-oss' marks, and a function that gives what its model will say."""
    marks = ["<|return|>", "<|start|>", "<|end|>", "<|channel|>", "<|message|>"]
    folder = tmp_path / "talker"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({sign: place for place, sign in enumerate(alphabet)}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(marks)
    cfg = ModelConfig(
        vocab_size=261, dim=16, num_layers=1, attention={"num_heads": 2, "context": 400},
        moe={"hidden_dim": 16, "num_experts": 4, "top_k": 2},
    )  # fmt: skip
    with atomic_folder(folder) as inside:
        save_model(Decoder(cfg), inside)
        SubwordTokenizer(inner, "file", 256).save(inside)
    template = "<|start|>user<|message|>{{ messages[-1].content }}<|end|><|start|>assistant"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))

    def says(text):
        ids = iter(inner.encode(text).ids)
        monkeypatch.setattr(writing, "next_tokens", lambda *_: torch.tensor([next(ids)]))
        return str(folder)

    return says


def test_a_chat_shows_the_final_channel(talker, capsys):
    chat = ["hello", "--chat"]
    assert main(["generate", talker(REPLY + "<|return|>"), *chat]) == 0
    assert capsys.readouterr() == ("hi\n", "")
    assert main(["generate", talker(REPLY + "<|return|>"), *chat, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["channels"]) == ("hi", {"analysis": "hm 😀\n"})
    assert main(["generate", talker(REPLY + "<|return|>"), *chat, "--show-experts"]) == 0
    shown = capsys.readouterr().out.splitlines()[0]
    assert re.sub(r"\[\d\]", "", shown) == "hi"


def test_special_shows_all_of_a_reply(talker, capsys):
    folder = talker(REPLY + "<|return|>")
    assert main(["generate", folder, "hello", "--chat", "--special"]) == 0
    assert capsys.readouterr() == (REPLY + "\n", "")
    assert main(["generate", talker(REPLY + "<|return|>"), "hello"]) == 0
    assert capsys.readouterr().out == "analysis\nhm 😀\nassistant\nfinal\nhi\n"


def test_characters_spelled_in_bytes(tmp_path, monkeypatch, capsys):
    tokenizer = byte_fallback("abcth")
    with atomic_folder(tmp_path / "model") as inside:
        cfg = {"dim": 16, "num_layers": 1, "attention": {"num_heads": 2, "context": 64}}
        moe = {"hidden_dim": 16, "num_experts": 4, "top_k": 2}
        save_model(Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, moe=moe, **cfg)), inside)
        tokenizer.save(inside)
    said = [*tokenizer.encode("a 😀漢 — b"), tokenizer.end_of_text]
    for more in ([], ["--show-experts"], ["--json"]):
        ids = iter(said)
        monkeypatch.setattr(writing, "next_tokens", lambda *_, ids=ids: torch.tensor([next(ids)]))
        assert main(["generate", str(tmp_path / "model"), "c", *more]) == 0
        out = capsys.readouterr().out
        text = json.loads(out)["text"] if more == ["--json"] else out.split("\n")[0]
        assert re.sub(r"\[\d\]", "", text) == "a 😀漢 — b"


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_answer_that_is_not_reached_is_said(talker, capsys, more):
    words = ["generate", talker(REPLY), "hello", "--chat", "--max-tokens", "12", *more]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["text"] if more else out) == ("" if more else "\n")
    assert "no answer, only text in the channel analysis; --special shows it" in err


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
    model, tokenizer = open_checkpoint(published).model, load_tokenizer(published)
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
