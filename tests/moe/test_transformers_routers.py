"""Routing and whole layers against transformers' own modules, on random weights."""

import pytest
import torch

from moestro import MoE, MoEConfig
from moestro.moe.routers import build_router

pytest.importorskip("transformers")

from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    PhimoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

D, E, T = 16, 12, 200


def config_of(top_k, num_experts=E, **changes):
    return MoEConfig(dim=D, hidden_dim=8, num_experts=num_experts, top_k=top_k, **changes)


def by_expert(experts_TK, weights_TK):
    """Weight of every expert, zero where it is not chosen: the order of the choices aside."""
    return torch.zeros(len(experts_TK), E).scatter(1, experts_TK, weights_TK.float())


def assert_same_routing(routing, experts_TK, weights_TK):
    ours_TE = by_expert(routing.experts_TK(), routing.weights_R.view(experts_TK.shape))
    theirs_TE = by_expert(experts_TK, weights_TK)
    assert torch.equal(ours_TE > 0, theirs_TE > 0)
    torch.testing.assert_close(ours_TE, theirs_TE, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2(method):
    theirs = DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=D,
            num_attention_heads=2,
            n_routed_experts=E,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            topk_method=method,
            routed_scaling_factor=16.0,
        )
    )
    torch.nn.init.normal_(theirs.weight)
    groups = {} if method == "greedy" else {"num_groups": 4, "top_groups": 2, "group_score": "max"}
    ours = build_router(config_of(3, router={"renormalize": False, "scale": 16.0, **groups}))
    ours.load_state_dict(theirs.state_dict())
    x_TD = torch.randn(T, D)
    _, weights_TK, experts_TK = theirs(x_TD)
    assert_same_routing(ours(x_TD), experts_TK, weights_TK)


def test_deepseek_v3():
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=D,
            n_routed_experts=E,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )
    )
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.e_score_correction_bias, std=0.3)
    router = {"kind": "sigmoid", "selection_bias": True, "num_groups": 4, "top_groups": 2}
    ours = build_router(config_of(3, router={**router, "scale": 2.5}))
    bias_E = theirs.e_score_correction_bias
    ours.load_state_dict({"weight": theirs.weight, "bias": bias_E})
    x_TD = torch.randn(T, D)
    _, weights_TK, experts_TK = theirs(x_TD)
    assert_same_routing(ours(x_TD), experts_TK, weights_TK)


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_phimoe(jitter):
    theirs = PhimoeTopKRouter(
        PhimoeConfig(
            hidden_size=D,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=E,
            num_experts_per_tok=2,
            router_jitter_noise=jitter,
        )
    ).eval()
    torch.nn.init.normal_(theirs.weight)
    ours = build_router(config_of(2, router={"kind": "sparsemixer", "jitter": jitter})).eval()
    ours.load_state_dict(theirs.state_dict())
    x_TD = torch.randn(T, D)
    _, weights_TK, experts_TK = theirs(x_TD)
    assert torch.equal(ours(x_TD).experts_TK(), experts_TK)
    assert_same_routing(ours(x_TD), experts_TK, weights_TK)


def test_gpt_oss_with_all_its_biases():
    theirs = GptOssMLP(
        GptOssConfig(hidden_size=D, intermediate_size=8, num_local_experts=E, num_experts_per_tok=4)
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    cfg = config_of(4, activation="clamped_swiglu", router={"bias": True}, experts={"bias": True})
    ours = MoE(cfg)
    experts = theirs.experts

    def gate_first(interleaved):
        return torch.cat([interleaved[..., ::2], interleaved[..., 1::2]], dim=-1)

    ours.load_state_dict(
        {
            "router.weight": theirs.router.weight,
            "router.logit_bias": theirs.router.bias,
            "experts.gate_up": gate_first(experts.gate_up_proj).transpose(1, 2),
            "experts.gate_up_bias": gate_first(experts.gate_up_proj_bias),
            "experts.down": experts.down_proj.transpose(1, 2),
            "experts.down_bias": experts.down_proj_bias,
        }
    )
    x = torch.randn(2, 30, D, requires_grad=True)
    goal = torch.randn(2, 30, D)
    results = []
    for layer in (theirs, ours):
        y = layer(x)[0]
        results.append((y.detach(), *torch.autograd.grad((y * goal).sum(), x)))
        with torch.no_grad():
            results[-1] += (layer(x[:1, :1])[0],)
    for left, right in zip(*results, strict=True):
        scale = left.abs().max().item()
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * scale)
    grad_E = torch.autograd.grad((ours(x)[0] * goal).sum(), ours.router.logit_bias)[0]
    their_E = torch.autograd.grad((theirs(x)[0] * goal).sum(), theirs.router.bias)[0]
    torch.testing.assert_close(grad_E, their_E, rtol=1e-3, atol=1e-4 * their_E.abs().max().item())


def test_switch_drops_in_each_sequence():
    theirs = SwitchTransformersTop1Router(
        SwitchTransformersConfig(d_model=D, num_experts=4, expert_capacity=5)
    ).eval()
    torch.nn.init.normal_(theirs.classifier.weight)
    ours = MoE(config_of(1, num_experts=4, capacity={"per_sequence": 5})).eval()
    ours.router.weight.data.copy_(theirs.classifier.weight)
    x = torch.randn(3, 30, D)
    masks_BSE, weights_BS1, _ = theirs(x)
    _, routing = ours(x)
    kept_TE = torch.zeros(90, 4, dtype=torch.int64)
    kept_TE[torch.arange(90), routing.experts_R] = routing.kept_R.long()
    assert torch.equal(kept_TE, masks_BSE.flatten(0, 1))
    torch.testing.assert_close(routing.weights_R, weights_BS1.flatten())
    assert 0 < routing.dropped() < 90
