"""How likely tokens were, of prompts and of texts, beside a forward of the model."""

import itertools
from typing import Any

import pytest
import torch

from moestro.config import ModelConfig
from moestro.errors import MoestroError
from moestro.infer import decoding
from moestro.infer.engine import Session, stream
from moestro.infer.sampling import SamplingConfig
from moestro.infer.writing import Scored, score
from moestro.models.decoder import Decoder

from .test_routed import run
from .test_session import BYTES, HEADS, MOE, model_of
from .test_text_to_text import tiny

PROMPT = "a rather long prompt"
LONG = {**HEADS, "context": 64}


def test_a_score_is_a_logarithm_of_the_softmax() -> None:
    logits_1V = torch.tensor([[1.0, 3.0, 3.0, -torch.inf]])
    want = (logits_1V.double().exp() / logits_1V.double().exp().sum()).log()[0]
    found = score(logits_1V, 0, 3)
    assert found.token == 0
    assert found.logprob == pytest.approx(float(want[0]))
    assert [token for token, _ in found.top] == [1, 2, 0]
    assert [logprob for _, logprob in found.top] == pytest.approx(want[[1, 2, 0]].tolist())
    assert score(logits_1V, 1, 0) == Scored(1, found.top[0][1], ())


@pytest.mark.parametrize("kind", ["python", "native"])
def test_every_token_of_a_prompt_and_its_text(kind: str) -> None:
    """Penalties and temperature change what is chosen, and not how likely it is said to be."""
    model = model_of(kind) if kind == "python" else model_of(kind, attention=LONG)
    sampling = SamplingConfig(seed=2, max_tokens=4, temperature=3, repetition_penalty=1.5)
    prompt = PROMPT[:18]
    session = Session(model, BYTES)
    other = session.add("other", sampling)
    number = session.add(prompt, sampling, top=2, prompt_scored=True)
    found = run(session)
    pieces = found[number]
    assert found[other][0].scored is None
    assert list(session.scored) == [number]
    tokens = [*prompt.encode(), *(piece.token for piece in pieces)]
    with torch.no_grad():
        logits_SV = model(torch.tensor([tokens])).logits[0]
    scored = [*session.scored[number], *(piece.scored for piece in pieces)]
    assert len(scored) == len(tokens) - 1
    for place, (token, each) in enumerate(zip(tokens[1:], scored, strict=True)):
        assert each is not None
        want = score(logits_SV[place : place + 1], token, 2)
        assert (each.token, [t for t, _ in each.top]) == (token, [t for t, _ in want.top])
        assert each.logprob == pytest.approx(want.logprob, abs=1e-4)
    alone = [piece.token for piece in stream(model, BYTES, prompt, sampling)]
    assert alone == [piece.token for piece in pieces]


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_a_prompt_in_pieces_beside_others_has_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Its chunks' logits all come from the pass that reads them, as few as there is room for."""
    model = model_of("native", attention=LONG)
    monkeypatch.setattr(decoding, "MOST_LOGITS", chunk * model.cfg.vocab_size)
    found = []
    for others in (0, 2):
        session = Session(model, BYTES)
        for _ in range(others):
            session.add("another", SamplingConfig(max_tokens=3))
        number = session.add(PROMPT, SamplingConfig(max_tokens=1), top=1, prompt_scored=True)
        run(session)
        found.append(session.scored[number])
    way = decoding.decoding_of(model)
    one_by_one, past = [], way.new()
    for before, token in itertools.pairwise(PROMPT.encode()):
        (passed,) = way.step([[before]], [past])
        one_by_one.append(score(passed.logits_NV, token, 1))
    assert found == [one_by_one, one_by_one]


@pytest.mark.parametrize("kind", ["native", "python"])
def test_logits_of_a_whole_prompt_are_gone_before_the_next_pass(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be as many as there is room for once, and the next request's come then."""
    session = Session(model_of(kind, attention=LONG), BYTES)
    whole, passed = session._decoding.step, []

    def step(*given: Any) -> Any:
        passed.append([each.logits_1V for each in session._running if each.logits_1V is not None])
        return whole(*given)

    monkeypatch.setattr(session._decoding, "step", step)
    for _ in range(2):
        session.add(PROMPT, SamplingConfig(max_tokens=3), top=1, prompt_scored=True)
    run(session)
    assert len(passed) > 3
    assert passed == [[]] * len(passed)


def test_what_is_read_in_one_piece_has_logits_between() -> None:
    model = Decoder(
        ModelConfig(dim=16, num_layers=1, attention=HEADS, moe={**MOE, "capacity": {}})
    ).eval()
    session = Session(model, BYTES)
    number = session.add("abcd", SamplingConfig(max_tokens=1), top=0, prompt_scored=True)
    run(session)
    with torch.no_grad():
        logits_SV = model(torch.tensor([[*b"abcd"]])).logits[0]
    rows = zip(logits_SV.split(1), b"bcd", strict=False)
    assert session.scored[number] == [score(logits_1V, token, 0) for logits_1V, token in rows]


def test_an_encoder_gives_no_logits() -> None:
    session = Session(tiny(), BYTES)
    with pytest.raises(MoestroError, match="an encoder reads"):
        session.add("abc", SamplingConfig(), top=0, prompt_scored=True)
    assert session.live == 0
