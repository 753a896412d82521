"""Tokenizers: round trips, streams, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import DataError
from moestro.text import (
    ByteTokenizer,
    Tokenizer,
    build_tokenizer,
    check_tokenizer,
    load_tokenizer,
    tokenizer_file,
    train_bpe,
)

SAMPLE = ["the cat sat on the mat. Ünïcödé, 漢字 and 🎻🎻\n" * 20, "def f(x):\n    return x\n" * 20]
BPE = train_bpe(SAMPLE, 300)
BOTH = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
texts = st.text(st.characters(codec="utf-8"))


@BOTH
@given(text=texts)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= number < tokenizer.vocab_size for number in ids)
    assert "\0" in text or tokenizer.end_of_text not in ids


@given(text=texts)
def test_bytes_are_utf8(text: str) -> None:
    assert bytes(ByteTokenizer().encode(text)) == text.encode()


def test_bpe_shortens_and_knows_its_name() -> None:
    assert len(BPE.encode(SAMPLE[0])) < len(SAMPLE[0].encode()) / 2
    assert BPE.name == "bpe:300"
    assert 257 < BPE.vocab_size <= 300


def test_bpe_is_trained_in_linear_time_on_text_without_breaks() -> None:
    """Words are bounded: a pair merged in a word costs the length of the word."""
    for run in ("=" * 100_000, "ACGT" * 25_000, " " * 100_000):
        tokenizer = train_bpe([run], 400)
        assert tokenizer.decode(tokenizer.encode(run)) == run
        longest = max(len(tokenizer.decode([number])) for number in range(tokenizer.vocab_size))
        assert 16 <= longest <= 256
    # Words of other text are trained on whole.
    words = ["ab" * 100 + " " + "cd" * 100 + "\n"] * 3
    assert train_bpe(words, 290).encode(words[0]) == train_bpe(["".join(words)], 290).encode(
        words[0]
    )


def test_bpe_of_little_text_says_its_real_size() -> None:
    assert train_bpe(["ab"], 1000).vocab_size < 300


def test_a_special_token_spelled_out_is_plain_text() -> None:
    text = "before <|end_of_text|> after"
    assert BPE.end_of_text not in BPE.encode(text)
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.decode([BPE.end_of_text]) == ""


@BOTH
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.name, again.vocab_size, again.end_of_text) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert again.encode(SAMPLE[0]) == tokenizer.encode(SAMPLE[0])


def test_any_tokenizer_json(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 9}, "?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<|endoftext|>"])
    inner.enable_truncation(1)
    inner.enable_padding(length=5)
    path = tmp_path / "tokenizer.json"
    inner.save(str(path))
    found = tokenizer_file(path)
    assert found.name == "file"
    assert found.encode("a b a") == [0, 1, 0]
    assert found.vocab_size == max(9, found.end_of_text) + 1  # ids may have gaps
    assert load_tokenizer(tmp_path).end_of_text == found.end_of_text
    found.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("b") == [1]
    assert build_tokenizer(str(path), []).encode("b a") == [1, 0]


def with_ends(folder: Path, special: list[str], **files: dict[str, object]) -> Tokenizer:
    """The tokenizer of a folder with these special tokens, ids from 3, and these JSON files."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(special)
    inner.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return load_tokenizer(folder)


TURN, DOCUMENT = "<|im_end|>", "<|endoftext|>"


@pytest.mark.parametrize(
    ("special", "files", "end", "ends"),
    [
        ([DOCUMENT], {}, 3, {3}),
        ([TURN, DOCUMENT], {"generation_config": {"eos_token_id": [3, 4]}}, 4, {3, 4}),
        ([TURN, DOCUMENT], {"config": {"eos_token_id": 3}}, 3, {3}),
        (["<x>", "<y>"], {"config": {"eos_token_id": 4}}, 4, {4}),
        (["<x>", "<y>"], {"tokenizer_config": {"eos_token": {"content": "<y>"}}}, 4, {4}),
        (["<x>", "<y>"], {"tokenizer_config": {"eos_token": "<x>"}}, 3, {3}),
        (
            ["<x>", "<y>", "<z>"],
            {"config": {"eos_token_id": [5]}, "generation_config": {"eos_token_id": 3}},
            3,
            {3, 5},
        ),
        ([DOCUMENT], {"config": {"eos_token_id": None}}, 3, {3}),
        # Nothing is said of a token that is not there, but that no text can end with it.
        ([DOCUMENT], {"config": {"eos_token_id": 99}}, 3, {3, 99}),
    ],
)
def test_the_ends_that_a_checkpoint_states(
    tmp_path: Path, special: list[str], files: dict, end: int, ends: set[int]
) -> None:
    found = with_ends(tmp_path, special, **files)
    assert (found.end_of_text, found.ends) == (end, ends)
    (tmp_path / "saved").mkdir()
    found.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.end_of_text, again.ends) == (end, ends)
    assert build_tokenizer(str(tmp_path), []).ends == ends


@pytest.mark.parametrize("bad", ["</s>", [1, "2"], -1, True, 1.0])
def test_ends_that_are_no_numbers_are_refused(tmp_path: Path, bad: object) -> None:
    with pytest.raises(DataError, match=r"config\.json: eos_token_id is .* a token's number"):
        with_ends(tmp_path, [DOCUMENT], config={"eos_token_id": bad})


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_files_beside_a_tokenizer_are_refused(tmp_path: Path, content: str) -> None:
    with_ends(tmp_path, [DOCUMENT])
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=r"generation_config\.json"):
        load_tokenizer(tmp_path)


def test_prompts_may_spell_special_tokens_and_documents_not() -> None:
    text = "the <|end_of_text|> cat"
    prompt = BPE.encode_prompt(text)
    assert prompt == [*BPE.encode("the "), BPE.end_of_text, *BPE.encode(" cat")]
    assert BPE.encode_prompt(text, templated=True) == prompt
    assert BPE.end_of_text not in BPE.encode(text)
    assert ByteTokenizer().encode_prompt(text) == list(text.encode())
    with pytest.raises(DataError, match="surrogate"):
        BPE.encode_prompt("\ud800")


def test_a_prompt_gets_what_the_post_processor_adds(tmp_path: Path) -> None:
    with_ends(tmp_path, ["<s>", "</s>"])
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path)
    assert found.encode_prompt("a b") == [3, 0, 1]
    assert found.encode_prompt("") == [3]
    assert found.encode_prompt("<s> b", templated=True) == [3, 1]
    assert found.encode("a b") == [0, 1]


def test_a_tokenizer_json_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(path))
    with pytest.raises(DataError, match=r"no token that ends a document.*added_tokens"):
        tokenizer_file(path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bpe:abc", r"'abc' is not a whole number.*bpe:1024"),
        ("bpe:", "is not a whole number"),
        ("bpe:-5", "is not a whole number"),
        ("bpe:²", "is not a whole number"),
        ("bpe:256", r"256 is too small.*257"),
        ("words", r"'words' is not 'bytes'.*tokenizer\.json"),
    ],
)
def test_bad_settings(setting: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_tokenizer(setting)


def test_small_bpe_is_refused_in_training_too() -> None:
    with pytest.raises(DataError, match="too small"):
        train_bpe(["text"], 100)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "moestro_tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match="write the tokenizer again"):
        load_tokenizer(tmp_path)


def test_what_the_library_raises_late_is_one_error(tmp_path: Path) -> None:
    """A token that is not there, and a template without its token, on which the library panics."""
    train_bpe(["text"], 260).save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())

    def loaded(**changes: object) -> Tokenizer:
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole | changes))
        return load_tokenizer(tmp_path)

    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}
    with pytest.raises(DataError, match=r"cannot encode this text \(.*\); use another"):
        loaded(model=words, pre_tokenizer=None).encode("b")
    part = {"Sequence": {"id": "A", "type_id": 0}}
    lost = [{"SpecialToken": {"id": "<q>", "type_id": 0}}, part]
    template = {"type": "TemplateProcessing", "single": lost, "pair": [part], "special_tokens": {}}
    with pytest.raises(DataError, match="cannot encode this text"):
        loaded(post_processor=template).encode_prompt("text")


@BOTH
def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"character 2 .* U\+D800"):
        tokenizer.encode("ab\ud800")


@BOTH
def test_ids_of_another_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for bad in ([0, tokenizer.vocab_size], [-1]):
        with pytest.raises(DataError, match="another vocabulary"):
            tokenizer.decode(bad)


def test_import_without_torch() -> None:
    code = "import sys, moestro.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
