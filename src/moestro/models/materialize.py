"""Models built without memory, and memory for them.

A model that is about to be read from disk needs neither random weights nor a second copy.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LARGE_BYTES = 1 << 21


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
    dtype: torch.dtype,
    device: str | torch.device,
    without: Container[nn.Module] = (),
) -> None:
    """Give a model that was built `without_memory` its own; what is in it is not set.

    Parameters that are one tensor stay one (a tied head). Buffers keep their own dtype.

    Args:
        model: changed in place.
        dtype: of the parameters.
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
                made[old] = nn.Parameter(_empty(old.shape, dtype, device))
            setattr(module, name, made[old])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=device))


def private_memory(nbytes: int) -> mmap.mmap:
    """Memory of its own, in huge pages where the system has them.

    Half the time of loading a model is the system handing out its memory in 4 KiB pages; a disk
    that is read past the page cache is half as fast into such.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    huge = getattr(mmap, "MADV_HUGEPAGE", None)
    if huge is not None:
        with suppress(OSError):  # a kernel without huge pages: slower, and nothing else
            memory.madvise(huge)
    return memory


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; a large one on the CPU in memory of its own."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(private_memory(nbytes), dtype=dtype).view(shape)
