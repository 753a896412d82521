"""The function that transformers calls in the place of its own for every mixture.

Without gradients on CPU the native kernels run, on the model's own weights or on packed ones.
Everything else runs on the torch kernels that this project trains with: gradients, GPUs, a missing
native library, and what the native kernels have no form for; on CPU without gradients the reason
is said once, as a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from moestro.errors import BackendError
from moestro.hf import layouts
from moestro.kernels import backends, native_cpu
from moestro.kernels.packing import PackedExperts
from moestro.kernels.reference import Biases
from moestro.moe import dispatch
from moestro.moe.experts import FEW_ROWS, compute_dtype
from moestro.moe.routing import Routing

# Where a module's packed experts hang; see `moestro.hf.packed`.
PACKED = "moestro_packed"

_said: set[str] = set()
_watched: dict[int, list[str]] | None = None


def mixture(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run each token through its experts and add up what they return, by its weights.

    Args:
        self: an experts module of transformers.
        hidden_states: [T, D].
        top_k_index: [T, K], the experts of each token; numbers of E and above (experts of another
            rank) take no part, forward or backward.
        top_k_weights: [T, K].

    Returns:
        [T, D] in the dtype of hidden_states.

    Raises:
        BackendError: gradients are wanted of packed weights.
        ShapeError: the weights have a form that is not known.
    """
    packed: PackedExperts | None = vars(self).get(PACKED)
    inputs = (hidden_states, top_k_index, top_k_weights)
    if packed is not None:
        _refuse_training(self, [hidden_states, top_k_weights])
        _note(self, f"native {native_cpu.path()}, {packed.format.kind}")
        return _native(packed, *inputs)
    weights = layouts.read(self)
    wanted = torch.is_grad_enabled()
    if wanted and any(each.requires_grad for each in (*inputs, *weights.tensors)):
        _note(self, "torch kernels: gradients are wanted")
        return _torch(self, weights, *inputs)
    reason = why_not_native(weights, hidden_states)
    if reason is None:
        _note(self, f"native {native_cpu.path()}, {weights.up_EHD.dtype}".replace("torch.", ""))
        return _native(_plain(weights), *inputs)
    if hidden_states.device.type == "cpu":
        _say_once(f"{type(self).__name__} runs on moestro's torch kernels: {reason}")
    _note(self, f"torch kernels: {reason}")
    return _torch(self, weights, *inputs)


def why_not_native(weights: layouts.Weights, x_TD: Tensor) -> str | None:
    """Why the native kernels cannot multiply these weights as they lie; None: they can."""
    if x_TD.device.type != "cpu":
        return f"the model is on {x_TD.device.type}"
    missing = native_cpu.available()
    if missing is not None:
        return missing
    dtypes = {weights.up_EHD.dtype, weights.down_EDF.dtype}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        return "its weights are neither float32 nor bfloat16; load it in one of them"
    if compute_dtype(x_TD) not in (torch.float32, weights.up_EHD.dtype):
        return (
            f"tokens are {compute_dtype(x_TD)} and weights {weights.up_EHD.dtype}; load the model "
            "in the dtype to compute in, without autocast"
        )
    odd = weights.odd()
    if odd is not None:
        return f"they have {odd}"
    if torch.bfloat16 in dtypes and (weights.up_EHD.shape[2] % 2 or weights.down_EDF.shape[2] % 2):
        return "its bfloat16 weights have an odd width"
    if weights.interleaved or weights.transposed:
        return "its weights lie transposed; moestro.hf.quantize(model, 'bfloat16') packs them"
    if not (weights.up_EHD.is_contiguous() and weights.down_EDF.is_contiguous()):
        return "its weights are not contiguous"
    return None


def _refuse_training(experts: nn.Module, inputs: list[Tensor]) -> None:
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    if wanted or experts.training:
        raise BackendError(
            "packed weights cannot be trained, and no gradient goes through them; train before "
            "moestro.hf.quantize; to run the model, call model.eval() and use torch.no_grad()"
        )


@contextmanager
def watching() -> Iterator[dict[int, list[str]]]:
    """What ran meanwhile: for the id of each experts module, one line per call."""
    global _watched
    before, _watched = _watched, {}
    try:
        yield _watched
    finally:
        _watched = before


def _note(module: nn.Module, what: str) -> None:
    if _watched is not None:
        _watched.setdefault(id(module), []).append(what)


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        warnings.warn(reason, stacklevel=3)


def _plain(weights: layouts.Weights) -> PackedExperts:
    """The model's own weights, not copied."""
    assert weights.activation is not None
    both = (weights.up_EHD, weights.down_EDF, weights.activation)
    return native_cpu.plain_experts(*both, weights.up_EH, weights.down_ED)


@lru_cache(maxsize=64)
def _tokens(num_tokens: int, top_k: int) -> Tensor:
    """The token of each assignment, where all take part."""
    return torch.arange(num_tokens, device="cpu").repeat_interleave(top_k)


def _native(packed: PackedExperts, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    tokens_A = _tokens(*experts_TK.shape)
    experts_A, weights_A = experts_TK.reshape(-1).long(), weights_TK.detach().reshape(-1)
    here_A = experts_A < packed.num_experts
    if not bool(here_A.all()):
        tokens_A, experts_A, weights_A = tokens_A[here_A], experts_A[here_A], weights_A[here_A]
    dtype = compute_dtype(x_TD)
    y_TD = native_cpu.mixture(packed, x_TD.to(dtype), tokens_A, experts_A, weights_A)
    return y_TD.to(x_TD.dtype)


def _torch(
    experts: Any,
    weights: layouts.Weights,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Dispatch, experts and combine by the kernels of training, with their gradients."""
    rows_TD = x_TD.to(compute_dtype(x_TD))
    up_EHD, down_EDF = weights.up_EHD, weights.down_EDF
    widths = (up_EHD.shape[2], up_EHD.shape[1], down_EDF.shape[2])
    kernel = backends.choose("auto", x_TD.device.type, rows_TD.dtype, widths)
    routing = _routing(experts_TK, weights_TK, len(up_EHD))
    biases = None
    if weights.up_EH is not None and weights.down_ED is not None:
        biases = Biases(weights.up_EH, weights.down_ED)
    fused = weights.activation if not (weights.interleaved or weights.post_norm) else None

    few = len(routing.experts_R) <= FEW_ROWS and not torch.is_grad_enabled()
    single = kernel.single_ffn
    if few and fused is not None and single is not None and routing.num_tokens:
        one = (up_EHD, down_EDF, fused, biases)
        y_TD = dispatch.mix_few(rows_TD, routing, lambda rows_PD, e: single(rows_PD, e, *one))
        return y_TD.to(x_TD.dtype)

    plan = dispatch.make_plan(routing, lambda counts_E: kernel.rooms(counts_E, rows_TD.dtype))
    rows_RD = dispatch.dispatch(rows_TD, plan)
    groups = (plan.offsets_E, plan.experts_E)
    if fused is not None:
        args = (plan.offsets_E, fused, plan.experts_E, biases)
        rows_RD = kernel.expert_ffn(rows_RD, up_EHD, down_EDF, *args)
    else:
        hidden_RH = kernel.grouped_mm(rows_RD, up_EHD, *groups, weights.up_EH)
        bend = experts._apply_gate if weights.gated else experts.act_fn
        rows_RD = kernel.grouped_mm(bend(hidden_RH), down_EDF, *groups, weights.down_ED)
        if weights.post_norm:
            rows_RD = experts.post_expert_norm(rows_RD)
    return dispatch.combine(rows_RD, routing.weights_R, plan).to(x_TD.dtype)


def _routing(experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Routing:
    """A router's choice as a Routing; experts of other ranks count as dropped."""
    num_tokens, top_k = experts_TK.shape
    experts_R = experts_TK.reshape(-1).long()
    # In at least fp32, and zero where nobody may read it: zero times NaN would not be.
    weights_R = weights_TK.reshape(-1)
    weights_R = weights_R.to(torch.promote_types(weights_R.dtype, torch.float32))
    here_R: Tensor | None = experts_R < num_experts
    assert here_R is not None
    if bool(here_R.all()):
        here_R = None
    else:
        weights_R = weights_R.masked_fill(~here_R, 0)
        experts_R = experts_R.masked_fill(~here_R, 0)
    tokens_R = torch.arange(num_tokens, device=experts_R.device).repeat_interleave(top_k)
    # Nobody asks for the logits here, only for their shape.
    shape_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device="meta")
    return Routing(tokens_R, experts_R, weights_R, shape_TE, shape_TE, top_k, kept_R=here_R)
