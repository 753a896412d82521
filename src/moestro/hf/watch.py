"""Collect a model's routing while it trains: one Routing per mixture for each forward pass.

Hooks listen from the start of the model's forward to its end, in training mode and with gradients
on, so that an evaluation counts nothing and layers that are computed again for the backward pass
count once.

Letters: T tokens, B sequences, S their length, E experts, K experts per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from moestro.errors import MoestroError, ShapeError
from moestro.moe.routing import Routing
from moestro.probe.recording.foreign import Chosen, Tap, probabilities, tapped

# Takes the Routings of a forward pass, one for each mixture, its number of sequences, its output.
Seen = Callable[[list[Routing], int, Any], None]


class Watch:
    """Hooks on a model and its mixtures that hand on what each forward pass decided.

    Args:
        model: whose forward is called.
        mixtures: all of its, in order.
        begins: called before a forward pass that will be watched.
        seen: called after it.
        differentiable: refuse logits without gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        mixtures: Sequence[Tap],
        begins: Callable[[], None],
        seen: Seen,
        differentiable: bool,
    ) -> None:
        self._mixtures, self._begins, self._seen = mixtures, begins, seen
        self._differentiable = differentiable
        self._names = _argument_names(model)
        self._listening = False
        self._inputs: dict[str, Any] = {}
        self._chosen: dict[int, Chosen] = {}
        self._hooks = ExitStack()
        self._hooks.enter_context(tapped(mixtures, self._see))
        for handle in (
            model.register_forward_pre_hook(self._start, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ):
            self._hooks.callback(handle.remove)

    def remove(self) -> None:
        """Take all hooks off."""
        self._hooks.close()

    def __deepcopy__(self, _: Any) -> Self:
        raise MoestroError(
            "a model cannot be copied while it is balanced: the copy would call the hooks of the "
            "original; copy it before moestro.hf.balance, or after remove()"
        )

    def _start(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._listening = model.training and torch.is_grad_enabled()
        if self._listening:
            _refuse_again()
            self._inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
            self._chosen = {}
            self._begins()

    def _see(self, place: int, chosen: Chosen) -> None:
        if not self._listening:
            return
        name = self._mixtures[place].name
        if place in self._chosen:
            raise MoestroError(
                f"{name} ran twice in one forward pass; layers that are used more than once "
                "cannot be balanced"
            )
        if self._differentiable and not torch.is_grad_enabled():
            raise MoestroError(
                f"{name} runs without gradients inside a training step, so no loss on its routing "
                "can reach the router. Reentrant activation checkpointing does this: enable "
                'it with {"use_reentrant": False}'
            )
        # Nothing is computed here: a layer that is computed again must save the same tensors.
        self._chosen[place] = chosen

    def _valid(self) -> Tensor | None:
        """The attention mask as bool [B, S]; None: no padding."""
        mask = self._inputs.get("attention_mask")
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ShapeError(
                f"attention_mask is {given}; which tokens are padding, which must not count, can "
                "only be read from a mask [sequences, tokens]"
            )
        return mask.bool()

    def _end(self, model: nn.Module, _: Any, output: Any) -> None:
        if not self._listening:
            return
        self._listening, chosen, self._chosen = False, self._chosen, {}
        if output is None:  # the forward pass failed: nothing of it may be held on to
            self._inputs = {}
            return
        missing = [tap.name for n, tap in enumerate(self._mixtures) if n not in chosen]
        if missing:
            raise MoestroError(
                f"{', '.join(missing)} did not run in this forward pass: these inputs pass by, or "
                "a kernel from the hub stands in for the block; load without use_kernels"
            )
        valid_BS, sequences = self._valid(), self._sequences()
        routings = [
            routing_of(tap, chosen[place], valid_BS) for place, tap in enumerate(self._mixtures)
        ]
        self._inputs = {}
        first = routings[0].logits_TE.device
        self._seen([_moved(routing, first) for routing in routings], sequences, output)

    def _sequences(self) -> int:
        """B."""
        for name in ("input_ids", "inputs_embeds", "attention_mask"):
            given = self._inputs.get(name)
            if isinstance(given, Tensor):
                return given.shape[0]
        return 1


def routing_of(tap: Tap, chosen: Chosen, valid_BS: Tensor | None) -> Routing:
    """What a mixture decided, as a Routing; logits and probabilities in fp32, with gradients.

    Raises:
        MoestroError: the router showed no logits.
        ShapeError: the mask is not of these tokens.
    """
    probs_TE = probabilities(tap, chosen.logits_TE)
    if chosen.logits_TE is None or probs_TE is None:
        raise MoestroError(
            f"{tap.name} ({type(tap.router).__name__}) showed no logits that probabilities could "
            "be made of, so it cannot be balanced; if the model was compiled and run before, "
            "balance it first"
        )
    num_tokens, top_k = chosen.experts_TK.shape
    if valid_BS is not None and valid_BS.numel() != num_tokens:
        raise ShapeError(
            f"{tap.name} routes {num_tokens} tokens, but attention_mask has "
            f"{list(valid_BS.shape)} places; give the mask of exactly these tokens"
        )
    tokens_T = torch.arange(num_tokens, device=chosen.experts_TK.device)
    return Routing(
        tokens_T.repeat_interleave(top_k),
        chosen.experts_TK.flatten(),
        chosen.weights_TK.flatten(),
        chosen.logits_TE.to(probs_TE.dtype),
        probs_TE,
        top_k,
        None if valid_BS is None else valid_BS.flatten().to(probs_TE.device),
    )


def _argument_names(model: nn.Module) -> tuple[str, ...]:
    """What a model calls its arguments; what the one inside calls them where a wrapper does not."""
    for module in model.modules():
        parameters = inspect.signature(module.forward).parameters
        if all(each.kind is not each.VAR_POSITIONAL for each in parameters.values()):
            return tuple(parameters)
    return ()


def _refuse_again() -> None:
    if torch._C._current_graph_task_id() != -1:
        raise MoestroError(
            "the whole model runs again within a backward pass, which cannot be told from a "
            "forward pass of its own; checkpoint its layers (gradient_checkpointing_enable), not "
            "the model"
        )


def _moved(routing: Routing, device: torch.device) -> Routing:
    """The same on another device: layers may lie on several."""
    fields = routing._asdict()
    moved: dict[str, Any] = {n: x.to(device) for n, x in fields.items() if isinstance(x, Tensor)}
    return routing._replace(**moved)
