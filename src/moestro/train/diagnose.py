"""Where a number that is not finite came from: the tensor to name when a run stops on NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_finite(x: Tensor) -> bool:
    """Whether every number of `x` is finite; waits for the device."""
    return bool(torch.isfinite(x).all())


def first_bad_gradient(model: nn.Module) -> str | None:
    """Name of the first parameter whose gradient holds NaN or infinity; None if there is none."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not is_finite(parameter.grad):
            return f"the gradient of {name}"
    return None


def first_bad_value(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Name of the first parameter, else module output, that holds NaN or infinity.

    Args:
        model: The model to watch.
        forward: Runs the model on the batch that went wrong; called once, without gradients.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            return f"the parameter {name}"
    with torch.no_grad(), _watched(model) as found:
        forward()
    return f"the output of {found[0]}" if found else None


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in the order they finish."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(is_finite(x) for x in _floats(output)):
                found.append(name or "the model")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _floats(item)
