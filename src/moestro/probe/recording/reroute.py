"""Change the routing of a model for a while: own models and those of transformers alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moestro.errors import ShapeError
from moestro.foreign.taps import RawChoice, tapped, taps
from moestro.moe.layer import MoE
from moestro.moe.routing import Routing
from moestro.probe.recording.choices import choice_of

Edit = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@contextmanager
def rerouted(model: nn.Module, edit: Edit) -> Iterator[None]:
    """Let `edit` decide where tokens go, with the routers' own choice before it.

    The routers still run; an own model's Routing keeps their logits and probabilities. Afterwards
    the model is as before, whatever happened.

    Args:
        model: an own model, or a causal language model of transformers.
        edit: (place, experts_TK, weights_TK) → (experts_TK, weights_TK), called in each forward
            pass, and again where a backward pass computes activations once more. `place` counts
            the mixtures from 0, as in a trace's L; T counts all rows of the forward pass, padding
            included. experts_TK is int64; expert E marks an empty place, whose weight counts for
            nothing; such places may come and go, and K may change. Where tokens have varying
            numbers of experts, rows are filled up with empty places.

    Raises:
        MoestroError: the model has no mixture, or one that cannot be looked into.
        ShapeError: raised in the forward pass if what `edit` returns does not fit.
    """
    own = [module for module in model.modules() if isinstance(module, MoE)]
    if not own:

        def see(place: int, raw: RawChoice) -> tuple[Tensor, Tensor]:
            return _edited(edit, place, raw.experts_TK, raw.weights_TK)

        with tapped(taps(model), see, again=True):
            yield
        return
    with ExitStack() as hooks:
        for place, layer in enumerate(own):
            hooks.callback(layer.router.register_forward_hook(_hook(place, edit)).remove)
        yield


def _hook(place: int, edit: Edit) -> Any:
    def hook(router: nn.Module, args: Any, routing: Routing) -> Routing:
        choice = choice_of(routing)
        experts_TK, weights_TK = _edited(edit, place, choice.experts_TK, choice.weights_TK)
        weights_TK = weights_TK.to(routing.weights_R.dtype)
        if routing.top_k:
            return _by_token(routing, experts_TK, weights_TK)
        return _by_expert(routing, experts_TK, weights_TK)

    return hook


def _edited(
    edit: Edit, place: int, experts_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    new_TK, new_weights_TK = edit(place, experts_TK, weights_TK)
    shape = list(new_TK.shape)
    fits = len(shape) == 2 and shape[0] == len(experts_TK) and shape[1] > 0
    if not fits or new_TK.dtype != torch.int64 or list(new_weights_TK.shape) != shape:
        raise ShapeError(
            f"the edit of mixture {place} returned experts {new_TK.dtype} {shape} and weights "
            f"{list(new_weights_TK.shape)}; both must be [{len(experts_TK)}, K], experts int64"
        )
    return new_TK, new_weights_TK


def _by_token(routing: Routing, experts_TK: Tensor, weights_TK: Tensor) -> Routing:
    """K assignments for every token; those in empty places are dropped before any capacity."""
    empty_TK = experts_TK >= routing.num_experts
    kept_R = ~empty_TK.flatten() if bool(empty_TK.any()) else None
    choice = (experts_TK.masked_fill(empty_TK, 0), weights_TK.masked_fill(empty_TK, 0))
    edited = Routing.of_choice(*choice, routing.logits_TE, routing.probs_TE, routing.valid_T)
    return edited._replace(kept_R=kept_R, load_TE=routing.load_TE)


def _by_expert(routing: Routing, experts_TK: Tensor, weights_TK: Tensor) -> Routing:
    """A flat list in the order of expert choice: every expert's best token, then the next ones."""
    tokens_R, places_R = (experts_TK < routing.num_experts).nonzero(as_tuple=True)
    experts_R, weights_R = experts_TK[tokens_R, places_R], weights_TK[tokens_R, places_R]
    order_R = weights_R.argsort(descending=True, stable=True)
    order_R = order_R[experts_R[order_R].argsort(stable=True)]
    counts_E = torch.bincount(experts_R, minlength=routing.num_experts)
    starts_E = counts_E.cumsum(0) - counts_E
    ranks_R = torch.arange(len(order_R), device=order_R.device) - starts_E[experts_R[order_R]]
    order_R = order_R[ranks_R.argsort(stable=True)]
    return routing._replace(
        tokens_R=tokens_R[order_R], experts_R=experts_R[order_R], weights_R=weights_R[order_R]
    )
