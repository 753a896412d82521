"""Gated DeltaNet layers against the same written out, their state, and what they refuse."""

import math

import pytest
import torch

from moestro import Decoder, ModelConfig
from moestro.config import DeltaConfig
from moestro.errors import ConfigError, ShapeError
from moestro.kernels import delta as kernel
from moestro.models.cache import StateCache
from moestro.models.delta import RATES, TIMES, DeltaNet

from .plain_delta import plain_delta

DELTA = {"kind": "delta", "key_heads": 2, "value_heads": 4, "key_dim": 5, "value_dim": 3}
CASES = [
    {},
    {"value_heads": 2},
    {"key_heads": 1, "value_heads": 3},
    {"conv_width": 1},
    {"conv_width": 7},
]


def module_of(dtype=torch.float64, **changes):
    cfg = ModelConfig(dim=16, attention={"window": {**DELTA, **changes}}, norm={"eps": 1e-3})
    module = DeltaNet(cfg).to(dtype)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name == "norm.weight"), std=0.5)
    return cfg, module


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_equals_the_loop(changes):
    """Outputs, and the gradients of the input and of every parameter."""
    cfg, module = module_of(**changes)
    x_BSD = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    y_BSD = module(x_BSD)
    expected_BSD = torch.stack([plain_delta(module, cfg, x_SD) for x_SD in x_BSD])
    torch.testing.assert_close(y_BSD, expected_BSD)
    names, leaves = zip(("input", x_BSD), *module.named_parameters(), strict=True)
    grad = torch.randn_like(y_BSD)
    ours = torch.autograd.grad(y_BSD, leaves, grad)
    exact = torch.autograd.grad(expected_BSD, leaves, grad)
    for name, a, b in zip(names, ours, exact, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("chunks", [[1] * 20, [6, 1, 1, 5, 7], [3, 17], [20]], ids=str)
def test_the_state_gives_what_the_whole_gives(changes, chunks):
    _, module = module_of(**changes)
    x_BSD = torch.randn(2, 20, 16, dtype=torch.float64)
    cache = StateCache()
    with torch.no_grad():
        whole_BSD = module(x_BSD)
        parts = [module(part, cache=cache) for part in x_BSD.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole_BSD)


def test_padding_leaves_the_state():
    """Before and after a text, whatever stands there."""
    _, module = module_of()
    x_BSD = torch.randn(2, 8, 16, dtype=torch.float64)
    before, after = (torch.full((2, n, 16), math.nan).double() for n in (3, 4))
    valid_BS = torch.tensor([[False] * 3 + [True] * 8 + [False] * 4] * 2)
    padded_BSD = module(torch.cat([before, x_BSD, after], 1), valid_BS)
    torch.testing.assert_close(padded_BSD[:, 3:11], module(x_BSD))
    assert padded_BSD.isfinite().all()
    cache, whole = StateCache(), StateCache()
    module(torch.cat([x_BSD, after], 1), valid_BS[:, 3:], cache)
    module(x_BSD, cache=whole)
    torch.testing.assert_close(cache.held(2)[1], whole.held(2)[1])


def held(cache, batch=2):
    return sum(x.untyped_storage().nbytes() for x in cache.held(batch))


def test_the_state_does_not_grow():
    cfg, module = module_of(torch.float32)
    cache, sizes = StateCache(), set()
    with torch.no_grad():
        for length in (1, 300, 1, 7):
            module(torch.randn(2, length, 16), cache=cache)
            sizes.add(held(cache))
    delta = cfg.attention.delta
    inputs = (delta.conv_width - 1) * delta.conv_channels
    assert sizes == {2 * 4 * (inputs + delta.value_width * delta.key_dim)}


def test_a_fork_goes_its_own_way():
    model = Decoder(ModelConfig(dim=16, num_layers=2, attention={"window": DELTA})).eval()
    first, second = torch.randint(0, 256, (2, 1, 9))
    with torch.inference_mode():
        cache = model.new_cache()
        model(first[:, :5], cache=cache)
        twin = cache.fork()
        for tokens, own in ((second[:, 5:], twin), (first[:, 5:], cache)):
            text = torch.cat([first[:, :5], tokens], 1)
            expected = model(text).logits[:, 5:]
            torch.testing.assert_close(model(tokens, cache=own).logits, expected)
    assert cache.position == twin.position == 9


def test_a_state_is_cut_at_its_end_or_before_its_begin():
    model = Decoder(ModelConfig(dim=16, num_layers=2, attention={"window": DELTA})).eval()
    tokens = torch.randint(0, 256, (1, 9))
    cache = model.new_cache()
    assert cache.nbytes == 0
    with torch.inference_mode():
        expected = model(tokens, cache=cache).logits
        assert [cache.can_cut(position) for position in range(11)] == [
            position in (0, 9) for position in range(11)
        ]
        again = cache.fork(0)
        torch.testing.assert_close(model(tokens, cache=again).logits, expected)
    assert again.position == 9
    assert cache.nbytes == 2 * held(cache.layers[0], 1)


def test_filled_in_inference_mode_and_trained_outside():
    _, module = module_of()
    x_BSD = torch.randn(2, 12, 16, dtype=torch.float64)
    cache = StateCache()
    with torch.inference_mode():
        module(x_BSD[:, :7], cache=cache)
    y_BSD = module(x_BSD[:, 7:], cache=cache)
    y_BSD.sum().backward()
    torch.testing.assert_close(y_BSD, module(x_BSD)[:, 7:])


def test_gradients_pass_through_the_state():
    _, module = module_of()
    x_BSD = torch.randn(1, 8, 16, dtype=torch.float64, requires_grad=True)
    cache = StateCache()
    parts = [module(part, cache=cache) for part in x_BSD.split([3, 5], dim=1)]
    (ours,) = torch.autograd.grad(parts[1].square().sum(), x_BSD)
    (exact,) = torch.autograd.grad(module(x_BSD)[:, 3:].square().sum(), x_BSD)
    assert exact[:, :3].abs().max() > 0
    torch.testing.assert_close(ours, exact)


def test_another_batch_is_refused():
    _, module = module_of()
    cache = StateCache()
    module(torch.randn(2, 3, 16).double(), cache=cache)
    with pytest.raises(ShapeError, match=r"batch of 2, and 1"):
        module(torch.randn(1, 1, 16).double(), cache=cache)


def test_16_bits_keep_the_state_in_32():
    _, module = module_of()
    x_BSD = torch.randn(2, 90, 16, dtype=torch.float64)
    exact_BSD, cache = module(x_BSD), StateCache()
    low_BSD = module.bfloat16()(x_BSD.bfloat16(), cache=cache)
    assert low_BSD.dtype == torch.bfloat16
    assert cache.held(2)[1].dtype == torch.float32
    assert (low_BSD - exact_BSD).abs().max() < 0.05 * exact_BSD.abs().max()


def test_autocast_leaves_the_rule_in_32_bits(monkeypatch):
    """What the rule is given is rounded; its sums are not."""
    seen = []
    rule = kernel.gated_delta
    monkeypatch.setattr(kernel, "gated_delta", lambda *x: seen.append((x, rule(*x))) or seen[-1][1])
    _, module = module_of(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 20, 16))
    ((given, (y_BSHO, state_BHAO)),) = seen
    for a, b in zip((y_BSHO, state_BHAO), rule(*given), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_where_decay_starts():
    """Rates and times as in Mamba-2: a state forgets over 1 / (rate · time) tokens."""
    cfg = ModelConfig(dim=8, attention={"window": {**DELTA, "value_heads": 4000, "key_heads": 1}})
    module = DeltaNet(cfg)
    rates = module.log_rate.detach().exp()
    times = torch.nn.functional.softplus(module.time_bias.detach())
    assert RATES[0] <= rates.min() < 1.5 < 15.5 < rates.max() <= RATES[1] * 1.001
    assert TIMES[0] * 0.99 <= times.min() < 2e-3 < 0.09 < times.max() <= TIMES[1] * 1.01
    assert rates.mean() == pytest.approx(sum(RATES) / 2, rel=0.05)
    assert times.log().mean() == pytest.approx(sum(map(math.log, TIMES)) / 2, rel=0.05)


@pytest.mark.parametrize(
    ("every", "layers"), [(0, [True] * 5), (1, [False] * 5), (3, [True, True, False, True, True])]
)
def test_which_layers_are_delta(every, layers):
    attention = {"window": {**DELTA, "full_every": every}}
    model = Decoder(ModelConfig(dim=16, num_layers=5, attention=attention))
    assert [block.delta is not None for block in model.blocks] == layers
    assert [block.attention is None for block in model.blocks] == layers
    assert [isinstance(each, StateCache) for each in model.new_cache().layers] == layers


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ({"window": {**DELTA, "value_heads": 3}}, "3 value_heads do not share 2 key_heads"),
        ({"window": DELTA, "positions": {"kind": "relative"}}, "has rotary positions"),
        (
            {
                "window": DELTA,
                "latent": {"kv_rank": 4, "nope_dim": 4, "rope_dim": 4, "value_dim": 4},
            },
            "latent attention has no window",
        ),
        ({"window": {**DELTA, "kind": "deltas"}}, "window.kind = 'deltas' .* 'window', 'delta'"),
        ({"window": {**DELTA, "size": 3}}, "unknown setting attention.window.size"),
    ],
)
def test_settings_that_do_not_go_together(attention, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(dim=16, attention=attention)


def test_a_window_needs_no_kind():
    attention = ModelConfig(attention={"window": {"size": 4}}).attention
    assert attention.window.kind == "window"
    assert attention.delta is None
    assert isinstance(ModelConfig(attention={"window": DELTA}).attention.delta, DeltaConfig)
