"""Mixtures against their dense twin: same text, same order, same compute per token.

Each run is an ordinary run folder below the comparison's; what was measured is in compare.json.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moestro.config import EncDecConfig, ModelConfig, RunConfig
from moestro.data.domains import ALL
from moestro.data.windows import Corpus
from moestro.errors import ConfigError
from moestro.models.count import count
from moestro.models.twin import dense_twin
from moestro.train import state
from moestro.train.intervals import half_width
from moestro.train.loop import Trainer
from moestro.train.metrics import Point
from moestro.train.optim import step_flops
from moestro.train.scaling import Law, Mixture, law_json, laws, mixture_of, mixtures, remade

# The kind of the only mixture of a comparison; several are called by their `Mixture.name`.
MIXTURE, TWIN = "moe", "dense"
CALIBRATION_STEPS = 8
EVALUATIONS = 20
MOST_STEPS = 10**9
# Share of the given minutes that is planned for: speed drifts, saving and figures take time.
PLANNED_SHARE = 0.9


class Comparison(NamedTuple):
    """What is compared, beside the settings of a run.

    Attributes:
        seeds: Runs of each model.
        experts: Numbers of experts E, a mixture for each; none: the settings' own.
        granularities: Parts G that each expert is split into, a mixture for each.
        budget_tflop: Training compute of every run; unset: train.steps for all.
    """

    seeds: int = 1
    experts: tuple[int, ...] = ()
    granularities: tuple[int, ...] = ()
    budget_tflop: float | None = None

    @property
    def several(self) -> bool:
        """Whether more is asked for than the settings' own mixture."""
        return bool(self.experts or self.granularities)


# The settings' own mixture, once.
ONE = Comparison()


class ComparedRun(NamedTuple):
    """One run of the comparison: which model, its seed, folder and settings."""

    kind: str
    seed: int
    folder: Path
    cfg: RunConfig


class Curve(NamedTuple):
    """What one run measured: its evaluations, oldest first."""

    kind: str
    seed: int
    points: list[Point]

    @property
    def final(self) -> Point:
        """The last evaluation."""
        return self.points[-1]


class Verdict(NamedTuple):
    """What a mixture of one seed needed to reach its twin's final held-out loss.

    Attributes:
        kind: which mixture.
        seed: of both runs.
        moe_bpb: the mixture's final held-out bits per byte.
        dense_bpb: the twin's.
        compute: share of the twin's training FLOPs at which the mixture reached dense_bpb,
            interpolated between its evaluations; None if it never did.
        time: the same for the seconds spent in training steps.
    """

    kind: str
    seed: int
    moe_bpb: float
    dense_bpb: float
    compute: float | None
    time: float | None


def models(cfg: RunConfig, comparison: Comparison = ONE) -> dict[str, ModelConfig | EncDecConfig]:
    """The models that are compared, by kind; the dense twin comes last."""
    if comparison.several:
        made = {m.name: remade(cfg, m) for m in compared_mixtures(cfg, comparison)}
    else:
        made = {MIXTURE: cfg.model}
    return made | {TWIN: dense_twin(cfg.model)}


def plan(cfg: RunConfig, folder: Path, comparison: Comparison = ONE) -> list[ComparedRun]:
    """The runs of a comparison, in the order in which they are trained."""
    mixture_of(cfg)
    entries = []
    for number in range(comparison.seeds):
        seed, order = cfg.train.seed + number, list(models(cfg, comparison).items())
        # Each second time the other way round: a machine that slows down favours no side.
        for kind, model in reversed(order) if number % 2 else order:
            name = kind if comparison.seeds == 1 else f"{kind}-seed{seed}"
            run = cfg.model_copy(update={"model": model})
            chosen = {"seed": seed} | _steps(run, comparison.budget_tflop)
            run = run.model_copy(update={"train": cfg.train.model_copy(update=chosen)})
            entries.append(ComparedRun(kind, seed, folder / name, run))
    return entries


def compared_mixtures(cfg: RunConfig, comparison: Comparison) -> list[Mixture]:
    """Every combination of experts and granularity that is asked for, smallest first."""
    return mixtures(cfg, comparison.experts, comparison.granularities)


def _steps(cfg: RunConfig, budget_tflop: float | None) -> dict[str, int]:
    """Steps, and how often to evaluate and save, for a run of this compute."""
    if budget_tflop is None:
        return {}
    flops = step_flops(cfg)
    wanted = budget_tflop * 1e12 / flops
    if wanted > MOST_STEPS:
        raise ConfigError(
            f"--budget {budget_tflop:g} TFLOP is {wanted:.3g} steps of this model; "
            f"{MOST_STEPS:,} is the most, for {MOST_STEPS * flops / 1e12:.3g} TFLOP"
        )
    steps = round(wanted)
    if steps < EVALUATIONS:
        least = EVALUATIONS * flops / 1e12
        raise ConfigError(
            f"--budget {budget_tflop:g} TFLOP is {steps} steps of this model; "
            f"{least:.3g} is the least, for {EVALUATIONS} steps"
        )
    every = math.ceil(steps / EVALUATIONS)
    return {"steps": steps, "eval_every": every, "save_every": 5 * every}


def fit_to(
    cfg: RunConfig, corpus: Corpus, folder: Path, comparison: Comparison, minutes: float
) -> RunConfig:
    """Set `train.steps` (and how often to evaluate) so that all runs together take `minutes`.

    A few steps of each model are timed on this machine, so the number of steps, and with it the
    result, depends on its speed.

    Raises:
        ConfigError: the minutes are too few for as many steps as there are evaluations.
    """
    long = cfg.model_copy(update={"train": cfg.train.model_copy(update={"steps": 10**6})})
    entries = plan(long, folder, comparison._replace(seeds=1))
    trainers = (Trainer(entry.cfg, entry.folder, corpus) for entry in entries)
    seconds = sum(trainer.time_steps(CALIBRATION_STEPS) for trainer in trainers)
    step_tokens = cfg.train.batch_size * cfg.data.seq_len
    # An evaluation runs forward only: a third of a step's work for each of its tokens.
    evaluation_steps = EVALUATIONS * cfg.train.eval_tokens / step_tokens / 3
    budget_s = PLANNED_SHARE * 60 * minutes / comparison.seeds
    steps = max(0, int(budget_s / seconds - evaluation_steps))
    if steps < EVALUATIONS:
        least_s = (EVALUATIONS + evaluation_steps + 1) * seconds
        least = math.ceil(least_s * comparison.seeds / PLANNED_SHARE / 60)
        raise ConfigError(
            f"--minutes {minutes:g} is {steps} steps of each model on this machine; about {least} "
            f"is the least, for {EVALUATIONS} steps and as many evaluations"
        )
    steps -= steps % EVALUATIONS
    every = steps // EVALUATIONS
    chosen = {"steps": steps, "eval_every": every, "save_every": 5 * every}
    return cfg.model_copy(update={"train": cfg.train.model_copy(update=chosen)})


def done(entry: ComparedRun) -> bool:
    """Whether this run has been trained to its last step.

    Raises:
        ConfigError: by other settings.
    """
    last = state.checkpoint_folder(entry.folder, entry.cfg.train.steps)
    if state.newest_or_none(entry.folder) != last:
        return False
    state.check_settings(state.read_run_settings(last), entry.cfg, last)
    return True


def judge(curves: list[Curve]) -> list[Verdict]:
    """Compare every mixture with the twin of its seed."""
    twins = {curve.seed: curve.final for curve in curves if curve.kind == TWIN}
    verdicts = []
    for moe in curves:
        if moe.kind == TWIN or moe.seed not in twins:
            continue
        twin = twins[moe.seed]
        goal = twin.bits_per_byte[ALL]
        flops = crossing(moe.points, goal, lambda point: point.train_flops)
        seconds = crossing(moe.points, goal, lambda point: point.seconds)
        compute = None if flops is None else flops / twin.train_flops
        time = None if seconds is None else seconds / twin.seconds
        final = moe.final.bits_per_byte[ALL]
        verdicts.append(Verdict(moe.kind, moe.seed, final, goal, compute, time))
    return verdicts


def crossing(points: list[Point], goal_bpb: float, cost: Callable[[Point], float]) -> float | None:
    """The cost at which a curve first gets down to `goal_bpb`; None if it never does.

    Between two evaluations the curve is taken as a straight line; before the first one nothing
    is known, so a curve that starts below the goal is given its first evaluation's cost.
    """
    for number, point in enumerate(points):
        here = point.bits_per_byte[ALL]
        if here <= goal_bpb:
            if number == 0:
                return cost(point)
            previous = points[number - 1]
            before = previous.bits_per_byte[ALL]
            share = (before - goal_bpb) / (before - here)
            return cost(previous) + share * (cost(point) - cost(previous))
    return None


class Difference(NamedTuple):
    """Final held-out bits per byte of a mixture less its twin's, paired by seed.

    Attributes:
        kind: which mixture.
        seeds: how many pairs.
        mean: of the differences.
        low, high: the 95 % interval of the mean (Student's t); None with one seed.
    """

    kind: str
    seeds: int
    mean: float
    low: float | None
    high: float | None


def differences(verdicts: list[Verdict]) -> list[Difference]:
    """One for each mixture."""
    found = []
    for kind in dict.fromkeys(verdict.kind for verdict in verdicts):
        pairs = [v.moe_bpb - v.dense_bpb for v in verdicts if v.kind == kind]
        mean, half = statistics.fmean(pairs), half_width(pairs)
        ends = (None, None) if math.isnan(half) else (mean - half, mean + half)
        found.append(Difference(kind, len(pairs), mean, *ends))
    return found


def sentence(verdicts: list[Verdict]) -> str:
    """The result in one sentence for each mixture, whichever side won."""
    kinds = list(dict.fromkeys(verdict.kind for verdict in verdicts))
    if len(kinds) == 1:
        return _sentence(verdicts)
    told = {kind: _sentence([v for v in verdicts if v.kind == kind]) for kind in kinds}
    return "\n".join(f"{kind}: {text}" for kind, text in told.items())


def _sentence(verdicts: list[Verdict]) -> str:
    """The result of one mixture."""
    reached = [v.compute for v in verdicts if v.compute is not None]
    moe = statistics.fmean(v.moe_bpb for v in verdicts)
    dense = statistics.fmean(v.dense_bpb for v in verdicts)
    ends = f"the mixture ended at {moe:.4f} bits per byte, the dense twin at {dense:.4f}"
    (difference,) = differences(verdicts)
    if difference.low is not None:
        ends += (
            f", a difference of {difference.mean:+.4f} (paired by seed; the 95 % interval of its "
            f"mean is {difference.low:+.4f} to {difference.high:+.4f})"
        )
    if len(verdicts) == 1 and reached:
        return (
            f"The mixture needed {reached[0]:.0%} of the dense twin's training compute to reach "
            f"the twin's final held-out loss; {ends}."
        )
    if len(verdicts) == 1:
        return f"The mixture did not reach the dense twin's final held-out loss: {ends}."
    if len(reached) == len(verdicts):
        return (
            f"Over {len(verdicts)} seeds the mixture needed {statistics.fmean(reached):.0%} "
            f"({min(reached):.0%} to {max(reached):.0%}) of the dense twin's training compute to "
            f"reach the twin's final held-out loss; on average {ends}."
        )
    return (
        f"With {len(reached)} of {len(verdicts)} seeds the mixture reached the dense twin's final "
        f"held-out loss within the same compute; on average {ends}."
    )


def fitted(cfg: RunConfig, comparison: Comparison, curves: list[Curve]) -> list[Law]:
    """The laws of experts and granularity through the final losses; none of a single mixture."""
    if not comparison.several:
        return []
    losses = {m: mean_loss(curves, m.name) for m in compared_mixtures(cfg, comparison)}
    dense = mean_loss(curves, TWIN)
    if not all(map(math.isfinite, (dense, *losses.values()))):
        return []
    return laws(losses, dense, mixture_of(cfg).top_k)


def mean_loss(curves: list[Curve], kind: str) -> float:
    """Final held-out bits per byte of a model, mean over seeds."""
    return statistics.fmean(c.final.bits_per_byte[ALL] for c in curves if c.kind == kind)


def as_json(cfg: RunConfig, curves: list[Curve], comparison: Comparison = ONE) -> dict[str, Any]:
    """Everything that was measured, for compare.json and --json."""
    verdicts = judge(curves)
    made = models(cfg, comparison)
    tokens = cfg.train.batch_size * cfg.data.seq_len
    steps = {curve.kind: curve.final.step for curve in curves}
    return {
        "sentence": sentence(verdicts),
        "verdicts": [verdict._asdict() for verdict in verdicts],
        "differences": [each._asdict() for each in differences(verdicts)],
        "models": {
            kind: {
                **count(model)._asdict(),
                "train_flops_per_token": step_flops(cfg.model_copy(update={"model": model}))
                / tokens,
                "steps": steps[kind],
            }
            for kind, model in made.items()
        },
        "laws": [law_json(law) for law in fitted(cfg, comparison, curves)],
        "curves": [
            {**curve._asdict(), "points": [point._asdict() for point in curve.points]}
            for curve in curves
        ],
        "comparison": comparison._asdict(),
        "settings": cfg.model_dump(mode="json"),
    }


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation; the latter NaN for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread
