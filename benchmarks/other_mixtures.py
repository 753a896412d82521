"""Mixtures of other packages, described for `moestro check`: adapters only, of what is installed.

Each factory imports its package when it is called and makes a small layer without drops and noise,
where the package allows that; names of weights and rules are as its documentation states them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from moestro.check import AdapterNames, Description, ExpertNames, RouterRule, SharedNames

DIM, HIDDEN, EXPERTS = 16, 8, 4


def mixture_of_experts() -> tuple[nn.Module, Description]:
    """Top-2 of GShard, ReLU experts (mixture-of-experts)."""
    from mixture_of_experts import MoE

    layer = MoE(
        dim=DIM, num_experts=EXPERTS, hidden_dim=HIDDEN, second_policy_eval="all",
        capacity_factor_eval=100.0,
    )  # fmt: skip
    return layer, Description(
        router=RouterRule(top_k=2, weight="gate.w_gating", transposed=True),
        experts=ExpertNames(up="experts.w1", down="experts.w2", activation="relu", transposed=True),
        training=False,
    )


def st_moe() -> tuple[nn.Module, Description]:
    """Top-2 with GEGLU experts, gate rows second (st-moe-pytorch)."""
    from st_moe_pytorch import MoE

    class Gated(nn.Module):
        """An expert whose rows are named as the description wants them."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN, False)
            self.down = nn.Linear(HIDDEN, DIM, bias=False)

        def forward(self, x: Any) -> Any:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    layer = MoE(
        dim=DIM, num_experts=EXPERTS, gating_top_n=2, threshold_eval=0.0, threshold_train=0.0,
        capacity_factor_eval=100.0, capacity_factor_train=100.0,
        straight_through_dispatch_tensor=False,
        experts=nn.ModuleList(Gated() for _ in range(EXPERTS)),
    )  # fmt: skip
    return layer, Description(
        router=RouterRule(top_k=2, weight="gate.to_gates.weight"),
        experts=ExpertNames(
            gate="experts.experts.{e}.gate.weight", up="experts.experts.{e}.up.weight",
            down="experts.experts.{e}.down.weight",
        ),
        z=lambda module, output: output.router_z_loss,
    )  # fmt: skip


def litgpt(**more: Any) -> tuple[nn.Module, Description]:
    """Mixtral's layer (litgpt)."""
    from litgpt.config import Config
    from litgpt.model import LLaMAMoE

    config = Config(
        n_embd=DIM, n_expert=EXPERTS * 2, n_expert_per_token=2, moe_intermediate_size=HIDDEN,
        mlp_class_name="LLaMAMoE", bias=False, n_head=2, **more,
    )  # fmt: skip
    layer = LLaMAMoE(config)
    grouped = bool(more)
    if grouped:
        nn.init.normal_(layer.gate.weight, 0, 0.5)
        layer.gate.e_score_correction_bias.uniform_(0, 0.5)
    return layer, Description(
        router=RouterRule(
            top_k=2, weight="gate.weight", score="sigmoid" if grouped else "softmax",
            choice_bias="gate.e_score_correction_bias" if grouped else None,
            num_groups=4 if grouped else 1, top_groups=2 if grouped else 1,
            scale=2.5 if grouped else 1.0,
        ),
        experts=ExpertNames(
            gate="experts.{e}.fc_1.weight", up="experts.{e}.fc_2.weight",
            down="experts.{e}.proj.weight",
        ),
        shared=SharedNames(module="shared_experts") if grouped else None,
    )  # fmt: skip


def litgpt_grouped() -> tuple[nn.Module, Description]:
    """DeepSeek-V3's layer (litgpt)."""
    return litgpt(
        n_expert_groups=4, n_topk_groups=2, n_topk_scores_per_group=2, norm_topk_prob=True,
        routed_scaling_factor=2.5, n_shared_expert=1,
    )  # fmt: skip


def latent_moe() -> tuple[nn.Module, Description]:
    """With a latent width of D and identities around it, a plain mixture (latent-moe)."""
    from latent_moe import LatentMoE, LatentMoEConfig

    layer = LatentMoE(
        LatentMoEConfig(d=DIM, m=HIDDEN, n_experts=EXPERTS, top_k=2, alpha=1, n_shared=0,
                        device="cpu")
    )  # fmt: skip
    for each in (layer.w_down, layer.w_up):
        nn.init.eye_(each.weight)
        each.weight.requires_grad_(False)
    return layer, Description(
        router=RouterRule(top_k=2, weight="router.weight"),
        experts=ExpertNames(
            gate="experts.{e}.fc1.weight", up="experts.{e}.gate.weight",
            down="experts.{e}.fc2.weight",
        ),
        balance=lambda module, _: module.aux_loss / 1e-2,
        z=lambda module, _: module.z_loss / 1e-3,
    )  # fmt: skip


def torchtitan() -> tuple[nn.Module, Description]:
    """Sigmoid scores, normalised, with a bias to choose by (torchtitan)."""
    from torchtitan.models.common import moe
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    config = moe.MoE.Config(
        num_experts=EXPERTS,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(
                dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS
            ),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=2),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS, gate=Linear.Config(in_features=DIM, out_features=EXPERTS),
            top_k=2, score_func="sigmoid", route_norm=True, route_scale=2.5,
        ),
    )  # fmt: skip
    layer = config.build()
    for each in layer.parameters():
        nn.init.normal_(each, 0, 0.3)
    return layer, Description(
        router=RouterRule(top_k=2, weight="router.gate.weight", choice_bias="expert_bias_E",
                          score="sigmoid", scale=2.5),
        experts=ExpertNames(
            gate="routed_experts.inner_experts.w1_EFD", up="routed_experts.inner_experts.w3_EFD",
            down="routed_experts.inner_experts.w2_EDF",
        ),
    )  # fmt: skip


def peft() -> tuple[nn.Module, Description]:
    """Adapters of PEFT on both weights of transformers' Mixtral experts."""
    import peft
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=2
    )
    config._experts_implementation = "batched_mm"
    block = MixtralSparseMoeBlock(config)
    for each in block.parameters():
        nn.init.normal_(each, 0, 0.3)
    lora = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    layer = peft.inject_adapter_in_model(lora, block)
    layer.requires_grad_(True)
    found = []  # weight, A, B; the wrapper of the second weight is around that of the first
    for weight, at in (("gate_up_proj", "base_layer."), ("down_proj", "")):
        a, b = (f"experts.{at}lora_{each}.default.weight" for each in "AB")
        nn.init.normal_(layer.get_parameter(b), 0, 0.3)
        found.append((f"experts.base_layer.base_layer.{weight}", a, b))
    return layer, Description(
        router=RouterRule(top_k=2, weight="gate.weight"),
        experts=ExpertNames(gate_up=found[0][0], down=found[1][0]),
        adapters=tuple(
            AdapterNames(weight=own, a=a, b=b, scale=1.5, flat=True) for own, a, b in found
        ),
        merge=lambda module: (module.experts.base_layer.merge(), module.experts.merge()),
    )


FACTORIES: dict[str, Callable[[], tuple[nn.Module, Description]]] = {
    each.__name__: each
    for each in (
        mixture_of_experts, st_moe, litgpt, litgpt_grouped, latent_moe, torchtitan, peft,
    )
}  # fmt: skip
