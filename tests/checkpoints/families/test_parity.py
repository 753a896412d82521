"""Every family against transformers: the same numbers forwards, backwards, cached and written back.

A tiny model of transformers is saved, read, and compared; see tiny.py for what is in the models.
"""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import write_pretrained
from moestro.errors import ShapeError
from moestro.infer.decoding import NativeDecoding
from moestro.infer.native_decoder import supports
from moestro.models.count import count
from moestro.models.decoder import cannot_pack

from . import tiny


class Pair(NamedTuple):
    """transformers' model, ours with its weights, and the folder that they went through."""

    theirs: Any
    ours: Any
    family: str
    hf_config: dict[str, Any]
    folder: Any


@pytest.fixture(scope="module", params=tiny.TINY)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = tiny.build(request.param)
    tiny.save(theirs, folder)
    read = open_checkpoint(folder)
    return Pair(theirs, read.model.eval(), read.family, read.hf_config, folder)


def tokens(batch, length):
    return torch.randint(0, tiny.VOCABULARY, (batch, length))


def close(ours, theirs, tolerance=1e-5):
    """Equal up to `tolerance` of the largest number."""
    scale = theirs.abs().max().item()
    assert scale > 0.5, "numbers too small to tell anything"
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tolerance)


def chosen(first_TE, second, experts_TK=None):
    """A router's logits, weights and experts; Llama-4's returns weights of all, 0 but for one."""
    if experts_TK is None:
        return second, *first_TE.topk(1)
    return first_TE, second, experts_TK


@torch.no_grad()
def test_logits_and_routing(pair):
    tokens_BS = tokens(3, 19)
    choices = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: choices.append(output))
        for module in pair.theirs.modules()
        if type(module).__name__.endswith(("Router", "Gate"))
    ]
    theirs = pair.theirs(tokens_BS).logits
    for hook in hooks:
        hook.remove()
    ours = pair.ours(tokens_BS)
    close(ours.logits, theirs)
    assert len(ours.routings) == len(choices)
    for routing, output in zip(ours.routings, choices, strict=True):
        logits_TE, weights_TK, experts_TK = chosen(*output)
        close(routing.logits_TE, logits_TE.view_as(routing.logits_TE))
        order_TK = experts_TK.argsort(-1)
        own_TK = routing.experts_TK().argsort(-1)
        assert torch.equal(routing.experts_TK().gather(1, own_TK), experts_TK.gather(1, order_TK))
        torch.testing.assert_close(
            routing.weights_R.view_as(own_TK).gather(1, own_TK),
            weights_TK.gather(1, order_TK),
            rtol=1e-4,
            atol=1e-6,
        )


def test_packed_documents_are_what_each_is_alone_or_refused(pair):
    """Of every family; the longest is beyond the context that longrope does not stretch."""
    ours = pair.ours
    texts = [tokens(1, length) for length in (9, 1, 44)]
    row = torch.cat([*texts, tokens(1, 3)], dim=1)
    lengths = torch.tensor([9, 1, 44, 3])
    documents = torch.tensor([0, 1, 2, -1]).repeat_interleave(lengths)[None]
    with torch.no_grad():
        if cannot_pack(ours.cfg) is not None:
            with pytest.raises(ShapeError, match="a row of its own"):
                ours(row, documents)
            return
        packed = ours(row, documents).logits[:, :54].split([9, 1, 44], dim=1)
        for found, text in zip(packed, texts, strict=True):
            close(found, ours(text).logits)


def test_counted_exactly(pair):
    """Selection biases count, though they are buffers."""
    biases = [x for name, x in pair.theirs.named_buffers() if name.endswith("bias")]
    total = sum(x.numel() for x in (*pair.theirs.parameters(), *biases))
    assert count(pair.ours.cfg).total == total


@torch.no_grad()
def test_token_by_token_through_the_cache(pair):
    tokens_BS = tokens(2, 23)
    expected = pair.theirs(tokens_BS).logits
    cache = pair.ours.new_cache(2)
    first = pair.ours(tokens_BS[:, :9], cache=cache).logits
    rest = [pair.ours(tokens_BS[:, i : i + 1], cache=cache).logits for i in range(9, 23)]
    close(torch.cat([first, *rest], dim=1), expected)


def test_native_steps(pair):
    """The whole step in native code, where it takes the family."""
    reason = supports(pair.ours)
    if reason is not None:
        pytest.skip(reason)
    tokens_BS = tokens(1, 23)
    expected = pair.theirs(tokens_BS).logits[0].detach()
    way = NativeDecoding(pair.ours)
    past, first = way.begin(tokens_BS[0, :9].tolist())
    steps = [way.step([[token]], [past])[0] for token in tokens_BS[0, 9:].tolist()]
    close(torch.cat([passed.logits_NV for passed in (first, *steps)]), expected[8:], 1e-4)


@torch.no_grad()
def test_greedy_generations(pair):
    new = tokens(1, 5)
    cache, generated = pair.ours.new_cache(1), [new]
    for _ in range(32):
        new = pair.ours(new, cache=cache).logits[:, -1:].argmax(-1)
        generated.append(new)
    text = torch.cat(generated, 1)
    assert len(set(text[0].tolist())) > 4, "a constant proves nothing"
    # Theirs would have said each token: one pass over the text tells, since it is causal.
    assert torch.equal(pair.theirs(text[:, :-1]).logits[:, 4:].argmax(-1), text[:, 5:])


def test_gradients(pair, tmp_path):
    """Theirs become ours by being saved and read as if they were weights."""
    tokens_BS = tokens(3, 19)
    for model in (pair.theirs, pair.ours):
        model.zero_grad()
        logits = model(tokens_BS).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
    gradients = copy.deepcopy(pair.theirs)
    with torch.no_grad():
        for copied, parameter in zip(gradients.parameters(), pair.theirs.parameters(), strict=True):
            copied.copy_(torch.zeros_like(copied) if parameter.grad is None else parameter.grad)
    tiny.save(gradients, tmp_path)
    expected = dict(open_checkpoint(tmp_path).model.named_parameters())
    for name, parameter in pair.ours.named_parameters():
        if not parameter.requires_grad:  # an indexer's, which choose and take none
            assert parameter.grad is None
            assert not expected[name].any()
            continue
        scale = expected[name].abs().max().item()
        assert scale > 0, f"{name}: no gradient to compare"
        error = (parameter.grad - expected[name]).abs().max().item()
        assert error <= 1e-4 * scale, f"{name}: {error / scale}"


@torch.no_grad()
def test_written_back(pair, tmp_path):
    write_pretrained(pair.ours, tmp_path / "back", family=pair.family, hf_config=pair.hf_config)
    before = load_file(pair.folder / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key
    tokens_BS = tokens(2, 19)
    loaded = tiny.load(tmp_path / "back")
    assert torch.equal(loaded(tokens_BS).logits, pair.theirs(tokens_BS).logits)
    own = pair.theirs.config.to_dict()
    assert {k: v for k, v in loaded.config.to_dict().items() if k != "_name_or_path"} == {
        k: v for k, v in own.items() if k != "_name_or_path"
    }


@torch.no_grad()
def test_written_from_our_settings_alone(pair, tmp_path):
    """Without the original config.json the model is the same."""
    write_pretrained(pair.ours, tmp_path / "back", family=pair.family)
    tokens_BS = tokens(2, 19)
    loaded = tiny.load(tmp_path / "back")
    assert torch.equal(loaded(tokens_BS).logits, pair.theirs(tokens_BS).logits)
    assert open_checkpoint(tmp_path / "back").model.cfg == pair.ours.cfg
