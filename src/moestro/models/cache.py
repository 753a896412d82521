"""The cache of decoding: keys and values of each layer's last positions, or its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.config import CacheKind
from moestro.errors import ShapeError
from moestro.kernels.whole import from_whole, to_whole
from moestro.models.rotary import RotaryTable


class LayerCache:
    """Tensors [..., P, A] of one layer's last positions, kept for as long as they can be seen.

    Buffers grow by half and then slide, so a token copies a bounded number of positions however
    long the text gets, and memory stays below 9/8 of `limit` (plus a few) positions.

    Attributes:
        limit: most positions that a query looks back on, its own included.
        length: positions kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.length = 0
        self._most = limit + limit // 8 + 16
        self._start = 0
        self._buffers: tuple[Tensor, ...] = ()

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append S positions; returns all that the new ones may look at, oldest first.

        Args:
            new: one or more tensors [..., S, A] (keys and values, say), the same ones every time.

        Returns:
            Views [..., P, A] with P = min(earlier positions, limit - 1) + S: the last S are the new
            ones. They hold until the next call.

        Raises:
            ShapeError: the batch differs from the one that the cache was filled with.
        """
        added = new[0].shape[-2]
        if self._buffers:
            _check_batch(len(self._buffers[0]), len(new[0]))
        kept = self._forget()
        total = kept + added
        # Autograd keeps what it is given, so there nothing may be written in place.
        tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in new)
        if tracked or total > self._most:
            return self._joined(new, kept)
        # Tensors of inference mode cannot be written to outside it.
        sealed = not torch.is_inference_mode_enabled() and self._buffers[:1]
        if not self._fits(total) or (sealed and sealed[0].is_inference()):
            self._move(new, kept, total)
        for buffer, tensor in zip(self._buffers, new, strict=True):
            buffer.narrow(-2, self._start + kept, added).copy_(tensor)
        self.length = total
        return tuple(buffer.narrow(-2, self._start, total) for buffer in self._buffers)

    def room(self, added: int, *like: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """The whole buffers, and the place of the next position in them, for who writes there.

        Args:
            added: positions that will be written; more than `limit` make the buffers longer, until
                the next call.
            like: tensors [..., 0, A] of the buffers' shapes and dtypes.

        Raises:
            ShapeError: it is filled with another number of tensors, as one of another kind is.
        """
        if self._buffers and len(self._buffers) != len(like):
            raise ShapeError(
                f"the cache keeps {len(self._buffers)} tensors; given {len(like)}: it is of "
                "another kind, so use a new one"
            )
        kept = self._forget()
        if not self._fits(kept + added):
            self._move(like, kept, kept + added)
        return self._buffers, self._start + kept

    def fork(self, dropped: int = 0) -> LayerCache:
        """The same positions but for the last `dropped`, in memory of their own."""
        twin = type(self)(self.limit)
        twin.length = self.length - dropped
        buffers = (buffer.narrow(-2, self._start, twin.length) for buffer in self._buffers)
        twin._buffers = tuple(each.clone() for each in buffers)
        return twin

    def can_drop(self, dropped: int, position: int) -> bool:
        """Whether all is still kept that position `position - dropped` would look at.

        Args:
            dropped: of the last positions.
            position: how many have passed.
        """
        return self.length - dropped >= min(position - dropped, self.limit - 1)

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return sum(each.nbytes for each in self._buffers)

    def held(self) -> tuple[Tensor, ...]:
        """Views [..., P, A] of what is kept, oldest first; they hold until the next `extend`."""
        return tuple(buffer.narrow(-2, self._start, self.length) for buffer in self._buffers)

    def _forget(self) -> int:
        """Let go what the next position cannot see; returns the number of positions kept."""
        kept = min(self.length, self.limit - 1)
        self._start += self.length - kept
        self.length = kept
        return kept

    def _fits(self, total: int) -> bool:
        return bool(self._buffers) and self._start + total <= self._buffers[0].shape[-2]

    def _move(self, new: Sequence[Tensor], kept: int, total: int) -> None:
        """Bring what is kept to the front of larger buffers."""
        room = max(total, min(self._most, total + total // 2 + 16))
        buffers = []
        for n, tensor in enumerate(new):
            buffer = tensor.new_empty(*tensor.shape[:-2], room, tensor.shape[-1])
            if kept:
                old = self._buffers[n].narrow(-2, self._start, kept)
                buffer.narrow(-2, 0, kept).copy_(old)
            buffers.append(buffer)
        self._buffers, self._start = tuple(buffers), 0

    def _joined(self, new: Sequence[Tensor], kept: int) -> tuple[Tensor, ...]:
        """Old and new in tensors of their own, of which the last `limit` are kept."""
        whole = tuple(new)
        if kept:
            old = (buffer.narrow(-2, self._start, kept) for buffer in self._buffers)
            whole = tuple(torch.cat(pair, dim=-2) for pair in zip(old, new, strict=True))
        # A copy: a view would keep the whole prompt alive.
        self._buffers = tuple(tensor[..., -self.limit :, :].clone() for tensor in whole)
        self._start, self.length = 0, self._buffers[0].shape[-2]
        return whole


class WholeCache(LayerCache):
    """The same as int8 with one fp32 scale for each row of each position: the last dimension.

    What new positions look at, their own rows included, is what was rounded. The buffers are all
    tensors of bytes, then their scales. Gradients do not pass.
    """

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """See `LayerCache.extend`; what it returns is in the dtype of the new ones."""
        pairs = [to_whole(tensor) for tensor in new]
        whole, scales = zip(*pairs, strict=True)
        return self._numbers(super().extend(*whole, *scales), new[0].dtype)

    def held(self) -> tuple[Tensor, ...]:
        """See `LayerCache.held`; in fp32."""
        return self._numbers(super().held(), torch.float32)

    def _numbers(self, kept: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        half = len(kept) // 2
        pairs = zip(kept[:half], kept[half:], strict=True)
        return tuple(from_whole(whole, scales, dtype) for whole, scales in pairs)


class StateCache:
    """What a layer without attention keeps of a text, however long.

    That is the last inputs of its convolution and, of a delta layer, its state.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, ...] = ()
        self._shared = False  # with a fork

    def held(self, batch: int) -> tuple[Tensor, ...]:
        """The last W - 1 inputs [B, W - 1, I], and a state [B, H, A, O]; nothing for a new text.

        Raises:
            ShapeError: the cache was filled with another batch than this.
        """
        if not self._kept:
            return ()
        _check_batch(len(self._kept[0]), batch)
        if self._kept[0].is_inference() and not torch.is_inference_mode_enabled():
            # Autograd does not take tensors of inference mode.
            return tuple(each.clone() for each in self._kept)
        return self._kept

    def keep(self, inputs_BWI: Tensor, *state_BHAO: Tensor) -> None:
        """Replace all; inputs are copied where they would keep the whole text alive."""
        self._kept, self._shared = (inputs_BWI.clone(), *state_BHAO), False

    def room(self, *like: Tensor) -> tuple[Tensor, ...]:
        """All of it, fp32 and nobody else's, for who writes there; zeros for a new text.

        Args:
            like: tensors of their shapes.
        """
        kept = self._kept
        if not kept:
            self._kept = tuple(torch.zeros_like(each) for each in like)
        elif self._shared or any(each.dtype != torch.float32 for each in kept):
            self._kept = tuple(each.float().clone() for each in kept)
        elif not all(each.is_contiguous() for each in kept):
            self._kept = tuple(each.contiguous() for each in kept)
        self._shared = False
        return self._kept

    def fork(self, dropped: int = 0) -> StateCache:
        """The same state, copied once one of both is written to; none, where all is `dropped`."""
        twin = StateCache()
        if not dropped:
            twin._kept = self._kept
            twin._shared = self._shared = True
        return twin

    def can_drop(self, dropped: int, position: int) -> bool:
        """Whether it can be forked without the last positions: a state goes back only to nothing.

        Args:
            dropped: of the last positions.
            position: how many have passed.
        """
        return dropped in (0, position)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(each.nbytes for each in self._kept)


def _check_batch(held: int, given: int) -> None:
    if held != given:
        raise ShapeError(
            f"the cache holds a batch of {held}, and {given} were given; use a new cache for "
            "another batch"
        )


class KeysValues(NamedTuple):
    """What queries look at: keys and values, each [B, G, P, A]."""

    keys_BGPA: Tensor
    values_BGPA: Tensor


class CrossSource(NamedTuple):
    """What a decoder's cross attention sees of a text: one pair for each layer, and its padding."""

    cross: tuple[KeysValues, ...]
    valid_BP: Tensor | None


class KVCache:
    """What each layer keeps, how many positions have passed, and the angles of the next.

    Args:
        limits: most positions that each layer looks back on; None: it keeps a state instead.
        rotary: angles, for models with rotary positions.
        kind: how keys and values are kept; states stay as they are.

    Attributes:
        source: what cross attention sees, once it is read.
    """

    def __init__(
        self,
        limits: Sequence[int | None],
        rotary: RotaryTable | None = None,
        kind: CacheKind = "as-is",
    ) -> None:
        looking = WholeCache if kind == "int8" else LayerCache
        self.layers: list[LayerCache | StateCache] = [
            StateCache() if limit is None else looking(limit) for limit in limits
        ]
        self.rotary = rotary
        self.source: CrossSource | None = None
        self.position = 0

    def fork(self, position: int | None = None) -> KVCache:
        """The same past in memory of its own: both may go on, each its own way.

        Args:
            position: where it is cut, which `can_cut` has to allow; None: not at all.
        """
        dropped = 0 if position is None else self.position - position
        twin = KVCache((), self.rotary)
        twin.layers = [layer.fork(dropped) for layer in self.layers]
        twin.position = self.position - dropped
        twin.source = self.source  # nothing writes to it
        return twin

    def can_cut(self, position: int) -> bool:
        """Whether it can be forked at this position: no layer has let go what it looks back on."""
        dropped = self.position - position
        known = 0 <= position <= self.position
        return known and all(each.can_drop(dropped, self.position) for each in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def advance(self, added: int) -> None:
        """Count the positions that the native step has written."""
        for layer in self.layers:
            if isinstance(layer, LayerCache):
                layer.length += added
        self.position += added
