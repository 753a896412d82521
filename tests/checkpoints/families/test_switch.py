"""Switch Transformer against transformers: logits, drops, generation, gradients, and back."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moestro.bench.peers import cache_of
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.reading import read_settings
from moestro.checkpoints.writing import write_pretrained
from moestro.errors import CheckpointError, ConfigError

from . import tiny

FORMS = {
    "every_other": {},
    "every": {
        "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 2,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    """(transformers' model, what was read of it, its folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = tiny.build_switch(**FORMS[request.param])
    tiny.save(theirs, folder)
    return theirs, open_checkpoint(folder), folder


def tokens(batch, length):
    return torch.randint(2, tiny.VOCABULARY, (batch, length))


def close(ours, theirs):
    scale = theirs.abs().max()
    assert scale > 0.5, "numbers too small to tell anything"
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_and_routing_with_drops(pair):
    theirs, read, _ = pair
    source_BS, target_BT = tokens(2, 29), tokens(2, 23)
    choices = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: choices.append(output))
        for module in theirs.modules()
        if type(module).__name__.endswith("Router")
    ]
    expected = theirs(input_ids=source_BS, decoder_input_ids=target_BT).logits
    for hook in hooks:
        hook.remove()
    ours = read.model(source_BS, target_BT)
    close(ours.logits, expected)
    assert len(ours.routings) == len(choices)
    for routing, (kept_BSE, weights, logits_BSE) in zip(ours.routings, choices, strict=True):
        close(routing.logits_TE, logits_BSE.flatten(0, 1))
        kept_TE = kept_BSE.flatten(0, 1).bool()
        own_TE = torch.zeros_like(kept_TE)
        kept_R = routing.kept_R
        assert routing.dropped() > 0, "nothing was dropped, so drops were not tested"
        own_TE[routing.tokens_R[kept_R], routing.experts_R[kept_R]] = True
        assert torch.equal(own_TE, kept_TE)
        torch.testing.assert_close(routing.weights_R, weights.flatten(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_padding_in_the_source(pair):
    theirs, read, _ = pair
    source_BS, target_BT = tokens(3, 17), tokens(3, 9)
    valid_BS = torch.arange(17) < torch.tensor([17, 11, 5])[:, None]
    source_BS[~valid_BS] = 0
    expected = theirs(
        input_ids=source_BS, attention_mask=valid_BS.long(), decoder_input_ids=target_BT
    )
    close(read.model(source_BS, target_BT, valid_BS=valid_BS).logits, expected.logits)


@torch.no_grad()
def test_greedy_generation(pair):
    """Through both caches, token by token: text to text."""
    theirs, read, _ = pair
    source_BS = tokens(1, 21)
    new, cache, expected, steps = torch.zeros(1, 1, dtype=torch.int64), {}, [], []
    encoded = theirs.get_encoder()(input_ids=source_BS)
    for _ in range(32):
        output = theirs(encoder_outputs=encoded, decoder_input_ids=new, use_cache=True, **cache)
        cache, new = cache_of(output), output.logits[:, -1:].argmax(-1)
        expected.append(int(new))
        steps.append(output.logits)
    ours = read.model
    own = ours.new_cache(ours.encode(source_BS).memory)
    new, generated, own_steps = torch.zeros(1, 1, dtype=torch.int64), [], []
    for _ in range(32):
        logits = ours.decode(new, own).logits
        new = logits[:, -1:].argmax(-1)
        generated.append(int(new))
        own_steps.append(logits)
    assert len(set(expected)) > 2, "a constant proves nothing"
    assert generated == expected
    close(torch.cat(own_steps, 1), torch.cat(steps, 1))


def test_gradients(pair, tmp_path):
    """Theirs become ours by being saved and read as if they were weights."""
    theirs, read, _ = pair
    source_BS, target_BT, labels_BT = tokens(2, 29), tokens(2, 23), tokens(2, 23)
    theirs.zero_grad()
    logits = theirs(input_ids=source_BS, decoder_input_ids=target_BT).logits
    F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten()).backward()
    read.model.zero_grad()
    logits = read.model(source_BS, target_BT).logits
    F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten()).backward()
    gradients = copy.deepcopy(theirs)
    if not theirs.config.tie_word_embeddings:
        # One embedding of ours, whose gradient comes from both stacks.
        stacks = [stack.embed_tokens.weight for stack in (theirs.encoder, theirs.decoder)]
        total = stacks[0].grad + stacks[1].grad
        for weight in (theirs.shared.weight, *stacks):
            weight.grad = total
    with torch.no_grad():
        for copied, parameter in zip(gradients.parameters(), theirs.parameters(), strict=True):
            copied.copy_(torch.zeros_like(copied) if parameter.grad is None else parameter.grad)
    tiny.save(gradients, tmp_path)
    expected = dict(open_checkpoint(tmp_path).model.named_parameters())
    for name, parameter in read.model.named_parameters():
        scale = expected[name].abs().max().item()
        assert scale > 0, f"{name}: no gradient to compare"
        error = (parameter.grad - expected[name]).abs().max().item()
        assert error <= 1e-4 * scale, f"{name}: {error / scale}"


@torch.no_grad()
@pytest.mark.parametrize("original", [True, False])
def test_written_back(pair, tmp_path, original):
    theirs, read, folder = pair
    hf_config = read.hf_config if original else None
    write_pretrained(read.model, tmp_path / "back", hf_config=hf_config)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "back/model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key
    inputs = {"input_ids": tokens(2, 13), "decoder_input_ids": tokens(2, 8)}
    loaded = tiny.load(tmp_path / "back")
    assert torch.equal(loaded(**inputs).logits, theirs(**inputs).logits)


def test_copies_of_the_embedding_are_read_and_must_be_copies(tmp_path):
    """As files of old hold them."""
    tiny.save(tiny.build_switch(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    for key in copies:
        tensors[key] = tensors["shared.weight"].clone()
    save_file(tensors, path)
    model = open_checkpoint(tmp_path).model
    assert torch.equal(model.embed.weight, tensors["shared.weight"])
    for key in copies:
        save_file({**tensors, key: tensors[key] + 1}, path)
        with pytest.raises(CheckpointError, match=f"{key} differs"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_sparse_encoder_layers": 1}, "n = \\[2, 4\\]; only 1 or 2"),
        ({"num_sparse_encoder_layers": 0}, "only 1 or 2"),
        ({"dense_act_fn": "gated-gelu"}, "dense_act_fn is 'gated-gelu'"),
        ({"router_bias": True}, "router_bias is True"),
        ({"router_ignore_padding_tokens": True}, "router_ignore_padding_tokens"),
        ({"something_new": 1}, "unknown field something_new"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, fields, message):
    tiny.save(tiny.build_switch(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ConfigError, match=message):
        read_settings(path)
