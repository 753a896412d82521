"""bitsandbytes' 4 bits (QLoRA, Dettmers et al. 2023): a table of 16 numbers, blocks with a largest.

Two values lie in a byte, the high half first. `absmax` is the largest magnitude of each block; with
double quantisation it is itself a byte into a table of 256, times the largest of its own block,
plus an offset. The other facts are JSON in the bytes of `quant_state`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.checkpoints.quantised.form import Form, Header, Shape, expect
from moestro.errors import ShapeError
from moestro.strictjson import parse

_BYTES_AT_ONCE = 1 << 18
# Bytes may be stored as numbers of another type.
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_KNOWN = {
    "quant_type", "blocksize", "dtype", "shape",
    "nested_blocksize", "nested_dtype", "nested_offset",
}  # fmt: skip


class State(NamedTuple):
    """What `quant_state` says; of the outer blocks only with double quantisation."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    nested_offset: float


class Bnb4(Form):
    """`weight` (bytes), `.absmax`, `.quant_map` and `.quant_state`, and two of `.nested_…`."""

    bits = 4
    tensor = ""
    optional = (".nested_absmax", ".nested_quant_map")
    kind: str

    def shape(self, parts: Mapping[str, Header]) -> Shape:
        """[O, I]."""
        state = self._state(parts)
        values, nested = parts[""], ".nested_absmax" in parts
        expect("the weight", values, _STORAGE, values.shape)
        held, count = math.prod(values.shape) * values.dtype.itemsize, math.prod(state.shape)
        if held != (count + 1) // 2:
            raise ShapeError(f"the weight has {held:,} bytes; {list(state.shape)} in 4 bits take "
                             f"{(count + 1) // 2:,}")  # fmt: skip
        blocks = -(-count // state.block)
        expect("absmax", parts[".absmax"], [torch.uint8 if nested else torch.float32], [blocks])
        expect("quant_map", parts[".quant_map"], [torch.float32], [16])
        if nested != (".nested_quant_map" in parts):
            raise ShapeError("nested_absmax and nested_quant_map go together; one is missing")
        if nested:
            outer = -(-blocks // state.nested_block)
            expect("nested_absmax", parts[".nested_absmax"], [torch.float32], [outer])
            expect("nested_quant_map", parts[".nested_quant_map"], [torch.float32], [256])
        return state.shape

    def fill(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Number of the table times the largest of its block, in fp32. [O, I]."""
        self.shape(parts)
        state, table = self._state(parts), parts[".quant_map"]
        largest = parts[".absmax"]
        if ".nested_absmax" in parts:
            outer = parts[".nested_absmax"].repeat_interleave(state.nested_block)[: len(largest)]
            largest = parts[".nested_quant_map"][largest.int()] * outer + state.nested_offset
        data = parts[""].contiguous().view(-1).view(torch.uint8)
        byte = torch.arange(256, device=data.device)
        twins = torch.stack([table[byte >> 4], table[byte & 15]], dim=1)
        whole = (
            out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device="cpu")
        )
        flat = whole.view(-1)
        for start in range(0, len(data), _BYTES_AT_ONCE):  # whole blocks, but for the last
            numbers = F.embedding(data[start : start + _BYTES_AT_ONCE].int(), twins).flatten()
            blocks = largest[2 * start // state.block :][: -(-len(numbers) // state.block)]
            numbers = F.pad(numbers, (0, -len(numbers) % state.block)).view(-1, state.block)
            part = flat[2 * start : 2 * (start + _BYTES_AT_ONCE)]
            part.copy_(numbers.mul_(blocks[:, None]).view(-1)[: len(part)])
        if whole is not out:
            out.copy_(whole)

    def _state(self, parts: Mapping[str, Header]) -> State:
        """The facts of `quant_state`, checked."""
        held = parts[self.small[0]]
        assert isinstance(held, Tensor)
        expect("quant_state", held, [torch.uint8], ["bytes"])
        try:
            facts = parse(bytes(held.tolist()))
        except ValueError as error:
            raise ShapeError(f"quant_state is no JSON: {error}") from None
        if not isinstance(facts, dict) or not facts.keys() <= _KNOWN:
            raise ShapeError(
                f"quant_state is {facts!r:.200}; known are {', '.join(sorted(_KNOWN))}"
            )
        shape = facts.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_size, shape)):
            raise ShapeError(f"quant_state has the shape {shape!r:.100}; read are matrices")
        if facts.get("quant_type") != self.kind:
            raise ShapeError(f"quant_state has the quant_type {facts.get('quant_type')!r:.100} "
                             f"under a key of {self.kind}")  # fmt: skip
        sizes: list[Any] = [facts.get("blocksize")]
        offset: Any = 0.0
        if ".nested_absmax" in parts:
            sizes.append(facts.get("nested_blocksize"))
            offset = facts.get("nested_offset")
        if not all(size in _BLOCKS for size in sizes) or not isinstance(offset, int | float):
            raise ShapeError(
                f"quant_state has blocks of {sizes!r:.100} and the offset {offset!r:.100}; blocks "
                f"have {', '.join(map(str, _BLOCKS))}, and an offset is a number"
            )
        return State((shape[0], shape[1]), sizes[0], sizes[-1], float(offset))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


class Nf4(Bnb4):
    """16 quantiles of a normal distribution, as the file has them."""

    name = "NF4"
    kind = "nf4"
    needed = ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")
    small = needed[-1:]


class Fp4(Bnb4):
    """16 floats, as the file has them."""

    name = "FP4"
    kind = "fp4"
    needed = ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__fp4")
    small = needed[-1:]
