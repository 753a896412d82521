"""More and finer experts: what is remade, and the laws fitted to the losses."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moestro.config import RunConfig
from moestro.errors import ConfigError
from moestro.models.count import count
from moestro.train.scaling import (
    GRANULARITY_EXPONENT,
    Mixture,
    laws,
    mixtures,
    predict,
    remade,
    told,
)


def run(**moe: int) -> RunConfig:
    mixture = {"hidden_dim": 24, "num_experts": 8, "top_k": 2} | moe
    return RunConfig(model={"dim": 16, "num_layers": 2, "moe": mixture}, data={"seq_len": 16})


def test_every_combination_of_experts_and_granularity() -> None:
    assert mixtures(run(), [16, 8], [2, 1]) == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert mixtures(run(), [], [3]) == [(8, 3)]
    assert [m.name for m in mixtures(run(), [4], [1, 2])] == ["experts4", "experts4-granularity2"]


def test_finer_experts_change_the_router_alone_in_size() -> None:
    """Both counts differ from the unsplit model's by the router's new columns only."""
    cfg = run()
    coarse, fine = (count(remade(cfg, Mixture(8, g))) for g in (1, 4))
    router = 2 * 16 * (32 - 8)
    assert fine.total - coarse.total == router
    assert fine.active - coarse.active == router


def test_a_remade_mixture_keeps_every_other_setting() -> None:
    cfg = run()
    made = remade(cfg, Mixture(32, 3)).moe
    assert made is not None
    assert (made.num_experts, made.top_k, made.hidden_dim) == (96, 6, 8)
    own: Any = {"num_experts": True, "top_k": True, "hidden_dim": True, "router": {"renormalize"}}
    assert made.model_dump(exclude=own) == cfg.model.moe.model_dump(exclude=own)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gates_are_what_they_were_however_fine_experts_are(top_k: int) -> None:
    cfg = run(top_k=top_k)
    for fine in (1, 2, 4):
        made = remade(cfg, Mixture(8, fine)).moe
        assert made is not None
        assert made.renormalizes == cfg.model.moe.renormalizes == (top_k > 1)


@pytest.mark.parametrize(
    ("experts", "granularities", "said"),
    [
        ([1], [], "2 is the least"),
        ([8, 8], [], "names a number twice"),
        ([], [5], "does not divide model.moe.hidden_dim, 24"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    experts: list[int], granularities: list[int], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        mixtures(run(), experts, granularities)


def test_the_law_of_experts_is_found_and_predicts_the_largest() -> None:
    """Points made from the law itself: slope, offset and the point left out come back."""

    def loss(expansion: float) -> float:
        return 1.7 * expansion**-0.05

    measured = {Mixture(n): loss(n / 2) for n in (8, 16, 64)}
    (law,) = laws(measured, loss(1), top_k=2)
    assert (law.axis, law.fixed, law.largest) == ("experts", 1, 64)
    assert law.slope == pytest.approx(-0.05)
    assert math.exp(law.offset) == pytest.approx(1.7)
    assert law.predicted == pytest.approx(law.measured)
    assert law.residual < 1e-12
    assert predict(law, 256, 2) == pytest.approx(loss(128))


def test_a_point_off_the_law_shows_as_the_error_of_the_prediction() -> None:
    measured = {Mixture(8): 1.5, Mixture(16): 1.45, Mixture(64): 1.4 * 1.1}
    (law,) = laws(measured, 1.6, top_k=2)
    assert law.error is not None
    assert law.error < -0.05
    assert f"{law.error:+.2%} from the measured 1.5400" in told(law)


def test_the_law_of_granularity_is_found() -> None:
    measured = {Mixture(8, g): 1.2 + 0.3 * g**-GRANULARITY_EXPONENT for g in (1, 2, 4)}
    (law,) = laws(measured, 1.8, top_k=2)
    assert (law.axis, law.fixed, law.largest) == ("granularity", 8, 4)
    assert (law.offset, law.slope) == pytest.approx((1.2, 0.3))
    assert law.predicted == pytest.approx(law.measured)


def test_two_points_are_not_left_out_and_one_is_no_law() -> None:
    (law,) = laws({Mixture(8, 1): 1.5, Mixture(8, 2): 1.4}, 1.6, top_k=2)
    assert law.error is None
    assert told(law).endswith("a line through 2 points; too few points to leave one out")
    assert laws({Mixture(8): 1.5}, 1.6, top_k=2) == []


def test_as_many_experts_as_a_token_takes_are_a_point_beside_the_dense_one() -> None:
    (law,) = laws({Mixture(2): 1.5, Mixture(8): 1.4}, 1.6, top_k=2)
    assert law.points == 3
    assert predict(law, 2, 2) == pytest.approx(math.sqrt(1.5 * 1.6))
    assert "fitted to the 2 without E = 8" not in told(law)
