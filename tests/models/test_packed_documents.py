"""Documents in one row against each document alone: losses and all gradients."""

import pytest
import torch
from torch.nn import functional as F

from moestro.config import BalanceConfig, ModelConfig
from moestro.errors import ShapeError
from moestro.kernels import attention, reference_attention
from moestro.models.decoder import Decoder
from moestro.train.objective import IGNORED, Objective

LENGTHS = ((3, 1, 9), (13,), (5, 4))
# Of the documents, those of 9 and 13 tokens are stretched.
LONGROPE = {
    "kind": "longrope", "short_factor": [1.0, 1.5, 1.0, 2.0], "long_factor": [2.0, 3.0, 5.0, 7.0],
    "original_context": 5, "short_scale": 1.1, "long_scale": 1.3,
}  # fmt: skip
MODELS = {
    "window": {"attention": {"num_heads": 4, "num_kv_heads": 2, "window": {"size": 4}}},
    "sinks": {"attention": {"num_heads": 2, "sinks": True, "qk_norm": "head"}},
    "latent": {"attention": {"num_heads": 2, "latent": {
        "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4}}},
    "longrope": {"attention": {"num_heads": 2, "positions": {"scaling": LONGROPE}}},
    "mixture": {"moe": {"hidden_dim": 8, "num_experts": 4, "top_k": 2}},
}  # fmt: skip


def model(changes):
    torch.manual_seed(1)
    base = {"vocab_size": 31, "dim": 16, "num_layers": 2, "dense": {"hidden_dim": 12}}
    return Decoder(ModelConfig(**{**base, **changes})).double()


def rows():
    """Tokens, targets and documents [3, 3, 13], and each document with its targets."""
    torch.manual_seed(2)
    packed = torch.zeros(3, 3, 13, dtype=torch.int64)
    packed[:, 1], packed[:, 2] = IGNORED, -1
    alone = []
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths):
            tokens = torch.randint(1, 31, (length,))
            targets = torch.full((length,), IGNORED)
            learned = torch.rand(length - 1) < 0.6
            targets[:-1][learned] = tokens[1:][learned]
            alone.append((tokens[None], targets[None]))
            place = slice(at, at + length)
            packed[row, 0, place], packed[row, 1, place] = tokens, targets
            packed[row, 2, place] = number
            at += length
    return packed, alone


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_packed_documents_are_what_each_is_alone(changes):
    net, (packed, alone) = model(changes), rows()
    labels = (packed[:, 1] != IGNORED).sum()

    def gradients(pieces):
        net.zero_grad()
        total = 0.0
        for inputs, targets in pieces:
            logits = net(*inputs).logits.flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), reduction="sum") / labels
            loss.backward()
            total += loss.item()
        return total, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    one_by_one = gradients([((tokens,), targets) for tokens, targets in alone])
    for split in (1, 3):
        chunks = packed.chunk(split)
        together = gradients([((c[:, 0], c[:, 2]), c[:, 1]) for c in chunks])
        assert abs(together[0] - one_by_one[0]) < 1e-12
        for name, grad in one_by_one[1].items():
            assert (together[1][name] - grad).abs().max() < 1e-12, name


def test_tokens_without_a_label_give_no_gradient_at_all():
    net, (packed, _) = model({"moe": MODELS["mixture"]["moe"]}), rows()
    outputs = net(packed[:, 0], packed[:, 2])
    outputs.logits.retain_grad()
    Objective(BalanceConfig(switch=0.0, z=0.0))(outputs, packed[:, 1]).total.backward()
    nothing = outputs.logits.grad[packed[:, 1] == IGNORED]
    assert torch.equal(nothing, torch.zeros_like(nothing))
    assert all(not bool(r.valid_T[packed[:, 2].flatten() < 0].any()) for r in outputs.routings)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_keeps_documents_apart(window):
    q, k, v = (torch.randn(2, heads, 9, 4).double() for heads in (4, 2, 2))
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1, -1], [0] * 9])
    wanted = reference_attention.attend(q, k, v, window=window, valid_BP=documents)
    found = attention.attend(q, k, v, window=window, valid_BP=documents)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    alone = reference_attention.attend(q[:1, :, 3:5], k[:1, :, 3:5], v[:1, :, 3:5], window=window)
    torch.testing.assert_close(found[:1, :, 3:5], alone, rtol=0, atol=1e-12)


def test_what_cannot_keep_documents_apart_is_refused():
    delta = {"key_heads": 2, "value_heads": 2, "key_dim": 4, "value_dim": 4}
    cfg = {"attention": {"num_heads": 2, "window": {"kind": "delta", **delta}}, "num_layers": 4}
    net, tokens = model(cfg), torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ShapeError, match="DeltaNet"):
        net(tokens, torch.tensor([[0, 0, 1, 1]]))
    one = net(tokens, torch.tensor([[0, 0, 0, -1]])).logits[:, :3]
    torch.testing.assert_close(one, net(tokens[:, :3]).logits, rtol=0, atol=1e-6)
    with pytest.raises(ShapeError, match="padding by -1"):
        net(tokens, torch.tensor([[0, 0, 0]]))


@pytest.mark.parametrize("original", [3, 4, 5, 16])
def test_padding_does_not_stretch_a_text(original):
    """Alone in a longer row, a text has the angles of its own length."""
    scaling = {**LONGROPE, "original_context": original}
    net = model({"attention": {"num_heads": 2, "positions": {"scaling": scaling}}})
    tokens = torch.arange(1, 9)[None]
    found = net(tokens, torch.tensor([[0] * 4 + [-1] * 4])).logits[:, :4]
    torch.testing.assert_close(found, net(tokens[:, :4]).logits, rtol=0, atol=1e-12)
