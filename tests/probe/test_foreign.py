import numpy as np
import pytest
import torch
from torch import nn

from moestro.errors import DataError, MoestroError
from moestro.foreign import taps
from moestro.foreign.classes import EXPERTS, PLAIN
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record
from moestro.probe.recording.replay import agreement, replay
from moestro.probe.recording.reroute import rerouted

from . import foreign_zoo as zoo

# Their experts are not handed choices; the router's output is looked at instead.
OTHERWISE = ("JetMoeForCausalLM", "Llama4ForCausalLM")


def passages(*lengths):
    return [Passage(torch.randint(3, zoo.VOCABULARY, (n,))) for n in lengths]


def received(model):
    """What each experts module is handed from now on: a list of (experts_TK, weights_TK)."""
    handed = []
    for tap in taps.taps(model):
        inner = tap.experts.forward

        def forward(*args, inner=inner, **kwargs):
            handed.append((args[1].clone(), args[2].clone()))
            return inner(*args, **kwargs)

        tap.experts.forward = forward
    return handed


def by_expert(experts, weights):
    """Both [.., K], in the order of the experts."""
    order = np.argsort(experts, axis=-1, kind="stable")
    return (np.take_along_axis(np.asarray(each), order, -1) for each in (experts, weights))


def plain(model, trace):
    """Logits of each sequence, in the batches of the trace, with nothing looked at."""
    starts = np.cumsum(trace.length_N) - trace.length_N
    found = []
    for number in np.unique(trace.batch_N):
        chosen = np.flatnonzero(trace.batch_N == number)
        rows = [
            torch.from_numpy(trace.tokens_T[starts[n] : starts[n] + trace.length_N[n]]).long()
            for n in chosen
        ]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        valid = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with torch.no_grad():
            output = model(
                input_ids=tokens,
                attention_mask=None if valid.all() else valid,
                use_cache=False,
            )
        logits = output.logits if "logits" in output else output.last_hidden_state
        found += [row[: len(own)] for row, own in zip(logits, rows, strict=True)]
    return found


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_what_is_recorded_is_what_the_experts_were_handed(name):
    model = zoo.build(name)
    texts = passages(9, 6)
    handed = [] if name in OTHERWISE else received(model)
    trace = record(model, texts)
    found = taps.taps(model)
    assert trace.length_N.tolist() == [9, 6]
    assert len(trace.tokens_T) == 15
    real = (torch.arange(9) < torch.tensor([9, 6])[:, None]).flatten().numpy()
    for place, (experts, weights) in enumerate(handed):
        ours = by_expert(trace.experts_TLK[:, place].astype(int), trace.weights_TLK[:, place])
        if EXPERTS.get(type(found[place].experts).__name__, PLAIN).skips:
            experts = experts.masked_fill(weights == 0, found[place].num_experts - 1)
        theirs = by_expert(experts.numpy()[real], weights.numpy()[real])
        for mine, used in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, used)
    assert name in OTHERWISE or len(handed) == len(trace.subject.moe_layers)
    assert (trace.experts_TLK < trace.subject.num_experts).all()
    assert np.isfinite(trace.entropy_TL).all()
    np.testing.assert_allclose(trace.probs_NLE.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_replay_is_bitwise_and_an_edit_changes_the_logits(name):
    model = zoo.build(name)
    trace = record(model, passages(9, 6, 7), batch_size=2)
    expected = plain(model, trace)
    replayed = [logits for part in replay(model, trace) for logits in part.logits]
    for mine, theirs in zip(replayed, expected, strict=True):
        assert torch.isfinite(theirs).all()
        assert torch.equal(mine, theirs)
    assert (agreement(model, trace) == 1).all()

    num_experts = trace.subject.num_experts
    real_experts = num_experts - (name == "ZayaForCausalLM")

    def shifted(place, experts_TK, weights_TK):
        return (experts_TK + 1) % real_experts, weights_TK

    handed = [] if name in OTHERWISE else received(model)
    other = trace._replace(experts_TLK=(trace.experts_TLK + 1) % real_experts)
    with rerouted(model, shifted):
        edited = plain(model, trace)
    if handed:
        assert all((experts < num_experts).all() for experts, _ in handed)
    assert all(not torch.equal(mine, theirs) for mine, theirs in zip(edited, expected, strict=True))
    forced = [logits for part in replay(model, other) for logits in part.logits]
    assert all(not torch.equal(mine, theirs) for mine, theirs in zip(forced, expected, strict=True))
    again = plain(model, trace)  # nothing is left behind
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, expected, strict=True))


@pytest.mark.parametrize("name", OTHERWISE)
def test_routers_looked_at_instead_choose_the_largest_logits(name):
    model = zoo.build(name)
    router = taps.taps(model)[0].router
    seen = []
    router.register_forward_hook(lambda module, args, output: seen.append(output))
    trace = record(model, passages(8))
    logits = seen[0][-1]
    expected = logits.topk(3).indices.sort(1).values
    np.testing.assert_array_equal(np.sort(trace.experts_TLK[:, 0], axis=1), expected)
    weights, experts = (np.asarray(each) for each in logits.topk(3))
    scores = 1 / (1 + np.exp(-weights))
    if name.startswith("Jet"):
        scores = np.exp(weights) / np.exp(weights).sum(1, keepdims=True)
    np.testing.assert_array_equal(trace.experts_TLK[:, 0], experts)
    np.testing.assert_allclose(trace.weights_TLK[:, 0], scores, rtol=1e-5)


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("kind", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_is_bitwise_whatever_runs_the_experts(name, kind, dtype):
    model = zoo.build(name, moe_intermediate_size=16).to(dtype)
    model.set_experts_implementation(kind)
    trace = record(model, passages(9, 6, 7), batch_size=2)
    replayed = [logits for part in replay(model, trace) for logits in part.logits]
    for mine, theirs in zip(replayed, plain(model, trace), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, theirs)


def test_experts_come_heaviest_first():
    model = zoo.build("DeepseekV3ForCausalLM")  # its router returns them unsorted
    trace = record(model, passages(20))
    assert (np.diff(trace.weights_TLK, axis=2) <= 0).all()


def test_families_new_to_the_tests_are_listed():
    """A family that no table names is found, and tried."""
    name = "Qwen3MoeForCausalLM"
    file = zoo.classes()[name]
    assert file not in zoo.unknown()
    known = zoo.FAMILIES.pop(name)
    try:
        assert zoo.outcome(zoo.unknown()[file]) == f"{name} is recorded"
    finally:
        zoo.FAMILIES[name] = known
    assert zoo.outcome(["VitPoseNaiveMoe"]) == "no class for text alone"


def test_skipped_tokens_are_an_expert_of_their_own():
    model = zoo.build("ZayaForCausalLM")
    with torch.no_grad():
        for tap in taps.taps(model):
            tap.router.balancing_biases[-1] = 0.1
    trace = record(model, passages(30))
    skipped = trace.experts_TLK == 6
    assert trace.subject.num_experts == 7
    assert skipped.any()
    np.testing.assert_array_equal(skipped, trace.weights_TLK == 0)
    mine = next(iter(replay(model, trace))).logits[0]
    assert torch.equal(mine, plain(model, trace)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once_and_is_edited_alike(reentrant):
    model = zoo.build("MixtralForCausalLM").train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found, counted, edited = taps.taps(model), [], []
    tokens = torch.randint(3, 61, (2, 5))

    def edit(place, experts_TK, weights_TK):
        edited.append(place)
        return experts_TK.flip(1), weights_TK

    with (
        taps.tapped(found, lambda place, chosen: counted.append(place)),
        rerouted(model, edit),
    ):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert counted == [0, 1]
    assert sorted(edited) == [0, 0, 1, 1]


def test_prompt_and_generated_tokens_are_told_apart():
    model = zoo.build("Qwen3MoeForCausalLM")
    model.generation_config.eos_token_id = None
    texts = passages(5, 9)
    trace = record(model, texts, generate=4)
    assert trace.length_N.tolist() == [9, 13]
    for n, text in enumerate(texts):
        mine = trace.sequence_T == n
        assert trace.generated_T[mine].tolist() == [False] * len(text.tokens) + [True] * 4
        logits = plain(model, trace)[n]
        assert trace.tokens_T[mine][-4:].tolist() == logits[-5:-1].argmax(-1).tolist()
    again = [each for part in replay(model, trace) for each in part.logits]
    assert all(torch.equal(a, b) for a, b in zip(again, plain(model, trace), strict=True))


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_what_cannot_be_looked_into_is_refused(name):
    with pytest.raises(MoestroError, match=r"Doge|encoder-decoder"):
        record(zoo.build(name), passages(4))


def test_a_mixture_that_is_never_reached_is_an_error():
    model = zoo.build("MixtralForCausalLM")
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(MoestroError, match=r"layers\.1.*MixtralExperts.* 1 of 2"):
        record(model, passages(4))


def test_text_that_the_model_cannot_read():
    model = zoo.build("MixtralForCausalLM")
    with pytest.raises(DataError, match=r"token 61.*0 to 60"):
        record(model, [Passage([3, 61])])
    with pytest.raises(DataError, match=r"65 tokens.*context is 64"):
        record(model, passages(65))
    with pytest.raises(DataError, match="meta device"):
        record(zoo.build("MixtralForCausalLM").to("meta"), passages(4))
