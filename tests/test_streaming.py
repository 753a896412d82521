"""Text as it comes is the text at once, whatever the vocabulary spells characters with."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.streaming import StreamDecoder
from moestro.text import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

from .vocabularies import byte_fallback

SAMPLE = ["the cat sat on the mat. Ünïcödé, 漢字 and 🎻🎻\n" * 20]
FALLBACK = byte_fallback()
ALL = pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), train_bpe(SAMPLE, 300), FALLBACK],
    ids=["bytes", "byte-level", "byte-fallback"],
)
# ▁ is how a Llama-like vocabulary spells a space.
texts = st.text(st.characters(codec="utf-8", exclude_characters="▁") | st.sampled_from(" a漢😀é"))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    """What each token gives, and the rest."""
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(token) for token in ids], decoder.flush()


@ALL
@given(text=texts)
def test_text_comes_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert rest == ""


@ALL
@given(text=texts, part=st.floats(0, 1))
def test_a_broken_end_destroys_nothing_before_it(
    tokenizer: Tokenizer, text: str, part: float
) -> None:
    ids = tokenizer.encode(text)
    ids = ids[: round(part * len(ids))]
    found = tokenizer.decode(ids)
    whole = found.rstrip("\ufffd")
    assert text.startswith(whole)
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == found
    if "\ufffd" not in text:
        assert len(found) - len(whole) <= 3
        assert "".join(pieces) == whole


@ALL
@given(data=st.data())
def test_a_stream_of_anything_is_what_decode_gives(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    top = tokenizer.vocab_size - 1
    lead = FALLBACK.encode("😀")[1] if tokenizer is FALLBACK else min(top, 0xC0)
    token = st.integers(0, top) | st.integers(lead, top) | st.sampled_from(tokenizer.encode(" é😀"))
    runs = data.draw(st.lists(st.tuples(token, st.sampled_from([1, 1, 1, 2, 40])), max_size=60))
    ids = [token for token, times in runs for _ in range(times)]
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [train_bpe(["x"], 257), FALLBACK], ids=["level", "fallback"])
@pytest.mark.parametrize("between", [1, 9, 100])
def test_tokens_without_text_break_no_character(tokenizer: Tokenizer, between: int) -> None:
    *before, last = tokenizer.encode("words before it 😀")
    ids = [*before, *[tokenizer.end_of_text] * between, last, *tokenizer.encode("after")]
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    assert "😀" in pieces


def test_a_character_is_held_back() -> None:
    pieces, rest = streamed(ByteTokenizer(), list("a漢b".encode()))
    assert (pieces, rest) == (["a", "", "", "漢", "b"], "")
    assert streamed(ByteTokenizer(), [0xE6]) == ([""], "\ufffd")
    dash = FALLBACK.encode("a—")
    assert streamed(FALLBACK, dash) == (["a", "", "", "—"], "")
    assert streamed(FALLBACK, dash[:-1]) == (["a", "", ""], "\ufffd\ufffd")


def test_no_broken_byte_destroys_its_neighbours() -> None:
    byte = FALLBACK.encode("😀")[1:]
    first, second, third, fourth = byte
    assert FALLBACK.decode([*byte, first]) == "😀\ufffd"
    assert FALLBACK.decode([fourth, *byte, third, second]) == "\ufffd😀\ufffd\ufffd"
    assert FALLBACK.decode([first, second, *byte]) == "\ufffd\ufffd😀"


def test_a_saved_tokenizer_keeps_its_bytes(tmp_path: Path) -> None:
    FALLBACK.save(tmp_path)
    again, ids = load_tokenizer(tmp_path), FALLBACK.encode("a 😀😀")
    assert (again.specials, again.decode(ids[:-1])) == (FALLBACK.specials, "a 😀\ufffd\ufffd\ufffd")


def test_special_tokens_are_named() -> None:
    assert FALLBACK.specials == {0: "<unk>", 1: "<s>", 2: "</s>"}
    assert ByteTokenizer().specials == {}
