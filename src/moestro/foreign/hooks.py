"""Hooks of one module alone: a copy of it, or what is unpickled, does not call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

Function = Callable[..., Any]


class Hook:
    """A function that one module calls; copied along with the module, it becomes another.

    Copies take hooks along, and what a hook knows of the original is wrong in them. Most could not
    be pickled either.
    """

    def __init__(self, function: Function, in_copies: Function) -> None:
        self.function, self.in_copies = function, in_copies
        self.number = 0

    def __call__(self, *args: Any) -> Any:
        """What torch calls."""
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.in_copies, self.number)


def nothing(*_: Any) -> None:
    """What most hooks are in copies."""


def add(
    register: Callable[..., RemovableHandle],
    function: Function,
    *,
    in_copies: Function = nothing,
    **options: Any,
) -> RemovableHandle:
    """Register a forward hook that copies of the module do not call.

    Args:
        register: `module.register_forward_hook` or `module.register_forward_pre_hook`.
        function: the hook.
        in_copies: a function of a file's top level to call in copies instead.
        options: of `register`.
    """
    hook = Hook(function, in_copies)
    handle = register(hook, **options)
    hook.number = handle.id
    return handle


def functions(model: nn.Module) -> list[Function]:
    """What a model's modules call through hooks of this kind."""
    return [hook.function for _, hook in _ours(model)]


def drop_copied(model: nn.Module) -> None:
    """Take off what a copy was given along."""
    for registered, hook in _ours(model):
        if hook.function is hook.in_copies:
            del registered[hook.number]


def _ours(model: nn.Module) -> Iterator[tuple[dict[int, Any], Hook]]:
    for module in model.modules():
        for registered in (module._forward_pre_hooks, module._forward_hooks):
            for hook in list(registered.values()):
                if isinstance(hook, Hook):
                    yield registered, hook


def _copied(function: Function, number: int) -> Hook:
    # Another process counts its hooks from 0, and would give a later hook this one's number.
    RemovableHandle.next_id = max(RemovableHandle.next_id, number + 1)
    hook = Hook(function, function)
    hook.number = number
    return hook
