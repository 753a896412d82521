"""Constraints, and the experts of every token, as a session gives them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.infer.decoding import Decoding, Routed, decoding_of
from moestro.infer.engine import Session, generate_batch
from moestro.infer.native_decoder import supports
from moestro.infer.sampling import SamplingConfig
from moestro.infer.writing import Piece
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder

from .test_session import BYTES, HEADS, MOE, model_of

PROMPT = "a rather long prompt"


class Letters:
    """Allows one letter after another, each of a given set."""

    def __init__(self, *sets: str) -> None:
        self.left, self.taken = list(sets), list[int]()

    def allowed(self) -> Tensor:
        allowed_N = torch.zeros(128, dtype=torch.bool)  # fewer than the model's vocabulary
        letters = self.left.pop(0) if self.left else "\0"
        allowed_N[[ord(letter) for letter in letters]] = True
        return allowed_N

    def push(self, token: int) -> None:
        self.taken.append(token)


def run(session: Session) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {}
    while session.live:
        for number, piece in session.step():
            found.setdefault(number, []).append(piece)
    return found


@pytest.mark.parametrize("kind", ["python", "native"])
def test_a_constraint_holds_for_its_own_text(kind: str) -> None:
    model, held = model_of(kind), Letters("xy", "12", "xy")
    session = Session(model, BYTES)
    free = SamplingConfig(seed=3, max_tokens=6)
    numbers = [session.add("a", free), session.add("a", free, constraint=held)]
    found = run(session)
    texts = ["".join(piece.text for piece in found[number]) for number in numbers]
    assert len(texts[1]) == 3
    assert texts[1][0] in "xy"
    assert texts[1][1] in "12"
    assert found[numbers[1]][-1].finish == "end_of_text"
    assert held.taken == [*texts[1].encode(), 0]
    alone = [piece for _, piece in generate_batch(model, BYTES, ["a"], [free])]
    assert alone == found[numbers[0]]


def test_a_constraint_that_allows_nothing_ends_the_request() -> None:
    session = Session(model_of("python"), BYTES)
    number = session.add("a", SamplingConfig(), constraint=Letters(""))
    assert run(session) == {}
    assert list(session.failed) == [number]


@pytest.mark.parametrize("kind", ["python", "native", "int4"])
def test_the_experts_of_every_token_that_passed(kind: str) -> None:
    """Those of a forward over prompt and text; and their number is the load."""
    model = model_of(kind, attention={**HEADS, "context": 64})
    session = Session(model, BYTES)
    number = session.add(PROMPT, SamplingConfig(seed=1, max_tokens=7), routed=True)
    session.add("other", SamplingConfig(max_tokens=3))
    pieces = run(session)[number]
    assert list(session.routed) == [number]
    experts_TLK = torch.cat([each.experts_TLK for each in session.routed[number]])
    weights_TLK = torch.cat([each.weights_TLK for each in session.routed[number]])
    tokens = [*PROMPT.encode(), *(piece.token for piece in pieces)]
    assert experts_TLK.shape == weights_TLK.shape == (len(tokens), 2, 2)
    assert [tuple(each) for each in experts_TLK[len(PROMPT) :, :, 0].tolist()] == [
        piece.experts for piece in pieces
    ]
    if kind != "int4":  # packed experts may choose otherwise at a near tie
        (want,) = Decoding(model).step([tokens], [model.new_cache(1)])
        assert torch.equal(want.routed().experts_TLK, experts_TLK)
        torch.testing.assert_close(want.routed().weights_TLK, weights_TLK)
    assert session.load_LE is not None
    passed = len(tokens) + len("other") + 3
    assert session.load_LE.sum(1).tolist() == [2 * passed] * 2


def routed_of(moe: dict[str, Any], tokens: list[int]) -> tuple[Routed, Any]:
    model = Decoder(ModelConfig(dim=16, num_layers=2, attention=HEADS, moe={**MOE, **moe})).eval()
    (passed,) = Decoding(model).step([tokens], [model.new_cache(1)])
    return passed.routed(), model(torch.tensor([tokens]))


def pairs(experts_N: Tensor, weights_N: Tensor) -> dict[int, float]:
    found = zip(experts_N.tolist(), weights_N.tolist(), strict=True)
    return {expert: weight for expert, weight in found if expert >= 0}


@pytest.mark.filterwarnings("ignore:expert_choice routing")
def test_tokens_that_few_experts_took() -> None:
    """Expert choice and capacity: what is missing is -1, and weighs nothing."""
    tokens = list(range(10))
    for moe in ({"router": {"kind": "expert_choice"}}, {"capacity": {"eval_factor": 0.5}}):
        routed, output = routed_of(moe, tokens)
        assert (routed.experts_TLK == -1).any()
        for layer, routing in enumerate(output.routings):
            kept_R = torch.ones_like(routing.tokens_R, dtype=torch.bool)
            kept_R = kept_R if routing.kept_R is None else routing.kept_R
            for token in tokens:
                mine_R = (routing.tokens_R == token) & kept_R
                want = pairs(routing.experts_R[mine_R], routing.weights_R[mine_R])
                row = pairs(routed.experts_TLK[token, layer], routed.weights_TLK[token, layer])
                assert row == pytest.approx(want)
    gone = routed.experts_TLK == -1
    assert (routed.weights_TLK[gone] == 0).all()


def test_a_dense_model_has_no_experts() -> None:
    model = Decoder(ModelConfig(dim=16, num_layers=2, attention=HEADS, moe=None)).eval()
    kinds = [Decoding(model)]
    if native_cpu.available() is None and supports(model) is None:
        kinds.append(decoding_of(model))
    for decoding in kinds:
        (passed,) = decoding.step([[1, 2]], [decoding.new()])
        assert passed.routed().experts_TLK.numel() == 0
        assert decoding.load_LE is None
