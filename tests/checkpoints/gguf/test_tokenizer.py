"""Tokenizers through GGUF: the same tokens as the tokenizer.json that they were made from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from gguf import GGUFWriter
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from moestro.checkpoints.gguf.folder import NOTE, folder_of
from moestro.checkpoints.gguf.header import read
from moestro.checkpoints.gguf.tokenizer import RULES, rule_of, tokenizer_files
from moestro.checkpoints.gguf.writing import _write_tokenizer
from moestro.errors import CheckpointError, ConfigError
from moestro.text import load_tokenizer

TEXT = """It's 12345 o'clock, and they'll say "HELLO world" -- naïve café Straße!\r\n\r\n
    def f(x_1): return x_1 ** 2  # two  spaces\tand a tab
中文分词测试 かな カナ 한국어 русский العربية 🙂👩‍👩‍👧 e\u0301\n\n\n end. ABCdef iPhone's"""


def trained(rule: str) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    wanted = RULES[rule]
    steps: list[Any] = []
    if wanted == "digits":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    elif wanted != "gpt2":
        patterns = (wanted,) if isinstance(wanted, str) else wanted
        steps += [pre_tokenizers.Split(Regex(each), "isolated") for each in patterns]
    steps.append(pre_tokenizers.ByteLevel(False, use_regex=wanted in ("digits", "gpt2")))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    if rule in ("qwen2", "qwen35"):
        made.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|begin|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    made.add_tokens(["<think>"])
    return made


def saved(made: tokenizers.Tokenizer, folder: Path, template: str | None = "{{ 1 }}") -> Path:
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def through_gguf(folder: Path, target: Path) -> Path:
    writer = GGUFWriter(target, "llama")
    _write_tokenizer(writer, folder)
    return close(writer, target)


def close(writer: GGUFWriter, target: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def unfolded(file: Path, folder: Path) -> Path:
    folder.mkdir()
    for name, content in tokenizer_files(read(file)).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "rule", ["gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "gpt-4o", "deepseek-v3"]
)
def test_every_rule_gives_the_same_tokens(rule: str, tmp_path: Path) -> None:
    made = trained(rule)
    folder = saved(made, tmp_path / "a")
    assert RULES[rule_of(json.loads(made.to_str())) or ""] == RULES[rule]
    back = load_tokenizer(unfolded(through_gguf(folder, tmp_path / "m.gguf"), tmp_path / "b"))
    ours = load_tokenizer(folder)
    for text in (TEXT, "<|begin|>a<think>b<|im_end|>", "", " ", "x" * 300):
        assert back.encode(text) == ours.encode(text)
        assert back.encode_prompt(text) == ours.encode_prompt(text)
    tokens = ours.encode_prompt(f"{TEXT}<think>")
    assert back.decode(tokens) == ours.decode(tokens)
    assert back.end_of_text == ours.end_of_text == 2
    assert back.ends == ours.ends == {1, 2}
    assert back.specials == ours.specials
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ 1 }}"


def sentencepiece(target: Path, **changes: Any) -> Path:
    """A vocabulary whose merges follow from scores."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [2, 3, 3] + [6] * 256
    words = ["\u2581", "a", "b", "c", "ab", "bc", "abc", "\u2581a", "\u2581ab", "\u2581abc"]
    scores = [0.0] * len(tokens) + [-9.0, -8.0, -8.0, -8.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    writer = GGUFWriter(target, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + words)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in changes.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    return close(writer, target)


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(unfolded(sentencepiece(tmp_path / "m.gguf"), tmp_path / "a"))
    names = [*range(259), "\u2581", "a", "b", "c", "ab", "bc", "abc", "\u2581a", "\u2581ab"]
    ids = {name: number for number, name in enumerate([*names, "\u2581abc"])}
    assert tokenizer.encode("abc") == [ids["\u2581abc"]]
    assert tokenizer.encode("bc b") == [ids["\u2581"], ids["bc"], ids["\u2581"], ids["b"]]
    assert tokenizer.encode_prompt("a")[0] == 1
    assert tokenizer.encode("é") == [ids["\u2581"], 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("abc é a")) == "abc é a"
    file = sentencepiece(tmp_path / "n.gguf", add_space_prefix=False, add_bos_token=False)
    plain = load_tokenizer(unfolded(file, tmp_path / "b"))
    assert plain.encode_prompt("abc") == [ids["abc"]]


def test_what_is_refused(tmp_path: Path) -> None:
    def file(name: str, model: str, pre: str | None, merges: list[str], tokens: list[str]) -> Path:
        writer = GGUFWriter(tmp_path / name, "llama")
        writer.add_tokenizer_model(model)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
        return close(writer, tmp_path / name)

    some = ["a", "b", "ab"]
    for name, given, why in (
        ("1", ("gpt2", "default", ["a b"], some), "by the rule 'default'.*qwen2"),
        ("2", ("gpt2", None, ["a b"], some), "by the rule None"),
        ("3", ("bert", None, ["a b"], some), "'bert'; read are gpt2"),
        ("4", ("gpt2", "qwen2", ["a c"], some), "merges \\('a', 'c'\\)"),
        ("5", ("gpt2", "qwen2", ["a b"], ["a", "a", "b", "ab"]), "spelled the same"),
    ):
        with pytest.raises(ConfigError, match=why):
            tokenizer_files(read(file(name, *given)))
    lacking = saved(trained("gpt-2"), tmp_path / "a")
    text = json.loads((lacking / "tokenizer.json").read_text())
    text["pre_tokenizer"] = {"type": "Whitespace"}
    (lacking / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ConfigError, match="no name in GGUF"):
        through_gguf(lacking, tmp_path / "m.gguf")


def test_a_tokenizer_put_beside_is_kept(tmp_path: Path) -> None:
    """What the message about an unknown rule says to do."""
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in (
        ("block_count", 1), ("context_length", 8), ("embedding_length", 32),
        ("feed_forward_length", 32), ("attention.head_count", 2),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("unheard-of")
    writer.add_token_list(["a"])
    writer.add_token_merges([])
    writer.add_tensor("token_embd.weight", np.ones((1, 32), np.float32))
    file = close(writer, tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match=r"into .*m\.gguf\.moestro"):
        folder_of(file)
    place = tmp_path / "m.gguf.moestro"
    saved(trained("qwen2"), place)
    before = (place / "tokenizer.json").read_bytes()
    assert folder_of(file) == place
    assert (place / NOTE).is_file()
    file.touch()
    assert folder_of(file) == place
    assert (place / "tokenizer.json").read_bytes() == before
    file.unlink()
    with pytest.raises((CheckpointError, FileNotFoundError)):
        folder_of(file)
