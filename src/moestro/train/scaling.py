"""A comparison over several mixtures: more experts, finer experts, and the laws fitted to both.

All mixtures of one comparison share the dense twin, since none changes the active experts' size;
their routers, which grow with E·G, are counted in what each costs. With a budget of compute the
laws' numbers of tokens are not quite the same, then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from moestro.config import EncDecConfig, ModelConfig, MoEConfig, RunConfig
from moestro.errors import ConfigError

# Krajewski et al. 2024 (Scaling Laws for Fine-Grained Mixture of Experts), table 1: the exponent
# of granularity. With the few points of one comparison only the other two numbers are fitted.
GRANULARITY_EXPONENT = 0.58

Axis = Literal["experts", "granularity"]
Point = tuple[int, float]  # E or G, and the loss


class Mixture(NamedTuple):
    """One mixture of a comparison.

    Attributes:
        experts: E before the split, of the settings' width F.
        granularity: G, the parts that each expert is split into: G·E experts of width F/G,
            G·K of them per token (Krajewski et al. 2024, section 3).
    """

    experts: int
    granularity: int = 1

    @property
    def name(self) -> str:
        """Of its run folder."""
        fine = "" if self.granularity == 1 else f"-granularity{self.granularity}"
        return f"experts{self.experts}{fine}"


class Law(NamedTuple):
    """A published law's form fitted to final held-out losses.

    experts:     ln loss = offset + slope · ln(E/K), dense as E/K = 1 (Clark et al. 2022,
                 equation 1 at one model size, without the saturation of equation 7).
    granularity: loss = offset + slope · G^-0.58 (Krajewski et al. 2024, equation 9 at one
                 model size and one number of tokens, with its exponent).

    Attributes:
        axis: what is varied.
        fixed: the other number: G of the experts' law, E of the granularity's.
        offset, slope: as above, losses in bits per byte.
        points: How many were fitted.
        residual: largest |fitted - measured| / measured of them.
        largest: the point left out of a second fit: E or G.
        predicted, measured: its loss; None with fewer than three points.
    """

    axis: Axis
    fixed: int
    offset: float
    slope: float
    points: int
    residual: float
    largest: int | None
    predicted: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured of the point left out."""
        if self.predicted is None or self.measured is None:
            return None
        return self.predicted / self.measured - 1


def mixtures(cfg: RunConfig, experts: Sequence[int], granularities: Sequence[int]) -> list[Mixture]:
    """Every combination, smallest first.

    Raises:
        ConfigError: a number that the settings' mixture cannot have.
    """
    moe = mixture_of(cfg)
    for name, numbers in (("--experts", experts), ("--granularity", granularities)):
        if len(set(numbers)) < len(numbers):
            raise ConfigError(f"{name} {_listed(numbers)} names a number twice; name each once")
    for number in experts:
        if number < moe.top_k:
            raise ConfigError(
                f"--experts {number}: each token goes to {moe.top_k} experts (model.moe.top_k), so "
                f"{moe.top_k} is the least"
            )
    for number in granularities:
        if moe.hidden_dim % number:
            raise ConfigError(
                f"--granularity {number} does not divide model.moe.hidden_dim, {moe.hidden_dim}; "
                "choose a divisor of it, or another width"
            )
    return [
        Mixture(number, fine)
        for number in sorted(experts or [moe.num_experts])
        for fine in sorted(granularities or [1])
    ]


def remade(cfg: RunConfig, mixture: Mixture) -> ModelConfig | EncDecConfig:
    """The settings' model with the experts of `mixture`; active experts are as large as before."""
    moe, fine = mixture_of(cfg), mixture.granularity
    changed = {
        "num_experts": mixture.experts * fine,
        "top_k": moe.top_k * fine,
        "hidden_dim": moe.hidden_dim // fine,
    }
    # Left unset it would depend on K, which is multiplied here.
    router = {**moe.router.model_dump(), "renormalize": moe.renormalizes}
    try:
        checked = MoEConfig(**{**moe.model_dump(), "router": router, **changed})
    except ConfigError as error:
        raise ConfigError(
            f"{mixture.name} (--experts {mixture.experts}, --granularity {fine}): {error}"
        ) from None
    return cfg.model.model_copy(update={"moe": checked})


def laws(losses: Mapping[Mixture, float], dense: float, top_k: int) -> list[Law]:
    """Fit both laws wherever at least two points vary along one axis.

    Args:
        losses: Final held-out bits per byte of each mixture, mean over seeds.
        dense: The same of the dense twin, a point of the experts' law.
        top_k: K before any split.
    """
    found = []
    for fine in sorted({mixture.granularity for mixture in losses}):
        row = [(m.experts, loss) for m, loss in losses.items() if m.granularity == fine]
        if len(row) > 1:
            found.append(_law("experts", fine, [(top_k, dense), *row], top_k))
    for number in sorted({mixture.experts for mixture in losses}):
        row = [(m.granularity, loss) for m, loss in losses.items() if m.experts == number]
        if len(row) > 1:
            found.append(_law("granularity", number, row, top_k))
    return found


def predict(law: Law, number: float, top_k: int) -> float:
    """The loss that a law gives for E or G."""
    return _form(law.axis, law.offset, law.slope, number, top_k)


def told(law: Law) -> str:
    """The law in one sentence."""
    if law.axis == "experts":
        form = f"loss = {math.exp(law.offset):.4f} · (E/K)^{law.slope:+.4f}"
        of = f" at granularity {law.fixed}" if law.fixed > 1 else ""
    else:
        form = f"loss = {law.offset:.4f} {law.slope:+.4f} · G^-{GRANULARITY_EXPONENT}"
        of = f" of {law.fixed} experts"
    near = f"{law.points} points within {law.residual:.2%}"
    if law.points == 2:
        near = "a line through 2 points"
    text = f"{law.axis}{of}: {form}, {near}"
    if law.error is None:
        return text + "; too few points to leave one out"
    letter = "E" if law.axis == "experts" else "G"
    return (
        f"{text}; fitted to the {law.points - 1} without {letter} = {law.largest} it predicts "
        f"{law.predicted:.4f} there, {law.error:+.2%} from the measured {law.measured:.4f}"
    )


def law_json(law: Law) -> dict[str, Any]:
    """For compare.json."""
    return {**law._asdict(), "error": law.error}


def mixture_of(cfg: RunConfig) -> MoEConfig:
    """The settings' mixture.

    Raises:
        ConfigError: there is none.
    """
    if cfg.model.moe is None:
        raise ConfigError(
            "nothing to compare: the settings have no mixture; set model.moe.hidden_dim, for one"
        )
    return cfg.model.moe


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _law(axis: Axis, fixed: int, points: Sequence[Point], top_k: int) -> Law:
    """Fit all points, and again without the largest."""
    offset, slope = _fit(axis, points, top_k)
    residual = max(abs(_form(axis, offset, slope, n, top_k) / loss - 1) for n, loss in points)
    law = Law(axis, fixed, offset, slope, len(points), residual, None, None, None)
    largest, measured = max(points)
    rest = [(n, loss) for n, loss in points if n != largest]
    if len({n for n, _ in rest}) < 2:
        return law
    predicted = _form(axis, *_fit(axis, rest, top_k), largest, top_k)
    return law._replace(largest=largest, predicted=predicted, measured=measured)


def _fit(axis: Axis, points: Sequence[Point], top_k: int) -> tuple[float, float]:
    """Least squares of the law's linear form."""
    numbers = np.array([n for n, _ in points], dtype=np.float64)
    losses = np.array([loss for _, loss in points])
    if axis == "experts":
        x, y = np.log(numbers / top_k), np.log(losses)
    else:
        x, y = numbers**-GRANULARITY_EXPONENT, losses
    slope, offset = np.polyfit(x, y, 1)
    return float(offset), float(slope)


def _form(axis: Axis, offset: float, slope: float, number: float, top_k: int) -> float:
    if axis == "experts":
        return math.exp(offset + slope * math.log(number / top_k))
    return offset + slope * float(number**-GRANULARITY_EXPONENT)
