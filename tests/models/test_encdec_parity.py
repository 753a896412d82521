"""The encoder-decoder against transformers' Switch Transformer: logits, gradients, routing."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from moestro.bench.peers import cache_of
from moestro.models.encdec import START_TOKEN, EncDec

from .tiny_encdec import CAPACITY, settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")


def reference(tied=True, capacity=CAPACITY, mixtures=True):
    """A Switch Transformer of transformers, of the same sizes, whose layers outweigh its input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = transformers.SwitchTransformersConfig(
            vocab_size=60,
            d_model=32,
            d_kv=6,
            d_ff=24,
            num_heads=4,
            num_layers=4,
            num_decoder_layers=2,
            num_sparse_encoder_layers=2 if mixtures else 0,
            num_sparse_decoder_layers=1 if mixtures else 0,
            num_experts=4,
            expert_capacity=capacity,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
            tie_word_embeddings=tied,
            decoder_start_token_id=START_TOKEN,
            attn_implementation="eager",
        )
        if not mixtures:  # their smallest step is one mixture at layer 1
            cfg.encoder_sparse_step = cfg.decoder_sparse_step = 0
        theirs = transformers.SwitchTransformersForConditionalGeneration(cfg).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name == "shared.weight":
                weight.mul_(0.1)
            elif name == "decoder.final_layer_norm.weight":
                weight.uniform_(5.0, 15.0)
            elif "layer_norm" in name:
                weight.uniform_(0.5, 1.5)
            elif "relative" in name:
                weight.normal_()
    return theirs


def convert(theirs):
    """transformers' keys to ours; a tied head is not among theirs."""
    ours = {"embed.weight": theirs["shared.weight"]}
    if "lm_head.weight" in theirs:
        ours["head.weight"] = theirs["lm_head.weight"]
    for side, layers in (("encoder", 4), ("decoder", 2)):
        relative = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ours[f"{side}.relative.weight"] = theirs[relative]
        ours[f"{side}.norm.weight"] = theirs[f"{side}.final_layer_norm.weight"]
        for n in range(layers):
            ours |= convert_block(theirs, f"{side}.block.{n}.layer.", f"{side}.blocks.{n}.", side)
    return ours


def convert_block(theirs, old, new, side):
    attention, last = f"{old}0.SelfAttention.", 2 if side == "decoder" else 1
    mlp = f"{old}{last}.mlp."
    ours = {
        "attention_norm.weight": theirs[f"{old}0.layer_norm.weight"],
        "attention.qkv.weight": torch.cat([theirs[f"{attention}{x}.weight"] for x in "qkv"]),
        "attention.out.weight": theirs[f"{attention}o.weight"],
        "ffn_norm.weight": theirs[f"{old}{last}.layer_norm.weight"],
    }
    if side == "decoder":
        cross = f"{old}1.EncDecAttention."
        ours |= {
            "cross_norm.weight": theirs[f"{old}1.layer_norm.weight"],
            "cross.q.weight": theirs[f"{cross}q.weight"],
            "cross.kv.weight": torch.cat([theirs[f"{cross}{x}.weight"] for x in "kv"]),
            "cross.out.weight": theirs[f"{cross}o.weight"],
        }
    if f"{mlp}router.classifier.weight" in theirs:
        experts = [f"{mlp}experts.expert_{e}." for e in range(4)]
        ours |= {
            "ffn.router.weight": theirs[f"{mlp}router.classifier.weight"],
            "ffn.experts.gate_up": torch.stack([theirs[f"{e}wi.weight"] for e in experts]),
            "ffn.experts.down": torch.stack([theirs[f"{e}wo.weight"] for e in experts]),
        }
    else:
        ours |= {
            "ffn.gate_up": theirs[f"{mlp}wi.weight"][None],
            "ffn.down": theirs[f"{mlp}wo.weight"][None],
        }
    return {f"{new}{name}": weight for name, weight in ours.items()}


def same_weights(theirs, cfg):
    """Our model with the weights of `theirs`."""
    ours = EncDec(cfg).eval()
    weights = {name: weight.detach() for name, weight in theirs.state_dict().items()}
    ours.load_state_dict(convert(weights))
    return ours


@pytest.fixture(scope="module")
def pair():
    """(transformers' model, ours with the same weights); experts overflow."""
    torch.manual_seed(0)
    theirs = reference()
    return theirs, same_weights(theirs, settings())


def close(actual, expected):
    """Within 1e-5 of the largest number, which must not be a small one."""
    scale = expected.abs().max().item()
    assert scale > 0.5, "too small to tell anything"
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-5)


def batch(rows=3, source=19, target=13):
    return torch.randint(1, 60, (rows, source)), torch.randint(1, 60, (rows, target))


def test_logits_and_gradients_while_experts_overflow(pair):
    theirs, ours = pair
    source_BS, target_BT = batch()
    theirs.zero_grad()
    ours.zero_grad()
    expected = theirs(input_ids=source_BS, decoder_input_ids=target_BT).logits
    output = ours(source_BS, target_BT)
    assert all(routing.dropped() > 0 for routing in output.routings)
    close(output.logits.detach(), expected.detach())
    for logits in (expected, output.logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), target_BT[:, 1:].flatten()).backward()
    # Theirs has none for an expert that no token met.
    gradients = convert(
        {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in theirs.named_parameters()
        }
    )
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max().item()
        assert scale > 0, name
        error = (parameter.grad - gradients[name]).abs().max().item()
        assert error <= 1e-4 * scale, name


def test_routing(pair):
    theirs, ours = pair
    source_BS, target_BT = batch()
    with torch.no_grad():
        expected = theirs(
            input_ids=source_BS, decoder_input_ids=target_BT, output_router_logits=True
        )
        output = ours(source_BS, target_BT)
    logits = [*expected.encoder_router_logits, *expected.decoder_router_logits]
    assert len(output.routings) == len(logits) == len(ours.mixtures()) == 3
    assert ours.moe_layers == (1, 3, 5)
    for routing, logits_BSE in zip(output.routings, logits, strict=True):
        probs_BSE = logits_BSE.softmax(-1)
        best_BS = probs_BSE.argmax(-1)
        order_BSE = F.one_hot(best_BS, 4).cumsum(1)
        kept_BS = order_BSE.gather(-1, best_BS[..., None])[..., 0] <= CAPACITY
        assert torch.equal(routing.experts_R, best_BS.flatten())
        torch.testing.assert_close(routing.weights_R, probs_BSE.amax(-1).flatten())
        assert torch.equal(routing.kept_R, kept_BS.flatten())


def test_token_by_token_as_transformers_does_it(pair):
    """With capacity, one step counts only its own token: both models agree on that too."""
    theirs, ours = pair
    source_BS, target_BT = batch()
    past = {}
    with torch.no_grad():
        encoded = theirs.encoder(input_ids=source_BS)
        cache = ours.new_cache(ours.encode(source_BS).memory)
        for t in range(target_BT.shape[1]):
            expected = theirs(
                encoder_outputs=encoded,
                decoder_input_ids=target_BT[:, t : t + 1],
                use_cache=True,
                **past,
            )
            past = cache_of(expected)
            close(ours.decode(target_BT[:, t : t + 1], cache).logits, expected.logits)
    assert cache.position == target_BT.shape[1]


def test_greedy_generation_of_32_tokens(pair):
    """None of them twice: a random model would soon say one thing for ever."""
    theirs, ours = pair
    source_BS, _ = batch(rows=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = theirs.generate(
            source_BS, max_new_tokens=32, min_new_tokens=32, no_repeat_ngram_size=1
        )
        cache, tokens = ours.new_cache(ours.encode(source_BS).memory), [START_TOKEN]
        for _ in range(32):
            logits_V = ours.decode(torch.tensor([tokens[-1:]]), cache).logits[0, -1]
            logits_V[[1, *tokens]] = -torch.inf  # 1 is the end, which min_new_tokens forbids
            tokens.append(int(logits_V.argmax()))
    assert tokens == expected[0].tolist()


def test_padding(pair):
    """On the right it changes no logits of ours, and they are transformers' own."""
    theirs, ours = pair
    source_BS, target_BT = batch()
    valid_BS = torch.arange(19) < torch.tensor([[19], [11], [4]])
    valid_BT = torch.arange(13) < torch.tensor([[13], [2], [9]])
    with torch.no_grad():
        expected = theirs(
            input_ids=source_BS,
            attention_mask=valid_BS.long(),
            decoder_input_ids=target_BT,
            decoder_attention_mask=valid_BT.long(),
        ).logits
        found = ours(source_BS, target_BT, valid_BS=valid_BS, valid_BT=valid_BT)
        alone = ours(source_BS[1:2, :11], target_BT[1:2, :2]).logits
    close(found.logits[valid_BT], expected[valid_BT])
    close(found.logits[1:2, :2], alone)
    assert found.routings[0].counts_E().sum() == valid_BS.sum()
    assert found.routings[-1].counts_E().sum() == valid_BT.sum()


def test_an_untied_head():
    theirs = reference(tied=False, capacity=100)
    theirs.set_input_embeddings(theirs.shared)  # with an untied head they tie nothing else either
    ours = same_weights(theirs, settings(capacity=100, tied=False))
    source_BS, target_BT = batch()
    with torch.no_grad():
        expected = theirs(input_ids=source_BS, decoder_input_ids=target_BT).logits
        close(ours(source_BS, target_BT).logits, expected)


def test_without_mixtures_it_is_t5():
    theirs = reference(mixtures=False)
    ours = same_weights(theirs, settings(moe=None))
    source_BS, target_BT = batch()
    with torch.no_grad():
        expected = theirs(input_ids=source_BS, decoder_input_ids=target_BT).logits
        output = ours(source_BS, target_BT)
    close(output.logits, expected)
    assert output.routings == ours.moe_layers == ()
    assert ours.mixtures() == []
