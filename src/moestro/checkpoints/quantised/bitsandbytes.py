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
from moestro.checkpoints.quantised.scaling import GROUP, nibbles
from moestro.errors import ShapeError
from moestro.kernels.packing import BLOCKS, NF4, TABLES, BlockRows
from moestro.strictjson import parse

_BYTES_AT_ONCE = 1 << 18
_BLOCKS_AT_ONCE = 1 << 14
_NEAR = 0.01  # that a number of NF4's table is to the rounded one
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
        largest = self._largest(parts, state)
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

    def _largest(self, parts: Mapping[str, Tensor], state: State) -> Tensor:
        """The largest magnitude of each block, in fp32."""
        largest = parts[".absmax"]
        if ".nested_absmax" not in parts:
            return largest
        outer = parts[".nested_absmax"].repeat_interleave(state.nested_block)[: len(largest)]
        return parts[".nested_quant_map"][largest.int()] * outer + state.nested_offset

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

    @property
    def in_blocks(self) -> bool:
        """All but odd widths are."""
        return True

    def blocks(self, parts: Mapping[str, Header]) -> int | None:
        """See `Form`."""
        return None if self.shape(parts)[-1] % GROUP else NF4

    def rows(self, parts: Mapping[str, Tensor]) -> tuple[BlockRows, tuple[float, float]]:
        """See `Form`: numbers of the table become multiples of 1/127, magnitudes fp16."""
        (height, width), state = self.shape(parts), self._state(parts)
        table = torch.tensor(TABLES["nf4"], device="cpu", dtype=torch.float32)
        exact, rounded = parts[".quant_map"], table / 127
        if float((exact - rounded).abs().max()) > _NEAR:
            raise ShapeError("quant_map is not the table of NF4; --weights bf16 reads any")
        bytes_NX = parts[""].contiguous().view(-1).view(torch.uint8).view(-1, GROUP // 2)
        places = torch.arange(len(bytes_NX), device="cpu") * GROUP // state.block
        largest_N = self._largest(parts, state)[places]
        scales_N = (largest_N / 127).half()
        if not bool(scales_N.isfinite().all()):
            raise ShapeError("a largest magnitude is not finite in fp16")
        data = torch.empty(len(bytes_NX), BLOCKS[NF4][1], dtype=torch.uint8, device="cpu")
        data[:, :2] = scales_N[:, None].view(torch.uint8)
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        for start in range(0, len(data), _BLOCKS_AT_ONCE):
            some = slice(start, start + _BLOCKS_AT_ONCE)
            values = torch.stack([bytes_NX[some] >> 4, bytes_NX[some] & 15], -1).flatten(1)
            data[some, 2:] = nibbles(values)
            numbers = exact[values.int()] * largest_N[some, None]
            off = rounded[values.int()] * (127 * scales_N[some].float())[:, None] - numbers
            sums += torch.stack([each.double().square().sum() for each in (off, numbers)])
        squared, whole = sums.tolist()
        return BlockRows(data.view(height, -1), NF4, width), (squared, whole)


class Fp4(Bnb4):
    """16 floats, as the file has them."""

    name = "FP4"
    kind = "fp4"
    needed = ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__fp4")
    small = needed[-1:]
