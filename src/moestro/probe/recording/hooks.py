"""Hooks of one module alone: a copy of it, or what is unpickled, does not call them."""

from __future__ import annotations

from collections.abc import Callable
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
        self.function, self._in_copies = function, in_copies
        self.number = 0

    def __call__(self, *args: Any) -> Any:
        """What torch calls."""
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self._in_copies, self.number)

    @property
    def copied(self) -> bool:
        """Whether this one stands in a copy."""
        return self.function is self._in_copies


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
    return [hook.function for hooks in _registers(model) for _, hook in _ours(hooks)]


def drop_copied(model: nn.Module) -> None:
    """Take off what a copy was given along."""
    for hooks in _registers(model):
        for number, hook in _ours(hooks):
            if hook.copied:
                del hooks[number]


def _registers(model: nn.Module) -> list[dict[int, Any]]:
    return [
        hooks
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    ]


def _ours(hooks: dict[int, Any]) -> list[tuple[int, Hook]]:
    return [(number, hook) for number, hook in hooks.items() if isinstance(hook, Hook)]


def _copied(function: Function, number: int) -> Hook:
    # Another process counts its hooks from 0, and would give a later hook this one's number.
    RemovableHandle.next_id = max(RemovableHandle.next_id, number + 1)
    return Hook(function, function)
