"""The plug as operators of torch: what `torch.compile` and `torch.export` keep as one node.

What the experts do depends on the data (group sizes, few rows, the native library), so none of it
can be traced. In its place stand `torch.ops.moestro.*`, with the shape of what they return and
their gradients. These are computed by running the operator again under autograd, as under gradient
checkpointing: the same bits as without a compiler, and nothing more to keep than the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.foreign.layouts import ForeignWeights
from moestro.hf import compute
from moestro.kernels import native_cpu
from moestro.kernels.packing import UNGATED, ExpertSlabs, Format, PackedMatrix
from moestro.moe.mixing import compute_dtype, differentiated

# A CUDA graph would replay the group sizes of its first batch.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def traced(
    experts: Any, weights: ForeignWeights, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """The mixture of a module of transformers, by operators; see `forward.mixture`.

    Functions of its own between and after the products are left to the compiler; where gradients
    are wanted, so is a gate between halves that are not one after the other.
    """
    rows_TD = _rows(x_TD)
    grads = differentiated(x_TD, weights_TK, *weights.tensors)
    activation = weights.activation
    if activation is None or weights.post_norm or (grads and compute.fused(weights) is None):
        how = (experts, _ops().product)
        return compute.split(weights, rows_TD, experts_TK, weights_TK, *how).to(x_TD.dtype)
    inputs = (rows_TD, experts_TK, weights_TK)
    tensors = (*weights[:4], weights.other_EFD)
    flags = (weights.transposed, weights.interleaved)
    y_TD: Tensor = _ops().mixture(*inputs, *tensors, *flags, activation, grads)
    return y_TD.to(x_TD.dtype)


def traced_packed(
    packed: ExpertSlabs, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """`compute.by_packed`, by an operator."""
    sizes = [packed.num_experts, packed.dim, packed.hidden_dim]
    how = (packed.activation, *packed.format[:2], sizes)
    tensors = (packed.data, packed.up_bias, packed.down_bias)
    rows_TD = _rows(x_TD)
    y_TD: Tensor = _ops().packed_mixture(rows_TD, experts_TK, weights_TK, *tensors, *how)
    return y_TD.to(x_TD.dtype)


def traced_linear(packed: PackedMatrix, x_TI: Tensor) -> Tensor:
    """`native_cpu.linear`, by an operator."""
    data, *shape, format, bias_O = packed
    y_TO: Tensor = _ops().packed_linear(x_TI, data, bias_O, *format[:2], shape)
    return y_TO


def _rows(x_TD: Tensor) -> Tensor:
    """Tokens in the dtype to compute in; autocast does not know the meta device."""
    return x_TD if x_TD.device.type == "meta" else x_TD.to(compute_dtype(x_TD))


def _ops() -> Any:
    return torch.ops.moestro


def _register(
    name: str, arguments: str, run: Callable[..., Any], like: Callable[..., Any], to: str = "Tensor"
) -> None:
    """An operator without gradients: `run` computes it, `like` makes an empty result."""
    torch.library.define(f"moestro::{name}", f"({arguments}) -> {to}", tags=_TAGS)
    torch.library.impl(f"moestro::{name}", "default")(run)
    torch.library.register_fake(f"moestro::{name}")(like)


def _register_with_gradients(
    name: str, arguments: str, run: Callable[..., Tensor], like: Callable[..., Tensor]
) -> None:
    """`_register`, and gradients of the tensors by another operator, which runs it again."""

    def forward(*args: Any) -> Tensor:
        return run(*(each.detach() if isinstance(each, Tensor) else each for each in args))

    def gradients(grad: Tensor, needs: list[bool], *args: Any) -> list[Tensor]:
        leaves = [
            each.detach().requires_grad_(need) if isinstance(each, Tensor) else each
            for each, need in zip(args, needs, strict=True)
        ]
        with torch.enable_grad():
            y = run(*leaves)
        asked = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        return [each.contiguous() for each in torch.autograd.grad(y, asked, grad)]

    def gradients_like(grad: Tensor, needs: list[bool], *args: Any) -> list[Tensor]:
        asked = [each for each, need in zip(args, needs, strict=True) if need]
        return [each.new_empty(each.shape) for each in asked]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(each for each in inputs if isinstance(each, Tensor)))
        ctx.others = [None if isinstance(each, Tensor) else (each,) for each in inputs]

    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = iter(ctx.saved_tensors), list(ctx.needs_input_grad)
        args = [next(saved) if other is None else other[0] for other in ctx.others]
        found = iter(getattr(_ops(), f"{name}_gradients")(grad.contiguous(), needs, *args))
        return tuple(next(found) if need else None for need in needs)

    _register(name, arguments, forward, like)
    torch.library.register_autograd(f"moestro::{name}", backward, setup_context=keep)
    arguments = f"Tensor grad, bool[] needs, {arguments}"
    _register(f"{name}_gradients", arguments, gradients, gradients_like, "Tensor[]")


def _mixture(*args: Any) -> Tensor:
    x_TD, experts_TK, weights_TK, *tensors, transposed, interleaved, activation, grads = args
    up_EHD, down_EDF, up_EH, down_ED, other_EFD = tensors
    weights = ForeignWeights(
        up_EHD, down_EDF, up_EH, down_ED, activation not in UNGATED, interleaved, transposed,
        activation, post_norm=False, other_EFD=other_EFD,
    )  # fmt: skip
    inputs = (weights, x_TD, experts_TK, weights_TK)
    with torch.set_grad_enabled(grads):  # which decides the path, as it does without a compiler
        if grads:
            return compute.by_torch(*inputs)
        return compute.without_gradients(*inputs, "a compiled mixture")[0]


def _packed_mixture(*args: Any) -> Tensor:
    x_TD, experts_TK, weights_TK, data, *biases, activation, kind, group, sizes = args
    (num_experts, dim, hidden), (up_EH, down_ED) = sizes, biases
    format = Format(kind, group)
    packed = ExpertSlabs(data, num_experts, dim, hidden, activation, format, up_EH, down_ED)
    return compute.by_packed(packed, x_TD, experts_TK, weights_TK)


def _packed_linear(*args: Any) -> Tensor:
    x_TI, data, bias_O, kind, group, (rows, columns) = args
    return native_cpu.linear(PackedMatrix(data, rows, columns, Format(kind, group)), x_TI, bias_O)


def _like_tokens(x_TD: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


_register_with_gradients(
    "mixture",
    "Tensor x, Tensor experts, Tensor weights, Tensor up, Tensor down, Tensor? up_bias, "
    "Tensor? down_bias, Tensor? other, bool transposed, bool interleaved, str activation, "
    "bool grads",
    _mixture,
    _like_tokens,
)
_register_with_gradients(
    "product",
    "Tensor x, Tensor experts, Tensor weight, Tensor? bias",
    compute.product,
    lambda x, experts, weight, bias: x.new_empty(len(x), weight.shape[1]),
)
_register(
    "packed_mixture",
    "Tensor x, Tensor experts, Tensor weights, Tensor data, Tensor? up_bias, Tensor? down_bias, "
    "str activation, str kind, int group, int[] sizes",
    _packed_mixture,
    _like_tokens,
)
_register(
    "packed_linear",
    "Tensor x, Tensor data, Tensor? bias, str kind, int group, int[] shape",
    _packed_linear,
    lambda x, data, bias, kind, group, shape: x.new_empty(len(x), shape[0]),
)
