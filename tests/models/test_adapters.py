"""Adapters against merged weights, which are the definition: outputs and all gradients."""

import pytest
import torch
from torch.func import functional_call

from moestro.config import LoraConfig, ModelConfig
from moestro.errors import ConfigError
from moestro.infer.native_decoder import supports
from moestro.kernels.packing import Format
from moestro.models.adapters import attach, attached, merge, places
from moestro.models.decoder import Decoder
from moestro.moe.packed import Packable

MIXTURE = {"hidden_dim": 8, "num_experts": 5, "top_k": 2}
MODELS = {
    "mixture": {"moe": {**MIXTURE, "shared": {"hidden_dim": 12, "gate": True}}, "dense_first": 1},
    "biases": {
        "moe": {**MIXTURE, "activation": "clamped_swiglu", "experts": {"bias": True},
                "router": {"bias": True}},
        "attention": {"num_heads": 4, "num_kv_heads": 2, "bias": "all", "sinks": True},
    },
    "plain": {"moe": {**MIXTURE, "activation": "relu"}},
    "latent": {"attention": {"num_heads": 2, "latent": {
        "q_rank": 6, "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4}}},
}  # fmt: skip


def adapted(changes, **lora):
    """A model with random adapters, in float64."""
    torch.manual_seed(3)
    base = {"vocab_size": 31, "dim": 16, "num_layers": 2, "dense": {"hidden_dim": 12}}
    net = Decoder(ModelConfig(**{**base, **changes})).double()
    attach(net, LoraConfig(rank=3, alpha=5.0, **lora))
    for adapter in attached(net).values():
        torch.nn.init.normal_(adapter.b)
        adapter.double()
    return net


def gradients(net, logits):
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((logits * weights).sum(), list(trained.values()))
    return dict(zip(trained, grads, strict=True))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("backend", ["segments", "reference"])
def test_adapters_are_merged_weights(changes, backend, monkeypatch):
    monkeypatch.setenv("MOESTRO_BACKEND", backend)
    net, tokens = adapted(changes), torch.randint(0, 31, (2, 7))
    assert all("_adapter." in name for name, p in net.named_parameters() if p.requires_grad)
    logits = net(tokens).logits
    bare = Decoder(net.cfg).double()
    weights = dict(net.named_parameters())
    merged = {}
    for path, adapter in attached(net).items():
        deltas = []
        for a, b in zip(adapter.a.chunk(len(adapter.rows), 1), adapter.b.split(adapter.rows, 1),
                        strict=True):  # fmt: skip
            deltas.append(torch.einsum("eon,eni->eoi", b, a) * 5.0 / 3)
        merged[path] = weights[path] + torch.cat(deltas, 1).view_as(weights[path])
    plain = {name: merged.get(name, weights[name]) for name, _ in bare.named_parameters()}
    expected = functional_call(bare, plain, (tokens,)).logits
    assert (logits - expected).abs().max() < 1e-12
    found, wanted = gradients(net, logits), gradients(net, expected)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.abs().max() > 0
        assert (found[name] - grad).abs().max() < 1e-12 * max(1, grad.abs().max()), name
    with torch.no_grad():
        few = net(tokens[:1, :1]).logits  # by few rows
        merge(net)
        assert not attached(net)
        assert (net(tokens).logits - expected).abs().max() < 1e-12
        assert (net(tokens[:1, :1]).logits - few).abs().max() < 1e-12


def test_an_untrained_adapter_changes_nothing_and_an_idle_expert_gets_zeros():
    net = adapted({"moe": MIXTURE})
    for adapter in attached(net).values():
        torch.nn.init.zeros_(adapter.b)
    bare = Decoder(net.cfg).double()
    bare.load_state_dict({n: p for n, p in net.state_dict().items() if "_adapter." not in n})
    tokens = torch.randint(0, 31, (1, 1))
    output = net(tokens)
    assert torch.equal(output.logits, bare(tokens).logits)
    grads = gradients(net, output.logits)
    idle = output.routings[0].counts_E() == 0
    grad = grads["blocks.0.ffn.experts.down_adapter.b"]
    assert grad[~idle].abs().amax((1, 2)).min() > 0
    assert not grad[idle].any()


def test_targets_choose_the_places_and_none_is_an_error():
    cfg = MODELS["mixture"]
    kinds = {name.rsplit(".", 2)[-2] for name in attached(adapted(cfg, targets=["experts"]))}
    assert kinds == {"experts"}
    assert {place.kind for place in places(adapted(cfg))} == {
        "attention", "router", "experts", "dense",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="nothing of the kind"):
        adapted({}, targets=["experts"])


def test_dropout_is_of_the_adapter_in_training_alone():
    net, tokens = adapted({"moe": MIXTURE}, dropout=0.5), torch.randint(0, 31, (2, 7))
    assert not torch.equal(net(tokens).logits, net(tokens).logits)
    net.eval()
    assert torch.equal(net(tokens).logits, net(tokens).logits)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["mixture", "biases"])
def test_packed_weights_pass_the_gradient_to_the_adapters_as_unpacked_ones_do(name, kind):
    changes = dict(MODELS[name], dim=32)
    changes["moe"] = {**changes["moe"], "hidden_dim": 32}
    torch.manual_seed(4)
    base = {"vocab_size": 31, "num_layers": 2, "dense": {"hidden_dim": 32}, "head": {"tied": False}}
    plain, packed = (Decoder(ModelConfig(**{**base, **changes})) for _ in range(2))
    packed.load_state_dict(plain.state_dict())
    for path, module in list(packed.named_modules()):
        if isinstance(module, Packable):
            parent = packed.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], module.to_packed(Format(kind, 32)))
    unpack(plain, packed)
    for net in (plain, packed):
        attach(net, LoraConfig(rank=3, alpha=5.0))
        torch.manual_seed(5)
        for adapter in attached(net).values():
            torch.nn.init.normal_(adapter.a, std=0.1)
            torch.nn.init.normal_(adapter.b, std=0.1)
        net.train()
    tokens = torch.randint(0, 31, (2, 7))
    found, wanted = (gradients(net, net(tokens).logits) for net in (packed, plain))
    assert found.keys() == wanted.keys()
    for path, grad in wanted.items():
        torch.testing.assert_close(found[path], grad, rtol=1e-4, atol=1e-5 * grad.abs().max())
    assert "adapters" in str(supports(packed))
    with torch.no_grad():
        # Without gradients native code rounds what it reads to int8 as well, adapters or not.
        errors = []
        for scale in (5.0 / 3, 0.0):
            for net in (plain.eval(), packed.eval()):
                for adapter in attached(net).values():
                    adapter.scale = scale
            near, exact = packed(tokens), plain(tokens)
            # From a token on whose experts are others after the rounding, nothing is told.
            alike_T = torch.ones(14, dtype=torch.bool)
            for one, other in zip(near.routings, exact.routings, strict=True):
                alike_T &= (one.experts_TK() == other.experts_TK()).all(-1)
            alike_BS = alike_T.view(2, 7).cumprod(1) > 0
            error_TV = (near.logits - exact.logits)[alike_BS]
            errors.append(error_TV.square().mean().sqrt())
            assert alike_BS.sum() >= 7
        assert errors[0] < 2 * errors[1]
    with pytest.raises(ConfigError, match="packed weights"):
        merge(packed)


def unpack(plain, packed):
    """Give the plain model the numbers that the packed one has."""
    from moestro.kernels import native_cpu

    with torch.no_grad():
        for path, module in packed.named_modules():
            own = plain.get_submodule(path)
            if hasattr(module, "weights") and hasattr(own, "gate_up"):
                for expert in range(len(own.down)):
                    up, down = native_cpu.unpack_expert(module.weights, expert)
                    own.gate_up[expert], own.down[expert] = up, down
            elif hasattr(module, "weights"):
                own.weight.copy_(native_cpu.unpack_matrix(module.weights))
