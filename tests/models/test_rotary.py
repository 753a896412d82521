"""Rotary positions: every scaling against transformers, angles by hand, and the table ahead."""

import math
import types
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro import Decoder, ModelConfig
from moestro.config import RopeConfig
from moestro.errors import ConfigError
from moestro.kernels.pointwise import rotate
from moestro.models import rotary as rotary_module
from moestro.models.rotary import (
    RotaryTable,
    frequencies,
    magnitude,
    rotary,
    score_scale,
    turning_width,
)

CPU = torch.device("cpu")
FACTORS = tuple(1 + 0.3 * n for n in range(16))
LONG = {
    "kind": "longrope",
    "short_factor": FACTORS,
    "long_factor": FACTORS[::-1],
    "original_context": 10,
    "short_scale": 1.2,
    "long_scale": 1.4,
}
YARN = {"kind": "yarn", "factor": 8.0, "original_context": 64}
SCALINGS = {
    "none": None,
    "linear": {"kind": "linear", "factor": 4.0},
    "llama3": {"kind": "llama3", "factor": 8.0, "original_context": 8192},
    "llama3, own borders": {
        "kind": "llama3",
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 9.0,
        "original_context": 100,
    },
    "yarn": YARN,
    "yarn, not truncated": {**YARN, "factor": 32.0, "original_context": 4096, "truncate": False},
    "yarn, own borders": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5},
    "yarn, own factor": {**YARN, "attention_factor": 1.7},
    "yarn, shrinking": {**YARN, "factor": 0.5},
    "yarn, a step": {**YARN, "beta_fast": 1.0, "truncate": False},
    "yarn of DeepSeek": {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn, one mscale": {**YARN, "mscale": 0.7},
    "longrope": LONG,
}


def cfg_of(scaling, **attention):
    positions = {"theta": 10_000.0, "scaling": scaling}
    return ModelConfig(dim=128, attention={"num_heads": 4, "positions": positions, **attention})


def theirs(scaling, total, fraction=1.0):
    """(frequencies, magnitude) of transformers for heads of width 32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("transformers.modeling_rope_utils")
    names = {"original_context": "original_max_position_embeddings", "kind": "rope_type"}
    parameters = {names.get(name, name): value for name, value in scaling.items()}
    if scaling["kind"] == "llama3":
        parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **parameters}
    config = types.SimpleNamespace(
        rope_parameters={
            "rope_theta": 10_000.0,
            "partial_rotary_factor": fraction,
            **parameters,
        },
        head_dim=32,
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=40,
        standardize_rope_params=lambda: None,
    )
    return utils.ROPE_INIT_FUNCTIONS[scaling["kind"]](config, CPU, seq_len=total)


@pytest.mark.parametrize("name", [name for name in SCALINGS if SCALINGS[name]])
@pytest.mark.parametrize("total", [9, 10, 11, 1000])
def test_scalings_of_transformers(name, total):
    expected_A, scale = theirs(SCALINGS[name], total)
    rope = RopeConfig(scaling=SCALINGS[name])
    actual_A = frequencies(rope, 32, total)
    assert actual_A.dtype == torch.float64
    torch.testing.assert_close(actual_A.float(), expected_A, rtol=2e-6, atol=0)
    if name == "longrope":  # Theirs comes from the factor; Phi-3.5-MoE states both.
        assert magnitude(rope, total) == (1.4 if total > 10 else 1.2)
    else:
        assert magnitude(rope, total) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize(("fraction", "width"), [(0.5, 16), (0.4, 12), (0.0625, 2)])
def test_a_part_of_a_head_turns_as_in_transformers(name, fraction, width):
    cfg = cfg_of(None)
    rope = RopeConfig(scaling=SCALINGS[name], fraction=fraction)
    cfg = cfg.model_copy(update={"attention": cfg.attention.model_copy(update={"positions": rope})})
    assert turning_width(cfg) == width
    expected_A, _ = theirs(SCALINGS[name], 9, fraction)
    torch.testing.assert_close(frequencies(rope, width).float(), expected_A, rtol=2e-6, atol=0)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3])
def test_a_part_that_cannot_turn_is_refused(fraction):
    heads = {"num_heads": 4, "positions": {"fraction": fraction}}
    with pytest.raises(
        ConfigError, match=rf"positions\.fraction = {fraction} of a head of width 32 is"
    ):
        ModelConfig(dim=128, attention=heads)


def test_latent_attention_says_itself_how_much_turns():
    latent = {"kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
    with pytest.raises(ConfigError, match=r"leave positions\.fraction out"):
        ModelConfig(attention={"latent": latent, "positions": {"fraction": 0.5}})


@pytest.mark.parametrize("name", SCALINGS)
def test_score_scale_is_deepseeks(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        v3 = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    scaling = SCALINGS[name] or {}
    parameters = {"rope_type": scaling.get("kind", "default"), **scaling}
    ours = score_scale(RopeConfig(scaling=SCALINGS[name]))
    assert ours == pytest.approx(v3.yarn_apply_mscale(parameters, 1.0))
    assert (ours != 1) == (name == "yarn of DeepSeek")


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_by_hand(name):
    cfg = cfg_of(SCALINGS[name])
    rope = cfg.attention.positions
    cos_SA, sin_SA = rotary(3, 5, cfg, CPU, torch.float64)
    for s in range(5):
        for pair, frequency in enumerate(frequencies(rope, 32, 8).tolist()):
            scale = magnitude(rope, 8)
            assert cos_SA[s, pair].item() == pytest.approx(scale * math.cos((3 + s) * frequency))
            assert sin_SA[s, pair].item() == pytest.approx(scale * math.sin((3 + s) * frequency))


def test_linear_scaling_is_slower_positions():
    slow, plain = cfg_of(SCALINGS["linear"]), cfg_of(None)
    for a, b in zip(rotary(4 * 7, 1, slow, CPU), rotary(7, 1, plain, CPU), strict=True):
        torch.testing.assert_close(a, b)


def test_far_positions_keep_their_precision():
    """fp32 angles at position 100 000 would be off by 0.004; these come from fp64."""
    angles = rotary(100_000, 1, cfg_of(None), CPU)
    exact = [math.cos(100_000 * 10_000.0 ** (-i / 32)) for i in range(0, 32, 2)]
    assert angles.cos_SA[0].tolist() == pytest.approx(exact, abs=1e-6)


@given(st.integers(0, 5000), st.integers(0, 3000))
def test_rotation_keeps_lengths_and_depends_on_distance(position, shift):
    cfg = cfg_of(None)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(query_at, key_at):
        angles = [rotary(at, 1, cfg, CPU) for at in (query_at, key_at)]
        return (rotate(q, *angles[0]) * rotate(k, *angles[1])).sum()

    near, far = score(position + 3, position), score(position + shift + 3, position + shift)
    torch.testing.assert_close(near, far, rtol=1e-3, atol=5e-3)
    turned = rotate(q, *rotary(position, 1, cfg, CPU))
    torch.testing.assert_close(turned.norm(), q.norm())


@pytest.mark.parametrize("most", [1, 4, 64])
@pytest.mark.parametrize("name", ["none", "yarn", "longrope"])
def test_the_table_gives_the_same_angles(name, most, monkeypatch):
    """Forwards, backwards, across what it keeps, and across longrope's border at 10.

    As one text asks for them, and texts of all lengths by turns.
    """
    monkeypatch.setattr(RotaryTable, "BLOCK", 6)
    cfg = cfg_of(SCALINGS[name])
    table = RotaryTable(cfg, most)
    spans = [(0, 3), (3, 1), (4, 1), (5, 2), (7, 1), (8, 1), (9, 1), (10, 1), (11, 9), (2, 3)]
    spans += [(0, 11), (0, 10), (0, 40), (0, 3), (39, 1), (9, 1), (5, 0), (6, 6), (7, 5), (0, 24)]
    for start, length in spans:
        for dtype in (torch.float32, torch.float64):
            actual = table.at(start, length, CPU, dtype)
            for a, b in zip(actual, rotary(start, length, cfg, CPU, dtype), strict=True):
                assert torch.equal(a, b), (start, length)


def test_the_table_is_computed_once_for_many_tokens(monkeypatch):
    """Also of many texts, each at a place of its own."""
    calls, plain = [], rotary_module._angles
    monkeypatch.setattr(rotary_module, "_angles", lambda *args: calls.append(args) or plain(*args))
    table = RotaryTable(cfg_of(None))
    for position in range(600):
        table.at(position, 1, CPU, torch.float32)
    assert len(calls) == 3
    calls.clear()
    table = RotaryTable(cfg_of(None), 16)
    for step in range(200):
        for text in range(16):
            table.at(1000 * text + step, 1, CPU, torch.float32)
    assert len(calls) <= 32


def test_the_table_keeps_no_more_blocks_than_it_may():
    table = RotaryTable(cfg_of(None), 5)
    for position in range(0, 10_000, 256):
        table.at(position, 1, CPU, torch.float32)
    table.at(0, 10_000, CPU, torch.float32)
    assert len(table._blocks) == 5


def test_the_latent_part_alone_turns():
    latent = {"kv_rank": 8, "nope_dim": 6, "rope_dim": 4, "value_dim": 6}
    cfg = cfg_of(None, latent=latent)
    assert rotary(0, 3, cfg, CPU).cos_SA.shape == (3, 2)


def test_lists_of_the_wrong_length():
    with pytest.raises(ConfigError, match=r"3 factors.*give 16"):
        Decoder(cfg_of({**LONG, "short_factor": (1.0, 2.0, 3.0)}))
    with pytest.raises(ConfigError, match=r"16 factors.*give 4"):
        Decoder(cfg_of(LONG, head_dim=8))
