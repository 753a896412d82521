"""Models built without memory, and memory for them.

A model that is about to be read from disk needs neither random weights nor a second copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moestro.kernels.native_packing import of_the_system

# By name, of torch's own functions: what makes a parameter, and what draws random numbers into it.
_MAKERS = frozenset({"empty", "ones", "zeros"})
_DRAWS = frozenset({"normal_", "uniform_", "kaiming_uniform_"})


class _Shapes(TorchFunctionMode):
    """New tensors have no memory and draw no numbers; what is computed is computed for real.

    Unlike under `torch.device("meta")`, settings can still be checked by their numbers, and
    nothing imports the compiler, which takes a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _DRAWS:
            return args[0] if args else options["tensor"]
        if name in _MAKERS and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules built inside have parameters and buffers with a shape and a dtype, no numbers."""
    with _Shapes():
        yield


def materialize(
    model: nn.Module,
    dtype: torch.dtype | None,
    device: str | torch.device,
    without: Container[nn.Module] = (),
) -> None:
    """Give a model that was built `without_memory` its own; what is in it is not set.

    Parameters that are one tensor stay one (a tied head). Buffers keep their own dtype.

    Args:
        model: changed in place.
        dtype: of the parameters; None: as they are.
        device: where they go.
        without: modules in it whose own tensors stay without memory.
    """
    device = torch.device(device)
    made: dict[Tensor, nn.Parameter] = {}
    for module in list(model.modules()):
        if module in without:
            continue
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if old not in made:
                made[old] = nn.Parameter(
                    _empty(old.shape, dtype or old.dtype, device), old.requires_grad
                )
            setattr(module, name, made[old])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=device))


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; a large one on the CPU as `of_the_system` has it."""
    large = of_the_system(math.prod(shape) * dtype.itemsize) if device.type == "cpu" else None
    if large is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return large.view(dtype).view(shape)
