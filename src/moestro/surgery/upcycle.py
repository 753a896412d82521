"""A dense model made a mixture that computes what it did, for training to go on from.

Komatsuzaki et al. 2022 (arXiv 2212.05055); granular with virtual groups: He et al. 2024
(arXiv 2410.07524); part drawn again: Nakamura et al. 2025 (arXiv 2502.19261).

Letters: D width, F hidden width of the dense network, G its slices, E experts, K per token.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moestro.checkpoints.families import FAMILIES, family_of
from moestro.config import ModelConfig
from moestro.errors import ConfigError
from moestro.kernels.reference import GATED
from moestro.surgery.layers import Change, Layers, Tensors

ROUTER_STD = 0.02  # of the router's rows at the start, as in drop-upcycling
NOISE_STD = 0.02
# Model types to write, the first that fits; the later ones for their shared experts. After them
# come all others, of which most have a kind of attention of their own.
TARGETS = ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "hunyuan_v1_moe", "dots1", "glm4_moe")
Method = Literal["copy", "noise", "drop"]


class Recipe(NamedTuple):
    """How a mixture is made of a dense model.

    Attributes:
        experts: E.
        top_k: K.
        granularity: G, slices of the network, each an expert of F / G hidden units.
        method: copy; noise: N(0, 0.02) on a share of the weights as written; drop: a share of each
            expert's hidden units drawn again, normal with the mean and deviation of those that
            they replace, the same units in gate, up and down.
        share: of the weights or units that noise and drop change.
        shared: a shared expert, a copy of the dense network, beside the routed ones.
        seed: of what is drawn.
    """

    experts: int
    top_k: int
    granularity: int = 1
    method: Method = "copy"
    share: float = 0.5
    shared: bool = False
    seed: int = 0


def upcycled(layers: Layers, recipe: Recipe, family: str | None = None) -> tuple[Change, str]:
    """The mixture, and the model_type to write it as.

    Copies, sliced or not, compute what the dense model did. The weights of a token's K experts sum
    to 1. With slices, the G experts of a copy have equal router rows, so a token takes whole
    copies, K / G of them, and each slice has 1 / G of its copy's weight; hence `down` times G,
    which is right for any activation, unlike a root of G on each matrix. With a shared expert,
    both sides give half.

    Args:
        layers: of the dense model.
        recipe: what to make.
        family: None: the first of `TARGETS`, then of all, that can express the mixture.

    Raises:
        ConfigError: the model is a mixture, numbers do not go together, or no family can express
            the mixture; says why, and whether one could with a shared expert, or without.
    """
    _check(layers.cfg, recipe)
    if family:
        name, cfg = family, _expressed(layers, recipe, family)
    else:
        name, cfg = _first(layers, recipe)
    return Change.of_networks(cfg, partial(_network, cfg, recipe)), name


def rounds_to(layers: Layers, recipe: Recipe) -> torch.dtype | None:
    """The dtype that copies' `down` is rounded to; None: copies compute what the dense model did.

    Times a power of two a number is exact in any dtype, and in fp32 and float64 rounding is that of
    the computation itself.
    """
    mantissa, _ = math.frexp(_scale(recipe))
    narrow = {
        dtype
        for name, dtype in layers.stored.items()
        if name.endswith(".ffn.down") and dtype.itemsize < 4
    }
    return next(iter(narrow), None) if mantissa != 0.5 else None


def _scale(recipe: Recipe) -> float:
    """What routed experts' `down` is multiplied by."""
    return recipe.granularity * (0.5 if recipe.shared else 1.0)


def _expressed(layers: Layers, recipe: Recipe, family: str) -> ModelConfig:
    """The mixture's settings in a family.

    Raises:
        ConfigError: it cannot express them.
    """
    cfg = _settings(layers.cfg, recipe, family)
    layers.fields(cfg, family)
    return cfg


def _first(layers: Layers, recipe: Recipe) -> tuple[str, ModelConfig]:
    """The first family that can express the mixture, and its settings there.

    Raises:
        ConfigError: none can.
    """

    def able(recipe: Recipe) -> tuple[str, ModelConfig] | ConfigError:
        refused: list[ConfigError] = []
        for name in dict.fromkeys((*TARGETS, *FAMILIES)):
            try:
                return name, _expressed(layers, recipe, name)
            except ConfigError as error:
                refused.append(error)
        return refused[0]

    found = able(recipe)
    if isinstance(found, tuple):
        return found
    other = able(recipe._replace(shared=not recipe.shared))
    how = "without a shared expert" if recipe.shared else "with a shared expert"
    hint = (
        f"{how[0].upper()}{how[1:]} {other[0]} can"
        if isinstance(other, tuple)
        else f"Nor can one {how}; name a family to see what is in its way"
    )
    raise ConfigError(
        f"no family can express the mixture; what is in the way of {TARGETS[0]}: {found}. {hint}"
    )


def _check(cfg: ModelConfig, recipe: Recipe) -> None:
    """Refuse what cannot be made.

    Raises:
        ConfigError: says what can.
    """
    if cfg.moe is not None:
        raise ConfigError(
            f"the model is a mixture of {cfg.moe.num_experts} experts already; give a dense one"
        )
    hidden, slices = cfg.dense.hidden_dim, recipe.granularity
    if hidden % slices:
        raise ConfigError(
            f"granularity {slices} does not divide the network's {hidden} hidden units evenly"
        )
    if recipe.experts % slices or recipe.top_k % slices:
        raise ConfigError(
            f"{recipe.experts} experts, {recipe.top_k} per token, do not make whole copies of "
            f"{slices} slices; choose multiples of {slices} for both"
        )
    if not 2 <= recipe.top_k <= recipe.experts:
        raise ConfigError(
            f"top_k is {recipe.top_k}; it must be 2 to {recipe.experts}, the number of experts: "
            "one expert's weight alone is either the constant 1, of which a router learns "
            "nothing, or changes what the model computes"
        )
    if not 0 < recipe.share <= 1:
        raise ConfigError(f"the share to change is {recipe.share}; it must be above 0, at most 1")
    units = hidden // slices
    number, what = {
        "copy": (0, ""),
        "noise": (units * cfg.dim, "weights of an expert's down projection"),
        "drop": (units, "hidden units of an expert"),
    }[recipe.method]
    if number and not round(recipe.share * number):
        raise ConfigError(
            f"a share of {recipe.share:g} of the {number:,} {what} is none of them; the least is "
            f"{1 / number:.2g}"
        )


def _settings(cfg: ModelConfig, recipe: Recipe, family: str) -> ModelConfig:
    """The mixture's settings as a family has them."""
    always = family_of(family, "family").always
    router: dict[str, Any] = {
        name.removeprefix("moe.router."): value
        for name, value in always.items()
        if name.startswith("moe.router.")
    }
    hidden, shared = cfg.dense.hidden_dim, None
    if recipe.shared:
        shared = {"hidden_dim": hidden, "gate": always.get("moe.shared.gate", False)}
    moe = {
        "dim": cfg.dim,
        "hidden_dim": hidden // recipe.granularity,
        "num_experts": recipe.experts,
        "top_k": recipe.top_k,
        "activation": cfg.dense.activation,
        "router": {"renormalize": True, **router},
        "shared": shared,
    }
    new = ModelConfig(**{**cfg.model_dump(), "moe": moe, "moe_every": 1, "dense_first": 0})
    assert new.moe is not None
    if not new.moe.renormalizes:
        raise ConfigError(f"in {family} the weights of a token's experts do not sum to 1")
    return new


def _network(cfg: ModelConfig, recipe: Recipe, layer: int, tensors: Tensors) -> Tensors:
    """A mixture's tensors from those of the dense network in its place."""
    moe = cfg.moe
    assert moe is not None
    draw = torch.Generator("cpu").manual_seed(recipe.seed * 100_003 + layer)
    up_HD, down_DF = tensors["gate_up"][0], tensors["down"][0]
    slices, copies = recipe.granularity, recipe.experts // recipe.granularity
    # Hidden units of each slice: of gate and up alike.
    halves = up_HD.chunk(2) if moe.activation in GATED else (up_HD,)
    up_GHD = torch.cat([torch.unflatten(half, 0, (slices, -1)) for half in halves], dim=1)
    down_GDF = torch.unflatten(down_DF * _scale(recipe), 1, (slices, -1)).transpose(0, 1)
    up_EHD, down_EDF = up_GHD.repeat(copies, 1, 1), down_GDF.repeat(copies, 1, 1)
    if recipe.method == "noise":
        up_EHD, down_EDF = (_noisy(each, recipe.share, draw) for each in (up_EHD, down_EDF))
    elif recipe.method == "drop":
        for up_HD, down_DF in zip(up_EHD, down_EDF, strict=True):
            _draw_again(up_HD, down_DF, len(halves), recipe.share, draw)
    gated_shared = moe.shared is not None and moe.shared.gate
    rows_CD = (
        torch.randn(copies, cfg.dim, generator=draw, dtype=torch.float32, device="cpu") * ROUTER_STD
    )
    made = {
        "experts.gate_up": up_EHD,
        "experts.down": down_EDF,
        "router.weight": rows_CD.repeat_interleave(slices, dim=0).to(up_HD.dtype),
    }
    for name, wanted in (("bias", moe.router.selection_bias), ("logit_bias", moe.router.bias)):
        if wanted:
            made[f"router.{name}"] = torch.zeros(recipe.experts, dtype=torch.float32, device="cpu")
    if recipe.shared:
        made["shared.gate_up"] = tensors["gate_up"]
        made["shared.down"] = tensors["down"] * (1.0 if gated_shared else 0.5)
    if gated_shared:  # sigmoid(0) is the half
        made["shared_gate.weight"] = up_HD.new_zeros(1, cfg.dim)
    return made


def _noisy(weight: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """The weight with noise on a share of its entries."""
    some = torch.rand(weight.shape, generator=draw, dtype=torch.float32, device="cpu") < share
    noise = torch.randn(weight.shape, generator=draw, dtype=torch.float32, device="cpu") * NOISE_STD
    return weight + (noise * some).to(weight.dtype)


def _draw_again(
    up_HD: Tensor, down_DF: Tensor, halves: int, share: float, draw: torch.Generator
) -> None:
    """Draw a share of the hidden units of one expert again, in place."""
    number = down_DF.shape[1]
    units = torch.randperm(number, generator=draw, device="cpu")[: round(share * number)]
    parts = [(part, 0) for part in up_HD.chunk(halves)] + [(down_DF, 1)]
    for part, axis in parts:
        old = part.index_select(axis, units).double()
        new = torch.randn(old.shape, generator=draw, dtype=torch.float64, device="cpu")
        part.index_copy_(axis, units, (old.mean() + new * old.std()).to(part.dtype))
