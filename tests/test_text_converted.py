"""Tokenizers of which there is only SentencePiece's or tiktoken's file, against those libraries."""

import base64
import json
from pathlib import Path

import pytest

from moestro.errors import DataError
from moestro.text import load_tokenizer

TEXTS = (
    "The quick café  naïve", "12345 tokens", " leading and trailing ", "中文 🙂 ﬁ",
    "a\n\n\tdef f(x):", "<s>", "", "x" * 70,
)  # fmt: skip
CORPUS = ["the quick brown fox", "le café naïve", "12345 tokens, more", "def f(x):  return x"] * 40


def test_sentencepiece(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    pytest.importorskip("transformers")
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=340, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    ours = load_tokenizer(tmp_path)
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.vocab_size == theirs.vocab_size() == 340
    assert ours.end_of_text == theirs.eos_id() == 2
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text


def test_tiktoken(tmp_path: Path) -> None:
    library = pytest.importorskip("tiktoken")
    pytest.importorskip("transformers")
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [b"th", b"the", b" t", b" the", b"in", b"er", b"ca", b"caf", b"xx", b"xxxx"]
    lines = [f"{base64.b64encode(piece).decode()} {n}" for n, piece in enumerate(pieces)]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    settings = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours = load_tokenizer(tmp_path)
    theirs = library.Encoding(
        "tiny",
        pat_str=PATTERN,
        mergeable_ranks={piece: n for n, piece in enumerate(pieces)},
        special_tokens={"<|endoftext|>": len(pieces)},
    )
    assert ours.end_of_text == len(pieces)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, disallowed_special=()), text


# Llama 3's, which transformers splits by unless a folder says otherwise.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model", "spiece.model"])
def test_what_cannot_be_converted_says_what_is_needed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not a tokenizer")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    needed = r"pip install 'moestro\[hf\]' sentencepiece protobuf tiktoken.*own tokenizer\.json"
    with pytest.raises(DataError, match=rf"{name} is to be converted.*{needed}"):
        load_tokenizer(tmp_path)
