"""The encoder-decoder against itself; tests/models/test_encdec_parity.py has transformers'."""

import pytest
import torch

from moestro.errors import ShapeError
from moestro.kernels.attention import attend
from moestro.models.encdec import EncDec
from moestro.models.relative import RelativeBias

from .tiny_encdec import POSITIONS, settings


def batch(rows=3, source=19, target=13):
    return torch.randint(1, 60, (rows, source)), torch.randint(1, 60, (rows, target))


@pytest.mark.parametrize("pieces", [[1] * 13, [5, 1, 1, 6]])
def test_the_cache_changes_nothing(pieces):
    ours = EncDec(settings(capacity=None)).eval()
    torch.nn.init.normal_(ours.decoder.relative.weight)
    source_BS, target_BT = batch()
    valid_BS = torch.arange(19) < torch.tensor([[19], [11], [4]])
    with torch.no_grad():
        whole = ours(source_BS, target_BT, valid_BS=valid_BS).logits
        cache = ours.new_cache(ours.encode(source_BS, valid_BS).memory, valid_BS)
        parts = [ours.decode(part, cache).logits for part in target_BT.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_a_source_of_padding_alone_gives_numbers():
    ours = EncDec(settings()).eval()
    source_BS, target_BT = batch(rows=1)
    nothing_BS = torch.zeros(1, 19, dtype=torch.bool)
    assert ours(source_BS, target_BT, valid_BS=nothing_BS).logits.isfinite().all()


def test_the_future_is_not_seen():
    ours = EncDec(settings()).eval()
    source_BS, target_BT = batch()
    changed_BT = target_BT.clone()
    changed_BT[:, 7:] = 1 + changed_BT[:, 7:] % 59
    with torch.no_grad():
        before, after = ours(source_BS, target_BT).logits, ours(source_BS, changed_BT).logits
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7] - after[:, 7]).abs().max() > 0.1


def test_the_bias_pair_by_pair():
    relative = RelativeBias(8, 12, 2, bidirectional=False)
    torch.nn.init.normal_(relative.weight)
    valid_BP = torch.tensor([[True, False, True, True, True], [True] * 5])
    q, k = torch.zeros(2, 2, 3, 5), torch.zeros(2, 2, 5, 5)
    bias_HSP = relative(range(2, 5), range(5))
    weights = attend(q, k, torch.eye(5).expand(2, 2, 5, 5), bias_HSP=bias_HSP, valid_BP=valid_BP)
    assert weights.shape == (2, 2, 3, 5)
    for b, s, p in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)):
        seen = p <= s + 2 and valid_BP[b, p]
        near = relative.weight[min(int(s + 2 - p), 4)] if seen else torch.full((2,), -torch.inf)
        odds = weights[b, :, s, p] / weights[b, :, s, s + 2]
        torch.testing.assert_close(odds, (near - relative.weight[0]).exp())


def test_recomputed_activations_give_the_same_gradients():
    ours = EncDec(settings()).train()
    batches, gradients = batch(), []
    for recompute in (False, True):
        ours.checkpoint_activations = recompute
        ours.zero_grad()
        ours(*batches).logits.square().mean().backward()
        gradients.append([weight.grad.clone() for weight in ours.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_on_the_meta_device_it_has_shapes_and_no_memory():
    with torch.device("meta"):
        ours = EncDec(settings())
    assert {weight.device.type for weight in ours.parameters()} == {"meta"}
    real = EncDec(settings())
    assert [p.shape for p in ours.parameters()] == [p.shape for p in real.parameters()]
    assert ours.head.weight is ours.embed.weight


def test_names_of_parameters():
    """A checkpoint's keys; the rest of a mixture is the layer's own."""
    ours = EncDec(settings(norm={"kind": "layer"}, head={"tied": False, "bias": True}))
    names = {"embed.weight", "head.weight", "head.bias"}
    for side, layers, norms in (
        ("encoder", 4, ("attention_norm", "ffn_norm")),
        ("decoder", 2, ("attention_norm", "cross_norm", "ffn_norm")),
    ):
        inner = ["attention.qkv.weight", "attention.out.weight"]
        inner += [f"{norm}.{part}" for norm in norms for part in ("weight", "bias")]
        if side == "decoder":
            inner += ["cross.q.weight", "cross.kv.weight", "cross.out.weight"]
        names |= {f"{side}.{name}" for name in ("relative.weight", "norm.weight", "norm.bias")}
        names |= {f"{side}.blocks.{n}.{name}" for n in range(layers) for name in inner}
    found = {name for name in ours.state_dict() if ".ffn." not in name}
    assert found == names
    assert ours(*batch()).logits.shape == (3, 13, 60)


def test_fewer_key_heads_are_repeated_ones():
    attention = {"num_heads": 4, "head_dim": 6, "positions": POSITIONS}
    ours = EncDec(settings(attention=attention | {"num_kv_heads": 2})).eval()
    twin = EncDec(settings()).eval()
    weights = ours.state_dict()
    for name, weight in weights.items():
        if name.endswith("attention.qkv.weight"):
            q, kv = weight.split([24, 24])
            weights[name] = torch.cat([q, twice(kv)])
        elif name.endswith("cross.kv.weight"):
            weights[name] = twice(weight)
    twin.load_state_dict(weights)
    tokens = batch()
    torch.testing.assert_close(ours(*tokens).logits, twin(*tokens).logits)


def twice(kv):
    """[2 · 2 · 6, D] keys and values of 2 heads → of 4, each serving one query head."""
    return kv.view(2, 2, 6, -1).repeat_interleave(2, dim=1).flatten(0, 2)


def test_at_the_start_logits_are_near_one():
    for tied in (True, False):
        torch.manual_seed(0)
        logits = EncDec(settings(tied=tied))(*batch()).logits
        assert 0.5 < logits.std() < 2


def test_what_does_not_fit_is_refused():
    ours = EncDec(settings())
    source_BS, target_BT = batch()
    with pytest.raises(ShapeError, match="source takes int64 ids"):
        ours(source_BS[0], target_BT)
    with pytest.raises(ShapeError, match="target takes int64 ids"):
        ours(source_BS, target_BT.float())
    with pytest.raises(ShapeError, match=r"bool \[3, 19\]"):
        ours(source_BS, target_BT, valid_BS=source_BS)
    with pytest.raises(ShapeError, match="2 rows but the source 3"):
        ours(source_BS, target_BT[:2])
