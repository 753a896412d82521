"""The function that transformers calls instead of its own for every mixture.

What computes is in `moestro.hf.compute`; under `torch.compile` and `torch.export`, and of tensors
that hold no numbers, it is called through an operator of `moestro.hf.ops`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moestro.errors import BackendError
from moestro.foreign import layouts
from moestro.hf import compute, ops
from moestro.kernels import native_cpu, pointwise
from moestro.kernels.packing import ExpertSlabs
from moestro.moe.mixing import differentiated

# Where a module's packed experts hang; see `moestro.hf.packed`.
PACKED = "moestro_packed"

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
        BackendError: gradients are wanted of packed weights, weights are sharded, a transform of
            torch.func is active, or what MOESTRO_BACKEND names cannot run.
        ShapeError: the weights have a form that is not known.
    """
    inputs = (hidden_states, top_k_index, top_k_weights)
    packed: ExpertSlabs | None = vars(self).get(PACKED)
    if packed is not None:
        if self.training or differentiated(hidden_states, top_k_weights):
            raise BackendError(
                "packed weights cannot be trained, and no gradient goes through them; train before "
                "moestro.hf.quantize; to run the model, call model.eval() and use torch.no_grad()"
            )
        if through_ops(hidden_states):
            if packed.stored is not None:
                raise BackendError(
                    "experts that are read from a file are part of no graph; call the model "
                    "without torch.compile and torch.export"
                )
            return ops.traced_packed(packed, *inputs)
        y_TD = compute.by_packed(packed, *inputs)
        _note(self, None, packed.format.kind)
        return y_TD
    weights = layouts.read(self)
    if through_ops(hidden_states, weights.up_EHD, weights.down_EDF):
        return ops.traced(self, weights, *inputs)
    if differentiated(hidden_states, top_k_weights, *weights.tensors):
        _note(self, "gradients are wanted")
        return compute.by_torch(weights, *inputs, self)
    y_TD, why_not = compute.without_gradients(weights, *inputs, type(self).__name__, self)
    _note(self, why_not, weights.up_EHD.dtype)
    return y_TD


def through_ops(*tensors: Tensor) -> bool:
    """Whether to leave one operator in a graph, or of tensors without numbers (meta, fake).

    Raises:
        BackendError: there is no such operator for these tensors.
    """
    if torch.compiler.is_compiling():
        return True
    if pointwise.transformed():
        raise BackendError(
            "moestro's kernels have gradients of their own, which the transforms of torch.func "
            "(grad, vmap, jvp, …) cannot pass through; call "
            'model.set_experts_implementation("eager") for them'
        )
    for tensor in tensors:
        if hasattr(tensor, "placements"):
            raise BackendError(
                "the experts' weights are sharded (DTensor); moestro's kernels take whole ones. "
                "FSDP2 gathers them before the forward of the module that fully_shard was given: "
                "call that module; for tensor parallelism use another experts_implementation"
            )
        if type(tensor) not in (Tensor, nn.Parameter):
            return True
    return tensors[0].is_meta


@contextmanager
def watching() -> Iterator[dict[int, list[str]]]:
    """What ran meanwhile, outside of compiled code: one line per call, by the module's id."""
    global _watched
    before, _watched = _watched, {}
    try:
        yield _watched
    finally:
        _watched = before


def _note(module: nn.Module, why_not_native: str | None, weights: object = None) -> None:
    if _watched is not None:
        what = f"torch kernels: {why_not_native}"
        if why_not_native is None:
            what = f"native {native_cpu.path()}, {weights}".replace("torch.", "")
        _watched.setdefault(id(module), []).append(what)
