"""Which kernel runs, why, and how to force one.

`TABLE` is the whole story: the first row whose predicate accepts the device, dtype and widths
runs. A backend asked for by name, in code or by the environment variable MOESTRO_BACKEND, runs or
raises; it is never replaced by another. To add a kernel, write its functions and add a row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.errors import BackendError
from moestro.kernels import native_training, pointwise, reference, torch_grouped
from moestro.kernels.reference import Biases

ENVIRONMENT = "MOESTRO_BACKEND"


class Verdict(NamedTuple):
    """Whether a backend can run something, and the reason to show to a person."""

    ok: bool
    reason: str


Supports = Callable[[str, torch.dtype, tuple[int, ...]], Verdict]


class Backend(NamedTuple):
    """One row of the table.

    Attributes:
        name: what a person types to force it.
        supports: (device type, dtype, widths of every matrix) → Verdict.
        grouped_mm: see `reference.grouped_mm`.
        expert_ffn: see `reference.expert_ffn`.
        single_ffn: the network of one expert on a few rows, where no gradients are wanted; see
            `torch_grouped.single_ffn`. None: grouping is as good for few rows.
        rooms: (rows of each expert, dtype) → rows to give it, padding included. Groups are laid
            out by falling room where the two differ, else in the order of the experts.
        mixture: the whole mixture in one call; see `reference.mixture`. None: dispatch, experts
            and combine, one after another.
    """

    name: str
    supports: Supports
    grouped_mm: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    expert_ffn: Callable[
        [Tensor, Tensor, Tensor, Tensor, str, Tensor | None, Biases | None], Tensor
    ]
    single_ffn: Callable[[Tensor, int, Tensor, Tensor, str, Biases | None], Tensor] | None
    rooms: Callable[[Tensor, torch.dtype], Tensor]
    mixture: Callable[..., Tensor] | None = None


class Row(NamedTuple):
    """One line of `moestro doctor`."""

    name: str
    ok: bool
    reason: str
    chosen: bool


def _no_padding(counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    return counts_E


def _few_sizes(counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Pad 16-bit groups to one of few sizes, an eighth of an octave apart.

    oneDNN compiles a kernel for every new shape of a 16-bit GEMM (milliseconds and half a megabyte
    each), and routing makes new group sizes at every step. Powers of two lie in the middle between
    two sizes, so that a balanced layer usually has a single size, and groups of one size share a
    batched GEMM. This adds about a twentieth to the rows. Other dtypes go to a library that
    compiles nothing.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return counts_E
    counts = counts_E.tolist()
    if sum(counts) < 16 * len(counts):
        return counts_E
    return counts_E.new_tensor([_size_above(count) for count in counts])


def _size_above(count: int) -> int:
    """The smallest size of the scale that holds `count` rows, a multiple of 16."""
    if count == 0:
        return 0
    step = math.ceil(8 * math.log2(count) - 0.5)
    return max(math.ceil(2 ** ((step + 0.5) / 8) / 16), math.ceil(count / 16)) * 16


def _supports_torch(device: str, dtype: torch.dtype, widths: tuple[int, ...]) -> Verdict:
    if device != "cuda":
        return Verdict(False, "slower than segments off CUDA, where it is a loop over all experts")
    if not torch.cuda.is_available():
        return Verdict(False, "no CUDA device on this machine")
    if torch.cuda.get_device_capability() < (8, 0):
        return Verdict(False, "needs compute capability 8.0 or newer")
    return _torch_layout(dtype, widths)


def _torch_layout(dtype: torch.dtype, widths: tuple[int, ...]) -> Verdict:
    """What `torch.nn.functional.grouped_mm` needs of dtype and widths, on any device."""
    if dtype != torch.bfloat16:
        return Verdict(False, f"fast for bfloat16 only, not {dtype}")
    odd = [width for width in widths if width % 8]
    if odd:
        return Verdict(False, f"widths must be multiples of 8 (16 bytes); given {odd}")
    return Verdict(True, "CUDA with bfloat16")


def _supports_native(device: str, dtype: torch.dtype, widths: tuple[int, ...]) -> Verdict:
    reason = native_training.reason_against(device, dtype, widths)
    return Verdict(reason is None, reason or "CPU with AMX tiles, for bfloat16")


def _anywhere(device: str, dtype: torch.dtype, widths: tuple[int, ...]) -> Verdict:
    return Verdict(True, "any device and dtype")


def _own_autograd(supports: Supports) -> Supports:
    """The predicate of a kernel with its own autograd, which `torch.func` cannot pass through."""

    def verdict(device: str, dtype: torch.dtype, widths: tuple[int, ...]) -> Verdict:
        if pointwise.transformed():
            return Verdict(
                False,
                "torch.func (grad, vmap, jvp, …) needs plain torch, which only the reference is: "
                'build the model with backend="reference", or leave it "auto"',
            )
        return supports(device, dtype, widths)

    return verdict


TABLE: tuple[Backend, ...] = (
    Backend(
        "torch",
        _own_autograd(_supports_torch),
        torch_grouped.TORCH.grouped_mm,
        torch_grouped.TORCH.expert_ffn,
        None,
        _no_padding,
    ),
    Backend(
        "native",
        _own_autograd(_supports_native),
        native_training.NATIVE.grouped_mm,
        native_training.expert_ffn,
        torch_grouped.single_ffn,
        _no_padding,
    ),
    Backend(
        "segments",
        _own_autograd(_anywhere),
        torch_grouped.SEGMENTS.grouped_mm,
        torch_grouped.SEGMENTS.expert_ffn,
        torch_grouped.single_ffn,
        _few_sizes,
    ),
    Backend(
        "reference",
        _anywhere,
        reference.grouped_mm,
        reference.expert_ffn,
        None,
        _no_padding,
        reference.mixture,
    ),
)


def forced() -> str:
    """What MOESTRO_BACKEND says; "auto" where it says nothing."""
    return os.environ.get(ENVIRONMENT, "auto")


def choose(name: str, device: str, dtype: torch.dtype, widths: tuple[int, ...] = ()) -> Backend:
    """The backend that runs.

    Args:
        name: a row's name, or "auto": what MOESTRO_BACKEND says, else the first that can run.
        device: device type, such as "cpu".
        dtype: the dtype computed in.
        widths: D and the experts' hidden widths.

    Raises:
        BackendError: the name is unknown, or that backend cannot run this.
    """
    if name == "auto":
        name = forced()
    if name == "auto":
        return next(row for row in TABLE if row.supports(device, dtype, widths).ok)
    named = [row for row in TABLE if row.name == name]
    if not named:
        known = ", ".join(row.name for row in TABLE)
        raise BackendError(f"unknown kernel backend {name!r}; known: auto, {known}")
    verdict = named[0].supports(device, dtype, widths)
    if not verdict.ok:
        raise BackendError(
            f"kernel backend {name!r} was asked for and cannot run on {device}: {verdict.reason}. "
            f"Choose another (unset {ENVIRONMENT}, or use 'auto'); `moestro doctor` lists them"
        )
    return named[0]


def table(device: str | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """The table as this machine sees it, for `moestro doctor`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = choose("auto", device, dtype).name
    except BackendError:
        chosen = ""
    return [Row(row.name, *row.supports(device, dtype, ()), row.name == chosen) for row in TABLE]
