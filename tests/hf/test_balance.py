"""Balance losses of transformers' mixtures: held to the formulas, over every shape of training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import moestro.hf as hf
from moestro.errors import ConfigError, MoestroError
from moestro.moe import balance as losses
from moestro.moe.routing import Routing

from ..ranks import run_two_ranks
from .zoo import NAMES, build, experts_of, tokens

SIGMOID = ("deepseek_v3", "glm4_moe", "dots1", "minimax_m2")
# One token of the first sequence and four of the second are padding.
MASK = torch.ones(2, 9, dtype=torch.long)
MASK[0, 8:] = MASK[1, 5:] = 0


def training(name, layers=2, **changes):
    return build(name, layers, **changes).train()


def routers(model):
    """(its experts, its router) of every mixture."""
    found = []
    for block in model.modules():
        inner = dict(block.named_children())
        if hasattr(inner.get("experts"), "is_transposed"):
            found.append((inner["experts"], inner.get("gate", inner.get("router"))))
    return found


def listen(model):
    """Lists that each forward fills with logits [T, E], experts [T, K] of each mixture."""
    seen, before = [], []
    for experts, router in routers(model):
        router.register_forward_hook(lambda m, a, out: before.append(out[0]))
        experts.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(
                (before.pop(), args[1] if len(args) > 1 else kwargs["top_k_index"])
            ),
            with_kwargs=True,
        )
    return seen


def direct(seen, valid_T, sigmoid):
    """Σ over layers of E · Σ_e f_e · P_e, written out for the real tokens."""
    total = 0.0
    for logits_TE, experts_TK in seen:
        logits_TE, experts_TK = logits_TE.float()[valid_T], experts_TK[valid_T]
        scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
        probs_E = (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)
        share_E = F.one_hot(experts_TK, logits_TE.shape[1]).float().mean((0, 1))
        total = total + logits_TE.shape[1] * (share_E * probs_E).sum()
    return total


def as_routings(seen, valid_T=None):
    found = []
    for logits_TE, experts_TK in seen:
        num_tokens, top_k = experts_TK.shape
        found.append(
            Routing(
                torch.arange(num_tokens).repeat_interleave(top_k), experts_TK.flatten(),
                torch.ones(experts_TK.numel()), logits_TE, logits_TE.softmax(-1), top_k, valid_T,
            )
        )  # fmt: skip
    return found


def gradients(loss, model):
    parameters = [router.weight for _, router in routers(model) if hasattr(router, "weight")]
    parameters.append(model.get_input_embeddings().weight)
    return torch.autograd.grad(loss, parameters, retain_graph=True)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_are_those_of_the_formula(name):
    model = training(name)
    balancer = hf.balance(model, switch=0.5)
    seen = listen(model)
    model(tokens(), attention_mask=MASK)
    loss = balancer.loss()
    wanted = 0.5 * direct(seen, MASK.flatten().bool(), name in SIGMOID)
    torch.testing.assert_close(loss, wanted)
    for got, want in zip(gradients(loss, model), gradients(wanted, model), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
def test_each_scope_is_that_of_the_package(scope):
    model = training("qwen3_moe")
    balancer = hf.balance(model, switch=0.3, scope=scope, z=0.1)
    seen = listen(model)
    model(tokens(), attention_mask=MASK)
    valid_T, wanted = MASK.flatten().bool(), 0.0
    for routing in as_routings(seen, valid_T):
        switch = losses.switch_loss(routing)
        if scope == "sequence":
            switch = losses.sequence_loss(routing, 2)
        wanted = wanted + 0.3 * switch + 0.1 * losses.z_loss(routing)
    torch.testing.assert_close(balancer.loss(), wanted)
    assert set(balancer.parts) == {"switch", "z"}


def test_the_global_scope_counts_the_step_so_far():
    model = training("qwen3_moe")
    balancer = hf.balance(model, switch=1.0, scope="global")
    seen = listen(model)
    for _ in range(2):
        model(tokens())
        last = balancer.loss()
        last.backward()
    first, second = as_routings(seen[:2]), as_routings(seen[2:])
    wanted = sum(
        losses.switch_loss(b, a.counts_E() + b.counts_E())
        for a, b in zip(first, second, strict=True)
    )
    torch.testing.assert_close(last, wanted)
    balancer.step()
    seen.clear()
    model(tokens())
    torch.testing.assert_close(
        balancer.loss(), sum(losses.switch_loss(routing) for routing in as_routings(seen))
    )


def test_perfect_balance_is_one_in_each_layer():
    model = training("qwen3_moe", num_experts=3)  # K is 3 too: every expert gets every token
    balancer = hf.balance(model, switch=1.0)
    model(tokens())
    assert balancer.loss().item() == pytest.approx(2.0)
    assert balancer.parts["switch"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_familys_coefficient_gives_the_familys_gradient(name):
    model = training(name, layers=1, router_aux_loss_coef=0.25)
    batch = tokens()
    plain, own = (
        model(batch, labels=batch, output_router_logits=asked).loss for asked in (False, True)
    )
    wanted = gradients(own - plain, model)
    balancer = hf.balance(model)
    top_k = model.config.num_experts_per_tok
    assert balancer.cfg.switch == hf.converted(0.25, top_k, 1) == 0.25 * top_k
    model(batch)
    for got, want in zip(gradients(balancer.loss(), model), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_padding_counts_nowhere():
    model = training("qwen3_moe")
    batch = tokens(1, 6)
    found = []
    for extra in (0, 3):
        padded = F.pad(batch, (0, extra), value=7)
        mask = F.pad(torch.ones_like(batch), (0, extra))
        with hf.balance(model, switch=1.0, z=1.0) as balancer:
            model(padded, attention_mask=mask)
            loss = balancer.loss()
            loss.backward()
            balancer.step()
            found.append((loss.detach(), list(balancer.health().values())))
    torch.testing.assert_close(found[0][0], found[1][0])
    for short, long in zip(found[0][1], found[1][1], strict=True):
        assert short == pytest.approx(long, rel=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_layers_computed_again_count_once(name):
    batch, found = tokens(), []
    for again in (False, True):
        model = training(name)
        if again:
            model.activation_checkpointing_enable()
        calls = listen(model)
        balancer = hf.balance(model, switch=1.0, bias_rate=0.01)
        (model(batch, labels=batch).loss + balancer.loss()).backward()
        assert len(calls) == 2 + 2 * again
        balancer.step()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((grads, balancer.health(), balancer.state_dict()))
    for left, right in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused_for_losses():
    model = training("qwen3_moe")
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with hf.balance(model, switch=1.0), pytest.raises(MoestroError, match="use_reentrant"):
        model(tokens())
    balancer = hf.balance(model, switch=0.0, bias_rate=0.01)  # counts need no gradient
    model(tokens()).logits.sum().backward()
    balancer.step()
    assert any(value.any() for value in balancer.state_dict().values())


def test_health_is_that_of_all_micro_batches_of_the_step():
    model = training("olmoe")
    balancer = hf.balance(model, switch=0.1)
    for _ in range(2):  # the second step must know nothing of the first
        seen = listen(model)
        for _ in range(3):
            model(tokens())
            balancer.loss().backward()
        balancer.step()
    for place, layer in enumerate(balancer.health().values()):
        both = [seen[place + 2 * micro] for micro in range(3)]
        counts_E = sum(F.one_hot(experts, 8).sum((0, 1)) for _, experts in both).float()
        probs_TE = torch.cat([logits for logits, _ in both]).softmax(-1)
        assert layer.imbalance == pytest.approx((counts_E.max() / counts_E.mean()).item())
        assert layer.dead == (counts_E == 0).sum()
        entropy = -(probs_TE * probs_TE.log()).sum(-1).mean() / torch.tensor(8.0).log()
        assert layer.entropy == pytest.approx(entropy.item(), rel=1e-5)
    assert list(balancer.health()) == [f"model.layers.{n}.mlp.experts" for n in range(2)]


def test_evaluation_counts_nothing():
    model = training("qwen3_moe")
    balancer = hf.balance(model, switch=0.1)
    with torch.no_grad():
        model(tokens())
    model.eval()
    model(tokens())
    with pytest.raises(MoestroError, match="no forward pass"):
        balancer.loss()
    with pytest.raises(MoestroError, match="without a forward pass"):
        balancer.step()
    with pytest.raises(MoestroError, match="no step"):
        balancer.health()


def test_wrong_use_is_said_at_once():
    model = training("qwen3_moe")
    balancer = hf.balance(model, switch=0.1)
    with pytest.raises(MoestroError, match="balanced already"):
        hf.balance(model, switch=0.1)
    model(tokens())
    with pytest.raises(MoestroError, match="never taken"):
        model(tokens())
    model(tokens())  # the refused pass left nothing behind
    balancer.loss()
    with pytest.raises(MoestroError, match="no forward pass"):
        balancer.loss()
    with pytest.raises(MoestroError, match="no backward pass"):
        balancer.step()
    balancer.remove()
    model(tokens())
    with pytest.raises(MoestroError, match="no forward pass"):
        balancer.loss()


def test_models_and_coefficients_that_cannot_be():
    for name, settings, error, words in (
        ("llama", {"switch": 0.1}, MoestroError, "no mixture"),
        ("qwen3_moe", {"switch": -0.1}, ConfigError, "switch"),
        ("qwen3_moe", {"scope": "all"}, ConfigError, "scope"),
        ("deepseek_v3", {}, ConfigError, "names no coefficient"),
        ("phimoe", {"bias_rate": 0.1}, MoestroError, "PhimoeTopKRouter"),
    ):
        model = training(name)
        with pytest.raises(error, match=words):
            hf.balance(model, **settings)
        assert not model._forward_pre_hooks
    with pytest.raises(ConfigError, match="DistributedDataParallel"):
        hf.balance(torch.nn.DataParallel(training("qwen3_moe")), switch=0.1)


def test_a_familys_coefficient_of_zero_stands_where_something_else_is_asked_for():
    """An explicit zero too: to use a trained model, whose biases are loaded."""
    for name in ("mixtral", "qwen3_moe"):
        model = training(name, router_aux_loss_coef=0.0)
        with pytest.raises(ConfigError, match="is 0; give switch="):
            hf.balance(model)
        for settings in ({"z": 0.1}, {"bias_rate": 0.1}, {"switch": 0.0}):
            with hf.balance(model, **settings) as balancer:
                assert balancer.cfg.switch == 0


def test_a_loss_that_cannot_reach_anything_is_refused():
    model = training("qwen3_moe")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    balancer = hf.balance(model, switch=0.1)
    model(tokens())
    with pytest.raises(MoestroError, match="no gradient"):
        balancer.loss()


def test_a_mixture_that_did_not_run_is_refused():
    model = training("qwen3_moe")
    hf.balance(model, switch=0.1)
    experts = experts_of(model)[1]
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(MoestroError, match=r"layers\.1\.mlp\.experts did not run"):
        model(tokens())
    assert experts is not None


RANK_OF_TWO = """
import sys, warnings
warnings.filterwarnings("error")
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
import moestro.hf as hf
from moestro.train.distributed import joined

root = Path(sys.argv[1])
with joined(torch.device("cpu")) as ranks:
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_pretrained(root))
    model.set_experts_implementation("eager")
    model.load_state_dict(load_file(root / "start.safetensors"))
    wrapped = DistributedDataParallel(model.train())
    balancer = hf.balance(wrapped, switch=0.5, scope="global", z=0.1, bias_rate=0.01)
    mine = load_file(root / "batch.safetensors")["tokens"].chunk(2)[ranks.rank]
    for _ in range(2):
        (wrapped(mine).logits.square().mean() + balancer.loss()).backward()
        balancer.step()
    if ranks.writes:
        grads = {n: p.grad for n, p in model.named_parameters()}
        save_file(grads, root / "grads.safetensors")
        save_file(balancer.state_dict(), root / "biases.safetensors")
    print([tuple(layer) for layer in balancer.health().values()])
"""


def test_two_ranks_are_one(tmp_path):
    model = training("qwen3_moe")
    batch = tokens(4)
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    save_file({"tokens": batch}, tmp_path / "batch.safetensors")
    found = run_two_ranks(RANK_OF_TWO, tmp_path)
    balancer = hf.balance(model, switch=0.5, scope="global", z=0.1, bias_rate=0.01)
    for _ in range(2):
        (model(batch).logits.square().mean() + balancer.loss()).backward()
        balancer.step()
    assert found[0] == found[1]
    for layer, theirs in zip(balancer.health().values(), eval(found[0]), strict=True):
        assert tuple(layer) == pytest.approx(theirs, rel=1e-6)
    torch.testing.assert_close(load_file(tmp_path / "biases.safetensors"), balancer.state_dict())
    grads = load_file(Path(tmp_path, "grads.safetensors"))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)
