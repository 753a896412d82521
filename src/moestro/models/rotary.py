"""Rotary positions: the angles by which queries and keys turn, and how they are stretched.

Letters: S positions, A width of the part of a head that turns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.config import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NetworkConfig,
    RopeConfig,
    YarnScaling,
)
from moestro.errors import ConfigError
from moestro.kernels import pointwise


class Rotary(NamedTuple):
    """Cosines and sines of S positions, [S, A/2] or [B, S, A/2], for `pointwise.rotate`."""

    cos_SA: Tensor
    sin_SA: Tensor


def turning_width(cfg: NetworkConfig) -> int:
    """A: the part of a head that turns, or the rotary part of a latent one."""
    latent = cfg.attention.latent
    return int(cfg.head_dim * _rope_of(cfg).fraction) if latent is None else latent.rope_dim


def turn(x_BSHO: Tensor, angles: Rotary) -> Tensor:
    """Rotate the first A numbers of each head, and leave the rest: [B, S, H, O ≥ A]."""
    width = 2 * angles.cos_SA.shape[-1]
    if width == x_BSHO.shape[-1]:
        return pointwise.rotate(x_BSHO, *angles)
    turned_BSHA = pointwise.rotate(x_BSHO[..., :width], *angles)
    return torch.cat([turned_BSHA, x_BSHO[..., width:]], dim=-1)


def frequencies(rope: RopeConfig, width: int, total: int = 0) -> Tensor:
    """Radians per position of each pair, fp64 [A/2]: θ^(-2i/A), stretched.

    Args:
        rope: base and scaling.
        width: A.
        total: length of the text so far; only longrope depends on it.

    Raises:
        ConfigError: longrope's lists are not A/2 long.
    """
    base_A = rope.theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return base_A / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(base_A, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(base_A, rope.theta, scaling)
    if isinstance(scaling, LongRopeScaling):
        divisors = scaling.long_factor if _beyond(scaling, total) else scaling.short_factor
        if len(divisors) != width // 2:
            raise ConfigError(
                f"attention.positions.scaling has {len(divisors)} factors; "
                f"heads of width {width} turn {width // 2} pairs, so give {width // 2}"
            )
        return base_A / base_A.new_tensor(divisors)
    return base_A


def magnitude(rope: RopeConfig, total: int = 0) -> float:
    """What cosines and sines are multiplied by; `total` as in `frequencies`."""
    scaling = rope.scaling
    if isinstance(scaling, LongRopeScaling):
        return scaling.long_scale if _beyond(scaling, total) else scaling.short_scale
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        both = (_mscale(scaling.factor, m) for m in (scaling.mscale, scaling.mscale_all_dim))
        return next(both) / next(both)
    return _mscale(scaling.factor, 1.0)


def score_scale(rope: RopeConfig) -> float:
    """What latent attention's scores are multiplied by: yarn's factor of all of a head, squared.

    DeepSeek-V2's own addition: outside latent attention, `mscale_all_dim` only divides `magnitude`.
    """
    scaling = rope.scaling
    if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return 1.0


def _beyond(scaling: LongRopeScaling, total: int) -> bool:
    """Whether longrope takes its long factors.

    Decided for all positions of a forward by the length of the text at its end. Keys that a cache
    holds keep the angles that they were given before the text grew beyond the original context.
    """
    return total > scaling.original_context


def _mscale(factor: float, slope: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1


def _llama3(base_A: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Pairs that turn rarely are divided by the factor, frequent ones are kept (Llama 3.1)."""
    turns_A = scaling.original_context * base_A / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_A = ((turns_A - low) / (high - low)).clamp(0, 1)
    return kept_A * base_A + (1 - kept_A) * base_A / scaling.factor


def _yarn(base_A: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    """Like llama3, but the blend is linear in the pair's number (Peng et al. 2023, §3.2)."""
    width = 2 * len(base_A)

    def pair(turns: float) -> float:
        """Number of the pair that turns so often within the original context."""
        length = scaling.original_context / (2 * math.pi * turns)
        return width * math.log(length) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # The border of both is then a step.
    pairs_A = torch.arange(len(base_A), dtype=base_A.dtype, device=base_A.device)
    divided_A = ((pairs_A - low) / (high - low)).clamp(0, 1)
    return (1 - divided_A) * base_A + divided_A * base_A / scaling.factor


def rotary(
    start: int,
    length: int,
    cfg: NetworkConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Rotary:
    """Angles position · frequency of positions start … start+length-1 (Su et al. 2021, eq. 15).

    Computed in fp64: at position 100 000, fp32 would be off by 0.004.

    Args:
        start: first position.
        length: S.
        cfg: of a model with rotary positions.
        device: of the result.
        dtype: of the result.
    """
    return _angles(start, length, start + length, cfg, device, dtype)


def _angles(
    start: int,
    length: int,
    total: int,
    cfg: NetworkConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Rotary:
    """Angles of these positions in a text of `total` tokens."""
    rope = _rope_of(cfg)
    turns_A = frequencies(rope, turning_width(cfg), total).to(device)
    positions_S = torch.arange(start, start + length, device=device, dtype=torch.float64)
    angles_SA = positions_S[:, None] * turns_A
    scale = magnitude(rope, total)
    return Rotary((angles_SA.cos() * scale).to(dtype), (angles_SA.sin() * scale).to(dtype))


def packed_rotary(
    documents_BS: Tensor, cfg: NetworkConfig, dtype: torch.dtype = torch.float32
) -> Rotary:
    """Angles of documents that lie one after another in each sequence: each begins at position 0.

    Each is stretched by longrope as it would be alone: by its own length.
    """
    length, device = documents_BS.shape[1], documents_BS.device
    places_S = torch.arange(length, device=device)
    begins_BS = documents_BS.diff(dim=1, prepend=documents_BS[:, :1] - 1) != 0
    first_BS = (places_S * begins_BS).cummax(dim=1).values
    positions_BS = places_S - first_BS
    angles = Rotary(*(each[positions_BS] for each in rotary(0, length, cfg, device, dtype)))
    scaling = _rope_of(cfg).scaling
    if not isinstance(scaling, LongRopeScaling) or not _beyond(scaling, length):
        return angles
    short = rotary(0, scaling.original_context, cfg, device, dtype)
    ends_BS = documents_BS.diff(dim=1, append=documents_BS[:, -1:] - 1) != 0
    last_BS = places_S.where(ends_BS, length).flip(1).cummin(dim=1).values.flip(1)
    stretched_BS1 = (last_BS - first_BS >= scaling.original_context)[..., None]
    nearest_BS = positions_BS.clamp(max=scaling.original_context - 1)
    pairs = zip(angles, short, strict=True)
    return Rotary(*(long.where(stretched_BS1, near[nearest_BS]) for long, near in pairs))


def _rope_of(cfg: NetworkConfig) -> RopeConfig:
    assert isinstance(cfg.attention.positions, RopeConfig)
    return cfg.attention.positions


class RotaryTable:
    """Angles computed a block of positions at a time, so that decoding a token only takes a row.

    Texts of any length may share one.

    Args:
        cfg: of a model with rotary positions.
        most: blocks that are kept, those used last.
    """

    BLOCK = 256
    # More at once, as of a prompt that passes whole, are computed for that call alone.
    MOST_AT_ONCE = 4

    def __init__(self, cfg: NetworkConfig, most: int = MOST_AT_ONCE) -> None:
        self.cfg, self._most = cfg, most
        scaling = _rope_of(cfg).scaling
        self._scaling = scaling if isinstance(scaling, LongRopeScaling) else None
        self._blocks: dict[_Block, Rotary] = {}

    def at(self, start: int, length: int, device: torch.device, dtype: torch.dtype) -> Rotary:
        """`rotary` of these positions."""
        total = start + length
        first, last = start // self.BLOCK, max(start, total - 1) // self.BLOCK
        if last - first >= self.MOST_AT_ONCE:
            return rotary(start, length, self.cfg, device, dtype)
        beyond = self._scaling is not None and _beyond(self._scaling, total)
        blocks = [
            self._block(_Block(number, beyond, device, dtype)) for number in range(first, last + 1)
        ]
        cos_SA, sin_SA = blocks[0]
        if len(blocks) > 1:
            cos_SA, sin_SA = (torch.cat(each) for each in zip(*blocks, strict=True))
        start -= first * self.BLOCK
        return Rotary(cos_SA[start : start + length], sin_SA[start : start + length])

    def _block(self, block: _Block) -> Rotary:
        found = self._blocks.pop(block, None)
        if found is None:
            start = block.number * self.BLOCK
            # Of longrope, a text of another length has other angles at the same positions.
            total = start + self.BLOCK
            if self._scaling is not None:
                border = self._scaling.original_context
                total = max(total, border + 1) if block.beyond else min(total, border)
            found = _angles(start, self.BLOCK, total, self.cfg, block.device, block.dtype)
            if len(self._blocks) >= self._most:
                del self._blocks[next(iter(self._blocks))]
        self._blocks[block] = found  # the one used last is last
        return found


class _Block(NamedTuple):
    """Which angles a block of a `RotaryTable` has: positions, longrope's factors, and form."""

    number: int
    beyond: bool
    device: torch.device
    dtype: torch.dtype
