"""The formula of activations against what a real training step saves."""

import pytest
import torch

from moestro.config import BalanceConfig, EncDecConfig, ModelConfig
from moestro.kernels import attention as kernels
from moestro.kernels import delta
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.plan import activations
from moestro.plan.activations import activation_bytes
from moestro.train.objective import Objective

BATCH = 4
# What the page promises: the formula is within 10 % of what is saved.
WITHIN = 0.10

MOE = {"hidden_dim": 48, "num_experts": 8, "top_k": 2}
LATENT = {"kv_rank": 32, "nope_dim": 16, "rope_dim": 8, "value_dim": 16}
DELTA = {"kind": "delta", "key_heads": 2, "value_heads": 4, "key_dim": 16, "value_dim": 24}
RELATIVE = {"kind": "relative", "shared": True}


def decoder(moe=None, **attention) -> ModelConfig:
    attention = {"num_heads": 4, "num_kv_heads": 2, "context": 1024, **attention}
    if "latent" in attention:
        del attention["num_kv_heads"]
    return ModelConfig(
        vocab_size=64, dim=64, num_layers=2, attention=attention, moe=moe, dense={"hidden_dim": 96}
    )


def encdec(groups=4, **changes) -> EncDecConfig:
    attention = {"num_heads": 4, "num_kv_heads": groups, "head_dim": 16, "positions": RELATIVE}
    return EncDecConfig(
        vocab_size=64, dim=64, encoder_layers=2, decoder_layers=2, attention=attention, **changes
    )


KINDS = {
    "dense": decoder(),
    "mixture": decoder(MOE),
    "shared expert": decoder({**MOE, "shared": {"hidden_dim": 32, "gate": True}}),
    "plain experts": decoder({**MOE, "activation": "relu", "top_k": 1}),
    "head norm": decoder(qk_norm="head"),
    "norm after the rotation": decoder(qk_norm="rotated"),
    "full norm": decoder(MOE, qk_norm="full"),
    "window": decoder(window={"size": 32}),
    "sinks": decoder(sinks=True, bias="all", window={"size": 32, "full_every": 2}),
    "relative": decoder(positions={"kind": "relative"}),
    "delta": decoder(MOE, window={**DELTA, "full_every": 0}),
    "delta beside gated attention": decoder(
        MOE, window={**DELTA, "full_every": 2}, positions={"fraction": 0.5}, qk_norm="head"
    ),
    "pieces of a text": decoder(
        qk_norm="unit",
        window={"size": 100, "full_every": 2, "chunked": True},
        positions={"skipped_every": 2, "temperature": {}},
    ),
    "short convolutions": decoder(
        MOE, window={"kind": "conv", "attention_layers": [1]}, qk_norm="head"
    ),
    "latent": decoder(latent={"q_rank": 24, **LATENT}),
    "latent, no q_rank": decoder(MOE, latent=LATENT),
    "encoder-decoder": encdec(),
    "encoder-decoder, one key head": encdec(groups=1),
    "switch": encdec(moe_every=2, moe={**MOE, "activation": "relu", "top_k": 1}),
}


def saved(cfg, seq_len: int, checkpointed: bool = False, bf16: bool = False) -> int:
    """Bytes that autograd keeps of one step, weights left out, and the logits."""
    twice = isinstance(cfg, EncDecConfig)
    model = (EncDec(cfg) if twice else Decoder(cfg)).train()
    model.checkpoint_activations = checkpointed
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, cfg.vocab_size, (BATCH, seq_len))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(tokens, tokens) if twice else model(tokens)
        Objective(BalanceConfig())(output, tokens)
        keep(output.logits)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_saves(kind):
    cfg = KINDS[kind]
    planned = activation_bytes(cfg, 48, BATCH, number=4, checkpointed=False)
    assert planned == pytest.approx(saved(cfg, 48), rel=WITHIN)


@pytest.mark.parametrize("kind", ["sinks", "relative", "encoder-decoder"])
def test_scores_are_kept_in_blocks_of_queries(kind):
    seq_len = activations.ROWS + 50
    planned = activation_bytes(KINDS[kind], seq_len, BATCH, number=4, checkpointed=False)
    assert planned == pytest.approx(saved(KINDS[kind], seq_len), rel=WITHIN)


@pytest.mark.parametrize("seq_len", [activations.CHUNK, 2 * activations.CHUNK + 9])
def test_a_delta_layer_keeps_matrices_of_chunks(seq_len):
    planned = activation_bytes(KINDS["delta"], seq_len, BATCH, number=4, checkpointed=False)
    assert planned == pytest.approx(saved(KINDS["delta"], seq_len), rel=WITHIN)


def by_blocks(context, window):
    """The mean over queries of the keys that their block sees, and over keys, block by block."""
    pairs = keys = 0
    for start in range(0, context, activations.ROWS):
        end = min(start + activations.ROWS, context)
        visible = end - max(0, start + 1 - (window or context))
        pairs, keys = pairs + visible * (end - start), keys + visible
    return pairs / context, keys / context


@pytest.mark.parametrize("window", [None, 1, 2, 255, 256, 257, 258, 512, 513, 700, 4096])
def test_keys_seen_are_those_of_each_block(window):
    for context in (1, 2, 255, 256, 257, 511, 512, 513, 769, 1024, 1500, 4096, 5000):
        assert activations._seen(context, window) == by_blocks(context, window), context


def test_blocks_are_those_of_the_kernels():
    assert activations.ROWS == kernels.ROWS
    assert activations.CHUNK == delta.CHUNK


@pytest.mark.parametrize(
    ("kind", "seq_len"),
    [
        ("dense", kernels.LONGEST + 8),
        ("relative", 48),
        ("relative", 4),
        ("sinks", 48),
        ("delta", 48),
    ],
)
def test_in_bfloat16(kind, seq_len):
    """Beyond the lengths for which attention on CPU keeps probabilities in 16 bits."""
    planned = activation_bytes(KINDS[kind], seq_len, BATCH, number=2, checkpointed=False)
    assert planned == pytest.approx(saved(KINDS[kind], seq_len, bf16=True), rel=WITHIN)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_checkpointing_keeps_inputs_and_one_layer(kind):
    """Before the backward the inputs are there; the layer at work comes and goes within it."""
    cfg = KINDS[kind]
    short = cfg.model_copy(update={"num_layers": 1})
    layer = activation_bytes(cfg, 48, BATCH, 4, False) - activation_bytes(
        short, 48, BATCH, 4, False
    )
    planned = activation_bytes(cfg, 48, BATCH, 4, True) - layer
    assert planned == pytest.approx(saved(cfg, 48, checkpointed=True), rel=WITHIN)


def test_checkpointing_spares_the_copies_where_a_layer_is_larger():
    """Few tokens: inputs and copies; many: inputs and one layer, in bf16 as in fp32."""
    cfg = KINDS["dense"]

    def slope(model, tokens, checkpointed):
        more, less = (activation_bytes(model, 1, n, 2, checkpointed) for n in (tokens + 1, tokens))
        return more - less

    one_layer = cfg.model_copy(update={"num_layers": 1})
    layer = slope(cfg, 1, False) - slope(one_layer, 1, False)
    assert slope(cfg, 1000, True) - slope(cfg, 1, True) == layer


def test_twice_the_sequences_keep_twice_as_much():
    cfg = KINDS["mixture"]
    one, two = (activation_bytes(cfg, 64, batch, 4, False) for batch in (1, 2))
    assert two == 2 * one
