"""Pack the experts of a model of transformers in place, layer by layer, and its projections too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moestro.errors import BackendError, ShapeError
from moestro.foreign import classes, layouts, undecorated
from moestro.foreign.layouts import ForeignWeights
from moestro.hf import ops
from moestro.hf.forward import PACKED, through_ops
from moestro.hf.plug import use
from moestro.kernels import backends, native_cpu
from moestro.kernels.packing import Format, check_format
from moestro.models.linear import PackedLinear


class PackedModel(NamedTuple):
    """What `quantize` did."""

    format: Format  # how weights are stored now
    experts: tuple[str, ...]  # names of the packed experts modules
    linears: tuple[str, ...]  # names of the packed projections
    bytes_before: int  # size of what was packed
    bytes_after: int  # its size now, scales and padding included


class PackedProjection(PackedLinear):
    """A linear map with packed weights, in place of an `nn.Linear` of transformers."""

    def __init__(self, linear: nn.Linear, format: Format) -> None:
        super().__init__(native_cpu.pack_matrix(linear.weight, format, linear.bias))
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def product(self, rows_TI: Tensor) -> Tensor:
        """See `PackedLinear.product`."""
        if through_ops(rows_TI):
            return ops.traced_linear(self.weights, rows_TI)
        return super().product(rows_TI)

    def _save_to_state_dict(self, *_: Any) -> None:
        refuse_saving(self)


def quantize(
    model: Any, kind: str = "int8", group: int = 32, *, linears: bool = False
) -> PackedModel:
    """Replace the experts' weights by packed ones, a layer at a time, and run them from then on.

    The original tensors of a layer are freed before the next is packed: at no time are there two
    copies of the model. It cannot be trained afterwards, nor saved: what transformers would write
    has no experts.

    Args:
        model: of transformers, in evaluation mode, on CPU, in float32 or bfloat16.
        kind: int8, int4, bfloat16 or float32.
        group: inputs that share a scale (int8, int4): 32 or 64.
        linears: also pack the projections of attention, and the output head.

    Raises:
        BackendError: the model is in training mode, has experts that cannot be reached or of a
            form that the native kernels lack, or there is no native library.
        ShapeError: the kind or group does not exist, or weights are not finite; what was packed
            until then stays so.
    """
    format = Format(kind, group)
    check_format(format)
    if model.training:
        raise BackendError(
            "the model is in training mode, and packed weights cannot be trained; call "
            "model.eval() first"
        )
    found = layouts.find(model)
    backends.choose("auto", backends.PACKED)
    modules = dict(model.named_modules())
    for name, module in found.items():
        outer = classes.outermost(modules, name)
        if outer != name:
            raise BackendError(
                f"the experts {name} are inside of {type(modules[outer]).__name__}, which needs "
                "their weights; merge adapters into them first (model.merge_and_unload())"
            )
        _check(name, module)
    projections = _projections(model) if linears else {}
    for name, linear in projections.items():
        _check_weights(name, [linear.weight])
    use(model)
    model.requires_grad_(False)
    before = after = 0
    for name, module in found.items():
        old, new = _pack_module(name, module, format)
        before, after = before + old, after + new
    for name, linear in projections.items():
        packed = PackedProjection(linear, format)
        model.set_submodule(name, packed)
        before += _bytes(linear.weight)
        after += packed.weights.data.numel()
    return PackedModel(format, tuple(found), tuple(projections), before, after)


def _check(name: str, module: nn.Module) -> None:
    """Refuse before anything is touched."""
    if PACKED in vars(module):
        raise BackendError(f"{name} is packed already; load the model again to pack it otherwise")
    weights = layouts.read(module)
    refuse_odd(module, weights)
    _check_weights(name, weights.tensors)


def refuse_odd(module: nn.Module, weights: ForeignWeights) -> None:
    """Refuse experts that have no packed form."""
    odd = weights.odd()
    if odd is not None:
        raise BackendError(
            f"the experts of {type(module).__name__} have {odd}, which the native kernels lack; "
            "they cannot be packed"
        )


def _check_weights(name: str, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
            raise BackendError(
                f"only float32 or bfloat16 weights on CPU can be packed; {name} has "
                f"{tensor.dtype} on {tensor.device}. Load the model with "
                "dtype=torch.bfloat16 on CPU"
            )


def _projections(model: Any) -> dict[str, nn.Linear]:
    """Linear maps within attention, and the head."""
    found = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and type(module) is nn.Linear:
            found[name] = module
        if "Attention" in type(module).__name__:
            for inner, each in module.named_modules(prefix=name):
                if type(each) is nn.Linear:
                    found[inner] = each
    return found


def _pack_module(name: str, module: Any, format: Format) -> tuple[int, int]:
    """Pack one experts module and free its weights. Bytes before and after."""
    weights = layouts.read(module)
    assert weights.activation is not None
    (up_EHD, down_EDF), biases = weights[:2], weights[2:4]
    try:
        if weights.other_EFD is not None:
            up_EHD = torch.cat([up_EHD, weights.other_EFD], dim=1)
        packed = native_cpu.pack_experts(
            up_EHD, down_EDF, weights.activation, format, *biases, interleaved=weights.interleaved
        )
    except ShapeError as error:
        raise ShapeError(f"{name}, {error}") from error
    own_names = undecorated.names(module)
    for parameter in list(dict(module.named_parameters())):
        if parameter in own_names or parameter.endswith(("_proj", "_proj_bias")):
            owner, _, own = parameter.rpartition(".")
            del module.get_submodule(owner)._parameters[own]
    setattr(module, PACKED, packed)
    module.register_state_dict_pre_hook(refuse_saving)
    return sum(map(_bytes, weights.tensors)), packed.data.numel()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def refuse_saving(module: nn.Module, *_: Any) -> None:
    """A hook of state dicts that hold no experts."""
    raise BackendError(
        f"{type(module).__name__} holds packed weights, which transformers cannot save; save the "
        "model before moestro.hf.quantize"
    )
