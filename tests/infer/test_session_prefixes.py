"""Alone = beside others = with a known beginning: the same tokens and experts, the same bits."""

from typing import Any

import pytest
import torch

from moestro.config import ModelConfig
from moestro.infer.engine import Session
from moestro.infer.sampling import SamplingConfig
from moestro.infer.writing import Piece
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.text import ByteTokenizer

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)

SETTINGS = SamplingConfig(max_tokens=12, temperature=1.0, seed=5)
SYSTEM = "a beginning that all of the requests share, long enough to be kept; "


def decoder(**attention: Any) -> Decoder:
    torch.manual_seed(0)
    cfg = ModelConfig(
        dim=32,
        num_layers=3,
        moe={"hidden_dim": 24, "num_experts": 5, "top_k": 2},
        attention={"num_heads": 4, "num_kv_heads": 2, "context": 512, **attention},
    )
    return Decoder(cfg).eval()


def run(session: Session, *numbers: int) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {number: [] for number in numbers}
    while session.live:
        for number, piece in session.step():
            found[number].append(piece)
    assert not session.failed
    return found


@pytest.mark.parametrize("attention", [{}, {"window": {"size": 9, "full_every": 2}}])
def test_a_request_gets_the_same_whether_its_beginning_is_known(attention: Any) -> None:
    model, texts = decoder(**attention), [f"{SYSTEM}{end}" for end in ("one", "two", "three")]
    alone = []
    for text in texts:
        session = Session(model, ByteTokenizer())
        alone.append(run(session, session.add(text, SETTINGS))[0])
    session = Session(model, ByteTokenizer(), cache_bytes=1 << 30)
    first = run(session, session.add(texts[0], SETTINGS))[0]
    # Two more at a time, beside each other: one takes up what is kept, or what is running.
    numbers = [session.add(text, SETTINGS) for text in texts[1:]]
    rest = run(session, *numbers)
    assert [first, *(rest[number] for number in numbers)] == alone
    assert session.cached[0] == 0
    if not attention:
        assert all(session.cached[number] >= len(SYSTEM) for number in numbers)


def test_requests_of_one_prompt_compute_it_once() -> None:
    session = Session(decoder(), ByteTokenizer(), cache_bytes=1 << 30)
    numbers = [session.add(SYSTEM, SETTINGS) for _ in range(3)]
    found = run(session, *numbers)
    assert found[0] == found[1] == found[2]
    assert [session.cached[number] for number in numbers] == [0, *[len(SYSTEM) - 1] * 2]


def test_experts_of_every_token_are_computed_and_not_taken_from_memory() -> None:
    session = Session(decoder(), ByteTokenizer(), cache_bytes=1 << 30)
    run(session, session.add(SYSTEM, SETTINGS))
    number = session.add(SYSTEM, SETTINGS, routed=True)
    run(session, number)
    assert session.cached[number] == 0
    assert sum(len(each.experts_TLK) for each in session.routed[number]) >= len(SYSTEM)


def test_memory_is_honoured() -> None:
    session = Session(decoder(), ByteTokenizer(), cache_bytes=100_000)
    assert session.prefixes is not None
    for number in range(20):
        run(session, session.add(f"{number} {SYSTEM}", SETTINGS))
        assert session.prefixes.nbytes <= 100_000
    assert session.prefixes.nbytes > 0
    assert Session(decoder(), ByteTokenizer()).prefixes is None


def test_a_request_that_is_dropped_leaves_its_past() -> None:
    session = Session(decoder(), ByteTokenizer(), cache_bytes=1 << 30)
    number = session.add(SYSTEM, SETTINGS)
    session.step()
    session.drop(number)
    again = session.add(f"{SYSTEM}?", SETTINGS)
    run(session, again)
    assert session.cached[again] == len(SYSTEM)


def test_a_failed_step_leaves_nothing_to_go_on_from(monkeypatch: Any) -> None:
    """An interrupt in a step: some layers have the new tokens, others not."""
    model = decoder()
    text = f"{SYSTEM}one"
    session = Session(model, ByteTokenizer())
    alone = run(session, session.add(text, SETTINGS))[0]
    session = Session(model, ByteTokenizer(), cache_bytes=1 << 30)
    number = session.add(text, SETTINGS)
    for _ in range(4):
        session.step()
    (live,) = session._running
    whole = live.decoding.step

    def broken(*given: Any) -> Any:
        whole(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(live.decoding, "step", broken)
        with pytest.raises(KeyboardInterrupt):
            session.step()
    session.drop(number)
    assert not session.live
    assert run(session, again := session.add(text, SETTINGS))[again] == alone
    assert session.cached[again] == 0


LONG = {
    "kind": "longrope", "original_context": 80,
    "short_factor": (1.0,) * 4, "long_factor": (3.0,) * 4,
}  # fmt: skip


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_longrope_texts_of_all_lengths_get_what_they_get_alone(cache_bytes: int) -> None:
    """After longer ones, beside them, and before a text that goes on with theirs."""
    model = decoder(positions={"scaling": LONG})
    texts = [SYSTEM, SYSTEM[:40], SYSTEM * 2, SYSTEM[:30], SYSTEM + SYSTEM[:30]]
    alone = []
    for text in texts:
        session = Session(model, ByteTokenizer())
        alone.append(run(session, session.add(text, SETTINGS))[0])
    session = Session(model, ByteTokenizer(), cache_bytes=cache_bytes)
    for text, want in zip(texts, alone, strict=True):
        number = session.add(text, SETTINGS)
        assert run(session, number)[number] == want
    numbers = [session.add(text, SETTINGS) for text in texts]
    together = run(session, *numbers)
    assert [together[number] for number in numbers] == alone
