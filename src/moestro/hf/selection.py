"""The bias that loss-free balancing chooses experts with, for routers of transformers.

Where a family has one (`e_score_correction_bias` and the like) it is that family's own tensor.
Elsewhere the router's choice is made again with a bias, by the family's own rule, which is held to
the router's own choice bit for bit before it is trusted.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from moestro.errors import MoestroError
from moestro.probe.recording import routers

# What families call the bias that they choose with and that is in no weight.
BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")

# (router, its logits [T, E], bias [E]) → (weights [T, K], experts [T, K])
Rule = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


class OwnBias:
    """A bias tensor of the model's own, updated through a copy in fp32.

    Steps of 1e-3 are lost in a bfloat16 tensor, so the copy holds what the steps add up to. A
    tensor that is sharded is gathered to be read: read and set it on every rank.
    """

    def __init__(self, owner: nn.Module, path: str) -> None:
        self._owner, self._path = owner, path
        self._exact_E: Tensor | None = None

    @property
    def value_E(self) -> Tensor:
        """fp32 [E]; what the tensor holds, should others have written to it meanwhile."""
        held = self._held()
        held_E = (held.full_tensor() if isinstance(held, DTensor) else held).reshape(-1)
        if self._exact_E is not None:
            exact_E = self._exact_E.to(held_E.device)
            if torch.equal(exact_E.to(held_E.dtype), held_E):
                return exact_E
        return held_E.to(torch.float32, copy=True)

    def set(self, bias_E: Tensor) -> None:
        """Take fp32 [E] over, rounded to the tensor's dtype where the model reads it."""
        held = self._held()
        self._exact_E = bias_E.detach().to(held.device, torch.float32, copy=True)
        value = self._exact_E.view(held.shape)
        if isinstance(held, DTensor):
            # Every rank has the whole, so each keeps its own part of it.
            places = (held.device_mesh, held.placements)
            value = distribute_tensor(value, *places, src_data_rank=None)
        held.copy_(value)

    def remove(self) -> None:
        """Nothing: the bias is the model's and stays."""

    def _held(self) -> Tensor:
        """The tensor as it is now: moving or sharding a model replaces it."""
        tensor: Tensor = attrgetter(self._path)(self._owner)
        return tensor.detach()


class AddedBias:
    """A bias that the family does not have: a hook on the router chooses again with it.

    Until it is removed the model chooses with it, in training and in use, and so does a copy of
    the model, with a bias of its own. The first call makes the choice with a bias of zero too and
    compares it with the router's.

    Attributes:
        held: whether a balancer has it; not in a copy, whose bias the next balancer takes over.
    """

    def __init__(self, name: str, router: nn.Module, num_experts: int) -> None:
        kind = routers.named(router)
        rule = RULES.get(kind)
        if rule is None:
            raise MoestroError(
                f"{name} is a {kind}: it has no selection bias, and how it chooses is not known "
                "here, so none can be added; balance this family with switch=, and leave "
                "bias_rate at 0"
            )
        self.held = True
        self._name, self._rule, self._proven = name, rule, False
        self._bias_E = torch.zeros(num_experts, dtype=torch.float32, device="cpu")
        self._hook = router.register_forward_hook(self._choose)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "held": False}

    @property
    def value_E(self) -> Tensor:
        """fp32 [E]."""
        return self._bias_E

    def set(self, bias_E: Tensor) -> None:
        """Take fp32 [E] over."""
        self._bias_E = bias_E.detach().to(torch.float32, copy=True)

    def remove(self) -> None:
        """Let the router choose by itself again."""
        self._hook.remove()

    def _choose(self, router: nn.Module, _: Any, output: Any) -> Any:
        logits_TE = output[0]
        bias_E = self._bias_E.to(logits_TE.device)
        if not logits_TE.is_meta:  # a pass that only asks for shapes leaves nothing behind
            self._bias_E = bias_E
            if not self._proven and logits_TE.numel():
                self._prove(routers.core(router), output)
        weights_TK, experts_TK = self._rule(routers.core(router), logits_TE, bias_E)
        return (logits_TE, weights_TK.to(output[1].dtype), experts_TK, *output[3:])

    @torch.no_grad()
    def _prove(self, router: nn.Module, output: Any) -> None:
        logits_TE, weights_TK, experts_TK = output[:3]
        again_TK, chosen_TK = self._rule(router, logits_TE, torch.zeros_like(self._bias_E))
        same = torch.equal(chosen_TK, experts_TK)
        if not same or not torch.equal(again_TK.to(weights_TK.dtype), weights_TK):
            raise MoestroError(
                f"{self._name} ({routers.kind(router)}) does not choose by the rule that its "
                "class is known for, so a bias cannot be added to its choice; balance this model "
                "with switch=, and leave bias_rate at 0"
            )
        self._proven = True


Bias = OwnBias | AddedBias


def bias_of(name: str, router: nn.Module, block: nn.Module, num_experts: int) -> Bias:
    """The selection bias of one mixture, the family's own or an added one.

    Args:
        name: the router's, for messages.
        router: what returns (logits, weights, experts).
        block: the module that holds router and experts; some families keep the bias there.
        num_experts: E.

    Raises:
        MoestroError: there is none, and the router's rule is not known.
    """
    inner = routers.core(router)
    within = [path for path, _ in inner.named_modules()]
    # A wrapper that holds two routers shows the attributes of the one that runs; others show none.
    places = [(owner, path) for path in within for owner in (router, inner)]
    for owner, path in (*places, (block, "")):
        for own in BIASES:
            name_in = f"{path}.{own}" if path else own
            tensor = _reach(owner, name_in)
            if isinstance(tensor, Tensor) and tensor.numel() == num_experts:
                return OwnBias(owner, name_in)
    for hook in router._forward_hooks.values():
        added = getattr(hook, "__self__", None)
        if isinstance(added, AddedBias):
            if added.held:
                raise MoestroError(
                    f"{name} still chooses with the bias of an earlier balancer; call remove() on "
                    "that"
                )
            added.held = True
            return added
    return AddedBias(name, router, num_experts)


def _reach(owner: nn.Module, path: str) -> Any:
    try:
        return attrgetter(path)(owner)
    except AttributeError:
        return None


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP gathered: what is written there is lost, the shards are what counts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _softmax(
    router: Any, logits_TE: Tensor, bias_E: Tensor, *, renormalize: bool | None
) -> tuple[Tensor, Tensor]:
    """Top-K of the softmax; None renormalizes where the router's `norm_topk_prob` says so."""
    probs_TE = logits_TE.softmax(-1, dtype=torch.float32)
    experts_TK = (probs_TE.detach() + bias_E).topk(router.top_k, dim=-1).indices
    weights_TK = probs_TE.gather(-1, experts_TK)
    if router.norm_topk_prob if renormalize is None else renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK, experts_TK


def _logits(
    router: Any, logits_TE: Tensor, bias_E: Tensor, *, parts: bool = False
) -> tuple[Tensor, Tensor]:
    """Top-K of the logits; weights are the softmax of those chosen, in parts of 1 / K if so."""
    experts_TK = (logits_TE.detach() + bias_E).topk(router.top_k, dim=-1).indices
    weights_TK = logits_TE.gather(-1, experts_TK).softmax(-1)
    return weights_TK / router.top_k if parts else weights_TK, experts_TK


def _sigmoid(router: Any, logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Top-K of the sigmoid."""
    scores_TE = logits_TE.sigmoid()
    experts_TK = (scores_TE.detach() + bias_E).topk(router.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, experts_TK)
    if router.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK, experts_TK


def _deepseek_v2(router: Any, logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Top-K of the softmax, within the best groups where so configured; weights scaled."""
    probs_TE = logits_TE.softmax(-1, dtype=torch.float32)
    choice_TE = probs_TE.detach() + bias_E
    if router.topk_method == "group_limited_greedy":
        grouped_TNP = choice_TE.view(len(choice_TE), router.num_group, -1)
        best_TG = grouped_TNP.amax(-1).topk(router.topk_group, dim=-1, sorted=False).indices
        open_TN = torch.zeros_like(grouped_TNP[..., 0], dtype=torch.bool).scatter(1, best_TG, True)
        choice_TE = grouped_TNP.masked_fill(~open_TN[..., None], -math.inf).flatten(1)
    experts_TK = choice_TE.topk(router.top_k, dim=-1, sorted=False).indices
    return probs_TE.gather(-1, experts_TK) * router.routed_scaling_factor, experts_TK


# Class of the router → its rule. A class that is not here gets no bias.
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "FlexOlmoTopKRouter", "MellumTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter", "Qwen3NextTopKRouter", "Qwen3OmniMoeThinkerTextTopKRouter",
            "Qwen3OmniMoeTalkerTextTopKRouter", "Qwen4ExpTextTopKRouter",
        ),
        partial(_softmax, renormalize=None),
    ),
    **dict.fromkeys(
        (
            "HunYuanMoEV1Gate", "MiniMaxTopKRouter", "MixtralTopKRouter", "Qwen3_5MoeTopKRouter",
            "Qwen3OmniMoeTextTopKRouter", "Qwen3VLMoeTextTopKRouter",
        ),
        partial(_softmax, renormalize=True),
    ),
    "JambaTopKRouter": partial(_softmax, renormalize=False),
    **dict.fromkeys(
        (
            "AriaTextTopKRouter", "GptOssTopKRouter", "GraniteMoeHybridTopKRouter",
            "GraniteMoeSharedTopKRouter", "GraniteMoeSWATopKRouter", "GraniteMoeTopKRouter",
        ),
        _logits,
    ),
    "OpenAIPrivacyFilterTopKRouter": partial(_logits, parts=True),
    **dict.fromkeys(
        ("DeepseekOcr2TextTopkRouter", "DeepseekV2TopkRouter", "UnlimitedOcrTextTopkRouter"),
        _deepseek_v2,
    ),
    "FlintTopKRouter": _sigmoid,
}  # fmt: skip
