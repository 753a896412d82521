"""What is counted for a model in use, against what it really makes."""

from typing import Any

import pytest
import torch

from moestro.checkpoints.quantize import format_of, pack
from moestro.config import EncDecConfig, ModelConfig, NetworkConfig
from moestro.infer.decoding import NativeDecoding, decoding_of
from moestro.kernels import attention, native_cpu
from moestro.models import budget
from moestro.models.budget import Budget, Mixture, Needs, Use, fit, needs, smallest
from moestro.models.build import new_model
from moestro.models.cache import WholeCache
from moestro.models.indexer import Indexer
from moestro.models.passing import CHUNK, lacks
from moestro.models.rotary import rotary

CONTEXT, DIM, HIDDEN, EXPERTS, TOP_K = 256, 64, 96, 8, 2
USE = Use(texts=3, tokens=16)
WEIGHTS = 3 * DIM * HIDDEN  # of an expert


def config(**attention: object) -> ModelConfig:
    moe = {"hidden_dim": HIDDEN, "num_experts": EXPERTS, "top_k": TOP_K}
    heads = {"num_heads": 4, "num_kv_heads": 2, "context": CONTEXT}
    return ModelConfig(
        vocab_size=64, dim=DIM, num_layers=2, attention={**heads, **attention}, moe=moe
    )


def peak(seen: Any) -> int:
    """Most bytes of tensors that were there at once while torch's profiler looked on."""
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def counted(cfg: NetworkConfig, use: Use, weight: int = 2) -> Needs:
    return needs(cfg, 2, 0, [Mixture(weight * WEIGHTS, EXPERTS, TOP_K)] * 2, use)


PYTHON = {"positions": {"skipped_every": 2}}


@pytest.mark.parametrize(
    ("attention", "scored", "read_back"),
    [({}, False, False), (PYTHON, False, True), ({}, True, True)],
)
def test_numbers_read_back_from_an_int8_cache_are_counted_where_they_are_made(
    attention: dict[str, object], scored: bool, read_back: bool
) -> None:
    cfg, use = config(**attention), USE._replace(scored=scored)
    plain, whole = (counted(cfg, use._replace(cache=kind)) for kind in ("as-is", "int8"))
    assert whole.cache < plain.cache
    if not read_back:
        assert whole.buffers == plain.buffers
        return
    cache = WholeCache(CONTEXT)
    keys_values = torch.randn(2, use.texts, 2, CONTEXT, DIM // 4).bfloat16()
    made = cache.extend(*keys_values)
    # Both as numbers, and while one is made, it and its product in fp32.
    most = sum(each.nbytes for each in made) + 2 * 4 * made[0].numel()
    assert whole.buffers - plain.buffers == most


def test_earlier_texts_get_an_eighth_of_what_is_left() -> None:
    """So that the smallest amount does not grow with itself."""
    most = 40 << 20
    use = USE._replace(kept_bytes=most, kept_shrinks=True)
    wanted, without = counted(config(), use), counted(config(), USE)
    assert smallest(wanted) == smallest(without)
    for more in (0, 80 << 20, 1 << 30):
        found = fit(wanted, smallest(wanted) + more)
        left = smallest(wanted) + more - without.fixed - 2 * 2 * WEIGHTS
        assert found.needs.spare == min(most, left // 8)
        assert found.needs.cache == without.cache + found.needs.spare
        assert found.needs.fixed + found.kept_bytes <= found.memory


def test_logits_of_a_prompt_are_counted_where_they_may_be_echoed() -> None:
    """As many as `Decoding.chunk` lets pass together, and what one is scored with."""
    vocab, tokens = 65_536, 512
    cfg = config().model_copy(update={"vocab_size": vocab})
    use = Use(CONTEXT, texts=2)
    plain, echoed = (counted(cfg, use._replace(echoed=each)).buffers for each in (False, True))
    step = torch.nn.Module()
    step.cfg = cfg
    decoding = NativeDecoding.__new__(NativeDecoding)
    decoding.model = step
    rows = decoding.chunk([0] * tokens, told=True)
    assert 1 < rows < tokens
    assert 4 * vocab * rows < echoed - plain < 4 * vocab * (rows + 16)
    longrope = config(positions={"scaling": LONGROPE})
    plain, echoed = (counted(longrope, use._replace(echoed=e)).buffers for e in (False, True))
    assert echoed - plain >= 4 * longrope.vocab_size * CONTEXT


def test_more_of_a_prompt_passes_together_where_experts_are_read_and_there_is_room() -> None:
    cfg = config(context=8192)
    mixtures = [Mixture(40 << 20, EXPERTS, TOP_K)] * 2

    def fitted(memory: int, use: Use, cfg: ModelConfig = cfg) -> Budget:
        found = fit(needs(cfg, 2, 0, mixtures, use), memory)
        assert found.needs.fixed + found.kept_bytes <= found.memory
        return found

    use = Use(8192, prompt=4000)
    least = smallest(needs(cfg, 2, 0, mixtures, use))
    some, most = fitted(least + (80 << 20), use), fitted(least + (300 << 20), use)
    assert CHUNK < some.together < most.together == 4000
    whole = needs(cfg, 2, 0, mixtures, use._replace(tokens=4000))
    assert abs(most.needs.buffers / whole.buffers - 1) < 0.01
    assert fitted(least, use).together < CHUNK + 1000
    assert fitted(1 << 40, use).together == CHUNK  # all are kept
    assert fitted(least + (300 << 20), use._replace(prompt=None)).together == CHUNK
    assert fitted(least + (300 << 20), use._replace(prompt=100)).together == CHUNK
    asked = use._replace(prompt=None, chunk=4000)  # of a server
    assert fitted(least + (300 << 20), asked) == most
    assert fitted(least + (300 << 20), asked._replace(chunk=700)).together == 700
    python = config(context=8192, **PYTHON)  # other bits if it were cut elsewhere
    assert fitted(least + (400 << 20), use, python).together == CHUNK


RELATIVE = {"kind": "relative", "shared": True, "buckets": 8, "max_distance": 12}
LONGROPE = {
    "kind": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_context": CONTEXT // 2,
}


@pytest.mark.parametrize(
    ("kind", "attention", "moe"),
    [
        ("decoder", PYTHON, {}),
        ("decoder", {"positions": RELATIVE}, {}),
        ("decoder", {"sinks": True, **PYTHON}, {}),
        ("decoder", {}, {"capacity": {"factor": 1.5}}),
        ("encdec", {"positions": RELATIVE}, {}),
    ],
    ids=["chunked", "relative", "sinks", "capacity", "encdec"],
)
@pytest.mark.skipif(native_cpu.available() is not None, reason=str(native_cpu.available()))
def test_what_a_prompt_makes_in_python_is_counted(
    kind: str, attention: dict[str, object], moe: dict[str, object]
) -> None:
    """The last chunk, or the whole where a prompt passes in one: its logits and scores too."""
    long, vocab = 1200, 8000
    heads = {"num_heads": 4, "num_kv_heads": 2, "context": long, **attention}
    mixture = {"hidden_dim": HIDDEN, "num_experts": EXPERTS, "top_k": TOP_K, **moe}
    cfg: NetworkConfig = ModelConfig(
        vocab_size=vocab, dim=DIM, num_layers=2, attention=heads, moe=mixture
    )
    if kind == "encdec":
        heads = {**heads, "num_heads": 8, "num_kv_heads": 8, "head_dim": 8}
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "moe_every": 1}
        cfg = EncDecConfig(vocab_size=vocab, dim=DIM, attention=heads, moe=mixture, **sizes)
    model = new_model(cfg).eval().bfloat16()
    pack(model, format_of("int8"))
    decoding = decoding_of(model)
    past, prompt = decoding.new(), [1 + n % 250 for n in range(long)]
    size = decoding.chunk(prompt)
    read = long - long % size if long % size else 0
    if read:
        decoding.read(past, prompt[:read])
    with torch.profiler.profile(profile_memory=True) as seen:
        decoding.step([prompt[read : read + size]], [past])
    most, found = peak(seen), counted(cfg, Use(long))
    assert most - found.cache <= found.buffers


def test_a_prompt_that_passes_in_one_is_counted_whole() -> None:
    """Of native steps too: angles of longrope depend on the whole length."""
    plain, longrope = config(), config(positions={"scaling": LONGROPE})
    assert lacks(longrope) is None
    whole = counted(plain, Use(CONTEXT, tokens=CONTEXT))
    assert counted(longrope, Use(CONTEXT)).buffers == whole.buffers
    assert counted(longrope, Use(CONTEXT, prompt=9)) == counted(plain, Use(CONTEXT, tokens=9))


@pytest.mark.parametrize(("weight", "row"), [(1, 1 + 2 / 8), (2, 2 + 4), (4, 4 + 2)])
def test_rows_of_experts_take_what_a_kind_of_weights_multiplies(weight: int, row: float) -> None:
    """An expert's rows enter in that form, and leave as fp32; buffers are counted for all."""
    cfg, few, many = config(), USE, USE._replace(tokens=USE.tokens + 1000)
    rows = 1000 * TOP_K
    wanted = rows * (4 + row) * (DIM + HIDDEN)
    found = counted(cfg, many, weight).buffers - counted(cfg, few, weight).buffers
    others = 1000 * 4 * (8 * DIM + 3 * 8 * DIM // 4 + EXPERTS) + rows * 2 * budget._CHOICE
    assert wanted <= found - others <= 1.2 * wanted


def test_the_smallest_amount_keeps_one_expert_of_each_mixture() -> None:
    wanted = counted(config(), USE)
    assert fit(wanted, smallest(wanted)).kept >= (1, 1)


def test_what_an_indexer_chooses_with_is_counted() -> None:
    """At least its keys in fp32, and scores, products, a mask and what the ties are counted by."""
    assert budget._ROWS == attention.ROWS  # which it cannot import without torch
    latent = {"kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4, "q_rank": 8}
    index = {"num_heads": 2, "head_dim": 8, "top_k": 4}
    heads = {"num_heads": 4, "context": 1024, "latent": {**latent, "indexer": index}}
    cfg = ModelConfig(dim=DIM, attention=heads)
    assert cfg.attention.latent is not None
    use, length = Use(1024, texts=2, tokens=2 * 300), 300
    indexer = Indexer(DIM, cfg.attention.latent).bfloat16()
    x_BSD, q_BSR = (torch.randn(2, length, width).bfloat16() for width in (DIM, 8))
    angles = rotary(1024 - length, length, cfg, torch.device("cpu"))
    keys_BPA = torch.randn(2, 1024, 8).bfloat16()
    with torch.profiler.profile(profile_memory=True) as seen:
        choose = indexer(x_BSD, q_BSR, angles, keys_BPA)
        own, keys = range(1024 - attention.ROWS, 1024), range(1024)
        mask = choose(own, keys, attention.visible(own, keys, 1024, None, x_BSD.device))
    assert mask.shape == (2, 1, attention.ROWS, 1024)
    most, found = peak(seen), budget._choosing(cfg, use, 2)
    assert most <= found <= 1.5 * most
    assert counted(cfg, use).buffers >= found
