import numpy as np
import pytest
import torch
from torch import nn

from moestro.errors import DataError
from moestro.probe.recording.record import record
from moestro.probe.recording.replay import agreement, replay

from .deciders import decoder, passages

KINDS = {
    "plain": {},
    "arrival": {"capacity": {"eval_factor": 0.7}},
    "priority": {"capacity": {"eval_factor": 0.5, "priority": "router"}},
    "sequence": {"capacity": {"per_sequence": 2}},
    "expert_choice": {"router": {"kind": "expert_choice"}},
    "loss_free": {"router": {"kind": "sigmoid", "selection_bias": True}},
    "shared": {"shared": {"hidden_dim": 16}},
}


def plain(model, trace):
    """Logits of each sequence in the batches of the trace, nothing forced."""
    found = []
    for number in np.unique(trace.batch_N):
        rows = [
            torch.from_numpy(trace.tokens_T[trace.sequence_T == n]).long()
            for n in np.flatnonzero(trace.batch_N == number)
        ]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        valid = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        with torch.inference_mode():
            logits = model(ids, valid_BS=None if valid.all() else valid).logits
        found += [row[: len(own)] for row, own in zip(logits, rows, strict=True)]
    return found


def replayed(model, trace, **options):
    parts = list(replay(model, trace, **options))
    numbers = np.concatenate([part.sequences for part in parts])
    assert numbers.tolist() == list(range(len(trace.length_N)))
    return [logits for part in parts for logits in part.logits]


def same(one, two):
    return [torch.equal(a, b) for a, b in zip(one, two, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_same_logits_to_the_last_bit(kind, dtype, batch_size):
    model = decoder(**KINDS[kind]).to(dtype)
    trace = record(model, passages(15, 9, 7), batch_size=batch_size, generate=2)
    if "capacity" in KINDS[kind]:
        assert not trace.kept_TLK.all()
    expected = plain(model, trace)
    assert all(same(replayed(model, trace), expected))
    assert agreement(model, trace).tolist() == [1, 1]
    if batch_size > 1:
        return  # padding, whose routing is not recorded, may change how products are computed
    # Another router, the same routing: it is the trace that decides.
    with torch.no_grad():
        for layer in model.mixtures():
            layer.router.weight.normal_()
    assert not any(same(plain(model, trace), expected))
    assert all(same(replayed(model, trace, any_model=True), expected))
    assert (agreement(model, trace, any_model=True) < 1).all()


def test_a_changed_trace_gives_other_logits():
    model = decoder()
    trace = record(model, passages(8, 5))
    expected = plain(model, trace)
    moved = trace.experts_TLK.copy()
    moved[trace.sequence_T == 1] = (moved[trace.sequence_T == 1] + 1) % 6
    found = replayed(model, trace._replace(experts_TLK=moved))
    assert [torch.allclose(a, b) for a, b in zip(found, expected, strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip
    shares = agreement(model, trace._replace(experts_TLK=moved))
    other = (np.sort(moved, -1) != np.sort(trace.experts_TLK, -1)).any(-1)[:, 0]
    assert shares[0] == 1 - other.mean()
    lighter = trace._replace(weights_TLK=trace.weights_TLK * np.float32(0.5))
    assert not any(same(replayed(model, lighter), expected))
    dropped = trace._replace(kept_TLK=np.arange(26 * 2 * 2).reshape(26, 2, 2) % 3 > 0)
    assert not any(same(replayed(model, dropped), expected))


def test_the_order_of_experts_does_not_matter_to_agreement():
    model = decoder()
    trace = record(model, passages(8))
    flipped = trace._replace(
        experts_TLK=trace.experts_TLK[..., ::-1], weights_TLK=trace.weights_TLK[..., ::-1]
    )
    assert agreement(model, flipped).tolist() == [1, 1]
    for one, two in zip(replayed(model, flipped), plain(model, trace), strict=True):
        torch.testing.assert_close(one, two)


def test_traces_of_other_models_are_refused():
    trace = record(decoder(), passages(4), name="mine")
    with pytest.raises(DataError, match=r"of mine, and this model.s weights differ"):
        next(iter(replay(decoder(seed=1), trace)))
    with pytest.raises(DataError, match="2 mixtures of 6 experts; the model has 2 of 5"):
        next(iter(replay(decoder(num_experts=5), trace, any_model=True)))
    large = trace._replace(tokens_T=np.full_like(trace.tokens_T, 61))
    with pytest.raises(DataError, match=r"token 61.*0 to 60"):
        next(iter(replay(decoder(), large)))
