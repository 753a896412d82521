"""Runs experts of transformers that do not use its experts interface.

Where one is asked to run on moestro, its forward, or that of the block around it, is replaced in
the module by a function of this file, which calls `moestro.hf.forward.mixture`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from moestro.foreign import undecorated
from moestro.foreign.classes import core, kind
from moestro.foreign.routers import ROUTERS
from moestro.hf.forward import PACKED, mixture

Forward = Callable[..., Any]


def _llama4_block(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Only the experts that are chosen; each weight multiplies what goes into its expert."""
    x_TD = hidden_states.reshape(-1, self.hidden_dim)
    scores_TE, logits_TE = self.router(x_TD)
    weights_TK, experts_TK = scores_TE.topk(self.top_k, dim=-1)
    rows_AD = (x_TD[:, None] * weights_TK[..., None]).flatten(0, 1)
    experts_A1 = experts_TK.reshape(-1, 1)
    y_AD = self.experts(rows_AD, experts_A1, torch.ones_like(experts_A1, dtype=rows_AD.dtype))
    routed_TD = y_AD.view(len(x_TD), self.top_k, -1).sum(1)
    return self.shared_expert(x_TD) + routed_TD, logits_TE


def _jetmoe(self: Any, layer_input: Tensor) -> Tensor:
    """JetMoE's mixture of feed-forward networks, whose sum has a bias."""
    x_TD = layer_input.reshape(-1, layer_input.shape[-1])
    output = ROUTERS["JetMoeTopKGating"].output
    assert output is not None
    # Not by the logits: a probe may have written another choice into what the router returns.
    experts_TK, weights_TK, _ = output[0](core(self.router), self.router(x_TD))
    y_TD = mixture(self, x_TD, experts_TK, weights_TK)
    biased: Tensor = y_TD.view_as(layer_input) + self.bias
    return biased


def _longcat(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts that compute, which ignore the others' numbers, and those that return their input."""
    y_TD = mixture(self, hidden_states, top_k_index, top_k_weights)
    same_TK = top_k_index >= self.num_routed_experts
    share_T1 = top_k_weights.masked_fill(~same_TK, 0).sum(-1, keepdim=True)
    return y_TD + (hidden_states * share_T1).to(y_TD.dtype)


def _dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts that are handed texts, not rows."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    return mixture(self, x_TD, top_k_index, top_k_weights).view_as(hidden_states)


def _switch(
    self: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    """One expert for each token, given as zeros and a one; for a token that is dropped, none."""
    chosen_TE = selected_experts.flatten(0, 1)
    dropped_T = chosen_TE.sum(-1) == 0
    experts_T = chosen_TE.argmax(-1).masked_fill(dropped_T, self.num_experts)
    if PACKED not in vars(self):
        undecorated.gather(self)
    return mixture(self, hidden_states, experts_T[:, None], routing_weights)


FORWARDS: Mapping[str, Forward] = {
    "DbrxExperts": _dbrx,
    "JetMoeMoE": _jetmoe,
    "Llama4TextExperts": mixture,
    "Llama4TextMoe": _llama4_block,
    "LongcatFlashExperts": _longcat,
    "Step3p7Experts": mixture,
    "SwitchTransformersExperts": _switch,
}


def host(model: nn.Module) -> None:
    """Let moestro run such experts of a model."""
    for module in model.modules():
        forward = FORWARDS.get(kind(module))
        if forward is not None and type(module).__module__.startswith("transformers.models."):
            vars(module)["forward"] = MethodType(forward, module)


def release(model: nn.Module) -> None:
    """Let them run as in transformers again."""
    for module in model.modules():
        given = vars(module).get("forward")
        if getattr(given, "__func__", None) in FORWARDS.values():
            del module.forward
