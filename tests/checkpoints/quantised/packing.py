"""Weights packed as others publish them, by the most obvious definition of each form.

A packer takes a matrix [O, I] and gives its parts by suffix, and the numbers that they stand for.
"""

import json

import numpy as np
import torch

NF4 = torch.tensor([
    -1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
])  # fmt: skip


def words(values_RC, bits, order=None):
    """Values of each row in 32-bit words; `order` says which come first in a word."""
    per = 32 // bits
    values = values_RC.numpy().astype(np.uint64)
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % per)))
    out = np.zeros((values.shape[0], values.shape[1] // per), dtype=np.uint64)
    for place, column in enumerate(order or range(per)):
        out |= values[:, column::per] << np.uint64(bits * place)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32))


def in_groups(weight_OI, groups_I, bits, symmetric, scale_dtype):
    """Whole numbers [O, I] with scales and zero points [O, N], of groups of columns."""
    count = int(groups_I.max()) + 1
    scales_ON = torch.empty(len(weight_OI), count)
    zeros_ON = torch.full((len(weight_OI), count), 2 ** (bits - 1))
    for n in range(count):
        low, high = weight_OI[:, groups_I == n].aminmax(dim=1)
        if symmetric:
            scales_ON[:, n] = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scales_ON[:, n] = (high - low) / (2**bits - 1)
            zeros_ON[:, n] = (-low / scales_ON[:, n]).round().clamp(0, 2**bits - 1)
    scales_ON = scales_ON.to(scale_dtype)
    spread = scales_ON.float()[:, groups_I]
    values = (weight_OI / spread).round() + zeros_ON[:, groups_I]
    values_OI = values.clamp(0, 2**bits - 1).long()
    return values_OI, scales_ON, zeros_ON, (values_OI - zeros_ON[:, groups_I]).float() * spread


def groups_of(width, group, act_order=False):
    groups_I = torch.arange(width) // (width if group == -1 else group)
    if act_order:
        groups_I = groups_I[torch.randperm(width, generator=torch.Generator().manual_seed(1))]
    return groups_I


def gptq(weight_OI, bits=4, group=16, symmetric=True, act_order=False, version=1,
         g_idx=True, scale_dtype=torch.float16):  # fmt: skip
    groups_I = groups_of(weight_OI.shape[1], group, act_order)
    values, scales, zeros, numbers = in_groups(weight_OI, groups_I, bits, symmetric, scale_dtype)
    packed_zeros = words(zeros.T, bits)
    if version == 1:  # a one less in every value of a word, borrowing from the next
        ones = sum(1 << place for place in range(0, 32, bits))
        less = packed_zeros.numpy().view(np.uint32) - np.uint32(ones)
        packed_zeros = torch.from_numpy(less.view(np.int32))
    parts = {
        ".qweight": words(values, bits).T.contiguous(),
        ".qzeros": packed_zeros,
        ".scales": scales.T.contiguous(),
    }
    if g_idx:
        parts[".g_idx"] = groups_I.int()
    return parts, numbers


def awq(weight_OI, group=16):
    groups_I = groups_of(weight_OI.shape[1], group)
    values, scales, zeros, numbers = in_groups(weight_OI, groups_I, 4, False, torch.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        ".qweight": words(values.T, 4, order),
        ".qzeros": words(zeros.T, 4, order),
        ".scales": scales.T.contiguous(),
    }
    return parts, numbers


def packed_ints(weight_OI, bits=4, group=16, symmetric=True, act_order=False,
                scale_dtype=torch.bfloat16):  # fmt: skip
    groups_I = groups_of(weight_OI.shape[1], group, act_order)
    values, scales, zeros, numbers = in_groups(weight_OI, groups_I, bits, symmetric, scale_dtype)
    parts = {
        ".weight_packed": words(values, bits),
        ".weight_scale": scales,
        ".weight_shape": torch.tensor(weight_OI.shape),
    }
    if not symmetric:
        parts[".weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    if act_order:
        parts[".weight_g_idx"] = groups_I.int()
    return parts, numbers


def whole_ints(weight_OI, strategy="channel", symmetric=True):
    """int8, less 128."""
    flat = weight_OI.reshape(1, -1) if strategy == "tensor" else weight_OI
    groups_I = torch.zeros(flat.shape[1], dtype=torch.long)
    values, scales, zeros, numbers = in_groups(flat, groups_I, 8, symmetric, torch.float32)
    values = (values - 128).to(torch.int8).view(weight_OI.shape)
    scales = scales.view(-1) if strategy == "tensor" else scales
    parts = {".weight": values, ".weight_scale": scales}
    if not symmetric:
        parts[".weight_zero_point"] = (zeros - 128).to(torch.int8).view(scales.shape)
    return parts, numbers.view(weight_OI.shape)


def whole_floats(weight_OI, strategy="channel", block=(16, 8), suffix=".weight_scale"):
    """e4m3."""
    height, width = weight_OI.shape
    rows, columns = {"tensor": (height, width), "channel": (1, width), "block": block}[strategy]
    scales = torch.empty(-(-height // rows), -(-width // columns))
    numbers = torch.empty(height, width)
    values = torch.empty(height, width, dtype=torch.float8_e4m3fn)
    for n in range(scales.shape[0]):
        for m in range(scales.shape[1]):
            at = (slice(n * rows, (n + 1) * rows), slice(m * columns, (m + 1) * columns))
            scales[n, m] = weight_OI[at].abs().max() / 448
            values[at] = (weight_OI[at] / scales[n, m]).to(torch.float8_e4m3fn)
            numbers[at] = values[at].float() * scales[n, m]
    return {".weight": values, suffix: scales.view(1) if strategy == "tensor" else scales}, numbers


def nf4(weight_OI, block=64, double=False, storage=torch.uint8, shape=None):
    flat = weight_OI.reshape(-1)
    blocks = list(flat.split(block))
    largest = torch.stack([one.abs().max() for one in blocks])
    facts = {"quant_type": "nf4", "blocksize": block, "dtype": "float32",
             "shape": list(shape or weight_OI.shape)}  # fmt: skip
    parts = {".weight.quant_map": NF4}
    if double:
        facts |= {"nested_blocksize": 256, "nested_dtype": "float32",
                  "nested_offset": largest.mean().item()}  # fmt: skip
        table = torch.linspace(-1, 1, 256)
        apart = (largest - facts["nested_offset"]).split(256)
        outer = torch.stack([one.abs().max() for one in apart])
        codes = torch.cat([((one / most)[:, None] - table).abs().argmin(1)
                           for one, most in zip(apart, outer, strict=True)])  # fmt: skip
        spread = torch.cat([most.expand(len(one)) for one, most in zip(apart, outer, strict=True)])
        parts |= {".weight.absmax": codes.to(torch.uint8), ".weight.nested_absmax": outer,
                  ".weight.nested_quant_map": table}  # fmt: skip
        largest = table[codes] * spread + facts["nested_offset"]
    else:
        parts[".weight.absmax"] = largest
    spread = torch.cat([most.expand(len(one)) for one, most in zip(blocks, largest, strict=True)])
    codes = ((flat / spread)[:, None] - NF4).abs().argmin(1)
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    data = (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)
    parts[".weight"] = data.view(storage).view(-1, 1)
    parts[".weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(facts).encode()),
                                                                  dtype=torch.uint8)  # fmt: skip
    return parts, (NF4[codes] * spread).view(weight_OI.shape)


def compressed(format, bits=4, kind="int", strategy="group", symmetric=True, **more):
    """The quantization_config of compressed-tensors."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric,
               "dynamic": False, "observer": "minmax", **more}  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip


def gptq_settings(bits=4, group=16, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False,
            "sym": True, "damp_percent": 0.01, **more}  # fmt: skip


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
       "_load_in_4bit": True, "bnb_4bit_quant_storage": "uint8",
       "llm_int8_skip_modules": ["lm_head"]}  # fmt: skip

# name → (quantization_config, packer of one matrix).
FORMS = {
    "gptq": (gptq_settings(), gptq),
    "gptq_zeros": (gptq_settings(sym=False), lambda w: gptq(w, symmetric=False)),
    "gptq_order": (
        gptq_settings(desc_act=True),
        lambda w: gptq(w, symmetric=False, act_order=True),
    ),
    "gptq_int8": (gptq_settings(8, -1), lambda w: gptq(w, 8, -1, g_idx=False)),
    "gptq_v2": (
        gptq_settings(checkpoint_format="gptq_v2"),
        lambda w: gptq(w, symmetric=False, version=2, scale_dtype=torch.bfloat16),
    ),
    "awq": (AWQ, awq),
    "packed_int4": (compressed("pack-quantized", group_size=16), packed_ints),
    "packed_zeros": (
        compressed("pack-quantized", group_size=16, symmetric=False, actorder="group"),
        lambda w: packed_ints(w, symmetric=False, act_order=True),
    ),
    "packed_int8": (
        compressed("pack-quantized", 8, strategy="channel"),
        lambda w: packed_ints(w, 8, -1, scale_dtype=torch.float16),
    ),
    "int8_rows": (compressed("int-quantized", 8, strategy="channel"), whole_ints),
    "int8_whole": (
        compressed("int-quantized", 8, strategy="tensor", symmetric=False),
        lambda w: whole_ints(w, "tensor", symmetric=False),
    ),
    "fp8_rows": (compressed("float-quantized", 8, "float", "channel"), whole_floats),
    "fp8_whole": (
        compressed("float-quantized", 8, "float", "tensor"),
        lambda w: whole_floats(w, "tensor"),
    ),
    "fp8_blocks": (
        compressed("float-quantized", 8, "float", "block", block_structure=[16, 8]),
        lambda w: whole_floats(w, "block"),
    ),
    "fp8_static": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        lambda w: whole_floats(w, "tensor"),
    ),
    "nf4": (BNB, nf4),
    "nf4_double": (
        {**BNB, "bnb_4bit_use_double_quant": True},
        lambda w: nf4(w, double=True, storage=torch.bfloat16),
    ),
}
