import numpy as np
import pytest
import torch

from moestro.errors import DataError, MoestroError
from moestro.models.encdec import EncDec
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record, record_batches
from moestro.probe.recording.traces import join

from ..models.tiny_encdec import settings
from ..ranks import run_two_ranks
from .deciders import VOCABULARY, decoder, passages


def equal(one, two):
    for name, left, right in zip(one._fields, one, two, strict=True):
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right, err_msg=name)
        else:
            assert left == right, name


def routings(model, *texts):
    """What the model returns for each text alone."""
    with torch.inference_mode():
        return [model(torch.as_tensor(text.tokens)[None]).routings for text in texts]


def test_a_trace_holds_what_the_model_returned():
    model, texts = decoder(), passages(9, domains=("code",))
    trace = record(model, texts, name="mine")
    assert trace.subject[0] == "mine"
    assert trace.subject[2:] == ((1, 2), 6, 2)
    assert (trace.domains, trace.documents) == (("code",), ("code/#0",))
    assert trace.tokens_T.tolist() == texts[0].tokens.tolist()
    assert trace.kept_TLK is None
    assert not trace.generated_T.any()
    for place, routing in enumerate(routings(model, *texts)[0]):
        probs = routing.probs_TE.numpy()
        experts = routing.experts_TK().numpy()
        np.testing.assert_array_equal(trace.experts_TLK[:, place], experts)
        np.testing.assert_array_equal(trace.weights_TLK[:, place].ravel(), routing.weights_R)
        np.testing.assert_allclose(trace.probs_NLE[0, place], probs.mean(0), rtol=1e-6)
        entropy = -(probs * np.log(probs)).sum(1)
        np.testing.assert_allclose(trace.entropy_TL[:, place], entropy, rtol=1e-5)
        ranked = np.sort(probs, axis=1)[:, ::-1]
        margin = ranked[:, 1] - ranked[:, 2]  # K = 2, softmax: the best two are chosen
        np.testing.assert_allclose(trace.margin_TL[:, place], margin, atol=1e-7)
    assert trace.experts_TLK.dtype == np.uint8
    assert [trace.weights_TLK.dtype, trace.entropy_TL.dtype, trace.probs_NLE.dtype] == [
        np.float32
    ] * 3


def test_padding_changes_nothing():
    model, texts = decoder(), passages(9, 4, 6)
    together, alone = record(model, texts), record(model, texts, batch_size=1)
    for name in ("experts_TLK", "tokens_T", "length_N", "domain_N", "document_N"):
        np.testing.assert_array_equal(getattr(together, name), getattr(alone, name))
    for name in ("weights_TLK", "entropy_TL", "margin_TL", "probs_NLE"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), atol=1e-5)
    assert together.batch_N.tolist() == [0] * 6
    assert alone.batch_N.tolist() == list(range(6))
    assert together.length_N.tolist() == [9, 9, 4, 4, 6, 6]
    assert together.domain_N.tolist() == [0, 1] * 3


def test_batches_join_to_the_whole():
    model, texts = decoder(), passages(5, 7, 3)
    calls = []
    parts = record_batches(
        model, texts, batch_size=4, progress=lambda done, total: calls.append((done, total))
    )
    first = next(parts)
    assert first.length_N.tolist() == [5, 5, 7, 7]
    assert calls == [(24, 30)]
    assert len(first.documents) == 4  # a part holds its own ones only
    equal(join([first, *parts]), record(model, texts, batch_size=4))
    assert calls[-1] == (30, 30)


def test_a_margin_below_zero_shows_that_a_bias_overruled_the_router():
    model = decoder(router={"kind": "sigmoid", "selection_bias": True})
    model.mixtures()[0].router.bias[3] = 10.0
    trace = record(model, passages(20))
    assert (trace.experts_TLK[:, 0, 0] == 3).all()
    assert (trace.margin_TL[:, 0] < 0).any()
    assert (trace.margin_TL[:, 1] > 0).all()


def test_no_margin_where_every_expert_is_chosen():
    trace = record(decoder(top_k=6), passages(3))
    assert np.isnan(trace.margin_TL).all()
    assert np.isfinite(trace.entropy_TL).all()


def test_dropped_assignments_are_marked():
    model = decoder(capacity={"eval_factor": 0.5, "priority": "router"})
    texts = passages(12, domains=("code",))
    trace = record(model, texts)
    for place, routing in enumerate(routings(model, *texts)[0]):
        assert 0 < int(routing.dropped()) < 24
        np.testing.assert_array_equal(trace.kept_TLK[:, place].ravel(), routing.kept_R)


def test_expert_choice_leaves_places_empty():
    model = decoder(router={"kind": "expert_choice"})
    texts = passages(12, domains=("code",))
    trace = record(model, texts)
    assert trace.subject.top_k == 0
    for place, routing in enumerate(routings(model, *texts)[0]):
        experts_TK, weights_TK = trace.experts_TLK[:, place], trace.weights_TLK[:, place]
        tokens, places = np.nonzero(experts_TK < 6)
        mine = set(zip(tokens, experts_TK[tokens, places], weights_TK[tokens, places], strict=True))
        theirs = zip(
            routing.tokens_R.tolist(),
            routing.experts_R.tolist(),
            routing.weights_R.tolist(),
            strict=True,
        )
        assert mine == set(theirs)
        assert (weights_TK[experts_TK == 6] == 0).all()
        assert (np.diff(weights_TK, axis=1) <= 0).all()  # heaviest first, empty places last


def test_generated_tokens_are_the_most_likely_ones_and_marked():
    model, texts = decoder(), passages(6, 11, domains=("code",))
    trace = record(model, texts, generate=5)
    assert trace.length_N.tolist() == [11, 16]
    assert trace.experts_TLK.shape[0] == 27
    for n, text in enumerate(texts):
        mine = trace.sequence_T == n
        assert trace.generated_T[mine].tolist() == [False] * len(text.tokens) + [True] * 5
        tokens = torch.from_numpy(trace.tokens_T[mine]).long()
        assert tokens[: len(text.tokens)].equal(text.tokens)
        with torch.inference_mode():
            logits = model(tokens[None]).logits[0]
        assert tokens[-5:].equal(logits[-6:-1].argmax(-1))


def test_generation_stops_where_the_tokenizer_says_a_text_ends():
    class Tokenizer:
        ends = frozenset(range(VOCABULARY))

        def encode(self, text):
            return [5, 6, 7]

    trace = record(decoder(), ["words"], tokenizer=Tokenizer(), generate=4)
    assert trace.generated_T.tolist() == [False, False, False, True]


def test_modes_are_restored_also_after_a_failure():
    model = decoder().train()
    model.head.eval()
    record(model, passages(4))
    assert model.training
    assert not model.head.training
    model.norm.forward = None
    with pytest.raises(TypeError):
        record(model, passages(4))
    assert model.training


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"texts": []}, DataError, "no text to record"),
        ({"texts": [Passage([3, 61])]}, DataError, r"has token 61.*0 to 60"),
        ({"texts": [Passage([-1])]}, DataError, "has token -1"),
        ({"texts": ["words"]}, MoestroError, "tokenizer"),
        ({"batch_size": 0}, MoestroError, "batch_size is 0"),
        ({"generate": -1}, MoestroError, "generate is -1"),
        ({"distributed": True}, MoestroError, "torchrun"),
        ({"model": decoder().to("meta")}, DataError, "meta device"),
        ({"model": EncDec(settings())}, MoestroError, "encoder-decoder"),
    ],
)
def test_what_cannot_be_recorded(given, error, message):
    with pytest.raises(error, match=message):
        record(**{"model": decoder(), "texts": passages(4), **given})


def test_a_dense_model_has_no_routing():
    model = decoder()
    model.moe_layers = ()
    with pytest.raises(MoestroError, match="no mixture layer"):
        record(model, passages(4))


RANK_OF_TWO = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from tests.probe.deciders import decoder, passages
from moestro.probe.recording.record import record
from moestro.probe.recording.tracefile import TraceWriter

dist.init_process_group("gloo")
model = decoder()
seen = []
trace = record(
    model, passages(5, 7, 3, 6, 4), batch_size=4, distributed=True, generate=1,
    progress=lambda done, total: seen.append(done),
)
with TraceWriter(Path(sys.argv[1]) / f"{dist.get_rank()}.npz", trace.subject) as writer:
    writer.write(trace)
print(seen)
dist.destroy_process_group()
"""


def test_two_ranks_share_the_work_and_both_have_the_trace_of_one(tmp_path):
    from moestro.probe.recording.tracefile import read_trace

    assert run_two_ranks(RANK_OF_TWO, tmp_path) == ["[24, 42, 50]\n"] * 2
    torch.manual_seed(0)
    model = decoder()
    one = record(model, passages(5, 7, 3, 6, 4), batch_size=4, generate=1)
    for rank in ("0", "1"):
        equal(read_trace(tmp_path / f"{rank}.npz"), one)
