"""Pack the experts of a model of transformers in place, layer by layer, and its projections too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moestro.errors import BackendError, ShapeError
from moestro.foreign import classes, layouts
from moestro.hf import ops
from moestro.hf.forward import PACKED, through_ops
from moestro.hf.plug import use
from moestro.kernels import native_cpu
from moestro.kernels.packing import Format, PackedExperts, check_format
from moestro.models.linear import PackedLinear


class PackedModel(NamedTuple):
    """What `quantize` did.

    Attributes:
        format: how weights are stored now.
        experts: names of the packed experts modules.
        linears: names of the packed projections.
        bytes_before: size of what was packed.
        bytes_after: its size now, scales and padding included.
    """

    format: Format
    experts: tuple[str, ...]
    linears: tuple[str, ...]
    bytes_before: int
    bytes_after: int


class PackedProjection(PackedLinear):
    """A linear map with packed weights, in the place of an `nn.Linear` of transformers.

    Args:
        linear: what it replaces; its weights are packed.
        format: how.
    """

    def __init__(self, linear: nn.Linear, format: Format) -> None:
        bias_O = None if linear.bias is None else linear.bias.detach().float().clone()
        super().__init__(native_cpu.pack_matrix(linear.weight, format), bias_O)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def product(self, rows_TI: Tensor) -> Tensor:
        """See `PackedLinear.product`."""
        if through_ops(rows_TI):
            return ops.traced_linear(self.weights, rows_TI, self.bias_O)
        return super().product(rows_TI)

    def _save_to_state_dict(self, *_: Any) -> None:
        _refuse_saving(self)


def quantize(
    model: Any, kind: str = "int8", group: int = 32, *, linears: bool = False
) -> PackedModel:
    """Replace the experts' weights by packed ones, a layer at a time, and run them from then on.

    The weights of a layer are let go before the next is packed, so that at no time two copies of
    the model exist. Nothing of the model can be trained afterwards, and it cannot be saved: what
    transformers would write has no experts.

    Args:
        model: of transformers, in evaluation mode, on CPU, in float32 or bfloat16.
        kind: int8, int4, bfloat16 or float32.
        group: inputs that share a scale (int8, int4): 32 or 64.
        linears: also pack the projections of attention, and the output head.

    Returns:
        What was packed.

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
    missing = native_cpu.available()
    if missing is not None:
        raise BackendError(missing)
    modules = dict(model.named_modules())
    for name, module in found.items():
        _check(name, module)
        _refuse_wrapped(name, modules)
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
        before += linear.weight.numel() * linear.weight.element_size()
        after += packed.weights.data.numel()
    return PackedModel(format, tuple(found), tuple(projections), before, after)


def _check(name: str, module: nn.Module) -> None:
    """Refuse before anything is touched."""
    if PACKED in vars(module):
        raise BackendError(f"{name} is packed already; load the model again to pack it otherwise")
    weights = layouts.read(module)
    odd = weights.odd()
    if odd is not None:
        raise BackendError(
            f"the experts of {type(module).__name__} have {odd}, which the native kernels lack; "
            "they cannot be packed"
        )
    _check_weights(name, weights.tensors)


def _refuse_wrapped(name: str, modules: dict[str, nn.Module]) -> None:
    """An adapter changes weights that would no longer be there."""
    outer = classes.outermost(modules, name)
    if outer != name:
        raise BackendError(
            f"the experts {name} are inside of {type(modules[outer]).__name__}, which needs their "
            "weights; merge adapters into them first (model.merge_and_unload())"
        )


def _check_weights(name: str, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
            raise BackendError(
                f"what is packed is float32 or bfloat16 on CPU; {name} has {tensor.dtype} on "
                f"{tensor.device}. Load the model with dtype=torch.bfloat16 on CPU"
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


def _pack_module(name: str, module: nn.Module, format: Format) -> tuple[int, int]:
    """Pack one experts module and let its weights go. Bytes before and after."""
    weights = layouts.read(module)
    assert weights.activation is not None
    num_experts, dim, hidden = weights.down_EDF.shape
    size = native_cpu.slab_bytes(dim, hidden, weights.activation, format)
    data = native_cpu.aligned(num_experts * size)
    for expert, slab in enumerate(data.view(num_experts, size)):
        up_HD = _gate_first(weights.up_EHD[expert].detach(), weights.interleaved)
        try:
            native_cpu.pack_expert(
                up_HD, weights.down_EDF[expert].detach(), weights.activation, format, slab
            )
        except ShapeError as error:
            raise ShapeError(f"{name}, expert {expert}: {error}") from error
    up_EH, down_ED = (
        None if bias is None else bias.detach().float() for bias in (weights.up_EH, weights.down_ED)
    )
    if up_EH is not None:
        up_EH = _gate_first(up_EH.t(), weights.interleaved).t().contiguous()
    before = sum(each.numel() * each.element_size() for each in weights.tensors)
    packed = PackedExperts(
        data, num_experts, dim, hidden, weights.activation, format, up_EH, down_ED
    )
    for parameter in list(module._parameters):
        if parameter.endswith(("_proj", "_proj_bias")):
            del module._parameters[parameter]
    setattr(module, PACKED, packed)
    _never_save(module)
    return before, data.numel()


def _gate_first(up_HX: Tensor, interleaved: bool) -> Tensor:
    """Rows of the gate, then rows of up."""
    return torch.cat([up_HX[::2], up_HX[1::2]]) if interleaved else up_HX


def _never_save(module: Any) -> None:
    module.register_state_dict_pre_hook(_refuse_saving)


def _refuse_saving(module: nn.Module, *_: Any) -> None:
    raise BackendError(
        f"{type(module).__name__} holds packed weights, which transformers cannot save; save the "
        "model before moestro.hf.quantize"
    )
