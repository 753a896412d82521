"""Layers with packed experts as subjects, resident or read from their file as they are wanted.

The definition is that of the numbers that the packed weights stand for, so it says nothing of the
format's rounding of weights. What is left is the rounding of rows, which native kernels quantise
as the weights are: a step over the largest of a group is what eps is to a dtype.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from moestro.check.subject import Ran, Subject
from moestro.check.targets import of_moe
from moestro.errors import MoestroError
from moestro.kernels.formats import QUANTISED
from moestro.kernels.native_packing import unpack_expert
from moestro.kernels.packing import ExpertSlabs
from moestro.moe.balance import switch_loss, z_loss
from moestro.moe.layer import MoE
from moestro.moe.packed import Packed, PackedExperts, PackedFeedForward

# Checks of what such a layer computes: it has no state dict, no gradients, and its own dtype.
OUTPUTS = frozenset({
    "run", "outputs", "permutation", "batch-split", "one-token", "zero-tokens", "empty-expert",
    "one-expert", "padding", "padding-nan", "unchanged", "balance-loss", "balance-mask",
    "balance-state", "z-loss", "z-mask", "z-state", "determinism", "evaluation",
})  # fmt: skip
# And where gradients pass through it to the router and to what comes before: rows keep their
# dtype there, and are rounded where no gradient is wanted.
GRADIENTS = OUTPUTS - {"evaluation"} | {
    "input-gradient", "router-gradient", "shared-gradients", "accumulation", "strides", "frozen",
    "micro-batches", "recomputation", "balance-gradient", "z-gradient", "state",
}  # fmt: skip


def unpacked(layer: MoE) -> MoE:
    """The same with plain experts in fp32: the numbers that its packed weights stand for.

    Raises:
        MoestroError: they are not in memory.
    """
    plain = MoE(layer.cfg)
    named = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    with torch.no_grad():
        for name, each in (*plain.named_parameters(), *plain.named_buffers()):
            if name in named:
                each.copy_(named[name])
        for mine, its in ((plain.experts, layer.experts), (plain.shared, layer.shared)):
            if isinstance(its, Packed):
                assert mine is not None
                _unpack(mine, its.weights)
    return plain


def _unpack(plain: nn.Module, weights: ExpertSlabs) -> None:
    if weights.data.is_meta:
        raise MoestroError(
            "its experts are in a file; give the layer before it was streamed as `resident`"
        )
    pairs = [unpack_expert(weights, e) for e in range(weights.num_experts)]
    named = dict(plain.named_parameters())
    for name, given in (
        ("gate_up", torch.stack([up for up, _ in pairs])),
        ("down", torch.stack([down for _, down in pairs])),
        ("gate_up_bias", weights.up_bias),
        ("down_bias", weights.down_bias),
    ):
        if given is not None:
            named[name].copy_(given.view_as(named[name]))


def of_packed(layer: MoE, title: str = "", resident: MoE | None = None) -> Subject:
    """A layer with packed experts beside the definition of its unpacked weights.

    Args:
        layer: in evaluation mode, or one that passes gradients (`Packed.passes_gradients`).
        title: of the report.
        resident: the same with its experts in memory, where those of `layer` are in a file.

    Raises:
        MoestroError: see `unpacked` and `of_moe`.
    """
    assert isinstance(layer.experts, PackedExperts)
    experts, shared = layer.experts, layer.shared
    plain, passes = unpacked(resident or layer), experts.passes_gradients
    for each in plain.experts.parameters():
        each.requires_grad_(False)
    if isinstance(shared, PackedFeedForward):
        assert plain.shared is not None
        plain.shared.requires_grad_(False)

    def run(module: nn.Module, x: Tensor, valid: Tensor | None) -> Ran:
        """The packed experts between the module's own router and gates."""
        made = copy.copy(module)
        made._modules = {**module._modules, "experts": experts}
        if isinstance(shared, PackedFeedForward):
            made._modules["shared"] = shared
        with nullcontext() if passes else torch.no_grad():
            y, routing = made(x, valid=valid)
            return Ran(y, switch_loss(routing), z=z_loss(routing))

    kind, eps = experts.weights.format.kind, 0.0
    if not passes and kind in QUANTISED:
        eps = 1 / 127  # rows are rounded to 8 bits
    elif not passes and kind == "bfloat16":
        eps = torch.finfo(torch.bfloat16).eps
    made = of_moe(plain, title or f"MoE, packed as {kind}")
    zeros = tuple(name for name in made.zeros if name.startswith("router."))  # others are packed
    return replace(
        made, run=run, trains=passes, eps=eps, only=GRADIENTS if passes else OUTPUTS, resized=None,
        relabel=None, spread=None, zeros=zeros,
    )  # fmt: skip
