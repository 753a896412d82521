"""What every quantised form says of itself, and how a checkpoint's tensors are joined by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from moestro.checkpoints.tensor_files import Source, Stored
from moestro.errors import CheckpointError, ShapeError
from moestro.kernels.packing import BlockRows

Shape = tuple[int, ...]

SCALES = (torch.float16, torch.bfloat16, torch.float32)
# The most bytes of a part that is read when a checkpoint is opened.
_SMALL = 4096


class Header(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> Shape:
        """Its sides."""

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""


class Form:
    """How a checkpoint stores one tensor as several, its parts.

    A part's key is that of the module or tensor and one of the suffixes here.

    Attributes:
        name: for people.
        bits: of a value.
        tensor: suffix of the tensor's own key.
        needed: suffixes of the parts that every tensor has; the first is that of the values.
        optional: suffixes of those that it may have.
        small: suffixes of those that say the tensor's shape; they are read before the others.
    """

    name: ClassVar[str]
    bits: int
    tensor: ClassVar[str] = ".weight"
    needed: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    small: ClassVar[tuple[str, ...]] = ()

    def shape(self, parts: Mapping[str, Header]) -> Shape:
        """The tensor's shape by its parts, which have to fit each other.

        Args:
            parts: by suffix; the small ones as tensors.

        Raises:
            ShapeError: a part has another shape, dtype or content than it should.
        """
        raise NotImplementedError  # each form has its own

    def fill(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the numbers that these parts stand for, rounded once, to the dtype of `out`.

        Args:
            parts: by suffix.
            out: of the tensor's shape; of any device and strides.

        Raises:
            ShapeError: see `shape`.
        """
        raise NotImplementedError  # each form has its own

    @property
    def in_blocks(self) -> bool:
        """Whether the settings allow tensors whose rows are ggml's blocks; see `blocks`."""
        return False

    def blocks(self, parts: Mapping[str, Header]) -> int | None:
        """The number of ggml's blocks of 32 that hold a tensor's rows; None: there are none.

        Args:
            parts: see `shape`.
        """
        return None

    def rows(self, parts: Mapping[str, Tensor]) -> tuple[BlockRows, tuple[float, float]]:
        """The tensor as such blocks, and what rounding their scales adds; see `row_blocks`.

        Raises:
            ShapeError: see `shape`; or the values are none that the blocks have.
        """
        raise NotImplementedError  # each form has its own

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The tensor that these parts stand for, rounded once, to `dtype`.

        Raises:
            ShapeError: see `shape`.
        """
        device = parts[self.needed[0]].device
        out = torch.empty(self.shape(parts), dtype=dtype, device=device)
        self.fill(parts, out)
        return out


@dataclass(frozen=True, eq=False)
class Quantised(Source):
    """A tensor that several of a checkpoint stand for."""

    parts: Mapping[str, Stored]
    form: Form
    number: int | None

    @property
    def blocks(self) -> int | None:
        """See `Source`."""
        return self.number

    @property
    def stored_in(self) -> str:
        """The form's name."""
        return self.form.name

    @classmethod
    def of(cls, key: str, parts: Mapping[str, Stored], form: Form) -> Quantised:
        """The tensor of these parts.

        Raises:
            CheckpointError: they do not fit each other; names file and key.
        """
        file, headers = parts[form.needed[0]].file, dict[str, Header](parts)
        for suffix in form.small:
            if parts[suffix].bytes > _SMALL:
                raise CheckpointError(
                    f"{file}: {parts[suffix].key} has {parts[suffix].bytes:,} bytes; "
                    f"{form.name} has at most {_SMALL:,} there"
                )
            headers[suffix] = parts[suffix].load()
        try:
            shape = form.shape(headers)
        except ShapeError as error:
            raise CheckpointError(f"{file}: {key}: {error}") from None
        size = sum(part.bytes for part in parts.values())
        return cls(file, key, None, shape, size, parts, form, form.blocks(headers))

    def entry(self, index: int) -> Quantised:
        """Entry `index` of the first axis; all parts of a stack are stacked."""
        parts = {suffix: part.entry(index) for suffix, part in self.parts.items()}
        return Quantised.of(self.key, parts, self.form)

    def load(self, dtype: torch.dtype) -> Tensor:
        """The numbers in `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device="cpu")
        self.load_into(out)
        return out

    def load_into(self, target: Tensor) -> None:
        """Fill a tensor of this shape, converted to its dtype; a stack entry by entry.

        What is needed on the way are the parts and a few rows.
        """
        if len(self.shape) > 2:
            super().load_into(target)
            return
        with self._named():
            self.form.fill(self._loaded(), target)

    def rows(self) -> tuple[BlockRows, tuple[float, float]]:
        """See `Source`: blocks that are made of the parts."""
        with self._named():
            return self.form.rows(self._loaded())

    def _loaded(self) -> dict[str, Tensor]:
        return {suffix: part.load() for suffix, part in self.parts.items()}

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say of what does not fit where it is."""
        try:
            yield
        except ShapeError as error:
            raise CheckpointError(f"{self.file}: {self.key}: {error}") from None


def join(
    stored: Mapping[str, Stored], forms: Sequence[Form], unused: Iterable[str] = ()
) -> dict[str, Source]:
    """Sources by key, parts joined under the key of the tensor that they stand for.

    Args:
        stored: of a checkpoint, by key, in the order of files and bytes, which stays.
        forms: that it may have; of those that fit the first is taken.
        unused: suffixes of keys that are left out.

    Raises:
        CheckpointError: parts are missing or do not fit, or a tensor is there twice; names the key.
    """
    keys = [key for key in stored if not key.endswith(tuple(unused))]
    owners: dict[str, tuple[str, Form]] = {}
    for base, form in _bases(keys, forms).items():
        name = base + form.tensor
        own = [base + suffix for suffix in form.needed + form.optional if base + suffix in stored]
        if name in stored and name not in own:
            raise CheckpointError(f"the checkpoint has {name} twice: plain and as {own[0]}")
        owners |= dict.fromkeys(own, (base, form))
    sources: dict[str, Source] = {}
    for key in keys:
        if key not in owners:
            sources[key] = stored[key]
            continue
        base, form = owners[key]
        if (name := base + form.tensor) not in sources:
            suffixes = [each for each in form.needed + form.optional if base + each in stored]
            parts = {suffix: stored[base + suffix] for suffix in suffixes}
            sources[name] = Quantised.of(name, parts, form)
    return sources


def _bases(keys: Sequence[str], forms: Sequence[Form]) -> dict[str, Form]:
    """What keys of parts begin with → the form that all parts there have.

    Raises:
        CheckpointError: a part is missing.
    """
    names = set(keys)
    # A suffix that plain tensors have as well proves nothing.
    marks = sorted(
        {each for form in forms for each in form.needed + form.optional if each != form.tensor},
        key=len,
        reverse=True,
    )
    found: dict[str, Form] = {}
    for key in keys:
        mark = next((mark for mark in marks if key.endswith(mark)), None)
        base = key.removesuffix(mark or "")
        if mark is None or base in found:
            continue
        lacking = {form: [base + each for each in form.needed if base + each not in names]
                   for form in forms}  # fmt: skip
        form = min(lacking, key=lambda form: len(lacking[form]))
        if lacking[form]:
            raise CheckpointError(f"the checkpoint has {key} but lacks {lacking[form][0]}")
        found[base] = form
    return found


def expect(what: str, given: Header, dtypes: Sequence[torch.dtype], shape: Sequence[Any]) -> None:
    """Refuse a part of another dtype or shape.

    Args:
        what: its name.
        given: the part.
        dtypes: that it may have.
        shape: its sides; None or a letter for any.

    Raises:
        ShapeError: says what was given and what is expected.
    """
    sides = tuple(given.shape)
    fits = len(sides) == len(shape) and all(
        not isinstance(want, int) or want == side for want, side in zip(shape, sides, strict=True)
    )
    if given.dtype not in dtypes or not fits:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ShapeError(
            f"{what} is {str(given.dtype).removeprefix('torch.')} {list(sides)}; it should be "
            f"{kinds} [{', '.join(map(str, shape))}]"
        )
