"""Saturation against a loop over tokens, its nulls against chance, and what is refused."""

import numpy as np
import pytest

from moestro.errors import DataError
from moestro.probe.measures.saturation import saturation

from .traces import make_trace


def run(**options):
    """Traces of three checkpoints: the same text, routed by chance, then half as at the end."""
    last = make_trace(seed=1, **options)
    first = make_trace(seed=2, **options)
    early = last._replace(experts_TLK=first.experts_TLK, weights_TLK=first.weights_TLK)
    half_T = np.arange(len(last.tokens_T)) % 2 == 0
    middle = last._replace(
        experts_TLK=np.where(half_T[:, None, None], last.experts_TLK, early.experts_TLK),
        subject=last.subject._replace(fingerprint="1" * 32),
    )
    return [early, middle, last]


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 3, "experts": 5, "empty": 0.3}])
def test_share_is_what_a_loop_counts(options):
    traces = run(**options)
    found = saturation(traces, [10, 20, 30], draws=9)
    num_experts, total = traces[-1].subject.num_experts, len(traces[-1].tokens_T)
    for j, trace in enumerate(traces):
        for layer in range(2):
            shared = chosen = 0
            for t in range(total):
                here = set(trace.experts_TLK[t, layer].tolist()) - {num_experts}
                there = set(traces[-1].experts_TLK[t, layer].tolist()) - {num_experts}
                shared, chosen = shared + len(here & there), chosen + len(there)
            assert found.share_JL[j, layer] == pytest.approx(shared / chosen)
    np.testing.assert_allclose(found.mean_J, found.share_JL.mean(axis=1))
    assert found.steps_J.tolist() == [10, 20, 30]
    assert (found.share_JL[-1] == 1).all()
    assert (found.interval_JL2[-1] == 1).all()


def test_nulls_are_what_chance_gives():
    """Independent choices: by uniform routing K / E, by uneven loads what dealing anew gives."""
    options = {"documents": 100, "experts": 8, "lengths": (30,)}
    total = 200 * 2 * 30
    even = saturation(run(**options), [1, 2, 3], draws=9)
    assert even.random == 2 / 8
    error = 4.5 * np.sqrt(0.25 / total)
    assert np.abs(even.share_JL[0] - 0.25).max() < error
    assert np.abs(even.share_JL[1] - (1 + 0.25) / 2).max() < error
    early, middle, last = run(skew=2.0, **options)
    shuffled = np.random.default_rng(0).permutation(last.experts_TLK, axis=0)
    uneven = saturation([early._replace(experts_TLK=shuffled), middle, last], [1, 2, 3], draws=9)
    assert (uneven.loads_JL[0] > uneven.random + 0.05).all()
    assert np.abs(uneven.share_JL[0] - uneven.loads_JL[0]).max() < error
    assert (uneven.share_JL[1] > uneven.loads_JL[1] + 0.1).all()


def test_intervals_hold_the_share():
    found = saturation(run(documents=10), [1, 2, 3], draws=99)
    for value, limits in (
        (found.share_JL, found.interval_JL2),
        (found.mean_J, found.mean_interval_J2),
    ):
        assert (limits[:2, ..., 0] < value[:2]).all()
        assert (value[:2] < limits[:2, ..., 1]).all()


def test_one_document_has_no_interval():
    found = saturation(run(domains=("code",), documents=1), [1, 2, 3], draws=9)
    assert found.documents == 1
    assert np.isnan(found.interval_JL2).all()
    assert np.isnan(found.mean_interval_J2).all()
    assert np.isfinite(found.share_JL).all()


def test_names_may_be_numbered_otherwise():
    early, _, last = run()
    turned = early._replace(domains=early.domains[::-1], domain_N=1 - early.domain_N)
    found = saturation([turned, last], [1, 2], draws=9)
    np.testing.assert_array_equal(
        found.share_JL, saturation([early, last], [1, 2], draws=9).share_JL
    )


def test_what_cannot_be_compared_is_refused():
    early, middle, last = run()
    with pytest.raises(DataError, match="1 traces and 1 steps"):
        saturation([last], [1])
    with pytest.raises(DataError, match="2 traces and 3 steps"):
        saturation([early, last], [1, 2, 3])
    with pytest.raises(DataError, match="do not rise"):
        saturation([early, middle, last], [1, 3, 3])
    for other in (
        early._replace(tokens_T=early.tokens_T + 1),
        early._replace(length_N=early.length_N[::-1]),
        early._replace(domain_N=1 - early.domain_N),
        early._replace(documents=("x", *early.documents[1:])),
        make_trace(lengths=(5,)),
    ):
        with pytest.raises(DataError, match="of step 5 and step 9 are not of the same text"):
            saturation([other, last], [5, 9])
    for options in ({"experts": 5}, {"layers": 3}):
        with pytest.raises(DataError, match="the models at step 5 and step 9 differ"):
            saturation([make_trace(**options), last], [5, 9])
