"""Where a number that is not finite came from: the tensor to name when a run stops on NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moestro.train.parallel import local


def is_finite(x: Tensor) -> bool:
    """Whether every number of `x` is finite; waits for the device."""
    return bool(torch.isfinite(x).all())


def first_bad_gradient(model: nn.Module) -> str | None:
    """Name of the first parameter whose gradient holds NaN or infinity; None if there is none."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not is_finite(local(parameter.grad)):
            return f"the gradient of {name}"
    return None


def first_bad_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter that holds NaN or infinity; None if there is none."""
    for name, parameter in model.named_parameters():
        if not is_finite(local(parameter)):
            return f"the parameter {name}"
    return None


def first_bad_output(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Name of the first module whose output holds NaN or infinity; None if there is none.

    `forward` runs the model on the batch that went wrong; called once, without gradients.
    """
    names = {module: name or "the model" for name, module in model.named_modules()}
    found: list[str] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not all(is_finite(x) for x in _floats(output)):
            found.append(names[module])

    with ExitStack() as hooks, torch.no_grad():
        for module in names:
            hooks.callback(module.register_forward_hook(hook).remove)
        forward()
    return f"the output of {found[0]}" if found else None


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _floats(item)
