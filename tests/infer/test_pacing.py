"""What a token takes is measured on the model, and changes nothing of what it computes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.checkpoints import packed_files, streamed
from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.config import ModelConfig
from moestro.infer import pacing
from moestro.infer.native_decoder import NativeDecoder, supports
from moestro.infer.pacing import measure_pace
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model whose experts are large beside what a call takes."""
    torch.manual_seed(0)
    moe = {"hidden_dim": 1024, "num_experts": 8, "top_k": 3}
    cfg = ModelConfig(vocab_size=64, dim=256, num_layers=2, moe=moe)
    model, path = Decoder(cfg).eval(), tmp_path_factory.mktemp("model") / "packed"
    pack(model, WEIGHTS["int8"])
    packed_files.save(model, path, WEIGHTS["int8"], {})
    return path


@pytest.mark.parametrize("kept", [1, 4, 8])
def test_what_misses_add(file: Path, kept: int) -> None:
    model = streamed.load(file, [kept, kept])
    residency = streamed.residency_of(model)
    pace = measure_pace(model, residency, 0.2)
    assert pace.compute_s > 0
    assert len(pace.missed_M) == 4
    assert pace.missed_M[0] == 0
    if kept == 8:
        assert pace.missed_M == (0, 0, 0, 0)
    else:
        assert residency.reads().waited_s > 0
        assert pace.missed_M[3] > 0
    mapped, tokens = packed_files.load(file), [[*range(20)], [3]]
    decoders = [NativeDecoder(each) for each in (model, mapped)]
    pasts = [[each.model.new_cache(1), each.model.new_cache(1)] for each in decoders]
    ours, theirs = (d.step(tokens, p).logits_NV for d, p in zip(decoders, pasts, strict=True))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("filled", [1, 2])
def test_tokens_that_miss_into_untouched_memory_say_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch, filled: int
) -> None:
    model, real, found = streamed.load(file, [2, 2]), pacing._missed, list[tuple[float, ...]]()

    def missed(*given: Any) -> tuple[float, ...]:
        found.append(real(*given))
        return found[-1]

    slow = [pacing._Step(0.001, 1e3, 2)] * 4
    monkeypatch.setattr(pacing, "_steps", lambda *_: slow)
    monkeypatch.setattr(pacing, "_missed", missed)
    whole = pacing._filled
    monkeypatch.setattr(pacing, "_filled", lambda *given: whole(*given)[:filled])
    pace = measure_pace(model, streamed.residency_of(model), 1.0)
    most = 1.0 if filled == 1 else pacing._MOST_APART
    assert pace.missed_M == tuple(most * cost for cost in found[0])


def test_waiting_is_a_part_of_the_time_and_grows(file: Path) -> None:
    model = streamed.load(file, [1, 1])
    decoder, past, found = NativeDecoder(model), model.new_cache(1), []
    for token in range(5):
        decoder.step([[token]], [past])
        found.append(streamed.residency_of(model).reads())
    assert all(now.waited_s > then.waited_s for then, now in pairwise(found))
    assert found[-1].since(found[0]).misses == 4 * 2 * 3 - found[-1].since(found[0]).hits


@pytest.mark.parametrize(("experts", "top_k", "kept"), [(2, 2, 1), (4, 4, 3), (4, 3, 1)])
def test_a_token_wants_all_of_its_experts_also_where_there_are_few_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int, top_k: int, kept: int
) -> None:
    torch.manual_seed(0)
    moe = {"hidden_dim": 64, "num_experts": experts, "top_k": top_k}
    model, path = (
        Decoder(ModelConfig(vocab_size=64, dim=64, num_layers=2, moe=moe)).eval(),
        tmp_path / "packed",
    )
    pack(model, WEIGHTS["int8"])
    packed_files.save(model, path, WEIGHTS["int8"], {})
    opened, calls, mix = streamed.load(path, [kept, kept]), list[int](), pacing._mix

    def counted(layer: Any, chosen: list[int]) -> None:
        calls.append(len(set(chosen)))
        mix(layer, chosen)

    monkeypatch.setattr(pacing, "_filled", lambda model, *_: [model.blocks[0].ffn.experts])
    monkeypatch.setattr(pacing, "_mix", counted)
    pace = measure_pace(opened, streamed.residency_of(opened), 0.05)
    assert set(calls) == {top_k}
    assert pace.missed_M[0] == 0 < pace.missed_M[-1]


def test_a_model_that_decodes_in_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    attention = {"positions": {"skipped_every": 2}}
    moe = {"hidden_dim": 64, "num_experts": 4, "top_k": 2}
    cfg = ModelConfig(vocab_size=64, dim=64, num_layers=2, attention=attention, moe=moe)
    model, path = Decoder(cfg).eval(), tmp_path / "packed"
    pack(model, WEIGHTS["int8"])
    packed_files.save(model, path, WEIGHTS["int8"], {})
    opened = streamed.load(path, [2, 2])
    assert supports(opened) is not None
    assert measure_pace(opened, streamed.residency_of(opened), 0.05).compute_s > 0
