import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moestro.config import ModelConfig
from moestro.errors import DataError, MoestroError
from moestro.infer.decoding import first_expert
from moestro.infer.engine import stream
from moestro.infer.prompts import encode_prompt
from moestro.infer.sampling import (
    Past,
    SamplingConfig,
    new_generator,
    next_tokens,
    penalised,
)
from moestro.infer.writing import Piece, find_stop
from moestro.models.cache import KVCache
from moestro.models.decoder import Decoder
from moestro.models.network import ModelOutput
from moestro.moe.routing import Routing
from moestro.text import ByteTokenizer, SubwordTokenizer, train_bpe

BYTES = ByteTokenizer()
MOE = {"hidden_dim": 16, "num_experts": 4, "top_k": 2}
SIZES = {
    "dim": 16,
    "num_layers": 3,
    "dense": {"hidden_dim": 16},
    "attention": {"num_heads": 2, "context": 12},
}


class Scripted(nn.Module):
    """A model that says given bytes in order; token t meets experts t % 4 and t // 4 % 4."""

    moe_layers = (1, 3)

    def __init__(self, says: bytes, context: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.cfg = ModelConfig(vocab_size=256, attention={"context": context})
        self.says = says
        self.calls: list[list[int]] = []
        self.eval()

    def new_cache(self, batch: int) -> KVCache:
        return KVCache(())

    def forward(self, tokens_BS: Tensor, *, cache: object = None) -> ModelOutput:
        tokens_T = tokens_BS[0]
        self.calls.append(tokens_T.tolist())
        logits_BSV = torch.zeros(1, len(tokens_T), 256)
        said = len(self.calls) - 1
        logits_BSV[0, -1, self.says[said] if said < len(self.says) else 0] = 9.0
        return ModelOutput(logits_BSV, (routed(tokens_T % 4), routed(tokens_T // 4 % 4)))


def routed(first_T: Tensor) -> Routing:
    experts_TK = torch.stack([first_T, (first_T + 1) % 4], -1)
    tokens_R = torch.arange(len(first_T)).repeat_interleave(2)
    weights_R = torch.full((2 * len(first_T),), 0.5)
    zeros_TE = torch.zeros(len(first_T), 4)
    return Routing(tokens_R, experts_TK.flatten(), weights_R, zeros_TE, zeros_TE, top_k=2)


def said(says: bytes, stop: Sequence[str] = (), max_tokens: int = 100) -> list[Piece]:
    sampling = SamplingConfig(temperature=0.0, stop=tuple(stop), max_tokens=max_tokens)
    return list(stream(Scripted(says), BYTES, "prompt", sampling))


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_text_tokens_and_finish() -> None:
    pieces = said(b"hello")
    assert joined(pieces) == "hello"
    assert bytes(piece.token for piece in pieces) == b"hello\0"
    assert [piece.finish for piece in pieces] == [None] * 5 + ["end_of_text"]


def test_length_ends_the_text() -> None:
    pieces = said(b"hello", max_tokens=3)
    assert joined(pieces) == "hel"
    assert [piece.finish for piece in pieces] == [None, None, "length"]


def test_experts_are_those_of_the_token_itself() -> None:
    pieces = said(b"az")
    assert [piece.experts for piece in pieces] == [
        (97 % 4, 97 // 4 % 4),
        (122 % 4, 122 // 4 % 4),
        (),
    ]


def test_the_prompt_is_read_once() -> None:
    model = Scripted(b"xyz")
    list(stream(model, BYTES, "abc", SamplingConfig(temperature=0.0)))
    assert model.calls == [list(b"abc"), [120], [121], [122]]


def test_pieces_come_before_the_end() -> None:
    model = Scripted(b"xyz")
    pieces = stream(model, BYTES, "abc", SamplingConfig(temperature=0.0))
    assert next(pieces).text == "x"
    assert len(model.calls) == 2


def test_an_empty_prompt_starts_a_document() -> None:
    model = Scripted(b"x")
    list(stream(model, BYTES, "", SamplingConfig(temperature=0.0)))
    assert model.calls[0] == [BYTES.end_of_text]


def test_a_long_prompt_keeps_its_end() -> None:
    model = Scripted(b"x", context=4)
    list(stream(model, BYTES, "abcdef", SamplingConfig(temperature=0.0)))
    assert model.calls[0] == list(b"cdef")
    assert encode_prompt(BYTES, "abcdef", 4) == (list(b"cdef"), 2)
    assert encode_prompt(BYTES, "abcd", 4) == (list(b"abcd"), 0)


def test_no_half_characters() -> None:
    pieces = said("aé€😀b".encode())
    assert [piece.text for piece in pieces if piece.text] == ["a", "é", "€", "😀", "b"]
    cut = said("a😀".encode(), max_tokens=3)
    assert joined(cut) == "a\ufffd"


@pytest.mark.parametrize(
    ("says", "stop", "text"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("abc", ["abc", "b"], "a"),
        ("abc", ["bc", "abc"], ""),
        ("x\n\ny", ["\n\n"], "x"),
        ("a😀b", ["😀"], "a"),
        ("never ends with sto", ["stop"], "never ends with sto"),
    ],
)
def test_stop_strings(says: str, stop: list[str], text: str) -> None:
    pieces = said(says.encode(), stop)
    assert joined(pieces) == text
    stopped = any(each in says for each in stop)
    assert pieces[-1].finish == ("stop" if stopped else "end_of_text")
    assert all(piece.finish is None for piece in pieces[:-1])


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=200, deadline=None)
def test_stopping_is_what_reading_letter_by_letter_gives(says: str, stop: list[str]) -> None:
    want = says
    for end in range(len(says) + 1):
        ending = [each for each in stop if says[:end].endswith(each)]
        if ending:
            want = says[: end - max(map(len, ending))]
            break
    assert joined(said(says.encode(), stop)) == want


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=100, deadline=None)
def test_only_a_possible_stop_is_held_back(says: str, stop: list[str]) -> None:
    model = Scripted(says.encode())
    text = ""
    for piece in stream(model, BYTES, "p", SamplingConfig(temperature=0.0, stop=tuple(stop))):
        text += piece.text
        held = says[len(text) : len(model.calls) - 1]
        if piece.finish is None and not piece.text:
            assert any(each.startswith(held) for each in stop)
        assert find_stop(text, stop) is None


def test_stop_strings_across_long_tokens() -> None:
    tokenizer = train_bpe(["the cat sat on the mat"] * 20, 300)
    ids = tokenizer.encode("the cat sat on the mat")
    assert len(ids) < 12
    model = Scripted(b"")
    model.cfg = ModelConfig(vocab_size=400)
    model.says = [*ids, tokenizer.end_of_text]

    def wide(tokens_BS: Tensor, *, cache: object = None) -> ModelOutput:
        model.calls.append(tokens_BS[0].tolist())
        logits_BSV = torch.zeros(1, 1, 400)
        logits_BSV[0, -1, 399] = 99.0  # beyond the tokenizer: must never be chosen
        logits_BSV[0, -1, model.says[len(model.calls) - 1]] = 9.0
        return ModelOutput(logits_BSV, ())

    model.forward = wide
    sampling = SamplingConfig(temperature=0.0, stop=("at on",))
    pieces = list(stream(model, tokenizer, "", sampling))
    assert joined(pieces) == "the cat s"
    assert pieces[-1].finish == "stop"


def test_training_mode_is_refused() -> None:
    with pytest.raises(MoestroError, match=r"model\.eval"):
        next(stream(Scripted(b"x").train(), BYTES, "a", SamplingConfig()))


def test_of_a_tokenizer_with_more_tokens_only_a_prompt_with_one_is_refused() -> None:
    tokenizer = train_bpe(["abc"], 300)
    inner = tokenizer._inner
    inner.add_special_tokens(["[PAD]"])
    inner.add_tokens(["longer"])
    model = tiny(vocab_size=tokenizer.vocab_size)
    tokenizer = SubwordTokenizer(inner, "file", tokenizer.end_of_text)
    hot = SamplingConfig(temperature=100.0, max_tokens=300)
    pieces = list(stream(model, tokenizer, "abc", hot))
    assert max(piece.token for piece in pieces) < model.cfg.vocab_size < tokenizer.vocab_size
    for prompt, name in (("a[PAD]", "[PAD]"), ("a longer", "longer")):
        with pytest.raises(DataError, match=rf"the prompt has token \d+, '{re.escape(name)}',"):
            next(stream(model, tokenizer, prompt, hot))
    for token in (-1, model.cfg.vocab_size + 2):
        with pytest.raises(DataError, match=f"the prompt has token {token} but the model's"):
            next(stream(model, tokenizer, [token], hot))


def test_first_expert_without_a_fixed_number() -> None:
    zeros_TE = torch.zeros(2, 3)
    chosen = Routing(
        torch.tensor([1, 0, 1]),
        torch.tensor([0, 1, 2]),
        torch.tensor([0.2, 0.9, 0.7]),
        zeros_TE,
        zeros_TE,
        top_k=0,
    )
    assert first_expert(chosen) == 2
    assert first_expert(chosen._replace(tokens_R=torch.tensor([0, 0, 0]))) == -1


def tiny(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(**{**SIZES, "moe": MOE, **changes})).eval()


@pytest.mark.parametrize("moe", [MOE, None])
@pytest.mark.parametrize(
    "changes", [{"temperature": 0.0}, {"temperature": 1.0}, {"repetition_penalty": 3.0}]
)
def test_the_cache_changes_nothing(moe: dict[str, int] | None, changes: dict[str, float]) -> None:
    """Past the context too: 8 tokens of prompt and 20 new ones, in a context of 12."""
    model = tiny(moe=moe)
    sampling = SamplingConfig(max_tokens=20, seed=3, **changes)
    prompt = "a prompt"
    pieces = list(stream(model, BYTES, prompt, sampling))
    sequence = list(prompt.encode())
    generator, past = new_generator(sampling), Past(sequence)
    for piece in pieces:
        with torch.inference_mode():
            output = model(torch.tensor([sequence]))
        logits_1V = penalised(output.logits[:, -1], sampling, [past])
        assert piece.token == int(next_tokens(logits_1V, sampling, [generator]))
        sequence.append(piece.token)
        past.chosen[piece.token] += 1
    with torch.inference_mode():
        routings = model(torch.tensor([sequence])).routings
    for place, routing in enumerate(routings):
        firsts = routing.experts_TK()[len(prompt) :, 0].tolist()
        got = [piece.experts[place] for piece in pieces if piece.experts]
        assert got == firsts[: len(got)]
    assert len(pieces[0].experts) == len(model.moe_layers)


@pytest.mark.parametrize(
    ("stops", "found"),
    [
        (["abc", "b"], (1, "b")), (["abc", "bc"], (0, "abc")), (["c", "d"], (2, "c")),
        (["x"], None), ([], None),
    ],
)  # fmt: skip
def test_the_stop_that_is_complete_first_counts(
    stops: list[str], found: tuple[int, str] | None
) -> None:
    """Even where one token brings several of them at once."""
    assert find_stop("abcd", stops) == found
