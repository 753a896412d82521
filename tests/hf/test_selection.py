"""Loss-free balancing of transformers' mixtures: a bias that chooses and is in no weight."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import moestro.hf as hf
from moestro.errors import CheckpointError, MoestroError
from moestro.foreign.routers import ROUTERS

from ..probe import foreign_zoo
from ..ranks import run_two_ranks
from .zoo import NAMES, build, tokens

OWN = ("deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe", "minimax_m2")
ADDED = tuple(name for name in NAMES if name not in (*OWN, "phimoe"))
VARIANTS = [
    *((name, {}) for name in ADDED),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
]


def training(name, layers=2, **changes):
    return build(name, layers, **changes).train()


def one_step(balancer, model, batch=None):
    """The experts [T, K] that each layer used in a step."""
    used = []
    hooks = [
        block.experts.register_forward_pre_hook(
            lambda m, args, kwargs: used.append([*args, *kwargs.values()][1]), with_kwargs=True
        )
        for block in model.modules()
        if hasattr(getattr(block, "experts", None), "is_transposed")
    ]
    model(tokens() if batch is None else batch)
    balancer.step()
    for hook in hooks:
        hook.remove()
    return used


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_zero_changes_no_bit(name, changes, dtype):
    model, batch = training(name, **changes).to(dtype), tokens()
    before = model(batch).logits
    with hf.balance(model, switch=0.0, bias_rate=0.1) as balancer:
        assert balancer.adds_bias
        assert torch.equal(model(batch).logits, before)
        balancer.load_state_dict(
            {n: torch.randn(b.shape) for n, b in balancer.state_dict().items()}
        )
        assert not torch.equal(model(batch).logits, before)
    assert torch.equal(model(batch).logits, before)


@pytest.mark.parametrize("name", [*ADDED, *OWN])
def test_a_step_moves_each_bias_by_the_sign_of_its_load(name):
    model = training(name)
    balancer = hf.balance(model, switch=0.0, bias_rate=0.01)
    before = balancer.state_dict()
    used = one_step(balancer, model)
    after = balancer.state_dict()
    for experts_TK, key in zip(used, after, strict=True):
        counts_E = F.one_hot(experts_TK, len(after[key])).sum((0, 1)).float()
        assert counts_E.std() > 0
        signs_E = torch.sign(counts_E.mean() - counts_E)
        wanted_E = before[key] + 0.01 * (signs_E - signs_E.mean())
        torch.testing.assert_close(after[key], wanted_E)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_steps_make_the_load_even(name):
    model = training(name)
    batch = tokens(4, 24)
    balancer = hf.balance(model, switch=0.0, bias_rate=0.01)
    skewed = {n: torch.linspace(-0.5, 0.5, len(b)) for n, b in balancer.state_dict().items()}
    balancer.load_state_dict(skewed)
    one_step(balancer, model, batch)
    first = [layer.imbalance for layer in balancer.health().values()]
    for _ in range(80):
        model(batch)
        balancer.step()
    for before, layer in zip(first, balancer.health().values(), strict=True):
        assert layer.imbalance < 1.35 < 1.5 < before
        assert layer.dead == 0


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_bias_chooses_and_is_in_no_weight(renormalize):
    model = training("qwen3_moe", 1, norm_topk_prob=renormalize)
    balancer = hf.balance(model, switch=0.0, bias_rate=0.1)
    bias_E = torch.tensor([0.5, -0.5, 0.0, 0.3, 0.0, -0.1])
    balancer.load_state_dict({"model.layers.0.mlp.experts": bias_E})
    logits_TE, weights_TK, experts_TK = model.model.layers[0].mlp.gate(torch.randn(7, 48))
    probs_TE = logits_TE.softmax(-1)
    assert torch.equal(experts_TK, (probs_TE + bias_E).topk(3).indices)
    wanted_TK = probs_TE.gather(1, experts_TK)
    if renormalize:
        wanted_TK = wanted_TK / wanted_TK.sum(1, keepdim=True)
    torch.testing.assert_close(weights_TK, wanted_TK)
    assert weights_TK.requires_grad


def test_groups_are_chosen_with_the_bias_too():
    model = training(
        "deepseek_v2", 1, topk_method="group_limited_greedy", n_group=2, topk_group=1
    )  # groups of experts 0-3 and 4-7
    balancer = hf.balance(model, switch=0.0, bias_rate=0.1)
    name = "model.layers.0.mlp.experts"
    balancer.load_state_dict({name: torch.tensor([-2.0, -2, -2, -2, -9, -9, -9, -9])})
    assert model.model.layers[0].mlp.gate(torch.randn(1, 7, 48))[2].max() <= 3
    balancer.load_state_dict({name: torch.tensor([-2.0, -2, -2, -2, 0, -1, -1, -1])})
    assert model.model.layers[0].mlp.gate(torch.randn(1, 7, 48))[2].min() >= 4


def test_micro_batches_of_a_step_count_together():
    found = []
    batch = tokens(4)
    for parts in (1, 2):
        model = training("qwen3_moe")
        balancer = hf.balance(model, switch=0.0, bias_rate=0.01)
        for _ in range(3):
            for micro in batch.chunk(parts):
                model(micro)
            balancer.step()
        found.append(balancer.state_dict())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_small_steps_add_up_in_a_bfloat16_bias():
    model = training("dots1", 1).bfloat16()
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 9, 8, 8, 8]))
    balancer = hf.balance(model, switch=0.0, bias_rate=0.001)
    for _ in range(40):  # experts 0-2 get everything, and 9 - 0.001 is 9 in bfloat16
        one_step(balancer, model)
    assert gate.e_score_correction_bias.dtype == torch.bfloat16
    exact_E = balancer.state_dict()["model.layers.0.mlp.experts"]
    torch.testing.assert_close(exact_E, torch.tensor([8.96, 8.96, 8.96, 8.04, 8.04, 8.04]))
    assert torch.equal(gate.e_score_correction_bias, exact_E.bfloat16())
    gate.e_score_correction_bias.fill_(1.0)  # as loading a checkpoint would
    assert torch.equal(balancer.state_dict()["model.layers.0.mlp.experts"], torch.ones(6))


def test_a_model_that_moves_takes_its_bias_along():
    model = training("deepseek_v3", 1)
    balancer = hf.balance(model, switch=0.0, bias_rate=0.1)
    model.double()  # replaces every buffer
    before = model.model.layers[0].mlp.gate.e_score_correction_bias.clone()
    one_step(balancer, model)
    assert (model.model.layers[0].mlp.gate.e_score_correction_bias - before).abs().max() > 0.09


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_biases_are_kept_and_found_again(name):
    model, batch = training(name), tokens()
    balancer = hf.balance(model, switch=0.0, bias_rate=0.2)
    for _ in range(3):
        one_step(balancer, model, batch)
    model.eval()
    trained, state = model(batch).logits, balancer.state_dict()
    balancer.remove(keep_bias=True)
    assert torch.equal(model(batch).logits, trained)
    if balancer.adds_bias:
        with pytest.raises(MoestroError, match="earlier balancer"):
            hf.balance(model, bias_rate=0.1)
        balancer.remove()
        assert not torch.equal(model(batch).logits, trained)

    again = build(name, 2)
    used = hf.balance(again, switch=0.0)
    used.load_state_dict(state)
    assert torch.equal(again(batch).logits, trained)
    assert used.state_dict().keys() == state.keys()
    for wrong in ({}, {**state, "model.layers.0.mlp.experts": torch.zeros(4)}):
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts"):
            used.load_state_dict(wrong)


def test_without_biases_there_is_nothing_to_save():
    balancer = hf.balance(training("qwen3_moe"), switch=0.1)
    assert balancer.state_dict() == {}
    assert not balancer.adds_bias
    balancer.load_state_dict({})


def test_a_router_that_chooses_otherwise_is_noticed():
    model = training("qwen3_moe", 1)
    gate = model.model.layers[0].mlp.gate

    class Otherwise(type(gate)):
        def forward(self, hidden_states):
            logits, weights, experts = super().forward(hidden_states)
            return logits, weights * 2, experts

    Otherwise.__name__ = type(gate).__name__
    assert ROUTERS[Otherwise.__name__].weigh is not None
    gate.__class__ = Otherwise
    hf.balance(model, switch=0.0, bias_rate=0.1)
    with pytest.raises(MoestroError, match="does not choose by the rule"):
        model(tokens())


def test_a_family_of_unknown_rule_is_left_untouched():
    model = training("qwen3_moe")
    last = model.model.layers[1].mlp.gate
    last.__class__ = type("PhimoeTopKRouter", (type(last),), {"forward": type(last).forward})
    with pytest.raises(MoestroError, match=r"layers\.1.*PhimoeTopKRouter"):
        hf.balance(model, switch=0.0, bias_rate=0.1)
    assert not model.model.layers[0].mlp.gate._forward_hooks


# Family, whether it is balanced before it is sharded, and whether its parts are by themselves.
SHARDED = (
    ("ernie4_5_moe", True, False), ("ernie4_5_moe", False, True), ("qwen3_moe", True, True),
    ("AfmoeForCausalLM", True, True),
)  # fmt: skip
RANK_OF_TWO = """
import gc, sys, warnings
warnings.filterwarnings("error", module="moestro")
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import moestro.hf as hf
from moestro.train.distributed import joined

SETTINGS = {"switch": 0.5, "scope": "global", "bias_rate": 0.01}

def run(root, rank, mesh, early, parts):
    config = transformers.AutoConfig.from_pretrained(root)
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    model.load_state_dict(load_file(root / "start.safetensors"))
    balancer = hf.balance(model, **SETTINGS) if early else None
    for layer in model.model.layers if parts else ():
        blocks = [layer.mlp] if hasattr(layer.mlp, "experts") else []
        routers = [getattr(each, "gate", None) or each.router for each in blocks]
        for part in (*routers, *(each.experts for each in blocks), layer):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    balancer = balancer or hf.balance(model, **SETTINGS)
    mine = load_file(root / "batch.safetensors")["tokens"].chunk(2)[rank]
    for _ in range(2):
        (model(mine).logits.square().mean() + balancer.loss()).backward()
        balancer.step()
    state = balancer.state_dict()
    if rank == 0:
        save_file(state, root / "biases.safetensors")
    logits = model(mine).logits  # gathers what is not let go of before the backward pass
    balancer.load_state_dict({name: value + 1 for name, value in state.items()})
    (logits.sum() + balancer.loss()).backward()
    for name, value in balancer.state_dict().items():
        torch.testing.assert_close(value, state[name] + 1, rtol=0, atol=0)
    names = ("correction_bias", "expert_bias")
    held = [value for name, value in model.named_parameters() if name.endswith(names)]
    assert bool(held) != balancer.adds_bias
    for value, wanted in zip(held, balancer.state_dict().values()):
        torch.testing.assert_close(value.full_tensor().flatten(), wanted, rtol=0, atol=0)

with joined(torch.device("cpu")) as ranks:
    mesh = init_device_mesh("cpu", (2,))
    for case in sys.argv[2:]:
        name, early, parts = case.split("-")
        run(Path(sys.argv[1], case), ranks.rank, mesh, early == "True", parts == "True")
        gc.collect()  # a balanced model is a cycle that holds the process group, which ends here
"""


def sharded(name):
    return foreign_zoo.build(name).train() if name[0].isupper() else training(name)


def test_ranks_that_share_a_sharded_model_are_one(tmp_path):
    cases, batch = {"-".join(map(str, case)): case[0] for case in SHARDED}, tokens(4)
    for case, name in cases.items():
        model = sharded(name)
        model.config.save_pretrained(tmp_path / case)
        save_file(model.state_dict(), tmp_path / case / "start.safetensors")
        save_file({"tokens": batch}, tmp_path / case / "batch.safetensors")
    run_two_ranks(RANK_OF_TWO, tmp_path, *cases)
    for case, name in cases.items():
        model = sharded(name)
        balancer = hf.balance(model, switch=0.5, scope="global", bias_rate=0.01)
        for _ in range(2):
            (model(batch).logits.square().mean() + balancer.loss()).backward()
            balancer.step()
        biases = load_file(tmp_path / case / "biases.safetensors")
        torch.testing.assert_close(biases, balancer.state_dict(), rtol=0, atol=1e-7)
