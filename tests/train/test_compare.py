"""A comparison judges what was measured, whichever way it falls."""

from __future__ import annotations

import math
from math import nan
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from moestro.config import OptimConfig, RunConfig
from moestro.errors import ConfigError
from moestro.models.count import count
from moestro.train import compare
from moestro.train.compare import (
    Comparison,
    Curve,
    crossing,
    differences,
    fitted,
    judge,
    models,
    plan,
    sentence,
)
from moestro.train.figures import comparison_figure, scaling_figure
from moestro.train.intervals import half_width, student
from moestro.train.metrics import Point
from moestro.train.optim import step_flops
from moestro.train.task import train_flops


def points(*bits: float, flops: float = 100.0, seconds: float = 10.0) -> list[Point]:
    return [
        Point(n, 10 * n, seconds * n, flops * n, {"all": value, "code": value})
        for n, value in enumerate(bits, 1)
    ]


def curves(moe: list[float], dense: list[float], seed: int = 0) -> list[Curve]:
    return [Curve("moe", seed, points(*moe)), Curve("dense", seed, points(*dense, seconds=5.0))]


def test_crossing_is_interpolated_between_two_evaluations() -> None:
    assert crossing(points(5.0, 4.0, 2.0), 3.0, lambda p: p.train_flops) == pytest.approx(250.0)
    assert crossing(points(5.0, 4.0, 2.0), 4.0, lambda p: p.seconds) == pytest.approx(20.0)


def test_crossing_knows_never_and_from_the_start() -> None:
    assert crossing(points(5.0, 4.0), 3.9, lambda p: p.seconds) is None
    assert crossing(points(3.0, 2.0), 3.5, lambda p: p.seconds) == 10.0


def test_the_first_crossing_counts_even_if_the_curve_rises_again() -> None:
    assert crossing(points(5.0, 3.0, 4.0, 2.0), 3.5, lambda p: p.step) == pytest.approx(1.75)


def test_verdict_is_a_share_of_the_twins_whole_cost() -> None:
    (verdict,) = judge(curves([5.0, 3.0, 2.0, 1.0], [5.0, 4.0, 3.5, 3.0]))
    assert verdict.compute == pytest.approx(2 / 4)
    assert verdict.time == pytest.approx(20 / 20)
    assert "needed 50% of the dense twin's training compute" in sentence([verdict])


def test_a_mixture_that_loses_is_reported_as_such() -> None:
    verdicts = judge(curves([5.0, 4.0], [5.0, 3.0]))
    assert verdicts[0].compute is None
    assert sentence(verdicts).startswith("The mixture did not reach")
    assert "4.0000" in sentence(verdicts)


def test_seeds_are_paired_and_summed_up() -> None:
    runs = curves([5.0, 3.0], [5.0, 3.0], seed=0) + curves([5.0, 2.0], [5.0, 3.5], seed=1)
    verdicts = judge(runs)
    assert [v.seed for v in verdicts] == [0, 1]
    assert [v.compute for v in verdicts] == pytest.approx([1.0, 0.75])
    assert "Over 2 seeds the mixture needed 88% (75% to 100%)" in sentence(verdicts)
    lost = judge(curves([5.0, 3.0], [5.0, 3.0]) + curves([5.0, 4.0], [5.0, 3.5], seed=1))
    assert sentence(lost).startswith("With 1 of 2 seeds")


def test_differences_are_paired_and_have_student_s_interval() -> None:
    runs = [
        curve
        for seed, (moe, dense) in enumerate([(2.0, 3.0), (4.0, 5.5), (3.0, 3.5)])
        for curve in curves([9.0, moe], [9.0, dense], seed=seed)
    ]
    (found,) = differences(judge(runs))
    half = 4.303 * 0.5 / 3**0.5  # two degrees of freedom, a deviation of 0.5
    assert found == ("moe", 3, -1.0, pytest.approx(-1 - half), pytest.approx(-1 + half))
    told = sentence(judge(runs))
    assert f"-1.0000 (paired by seed; the 95 % interval of its mean is {-1 - half:+.4f}" in told
    (alone,) = differences(judge(runs[:2]))
    assert (alone.mean, alone.low, alone.high) == (-1.0, None, None)


def test_student_s_t() -> None:
    # Of tables: 10, 30, 120 degrees of freedom.
    for freedom, t in ((1, 12.706), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)):
        assert student(freedom) == pytest.approx(t, abs=1e-3)
    assert math.isnan(half_width([1.0]))


def test_muon_s_products_are_a_part_of_the_compute(tmp_path: Path) -> None:
    cfg = mixture()
    muon = cfg.model_copy(update={"optim": OptimConfig(matrices="muon")})
    more = step_flops(muon) - step_flops(cfg)
    # Each of 2 layers: qkv and out of attention, and of 4 experts [2·8, 16] and [16, 8].
    shapes = [(16, 48), (16, 16)] + [(16, 16), (8, 16)] * 4
    assert more == 2 * sum(5 * (4 * a * a * b + 2 * a**3) for a, b in shapes)
    asked = Comparison(budget_tflop=1e-1)
    steps = [plan(each, tmp_path, asked)[0].cfg.train.steps for each in (cfg, muon)]
    assert steps == [round(1e11 / step_flops(each)) for each in (cfg, muon)]
    assert steps[0] > steps[1]


def mixture() -> RunConfig:
    return RunConfig(
        model={"dim": 16, "num_layers": 2, "moe": {"hidden_dim": 8, "num_experts": 4}},
        data={"seq_len": 16},
        train={"steps": 10, "seed": 3},
    )


def test_plan_gives_both_models_the_same_seed_text_and_cost(tmp_path: Path) -> None:
    entries = plan(mixture(), tmp_path, Comparison(seeds=2))
    assert [(e.kind, e.seed) for e in entries] == [
        ("moe", 3), ("dense", 3), ("dense", 4), ("moe", 4)
    ]  # fmt: skip
    assert len({e.folder for e in entries}) == 4
    moe, dense = entries[0].cfg, entries[1].cfg
    assert moe.data == dense.data
    assert moe.train == dense.train
    active = [count(run.model).active for run in (moe, dense)]
    assert active[0] == pytest.approx(active[1], rel=0.02)


def test_a_dense_model_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        plan(RunConfig(), tmp_path)


def test_json_holds_every_point_and_the_counted_compute() -> None:
    cfg = mixture()
    result = compare.as_json(cfg, curves([5.0, 3.0], [5.0, 4.0]))
    assert result["verdicts"][0]["moe_bpb"] == 3.0
    assert [len(curve["points"]) for curve in result["curves"]] == [2, 2]
    model = count(cfg.model)
    assert result["models"]["moe"]["train_flops_per_token"] == model.train_flops(16)


def test_a_budget_gives_every_run_the_same_compute(tmp_path: Path) -> None:
    asked = Comparison(experts=(4, 16), granularities=(1, 4), budget_tflop=0.002)
    runs = [entry.cfg for entry in plan(mixture(), tmp_path, asked)]
    steps = [run.train.steps for run in runs]
    cost = [
        train_flops(run.model, run.data.seq_len) * n * run.train.batch_size
        for run, n in zip(runs, steps, strict=True)
    ]
    assert len(set(steps)) > 1
    assert all(abs(c - 2e9) <= 0.5 * c / n for c, n in zip(cost, steps, strict=True))
    assert all(-(-run.train.steps // run.train.eval_every) <= 20 for run in runs)


def test_a_budget_too_small_names_the_least(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the least, for 20 steps"):
        plan(mixture(), tmp_path, Comparison(budget_tflop=1e-9))


def test_each_of_several_mixtures_is_judged_beside_the_same_twin() -> None:
    runs = [
        Curve("experts4", 0, points(5.0, 3.0, 2.0)),
        Curve("experts8", 0, points(4.0, 2.5, 1.5)),
        Curve("dense", 0, points(5.0, 4.0, 3.0)),
    ]
    verdicts = judge(runs)
    assert [(v.kind, v.compute) for v in verdicts] == [
        ("experts4", pytest.approx(2 / 3)),
        ("experts8", pytest.approx((1 + 1 / 1.5) / 3)),
    ]
    assert [line.split(":")[0] for line in sentence(verdicts).splitlines()] == [
        "experts4", "experts8"
    ]  # fmt: skip


@pytest.mark.parametrize("asked", [Comparison(experts=(4, 8)), Comparison(granularities=(1, 2))])
def test_a_scaling_figure_where_no_mixture_reached_its_twin(
    tmp_path: Path, asked: Comparison
) -> None:
    kinds = [kind for kind in models(mixture(), asked) if kind != "dense"]
    runs = [Curve(kind, 0, points(5.0, 4.0)) for kind in kinds]
    scaling_figure(
        mixture(), asked, [*runs, Curve("dense", 0, points(5.0, 3.0))], tmp_path / "x.png"
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_no_number_is_no_law() -> None:
    asked = Comparison(experts=(4, 8))
    runs = [
        Curve(k, 0, points(5.0, v))
        for k, v in zip(models(mixture(), asked), (3.0, nan, 4.0), strict=True)
    ]
    assert fitted(mixture(), asked, runs) == []


def test_scaling_figure_is_a_png(tmp_path: Path) -> None:
    runs = [
        Curve(kind, seed, points(*bits))
        for seed in (0, 1)
        for kind, bits in {
            "experts4": (5.0, 3.0), "experts8": (4.0, 2.9), "experts16": (4.0, 3.9),
            "dense": (5.0, 3.5),
        }.items()
    ]  # fmt: skip
    path = tmp_path / "scaling.png"
    scaling_figure(mixture(), Comparison(seeds=2, experts=(4, 8, 16)), runs, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_figure_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "compare.png"
    comparison_figure(curves([5.0, 3.0, 2.0], [5.0, 4.0, 3.0]), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_seeds_of_a_model_are_drawn_alike_and_models_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    kinds = [*(f"experts{2**n}" for n in range(2, 12)), "dense"]
    runs = [Curve(kind, seed, points(5.0, 3.0)) for seed in (0, 1) for kind in kinds]
    comparison_figure(runs, tmp_path / "compare.png")
    for axes in drawn[0].axes:
        first, second = axes.lines[: len(kinds)], axes.lines[len(kinds) : 2 * len(kinds)]
        looks = [(line.get_color(), line.get_marker()) for line in first]
        assert looks == [(line.get_color(), line.get_marker()) for line in second]
        assert len(set(looks)) == len(kinds)
    legend = drawn[0].axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [*kinds[:-1], "dense twin"]


class _OneSecond:
    """A trainer whose steps take a second each."""

    def __init__(self, *_: object) -> None:
        pass

    def time_steps(self, _: int) -> float:
        return 1.0


@pytest.mark.parametrize("seeds", [1, 3])
def test_minutes_choose_steps_or_are_refused_with_the_least(
    seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "Trainer", _OneSecond)
    train = mixture().train.model_copy(update={"eval_tokens": 128})
    cfg, asked = mixture().model_copy(update={"train": train}), Comparison(seeds=seeds)

    def steps(minutes: float) -> int:
        found = compare.fit_to(cfg, None, tmp_path, asked, minutes)  # type: ignore[arg-type]
        assert found.train.steps == compare.EVALUATIONS * found.train.eval_every
        return found.train.steps

    hour = steps(60 * seeds)
    assert 0.5 * 3600 / 2 < hour < 3600 / 2
    with pytest.raises(ConfigError, match="is 0 steps of each model on this machine") as refused:
        steps(0.1)
    least = int(str(refused.value).split("about ")[1].split()[0])
    assert compare.EVALUATIONS <= steps(least) < hour
    with pytest.raises(ConfigError, match=f"about {least} is the least"):
        steps(least - 1.5)
