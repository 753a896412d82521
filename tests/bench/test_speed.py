from typing import Any

import pytest
import torch

from moestro.bench import speed
from moestro.bench.speed import ReadBandwidth, Round, measure, rounds_of, weight_bytes
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


def test_medians_over_the_rounds_after_one_to_warm_up() -> None:
    given = iter([Round(9, 9, 9), Round(1, 2, 4, 8.0), Round(2, 3, 1, 2.0), Round(4, 5, 2, 4.0)])
    found = measure(lambda: next(given), prompt=8, tokens=4, weight_bytes=100, rounds=3)
    assert found.prefill_per_s == 4
    assert found.decode_per_s == 2
    assert found.first_s == 3
    assert found.joules == 1
    assert found.read_per_s is None
    assert found.share is None
    assert found.peak_bytes > 0


def test_the_share_is_of_reading_in_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadBandwidth, "__call__", lambda self: 1000.0)
    found = measure(
        lambda: Round(1, 1, 2), prompt=8, tokens=4, weight_bytes=100, read=ReadBandwidth(1 << 16)
    )
    assert found.share == pytest.approx(0.2)
    assert found.read_per_s == 1000


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
