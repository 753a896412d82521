from collections import defaultdict
from typing import Any

import pytest
import torch

from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.config import ModelConfig
from moestro.errors import DataError, MoestroError
from moestro.infer import decoding
from moestro.infer.decoding import Decoding, decoding_of
from moestro.infer.engine import Session, generate_batch, stream
from moestro.infer.native_decoder import supports
from moestro.infer.sampling import SamplingConfig
from moestro.infer.writing import Piece
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.models.passing import chunked
from moestro.text import ByteTokenizer

BYTES = ByteTokenizer()
MOE: dict[str, Any] = {"hidden_dim": 16, "num_experts": 4, "top_k": 2}
HEADS = {"num_heads": 2, "context": 24}
DELTA: dict[str, Any] = {
    "kind": "delta",
    "key_heads": 1,
    "value_heads": 2,
    "key_dim": 4,
    "value_dim": 4,
    "full_every": 2,
}
PROMPTS = ["a", "a rather long prompt, longer than the context", "", "words", "aaaa"]
SAMPLINGS = [
    SamplingConfig(seed=5, max_tokens=9),
    SamplingConfig(temperature=0.0, max_tokens=30),
    SamplingConfig(seed=6, max_tokens=3, top_k=3),
    SamplingConfig(temperature=1.2, max_tokens=12, stop=("e", "t")),
    SamplingConfig(
        max_tokens=20, min_p=0.1, repetition_penalty=1.5, presence_penalty=1, frequency_penalty=1
    ),
]


def model_of(kind: str, **changes: Any) -> Decoder:
    """Packed, native or, by a kernel of Python's, decoded there; with other ways to look back."""
    native = kind.startswith(("native", "int4"))
    if "latent" in kind:
        latent = {"kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
        changes["attention"] = {**HEADS, "latent": latent}
    elif "delta" in kind:
        changes["attention"] = {**HEADS, "window": DELTA}
    if native and native_cpu.available() is not None:
        pytest.skip("no native library")
    cfg = ModelConfig(**{"dim": 16, "num_layers": 2, "attention": HEADS, "moe": MOE, **changes})
    model = Decoder(cfg, "auto" if native else "segments").eval()
    assert (supports(model) is None) == native
    if kind == "int4":
        pack(model, WEIGHTS["int4"])
    return model


@pytest.mark.parametrize(
    "kind", ["python latent", "python delta", "native", "native latent", "native delta", "int4"]
)
def test_a_request_gets_what_it_would_get_alone(kind: str) -> None:
    """Bit by bit: the tokens, the experts, and the logits behind them."""
    model = model_of(kind)
    together: dict[int, list[Piece]] = defaultdict(list)
    for number, piece in generate_batch(model, BYTES, PROMPTS, SAMPLINGS):
        together[number].append(piece)
    for number, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        assert together[number] == list(stream(model, BYTES, prompt, sampling))
        assert together[number][-1].finish is not None


@pytest.mark.parametrize("kind", ["python", "native"])
def test_seeds_are_of_each_request(kind: str) -> None:
    model = model_of(kind)
    same = [SamplingConfig(seed=seed, max_tokens=12) for seed in (1, 2, 1)]
    text: dict[int, list[int]] = defaultdict(list)
    for number, piece in generate_batch(model, BYTES, ["ab"] * 3, same):
        text[number].append(piece.token)
    assert text[0] == text[2]
    assert text[0] != text[1]


def test_one_sampling_serves_all_and_a_wrong_number_is_refused() -> None:
    model = model_of("python")
    done = list(generate_batch(model, BYTES, ["a", "b"], [SamplingConfig(max_tokens=2)]))
    assert {number for number, _ in done} == {0, 1}
    with pytest.raises(MoestroError, match="3 prompts came with 2"):
        list(generate_batch(model, BYTES, ["a", "b", "c"], SAMPLINGS[:2]))
    assert list(generate_batch(model, BYTES, [], SAMPLINGS[:1])) == []


def test_requests_come_and_go() -> None:
    model = model_of("python")
    session = Session(model, BYTES, most=2)
    greedy = SamplingConfig(temperature=0.0, max_tokens=6)
    alone = [list(stream(model, BYTES, prompt, greedy)) for prompt in ("ab", "cd", "ef")]
    pieces: dict[int, list[Piece]] = defaultdict(list)

    def step(times: int) -> None:
        for _ in range(times):
            for number, piece in session.step():
                pieces[number].append(piece)

    first = session.add("ab", greedy)
    step(4)  # the first reads the prompt
    assert len(pieces[first]) == 3
    dropped = session.add("zz", greedy)
    second = session.add("cd", greedy)
    step(1)
    third = session.add("ef", greedy)
    session.drop(dropped)
    assert session.live == 3
    step(20)
    assert session.live == 0
    assert session.step() == []
    assert [pieces[number] for number in (first, second, third)] == alone


@pytest.mark.parametrize(
    "token", [1.0, True, -1, 256, 2**70, "a", None, [1], torch.tensor(1)], ids=str
)
def test_what_is_no_token_is_refused_when_it_is_given(token: Any) -> None:
    session = Session(model_of("python"), BYTES)
    with pytest.raises(DataError, match=r"the prompt has .*the model's vocabulary"):
        session.add([1, token], SamplingConfig())
    assert session.live == 0
    assert session.add([0, 255], SamplingConfig()) == 0


@pytest.mark.parametrize("kind", ["python latent", "python delta", "native", "native delta"])
def test_a_long_prompt_is_read_between_the_tokens_of_others(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    greedy = SamplingConfig(temperature=0.0, max_tokens=12)
    long = "longer than a chunk"
    alone = [list(stream(model, BYTES, prompt, greedy)) for prompt in ("ab", long, "cd")]
    monkeypatch.setattr(decoding, "CHUNK", 4)
    session = Session(model, BYTES)
    pieces: dict[int, list[Piece]] = defaultdict(list)
    session.add("ab", greedy)
    made = [session.step(), session.step()]
    session.add(long, greedy)
    session.add("cd", greedy)
    made += [session.step() for _ in range(len(long) // 4 + 1)]
    assert [len(step) for step in made] == [0, *[1] * (len(made) - 1)]
    while session.live:
        made.append(session.step())
    for number, piece in (each for step in made for each in step):
        pieces[number].append(piece)
    assert [[piece.token for piece in pieces[n]] for n in range(3)] == [
        [piece.token for piece in one] for one in alone
    ]


def test_waiting_requests_hold_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than `most` have begun at any time."""
    model = model_of("python")
    begun: list[int] = []
    new = Decoding.new

    def counted(self: Decoding) -> Any:
        begun.append(len(begun) + 1)
        return new(self)

    monkeypatch.setattr(Decoding, "new", counted)
    session = Session(model, BYTES, most=2)
    for length in range(1, 6):
        session.add("x" * length, SamplingConfig(temperature=0.0, max_tokens=4))
    for _ in range(4):
        session.step()
    assert begun == [1, 2]
    while session.live:
        session.step()
    assert begun == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("window", [None, {"size": 3}, DELTA])
def test_a_prompt_in_chunks_is_the_prompt(window: dict[str, Any] | None) -> None:
    cfg = ModelConfig(dim=16, num_layers=2, attention={**HEADS, "window": window}, moe=MOE)
    model = Decoder(cfg).eval()
    tokens = torch.randint(0, 256, (40,)).tolist()
    way = Decoding(model)
    whole_cache, whole = way.begin(tokens)
    cache = way.new()
    for start in range(0, 40, 7):
        parts = way.read(cache, tokens[start : start + 7])
    torch.testing.assert_close(parts.logits_NV, whole.logits_NV)
    assert parts.experts == whole.experts
    assert cache.position == whole_cache.position == 40


def test_what_chunks_would_change_passes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that compete for an expert's room, and angles that depend on the length."""
    scaling = {
        "kind": "longrope",
        "short_factor": (1.0,) * 4,
        "long_factor": (2.0,) * 4,
        "original_context": 8,
    }
    longrope = {**HEADS, "positions": {"scaling": scaling}}
    for changes in ({"moe": {**MOE, "capacity": {}}}, {"attention": longrope}):
        cfg = ModelConfig(**{"dim": 16, "num_layers": 1, "attention": HEADS, "moe": MOE, **changes})
        assert not chunked(cfg)
        model = Decoder(cfg).eval()
        tokens = torch.randint(0, 256, (20,)).tolist()
        monkeypatch.setattr(decoding, "CHUNK", 5)
        _, passed = Decoding(model).begin(tokens)
        with torch.no_grad():
            want = model(torch.tensor([tokens])).logits[:, -1]
        assert torch.equal(passed.logits_NV, want)


def test_native_text_is_the_forwards_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("native")
    greedy = SamplingConfig(temperature=0.0, max_tokens=40)
    native = list(stream(model, BYTES, "some words", greedy))
    monkeypatch.setattr(decoding, "supports", lambda model: "not now")
    assert type(decoding_of(model)) is Decoding
    assert list(stream(model, BYTES, "some words", greedy)) == native
