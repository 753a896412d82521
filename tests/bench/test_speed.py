from typing import Any

import pytest
import torch

from moestro.bench import speed
from moestro.bench.speed import (
    ReadBandwidth,
    Round,
    Speed,
    Variant,
    by_turns,
    rounds_of,
    weight_bytes,
)
from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.config import ModelConfig
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 32,
    "num_layers": 2,
    "dense": {"hidden_dim": 64},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "context": 32},
}
MOE = {"hidden_dim": 64, "num_experts": 8, "top_k": 2, "shared": {"hidden_dim": 32}}


def test_variants_take_turns_and_medians_are_over_their_own_rounds() -> None:
    turns = []

    def variant(name: str, *given: Round, reads: bool = True) -> Variant:
        left = iter(given)

        def run() -> Round:
            turns.append(name)
            return next(left)

        return Variant(name, "int4", run, 100, 7, reads)

    def read() -> float:
        turns.append("read")
        return 1000.0

    first = variant("a", Round(1, 2, 4, 8.0), Round(2, 3, 1, 2.0), Round(4, 5, 2, 4.0))
    second = variant("b", *[Round(8, 8, 8)] * 3, reads=False)
    found = by_turns([first, second], prompt=8, tokens=4, rounds=3, read=read)
    assert turns == ["read", "a", "b"] * 3
    assert found[0] == Speed(4, 2, 3, 100, 1000, 0.2, 7, 1)
    assert found[1] == Speed(1, 0.5, 8, 100, None, None, 7, None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [MOE, None])
def test_the_bytes_that_a_token_reads(moe: dict[str, Any] | None, tied: bool) -> None:
    cfg = ModelConfig(**{**SIZES, "moe": moe, "head": {"tied": tied}})
    model = Decoder(cfg).eval()
    layer = 32 * 64 + 32 * 32 + 2 * 32  # qkv, out, norms
    layer += 3 * 32 * (2 * 64 + 32) + 8 * 32 if moe else 3 * 32 * 64
    assert weight_bytes(model) == 4 * (2 * layer + 32 + 64 * 32)
    if native_cpu.available() is None:
        pack(model, WEIGHTS["int8"])
        packed = 2 * (layer - 64 - (8 * 32 if moe else 0)) + 64 * 32
        rest = 4 * (2 * (64 + (8 * 32 if moe else 0)) + 32)
        pages = 2 * (2 * 2 + 1 if moe else 1) * 4096  # a slab ends with its page
        exact = packed * 8.5 / 8 + rest
        assert exact <= weight_bytes(model) <= exact + pages


def test_a_round_takes_the_prompt_and_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(ModelConfig(**{**SIZES, "moe": MOE})).eval()
    seen: list[list[int]] = []

    class Counting:
        def begin(self, tokens: list[int]) -> Any:
            seen.append(tokens)
            return None, Passed()

        def step(self, tokens: list[int], pasts: list[Any]) -> list[Any]:
            seen.append(tokens)
            return [Passed()]

    class Passed:
        logits_NV = torch.zeros(1, 64)

    monkeypatch.setattr(speed, "decoding_of", lambda model: Counting())
    run = rounds_of(model, 5, 3)
    made = run()
    assert [len(tokens) for tokens in seen] == [5, 1, 1, 1]
    assert 0 < made.prefill_s <= made.first_s
    assert made.decode_s > 0
    first, seen[:] = list(seen), []
    run()
    assert seen == first


def test_reading_gives_bytes_per_second() -> None:
    assert 1e7 < ReadBandwidth(1 << 22)() < 1e13
