from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from moestro.errors import DataError, MoestroError, ShapeError
from moestro.moe.routing import Routing
from moestro.probe.record import document_blocks, record

NUM_EXPERTS = 5


class Output(NamedTuple):
    logits: torch.Tensor
    routings: tuple[Routing, ...]


class FakeModel(nn.Module):
    """Routes token id v to expert v % E, then (v + 1) % E; probabilities are those two alone."""

    moe_layers = (1, 3)

    def __init__(self, num_experts=NUM_EXPERTS, top_k=2, drop_id=None):
        super().__init__()
        self.frozen = nn.Linear(1, 1)
        self.num_experts, self.top_k, self.drop_id = num_experts, top_k, drop_id
        self.batches = []

    def forward(self, tokens_BS):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches.append(tokens_BS)
        return Output(tokens_BS, (self.route(tokens_BS, 0), self.route(tokens_BS, 1)))

    def route(self, tokens_BS, shift):
        ids_T = tokens_BS.flatten() + shift
        experts_TK = (ids_T[:, None] + torch.arange(self.top_k)) % self.num_experts
        probs_TE = torch.zeros(len(ids_T), self.num_experts).scatter(1, experts_TK, 1 / self.top_k)
        kept_R = None
        if self.drop_id is not None:
            kept_R = (ids_T != self.drop_id).repeat_interleave(self.top_k)
        return Routing(
            tokens_R=torch.arange(len(ids_T)).repeat_interleave(self.top_k),
            experts_R=experts_TK.flatten(),
            weights_R=torch.full((experts_TK.numel(),), 1 / self.top_k),
            logits_TE=probs_TE.log(),
            probs_TE=probs_TE,
            top_k=self.top_k,
            kept_R=kept_R,
        )


class ExpertChoiceModel(FakeModel):
    """Expert e takes every token whose id is at least e: between 1 and E experts a token."""

    def route(self, tokens_BS, shift):
        wanted_TE = tokens_BS.flatten()[:, None] >= torch.arange(self.num_experts)
        experts_R, tokens_R = wanted_TE.T.nonzero(as_tuple=True)
        probs_TE = torch.full(wanted_TE.shape, 1 / self.num_experts)
        weights_R = torch.ones(len(tokens_R))
        return Routing(tokens_R, experts_R, weights_R, probs_TE.log(), probs_TE, top_k=0)


def windows(*sizes, seq_len=6, vocab=50):
    generator = torch.Generator().manual_seed(0)
    names = ("code", "prose", "sums")
    return {
        name: torch.randint(vocab, (size, seq_len), generator=generator)
        for name, size in zip(names, sizes, strict=False)
    }


def test_choices_come_back_in_the_windows_own_order():
    given = windows(7, 3, 4)
    rec = record(FakeModel(), given, batch_size=4)
    tokens = torch.cat(list(given.values())).numpy()
    expected = (tokens[..., None] + np.arange(2)) % NUM_EXPERTS
    np.testing.assert_array_equal(rec.experts_LNSK[0], expected)
    np.testing.assert_array_equal(rec.experts_LNSK[1], (expected + 1) % NUM_EXPERTS)
    counts = (expected[..., None] == np.arange(NUM_EXPERTS)).sum(axis=(1, 2))
    np.testing.assert_array_equal(rec.counts_LNE[0], counts)
    np.testing.assert_allclose(rec.probs_LNE[0], counts / 12, atol=1e-7)
    np.testing.assert_allclose(rec.entropy_LN, np.log(2), rtol=1e-6)
    assert rec.domains == ("code", "prose", "sums")
    assert rec.domain_N.tolist() == [0] * 7 + [1] * 3 + [2] * 4
    assert rec.block_N.tolist() == list(range(14))
    assert (rec.moe_layers, rec.top_k, rec.num_experts) == ((1, 3), 2, NUM_EXPERTS)


def test_batch_size_changes_nothing():
    given = windows(5, 2)
    one, two = record(FakeModel(), given, 1), record(FakeModel(), given, 100)
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left, right)


def test_every_batch_mixes_the_domains():
    given = {"a": torch.zeros(8, 4).long(), "b": torch.ones(4, 4).long()}
    model = FakeModel()
    record(model, given, batch_size=3)
    assert [batch[:, 0].sum().item() for batch in model.batches] == [1, 1, 1, 1]


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_choices_are_kept_in_the_smallest_dtype(num_experts, dtype):
    given = {"a": torch.tensor([[num_experts - 1, 0]])}
    rec = record(FakeModel(num_experts, top_k=1), given)
    assert rec.experts_LNSK.dtype == dtype
    assert rec.experts_LNSK[0].ravel().tolist() == [num_experts - 1, 0]


def test_dropped_assignments_are_counted_by_window():
    given = {"a": torch.tensor([[7, 7, 1], [1, 2, 3]]), "b": torch.tensor([[7, 0, 0]])}
    rec = record(FakeModel(drop_id=7), given)
    assert rec.dropped_LN[0].tolist() == [4, 0, 2]
    assert rec.counts_LNE.sum(axis=2).tolist() == [[6, 6, 6]] * 2  # before the drop


def test_expert_choice_keeps_counts_only():
    rec = record(ExpertChoiceModel(), {"a": torch.tensor([[0, 1], [4, 9]])})
    assert rec.experts_LNSK is None
    assert rec.top_k == 0
    assert rec.counts_LNE[0].tolist() == [[2, 1, 0, 0, 0], [2, 2, 2, 2, 2]]


def test_training_mode_is_restored_module_by_module():
    model = FakeModel().train()
    model.frozen.eval()
    record(model, windows(2))
    assert model.training
    assert not model.frozen.training


def test_training_mode_is_restored_after_a_failure():
    class Failing(FakeModel):
        def route(self, tokens_BS, shift):
            raise RuntimeError("no memory")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="no memory"):
        record(model, windows(2))
    assert model.training


def test_blocks_are_numbered_through_and_never_cross_domains():
    blocks = {"code": torch.tensor([4, 4, 9]), "prose": torch.tensor([9, 9])}
    rec = record(FakeModel(), windows(3, 2), blocks=blocks)
    assert rec.block_N.tolist() == [0, 0, 1, 2, 2]


def test_windows_of_one_document_share_a_block():
    end = 0
    tokens = torch.tensor([[5, 5], [5, end], [5, 5], [5, 5], [end, 5], [5, 5], [end, end]])
    blocks = document_blocks(tokens, end)
    same_as_next = (blocks[1:] == blocks[:-1]).tolist()
    assert same_as_next == [True, False, True, True, False, True]


def test_a_dense_model_has_no_routing():
    model = FakeModel()
    model.moe_layers = ()
    with pytest.raises(MoestroError, match="no mixture layer"):
        record(model, windows(1))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, DataError, "no domains"),
        ({"a": torch.zeros(0, 4).long()}, DataError, "'a' has no held-out window"),
        ({"a": torch.zeros(4).long()}, ShapeError, r"'a' are torch.int64 \[4\]"),
        ({"a": torch.zeros(2, 4)}, ShapeError, "float32"),
        ({"a": torch.zeros(1, 4).long(), "b": torch.zeros(1, 5).long()}, ShapeError, "4, 5"),
    ],
)
def test_windows_that_cannot_be_run(given, error, message):
    with pytest.raises(error, match=message):
        record(FakeModel(), given)


def test_blocks_must_match_the_windows():
    with pytest.raises(ShapeError, match="'prose': given nothing"):
        record(FakeModel(), windows(2, 2), blocks={"code": torch.zeros(2).long()})
    with pytest.raises(ShapeError, match=r"shape \[3\]"):
        record(FakeModel(), windows(2), blocks={"code": torch.zeros(3).long()})


def test_batch_size_must_be_positive():
    with pytest.raises(MoestroError, match="batch_size is 0"):
        record(FakeModel(), windows(1), batch_size=0)
