"""Collect a model's routing while it trains: one Routing per mixture for each forward pass.

Hooks listen from the start of the model's forward to its end, in training mode and with gradients
on, so that an evaluation counts nothing and layers that are computed again for the backward pass
count once.

Letters: T tokens, B sequences, S their length, E experts, K experts per token.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moestro.errors import MoestroError, ShapeError
from moestro.foreign import hooks
from moestro.foreign.classes import core_kind
from moestro.foreign.taps import RawChoice, Tap, tapped
from moestro.moe.routing import Routing


class Watch:
    """Hooks on a model and its mixtures that hand on what each forward pass decided.

    Args:
        model: whose forward is called.
        mixtures: all of its, in order.
        begins: called before a forward pass that will be watched.
        seen: called after it, with the Routing of each mixture and the number of sequences.
        differentiable: refuse logits without gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        mixtures: Sequence[Tap],
        begins: Callable[[], None],
        seen: Callable[[list[Routing], int], None],
        differentiable: bool,
    ) -> None:
        self._mixtures, self._begins, self._seen = mixtures, begins, seen
        self._differentiable = differentiable
        self._choices: dict[int, RawChoice] | None = None  # of a pass that is watched
        self._given_T: Tensor | None = None
        self._valid_T: Tensor | None = None
        self._sequences = 1
        reader = _reader(model, mixtures)
        self._names = tuple(inspect.signature(reader.forward).parameters)
        self._hooks = ExitStack()
        self._hooks.enter_context(tapped(mixtures, self._see))
        for handle in (
            hooks.add(model.register_forward_pre_hook, self._start, in_copies=_unbalanced),
            hooks.add(reader.register_forward_pre_hook, self._read, with_kwargs=True),
            hooks.add(model.register_forward_hook, self._end, always_call=True),
        ):
            self._hooks.callback(handle.remove)

    def remove(self) -> None:
        """Take all hooks off."""
        self._hooks.close()

    def valid(self, mask: Tensor) -> None:
        """Say which tokens of the next forward pass are real, whatever its attention mask says.

        The next one, whether it is watched or not: a mask never waits for a later batch.
        """
        self._given_T = mask.bool().flatten()

    def _start(self, model: nn.Module, _: Any) -> None:
        watched = model.training and torch.is_grad_enabled()
        self._choices = {} if watched else None
        if not watched:
            return
        if torch._C._current_graph_task_id() != -1:
            raise MoestroError(
                "the whole model runs again within a backward pass, which looks like a forward "
                "pass of its own; checkpoint its layers (gradient_checkpointing_enable) instead"
            )
        self._valid_T, self._sequences = None, 1
        self._begins()

    def _read(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._choices is None:
            return
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        mask, cache = inputs.get("attention_mask"), _first(inputs, "cache", "past_key_values")
        tokens = _first(inputs, "inputs_embeds", "input_ids", "attention_mask")
        self._sequences, length = getattr(tokens, "shape", (1, 0))[:2]
        self._valid_T = self._given_T
        if self._valid_T is None:
            self._valid_T = real_tokens(mask, self._sequences, length, cache)

    def _see(self, place: int, choice: RawChoice) -> None:
        if self._choices is None:
            return
        name = self._mixtures[place].name
        if place in self._choices:
            raise MoestroError(f"{name} ran twice in one forward pass, so it cannot be balanced")
        if self._differentiable and not torch.is_grad_enabled():
            raise MoestroError(
                f"{name} runs without gradients inside a training step, so no loss can reach its "
                'router: enable activation checkpointing with {"use_reentrant": False}'
            )
        # Nothing is computed here: a layer that is computed again must save the same tensors.
        self._choices[place] = choice

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        choices, self._choices = self._choices, None
        valid_T, self._valid_T, self._given_T = self._valid_T, None, None
        if choices is None:
            return
        if output is None:  # the forward pass failed: nothing of it may be held on to
            return
        missing = [tap.name for place, tap in enumerate(self._mixtures) if place not in choices]
        if missing:
            raise MoestroError(
                f"{', '.join(missing)} did not run in this forward pass: these inputs pass by, or "
                "a kernel from the hub runs instead; load without use_kernels"
            )
        found = [_routing(tap, choices[n], valid_T) for n, tap in enumerate(self._mixtures)]
        # Layers may lie on several devices.
        device = found[0].logits_TE.device
        found = [Routing(*(_moved(each, device) for each in routing)) for routing in found]
        self._seen(found, self._sequences)


def real_tokens(mask: Any, sequences: int, length: int, cache: Any) -> Tensor | None:
    """Which of B · S tokens an attention mask marks as real, bool [T]; None: all.

    Args:
        mask: [B, N], nonzero for real tokens; or [B, H, S, N] (bool, or 0 and less to be added to
            scores), where a token is real that may attend to itself. N is S and the tokens in the
            cache. Some models have several by name.
        sequences: B.
        length: S.
        cache: of earlier tokens, by transformers; None: there are none.

    Raises:
        ShapeError: it is neither.
    """
    if isinstance(mask, Mapping):
        mask = next((each for each in mask.values() if each is not None), None)
    if mask is None:
        return None
    cached = 0 if cache is None else int(cache.get_seq_length())
    end, shape = cached + length, tuple(getattr(mask, "shape", ()))
    if shape == (sequences, end):
        real: Tensor = mask[:, cached:].bool()
        return real.flatten()
    if len(shape) == 4 and shape[0] in (1, sequences) and shape[2:] == (length, end):
        itself = mask.diagonal(offset=cached, dim1=2, dim2=3)
        real = (itself >= 0 if mask.is_floating_point() else itself.bool()).any(1)
        return real.expand(sequences, length).flatten()
    given = list(shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ShapeError(
        f"attention_mask is {given}, and {sequences} sequences of {length} tokens are routed after "
        f"{cached} cached ones; padding can be read from [{sequences}, {end}] or [{sequences}, 1, "
        f"{length}, {end}]. For other masks, say which tokens are real with "
        "balancer.valid(mask) before each forward pass"
    )


def _routing(tap: Tap, choice: RawChoice, valid_T: Tensor | None) -> Routing:
    """What a mixture decided, as a Routing; logits and probabilities in fp32, with gradients."""
    probs_TE = tap.probabilities(choice.logits_TE)
    if choice.logits_TE is None or probs_TE is None:
        raise MoestroError(
            f"{tap.name} ({core_kind(tap.router)}) showed no logits that probabilities could be "
            "made of; a model must be balanced before it is compiled and run"
        )
    num_tokens = len(choice.experts_TK)
    if valid_T is not None and len(valid_T) != num_tokens:
        raise ShapeError(
            f"{tap.name} routes {num_tokens} tokens, and the mask has {len(valid_T)} places; say "
            "which tokens are real with balancer.valid(mask) before the forward pass"
        )
    valid_T = None if valid_T is None else valid_T.to(probs_TE.device)
    logits_TE = choice.logits_TE.to(probs_TE.dtype)
    return Routing.of_choice(choice.experts_TK, choice.weights_TK, logits_TE, probs_TE, valid_T)


def _reader(model: nn.Module, mixtures: Sequence[Tap]) -> nn.Module:
    """The innermost module around all mixtures that is given tokens and their mask.

    Wrappers add tokens of their own (prompt tuning) or a cache (prefix tuning) on the way to it.
    """
    found = model
    for name, module in model.named_modules():
        around = f"{name}." if name else ""
        if all(tap.name.startswith(around) for tap in mixtures):
            parameters = inspect.signature(module.forward).parameters
            if "attention_mask" in parameters and "inputs_embeds" in parameters:
                found = module
    return found


def _first(inputs: Mapping[str, Any], *names: str) -> Any:
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)


def _unbalanced(model: nn.Module, *_: Any) -> None:
    """What a copy calls instead of `Watch._start`: warns once that it is not watched."""
    if model.training and torch.is_grad_enabled():
        hooks.drop_copied(model)
        warnings.warn(
            f"this {type(model).__name__} is a copy of a model that moestro.hf.balance watches, "
            "and is not watched itself: call moestro.hf.balance on the copy to balance it",
            UserWarning,
            stacklevel=2,
        )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
