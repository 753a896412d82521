"""Latent attention head by head as the paper writes it, its two forms, and its cache."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moestro import Decoder, ModelConfig
from moestro.config import LatentConfig
from moestro.errors import ConfigError
from moestro.kernels import attention
from moestro.kernels.pointwise import rotate
from moestro.models.cache import LayerCache
from moestro.models.indexer import nearest_best
from moestro.models.latent import NORM_EPS, LatentAttention
from moestro.models.rotary import rotary, score_scale

CPU = torch.device("cpu")
LATENT = {"kv_rank": 6, "nope_dim": 5, "rope_dim": 4, "value_dim": 3}
INDEXER = {"num_heads": 9, "head_dim": 6, "top_k": 3}
YARN = {
    "kind": "yarn",
    "factor": 4.0,
    "original_context": 8,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
CASES = {
    "plain": {},
    "query rank": {"latent": {**LATENT, "q_rank": 7}},
    "wide values": {"latent": {**LATENT, "value_dim": 11}},
    "small rank": {"latent": {**LATENT, "kv_rank": 2}},
    "context": {"context": 4},
    "yarn": {"positions": {"scaling": YARN}},
    "indexer": {"latent": {**LATENT, "q_rank": 7, "indexer": INDEXER}},
    **{
        f"indexer, {n} heads": {
            "latent": {**LATENT, "q_rank": 7, "indexer": {**INDEXER, "num_heads": n}}
        }
        for n in (1, 2, 4)
    },
    "indexer, context": {"latent": {**LATENT, "q_rank": 7, "indexer": INDEXER}, "context": 5},
}


def cfg_of(name):
    attention = {"num_heads": 3, "context": 32, "latent": LATENT, **CASES[name]}
    return ModelConfig(dim=16, attention=attention, norm={"eps": 0.1})


def module_of(name):
    module = LatentAttention(cfg_of(name)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def rms(x, norm):
    return x * (x.square().mean() + NORM_EPS).rsqrt() * norm.weight


def turn(x_A, angles, position):
    """Pair (i, i + A/2) as a complex number."""
    half = len(x_A) // 2
    factor = torch.complex(angles.cos_SA[position], angles.sin_SA[position])
    turned = torch.complex(x_A[:half], x_A[half:]) * factor
    return torch.cat([turned.real, turned.imag])


@torch.no_grad()
def chosen(indexer, x_SD, small, angles, s, seen):
    """Those of the positions `seen` that token s attends to: §2.1 of DeepSeek-V3.2."""

    def turned(y_A, position):
        return torch.cat([turn(y_A[:4], angles, position), y_A[4:]])

    scores = {}
    for p in seen:
        key_A = turned(indexer.k_norm(indexer.k.weight @ x_SD[p]), p)
        heads = (indexer.q.weight @ small[s]).chunk(indexer.cfg.num_heads)
        scaled = [(turned(q_A, s) @ key_A).relu() / math.sqrt(len(key_A)) for q_A in heads]
        weights_H = indexer.weights.weight @ x_SD[s] / math.sqrt(len(heads))
        scores[p] = float(weights_H @ torch.stack(scaled))
    # Sorting keeps the order of equal scores, so the nearest of these are last.
    return sorted(sorted(seen, key=scores.get)[-indexer.cfg.top_k :])


def latent_by_loop(module, cfg, x_SD, valid_S=None):
    """Equations 9-19 of DeepSeek-V2, one token and one head at a time."""
    latent, heads, length = cfg.attention.latent, cfg.attention.num_heads, len(x_SD)
    angles = rotary(0, length, cfg, CPU, torch.float64)
    queries, keys, values, small = [], [], [], []
    for s, x_D in enumerate(x_SD):
        if latent.q_rank is None:
            q = module.q.weight @ x_D
        else:
            small.append(rms(module.q_down.weight @ x_D, module.q_norm))
            q = module.q_up.weight @ small[s]
        down = module.kv_down.weight @ x_D
        up = module.kv_up.weight @ rms(down[: latent.kv_rank], module.kv_norm)
        shared = turn(down[latent.kv_rank :], angles, s)
        queries.append([])
        keys.append([])
        values.append([])
        for q_O, up_O in zip(q.chunk(heads), up.chunk(heads), strict=True):
            nope, rope = q_O[: latent.nope_dim], q_O[latent.nope_dim :]
            queries[s].append(torch.cat([nope, turn(rope, angles, s)]))
            keys[s].append(torch.cat([up_O[: latent.nope_dim], shared]))
            values[s].append(up_O[latent.nope_dim :])
    scale = score_scale(cfg.attention.positions) / math.sqrt(latent.nope_dim + latent.rope_dim)
    rows = []
    for s in range(length):
        seen = range(max(0, s - cfg.attention.context + 1), s + 1)
        seen = [p for p in seen if valid_S is None or valid_S[p] or p == s]
        if module.indexer is not None:
            seen = chosen(module.indexer, x_SD, small, angles, s, seen)
        parts = []
        for h in range(heads):
            scores = torch.stack([queries[s][h] @ keys[p][h] * scale for p in seen])
            parts.append(scores.softmax(0) @ torch.stack([values[p][h] for p in seen]))
        rows.append(module.out.weight @ torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("padded", [False, True])
def test_both_forms_equal_the_loop(name, form, padded, monkeypatch):
    """Outputs, and the gradients of the input and of every parameter."""
    monkeypatch.setattr(LatentAttention, "_absorbs", lambda *_: form == "absorbed")
    cfg, module = cfg_of(name), module_of(name)
    x_BSD = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    valid_BS = torch.rand(2, 7) < 0.7 if padded else None
    y_BSD = module(x_BSD, rotary(0, 7, cfg, CPU, torch.float64), valid_BS)
    expected_BSD = torch.stack(
        [latent_by_loop(module, cfg, x_BSD[b], valid_BS[b] if padded else None) for b in range(2)]
    )
    torch.testing.assert_close(y_BSD, expected_BSD)
    learning = [each for each in module.named_parameters() if each[1].requires_grad]
    names, leaves = zip(("input", x_BSD), *learning, strict=True)
    grad = torch.randn_like(y_BSD)
    ours = torch.autograd.grad(y_BSD, leaves, grad)
    exact = torch.autograd.grad(expected_BSD, leaves, grad)
    for name_, a, b in zip(names, ours, exact, strict=True):
        torch.testing.assert_close(a, b, msg=name_)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["expanded", "absorbed", "cheaper"])
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 4, 2], [1, 11]], ids=str)
def test_the_cache_gives_what_the_whole_gives(name, form, chunks, monkeypatch):
    cfg, module = cfg_of(name), module_of(name)
    x_BSD = torch.randn(2, 12, 16, dtype=torch.float64)
    whole_BSD = module(x_BSD, rotary(0, 12, cfg, CPU, torch.float64))
    if form != "cheaper":
        monkeypatch.setattr(LatentAttention, "_absorbs", lambda *_: form == "absorbed")
    cache, start, parts = LayerCache(cfg.attention.context), 0, []
    with torch.inference_mode():
        for part in x_BSD.split(chunks, dim=1):
            angles = rotary(start, part.shape[1], cfg, CPU, torch.float64)
            parts.append(module(part, angles, cache=cache))
            start += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), whole_BSD)


def test_the_cache_keeps_the_latent_vector_and_the_shared_key():
    cfg, module = cfg_of("plain"), module_of("plain")
    cache, x_BSD = LayerCache(32), torch.randn(2, 5, 16, dtype=torch.float64)
    angles = rotary(0, 5, cfg, CPU, torch.float64)
    with torch.no_grad():
        module(x_BSD, angles, cache=cache)
        (kept,) = cache.extend(torch.zeros(2, 1, 10, dtype=torch.float64))
        latent, key = module.kv_down(x_BSD).split([6, 4], dim=-1)
        turned = rotate(key[:, :, None], *angles)[:, :, 0]
        torch.testing.assert_close(kept[:, :5], torch.cat([module.kv_norm(latent), turned], -1))


@pytest.mark.parametrize(
    ("length", "span", "absorbs"),
    [(1, 4096, True), (64, 4096, True), (512, 4096, False), (4096, 4096, False), (1, 1, False)],
)
def test_the_cheaper_form_is_taken(length, span, absorbs):
    """DeepSeek-V3's widths; products counted one by one."""
    module = module_of("plain")
    module.latent = LatentConfig(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    heads, up, both = module.num_heads, 256 * 512, 2 * 512 + 64
    absorbed = heads * (length * up + length * span * both)
    expanded = heads * (span * up + length * span * (128 + 64 + 128))
    assert module._absorbs(length, span) == (absorbed < expanded) == absorbs


def test_16_bits():
    cfg, module = cfg_of("query rank"), module_of("query rank")
    x_BSD = torch.randn(2, 9, 16, dtype=torch.float64)
    exact = module(x_BSD, rotary(0, 9, cfg, CPU, torch.float64))
    low = module.bfloat16()(x_BSD.bfloat16(), rotary(0, 9, cfg, CPU))
    assert low.dtype == torch.bfloat16
    assert (low - exact).abs().max() < 0.05 * exact.abs().max()


def test_layout_of_the_weights():
    plain = {name: tuple(p.shape) for name, p in module_of("plain").named_parameters()}
    shared = {
        "kv_down.weight": (6 + 4, 16),
        "kv_norm.weight": (6,),
        "kv_up.weight": (3 * (5 + 3), 6),
        "out.weight": (16, 3 * 3),
    }
    assert plain == {"q.weight": (3 * (5 + 4), 16), **shared}
    ranked = {name: tuple(p.shape) for name, p in module_of("query rank").named_parameters()}
    queries = {"q_down.weight": (7, 16), "q_norm.weight": (7,), "q_up.weight": (3 * (5 + 4), 7)}
    assert ranked == {**queries, **shared}


@pytest.mark.parametrize("rows", [2, 256])
def test_an_indexer_leaves_all_positions_while_they_are_few(rows, monkeypatch):
    monkeypatch.setattr(attention, "ROWS", rows)
    cfg, module = cfg_of("indexer"), module_of("indexer")
    x_BSD = torch.randn(2, 8, 16, dtype=torch.float64)
    angles = rotary(0, 8, cfg, CPU, torch.float64)
    dense_BSD = module_without_indexer(module)(x_BSD, angles)
    sparse_BSD = module(x_BSD, angles)
    torch.testing.assert_close(sparse_BSD[:, :3], dense_BSD[:, :3])
    assert not torch.allclose(sparse_BSD[:, 3:], dense_BSD[:, 3:])
    few = rotary(0, 3, cfg, CPU, torch.float64)
    keys_BPA = module.indexer.keys(x_BSD[:, :3], few)
    assert module.indexer(x_BSD[:, :3], None, few, keys_BPA) is None


def module_without_indexer(module):
    twin = copy.copy(module)
    twin._modules = {**module._modules, "indexer": None}
    return twin


def test_documents_choose_among_their_own():
    """Packed side by side, each gets what it gets alone."""
    cfg, module = cfg_of("indexer"), module_of("indexer")
    x_BSD, documents_BS = torch.randn(1, 11, 16, dtype=torch.float64), torch.tensor([[0] * 11])
    documents_BS[0, 5:] = 1
    together = module(x_BSD, rotary(0, 11, cfg, CPU, torch.float64), documents_BS)
    alone = module(x_BSD[:, :5], rotary(0, 5, cfg, CPU, torch.float64))
    torch.testing.assert_close(together[:, :5], alone)
    # Only distances count, so the second may begin anywhere.
    alone = module(x_BSD[:, 5:], rotary(0, 6, cfg, CPU, torch.float64))
    torch.testing.assert_close(together[:, 5:], alone)


def test_what_an_indexer_needs():
    for latent, words in (
        ({**LATENT, "indexer": INDEXER}, "set q_rank"),
        ({**LATENT, "q_rank": 7, "indexer": {**INDEXER, "head_dim": 2}}, "4 numbers of it turn"),
    ):
        with pytest.raises(ConfigError, match=words):
            ModelConfig(attention={"latent": latent})


def test_a_decoder_of_it_learns_and_refuses_what_it_has_not():
    model = Decoder(cfg_of("query rank"))
    tokens_BS = torch.randint(0, 256, (2, 6))
    model(tokens_BS).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ConfigError, match="latent"):
        ModelConfig(attention={"latent": LATENT, "sinks": True})


def tied(num_heads):
    """A small head and few of them: many scores are exactly 0."""
    latent = {**LATENT, "q_rank": 7, "indexer": {"num_heads": num_heads, "head_dim": 8, "top_k": 4}}
    attention = {"num_heads": 3, "context": 64, "latent": latent}
    cfg = ModelConfig(dim=16, attention=attention, norm={"eps": 0.1})
    module = LatentAttention(cfg)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return cfg, module


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_of_equal_scores_the_nearest_whatever_the_cut(num_heads):
    cfg, module = tied(num_heads)
    x_BSD = torch.randn(1, 40, 16)
    cache, parts = LayerCache(64), []
    with torch.no_grad():
        whole_BSD = module(x_BSD, rotary(0, 40, cfg, CPU))
        for s in range(40):
            parts.append(module(x_BSD[:, s : s + 1], rotary(s, 1, cfg, CPU), cache=cache))
        for length in (5, 8, 23):
            short_BSD = module(x_BSD[:, :length], rotary(0, length, cfg, CPU))
            torch.testing.assert_close(short_BSD, whole_BSD[:, :length], rtol=1e-4, atol=1e-4)
        module.double()
        loop_SD = latent_by_loop(module, cfg, x_BSD[0].double())
    torch.testing.assert_close(torch.cat(parts, 1), whole_BSD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole_BSD[0].double(), loop_SD, rtol=1e-4, atol=1e-4)


def test_the_best_are_the_largest_then_the_last():
    scores_QP = torch.tensor(
        [
            [0.0, 3, 0, -0.0, 0, -1],
            [2, 2, 2, 2, 2, 2],
            [5, 4, 3, 2, 1, 0],
            [1, -math.inf, -math.inf, -math.inf, 0, -math.inf],
            [math.nan, 1, 1, 0, 1, 1],
        ]
    )
    places = [row.nonzero()[:, 0].tolist() for row in nearest_best(scores_QP[None], 3)[0]]
    assert places == [[1, 3, 4], [3, 4, 5], [0, 1, 2], [0, 4, 5], [0, 4, 5]]


def test_positions_are_chosen_block_by_block(monkeypatch):
    """No tensor is as large as a mask of all queries and all positions."""
    monkeypatch.setattr(attention, "ROWS", 4)
    cfg = cfg_of("indexer")
    cfg = cfg.model_copy(update={"attention": cfg.attention.model_copy(update={"context": 512})})
    module, largest = LatentAttention(cfg), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
            largest = max([largest, *(x.numel() for x in tensors)])
            return made

    with torch.no_grad(), Watch():
        module(torch.randn(1, 512, 16), rotary(0, 512, cfg, CPU))
    assert 0 < largest < 512 * 512 // 4
