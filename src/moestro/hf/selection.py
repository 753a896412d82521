"""The bias that loss-free balancing chooses experts with, for routers of transformers.

Where a family has one (`e_score_correction_bias` and the like) it is that family's own tensor.
Elsewhere the router's choice is made again with a bias, by the rule that `foreign.routers` has for
its class, once that is bit for bit the router's own.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from moestro.errors import MoestroError
from moestro.foreign import routers
from moestro.foreign.classes import core, core_kind
from moestro.foreign.taps import Tap


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
        kind = core_kind(router)
        row = routers.ROUTERS.get(kind)
        if row is None or row.weigh is None:
            raise MoestroError(
                f"{name} is a {kind}: it has no selection bias, and none can be added because how "
                "it chooses is not known; use switch=, and leave bias_rate at 0"
            )
        self.held, self._proven, self._name = True, False, name
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

    def _choose(self, wrapped: nn.Module, _: Any, output: Any) -> Any:
        router, logits_TE = core(wrapped), output[0]
        bias_E = self._bias_E.to(logits_TE.device)
        if not logits_TE.is_meta:  # a pass that only asks for shapes leaves nothing behind
            self._bias_E = bias_E
            if not self._proven and logits_TE.numel():
                self._prove(router, output)
        weights_TK, experts_TK = routers.choose(router, logits_TE, bias_E)
        return (logits_TE, weights_TK.to(output[1].dtype), experts_TK, *output[3:])

    @torch.no_grad()
    def _prove(self, router: nn.Module, output: Any) -> None:
        again_TK, chosen_TK = routers.choose(router, output[0], torch.zeros_like(self._bias_E))
        same = torch.equal(chosen_TK, output[2])
        self._proven = same and torch.equal(again_TK.to(output[1].dtype), output[1])
        if not self._proven:
            raise MoestroError(
                f"{self._name} ({core_kind(router)}) does not choose by the rule of its class, so "
                "no bias can be added to its choice; use switch=, and leave bias_rate at 0"
            )


Bias = OwnBias | AddedBias


def biases_of(model: nn.Module, found: Sequence[Tap]) -> dict[str, Bias]:
    """The selection bias of each mixture, by name: the family's own, or an added one.

    Raises:
        MoestroError: one has none, and its router's rule is not known; none is added then.
    """
    biases: dict[str, Bias] = {}
    try:
        for tap in found:
            block = model.get_submodule(tap.name.rpartition(".")[0])
            biases[tap.name] = _bias_of(tap, block)
    except MoestroError:
        for bias in biases.values():
            bias.remove()
        raise
    return biases


def _bias_of(tap: Tap, block: nn.Module) -> Bias:
    """The bias of one mixture; some families keep theirs in the block that holds the router."""
    router = tap.router
    assert router is not None
    # A wrapper that holds two routers shows the attributes of the one that runs; others show none.
    owners = (router, core(router))
    places = [(owner, path) for path, _ in owners[1].named_modules() for owner in owners]
    for owner, path in (*places, (block, "")):
        for own in routers.BIASES:
            full = [part for part in (*path.split("."), own) if part]
            tensor: Any = owner
            for part in full:
                tensor = getattr(tensor, part, None)
            if isinstance(tensor, Tensor) and tensor.numel() == tap.num_experts:
                return OwnBias(owner, ".".join(full))
    for hook in router._forward_hooks.values():
        added = getattr(hook, "__self__", None)
        if isinstance(added, AddedBias):
            if added.held:
                raise MoestroError(f"{tap.name} has the bias of an earlier balancer: remove() that")
            added.held = True
            return added
    return AddedBias(tap.name, router, tap.num_experts)


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP gathered: what is written there is lost, the shards are what counts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
