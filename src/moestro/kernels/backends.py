"""Which kernel runs, why, and how to force one.

`TABLE` is the whole story: of the rows for a use, the first whose predicate accepts the work runs.
A backend asked for by name, in code or by the environment variable MOESTRO_BACKEND, runs or
raises; it is never replaced by another. To add a kernel, write its functions and add a row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moestro.errors import BackendError
from moestro.kernels import native_cpu, native_training, pointwise, reference, torch_grouped
from moestro.kernels.addresses import ROWS
from moestro.kernels.reference import Biases

ENVIRONMENT = "MOESTRO_BACKEND"
USES = {
    "train": "experts' products, with gradients",
    "infer": "a mixture without gradients",
    "packed": "packed weights",
    "step": "a token through a whole decoder",
}


class Work(NamedTuple):
    """What is to be computed."""

    device: str  # its type, such as "cpu"
    dtype: torch.dtype  # that is computed in
    widths: tuple[int, ...] = ()  # D and the experts' hidden widths
    use: str = "train"  # one of `USES`
    weights: tuple[Tensor, ...] = ()  # those that native code would read as they lie in the model
    lacks: str | None = None  # what else native code lacks for it


PACKED = Work("cpu", torch.float32, use="packed")


class Support(NamedTuple):
    """Whether a backend can run something, and the reason to show to a person."""

    ok: bool
    reason: str


def _no_padding(counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    return counts_E


class Backend(NamedTuple):
    """One row of the table. What it does not bring is the definition's.

    Attributes:
        single_ffn: the network of one expert on a few rows, where no gradients are wanted; see
            `torch_grouped.single_ffn`. None: grouping is as good for few rows.
        padded_counts: (rows of each expert, dtype) → rows to give it, padding included. Groups are
            laid out largest first where the two differ, else in the order of the experts.
        mixture: the whole mixture in one call; see `reference.mixture`. None: dispatch, experts
            and combine, one after another.
    """

    name: str  # what a person types to force it
    uses: tuple[str, ...]  # what it is for, of `USES`
    runs_on: str  # in words
    against: Callable[[Work], str | None]  # why it cannot do some work; None: it can
    grouped_mm: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor] = (
        reference.grouped_mm
    )
    expert_ffn: Callable[
        [Tensor, Tensor, Tensor, Tensor, str, Tensor | None, Biases | None], Tensor
    ] = reference.expert_ffn
    single_ffn: Callable[[Tensor, int, Tensor, Tensor, str, Biases | None], Tensor] | None = None
    padded_counts: Callable[[Tensor, torch.dtype], Tensor] = _no_padding
    mixture: Callable[..., Tensor] | None = None

    def refusal(self, work: Work) -> str | None:
        """Why it cannot do this now: `torch.func` cannot pass through a kernel's own autograd."""
        if pointwise.transformed() and self.name != "reference":
            return (
                "torch.func (grad, vmap, jvp, …) needs plain torch, which only the reference is: "
                'build the model with backend="reference", or leave it "auto"'
            )
        return self.against(work)

    def supports(self, work: Work) -> Support:
        """Whether it can do this now."""
        reason = self.refusal(work)
        return Support(reason is None, reason or self.runs_on)


class BackendRow(NamedTuple):
    """One line of `moestro doctor`."""

    use: str
    name: str
    ok: bool
    reason: str
    chosen: bool


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


def _against_torch(work: Work) -> str | None:
    """What `torch.nn.functional.grouped_mm` is slow for, or refuses."""
    if work.device != "cuda":
        return "slower than segments off CUDA, where it is a loop over all experts"
    if not torch.cuda.is_available():
        return "no CUDA device on this machine"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0 or newer"
    if work.dtype != torch.bfloat16:
        return f"fast for bfloat16 only, not {work.dtype}"
    odd = [width for width in work.widths if width % 8]
    return f"widths must be multiples of 8 (16 bytes); given {odd}" if odd else None


def _against_whole(work: Work) -> str | None:
    """What the native kernels cannot do in one call; asked before each, so in few steps."""
    if work.device != "cpu":
        return f"for the CPU, not {work.device}"
    reason = native_cpu.available() or work.lacks
    if reason is not None:
        return reason
    if work.use == "infer" and work.dtype not in ROWS:
        return f"for float32 and bfloat16, not {work.dtype}"
    for weight in work.weights:
        dtype = weight.dtype
        if work.use == "infer" and dtype != work.dtype:
            return (
                f"tokens are {work.dtype} and weights {dtype}; load the model in the dtype to "
                "compute in, without autocast"
            )
        if type(weight) not in (nn.Parameter, Tensor):
            return f"weights are plain tensors; given a {type(weight).__name__}"
        if not weight.is_cpu or dtype not in ROWS:
            return f"weights are float32 or bfloat16 on CPU; given {dtype} on {weight.device}"
        if dtype == torch.bfloat16 and weight.dim() > 1 and weight.shape[-1] % 2:
            return f"bfloat16 weights have an even width; given {list(weight.shape)}"
        if not weight.is_contiguous():
            return "weights are contiguous; given strided ones"
    return None


EXPERTS = ("train", "infer")
WHOLE = Backend(
    "native", ("infer", "packed", "step"), "CPU, for float32 and bfloat16", _against_whole,
    mixture=native_cpu.plain_mixture,
)  # fmt: skip
TABLE: tuple[Backend, ...] = (
    WHOLE,
    Backend(
        "torch", EXPERTS, "CUDA with bfloat16", _against_torch,
        torch_grouped.TORCH.grouped_mm, torch_grouped.TORCH.expert_ffn,
    ),
    Backend(
        "native", EXPERTS, "CPU with bf16 products (AMX, AVX-512), for bfloat16",
        lambda work: native_training.reason_against(*work[:3]),
        native_training.NATIVE.grouped_mm, native_training.expert_ffn, torch_grouped.single_ffn,
    ),
    Backend(
        "segments", EXPERTS, "any device and dtype", lambda work: None,
        torch_grouped.SEGMENTS.grouped_mm, torch_grouped.SEGMENTS.expert_ffn,
        torch_grouped.single_ffn, _few_sizes,
    ),
    Backend(
        "reference", EXPERTS, "any device and dtype", lambda work: None, mixture=reference.mixture
    ),
)  # fmt: skip


def forced() -> str:
    """What MOESTRO_BACKEND says; "auto" where it says nothing."""
    return os.environ.get(ENVIRONMENT, "auto")


def choose(name: str, work: Work) -> Backend:
    """The backend that runs: the one named, or for "auto" what MOESTRO_BACKEND says or the first.

    Raises:
        BackendError: the name is unknown, or what it names (of "auto": any) cannot run this.
    """
    name = forced() if name == "auto" else name
    reasons = []
    for row in TABLE:
        if work.use in row.uses and name in ("auto", row.name):
            reason = row.refusal(work)
            if reason is None:
                return row
            reasons.append(reason)
    known = dict.fromkeys(row.name for row in TABLE)
    if name not in ("auto", *known):
        raise BackendError(f"unknown kernel backend {name!r}; known: auto, {', '.join(known)}")
    if name == "auto":
        raise BackendError(f"no kernel backend can run {USES[work.use]}: {'; '.join(reasons)}")
    able = dict.fromkeys(row.name for row in TABLE if work.use in row.uses)
    why = "; ".join(reasons) or f"{USES[work.use]} run by {', '.join(able)} alone"
    raise BackendError(
        f"kernel backend {name!r} was asked for and cannot run on {work.device}: {why}. Choose "
        f"another (unset {ENVIRONMENT}, or use 'auto'); `moestro doctor` lists them"
    )


def why_not_whole(name: str, work: Work) -> str | None:
    """Why this is not done in one native call, the choice by name included; None: it is."""
    name = forced() if name == "auto" else name
    if name not in ("auto", WHOLE.name):
        return f"the kernel backend {name} was asked for"
    return WHOLE.refusal(work)


def table(device: str | None = None, dtype: torch.dtype = torch.bfloat16) -> list[BackendRow]:
    """The table as this machine sees it, use by use, for `moestro doctor`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for use in USES:
        work, chosen = Work(device, dtype, use=use), None
        with suppress(BackendError):
            chosen = choose("auto", work)
        able = [row for row in TABLE if use in row.uses]
        rows += [BackendRow(use, row.name, *row.supports(work), row is chosen) for row in able]
    return rows
