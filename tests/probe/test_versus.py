"""Two traces compared: each measure against a plain count, intervals against chance, refusals."""

import numpy as np
import pytest

from moestro.errors import DataError
from moestro.probe.measures.versus import compare

from .traces import make_trace

OPTIONS = {"documents": 12, "lengths": (40,), "experts": 8, "by_domain": 1.0}
NAMES = (
    "imbalance", "variation", "dead", "dropped", "balance", "spread", "margin", "specialisation",
)  # fmt: skip


def pick(comparison, name):
    return next(each for each in comparison.quantities if each.name == name)


def test_measures_are_plain_counts():
    trace = make_trace(dropped=0.2, skew=1.0, **OPTIONS)
    found = compare(trace, make_trace(seed=1, **OPTIONS), draws=9)
    assert tuple(each.name for each in found.quantities) == NAMES
    for layer in range(2):
        experts_TK = trace.experts_TLK[:, layer]
        load_E = np.array([(experts_TK == e).mean() for e in range(8)])
        domains = [
            np.array([(experts_TK[trace.domain_T == m] == e).mean() for e in range(8)])
            for m in range(2)
        ]
        p = np.average(trace.probs_NLE[:, layer], axis=0, weights=trace.length_N)
        expected = {
            "imbalance": load_E.max() / load_E.mean(),
            "variation": load_E.std() / load_E.mean(),
            "dead": (load_E == 0).sum(),
            "dropped": 1 - trace.kept_TLK[:, layer].mean(),
            "balance": -(p * np.log(p)).sum() / np.log(8),
            "spread": trace.entropy_TL[:, layer].mean() / np.log(8),
            "margin": trace.margin_TL[:, layer].mean(),
            "specialisation": np.abs(domains[0] - domains[1]).sum() / 4,
        }
        for name, value in expected.items():
            assert pick(found, name).first_L[layer] == pytest.approx(value, rel=1e-5), name
        np.testing.assert_allclose(found.loads_LE[0][layer], np.sort(load_E)[::-1])
    for each in found.quantities:
        assert each.first == pytest.approx(each.first_L.mean())
        assert each.difference == pytest.approx(each.second - each.first)
        np.testing.assert_allclose(each.difference_L, each.second_L - each.first_L)


def test_a_trace_does_not_differ_from_itself():
    trace = make_trace(**OPTIONS)
    for each in compare(trace, trace, draws=99).quantities:
        assert each.difference == 0
        assert not each.supported
        if each.name != "dead":
            np.testing.assert_array_equal(each.interval_2, 0)


def test_differences_are_found():
    even = make_trace(**OPTIONS)
    uneven = make_trace(seed=1, skew=2.0, **OPTIONS)
    found = compare(even, uneven, draws=399)
    for name, sign in (("imbalance", 1), ("variation", 1), ("balance", -1), ("spread", -1)):
        each = pick(found, name)
        assert each.supported, name
        assert each.interval_2[0] < each.difference < each.interval_2[1]
        assert (sign * each.interval_2 > 0).all()
        assert (sign * each.interval_L2 > 0).all()
    assert np.isnan(pick(found, "dead").interval_2).all()
    apart = make_trace(seed=1, documents=12, lengths=(40,), experts=8, by_domain=3.0)
    each = pick(compare(even, apart, draws=399), "specialisation")
    assert each.supported
    assert each.interval_2[0] > 0


def test_chance_is_not_found():
    """Of 30 pairs that differ by chance alone, about 95 % of the intervals hold 0.

    Few documents make a bootstrap's intervals a little narrow: 200 pairs left out 0 in up to 8 %.
    """
    outside = supported = total = 0
    for seed in range(30):
        pair = [
            make_trace(documents=12, lengths=(40,), experts=4, seed=2 * seed + i) for i in range(2)
        ]
        for each in compare(*pair, draws=399).quantities:
            if each.name not in ("dead", "dropped"):
                low, high = each.interval_2
                outside += not low <= 0 <= high
                supported += each.supported
                total += 1
    assert total == 180
    assert outside <= 24
    assert supported <= 12


def test_only_common_documents_count():
    first = make_trace(**OPTIONS)
    other = make_trace(seed=1, domains=("prose", "code", "verse"), **OPTIONS)
    found = compare(first, other, draws=9)
    assert found.documents == 24
    assert found.left_out == (0, 12)
    assert sorted(found.domains) == ["code", "prose"]
    which_N = other.domain_N != 2
    same = compare(first, other.choose(which_N), draws=9)
    assert same.left_out == (0, 0)
    assert found.tokens == same.tokens == (24 * 2 * 40, 24 * 2 * 40)
    for here, there in zip(found.quantities, same.quantities, strict=True):
        np.testing.assert_equal(here._asdict(), there._asdict())


def test_models_of_other_shapes():
    found = compare(make_trace(**OPTIONS), make_trace(layers=3, **OPTIONS), draws=9)
    each = pick(found, "imbalance")
    assert (len(each.first_L), len(each.second_L)) == (2, 3)
    assert each.difference_L.shape == (0,)
    assert each.interval_L2.shape == (0, 2)
    assert np.isfinite(each.interval_2).all()


def test_what_is_unknown_is_nan():
    found = compare(make_trace(**OPTIONS), make_trace(logits=False, **OPTIONS), draws=9)
    for each in found.quantities:
        unknown = each.name in ("balance", "spread", "margin")
        assert np.isnan(each.difference) == unknown, each.name
        assert np.isnan(each.interval_2).all() == (unknown or each.name == "dead"), each.name
        assert not (unknown and each.supported)


def test_one_document_has_no_interval():
    options = {"documents": 1, "domains": ("code",)}
    for each in compare(make_trace(**options), make_trace(seed=1, **options), draws=9).quantities:
        assert np.isnan(each.interval_2).all()
        assert np.isnan(each.interval_L2).all()
        assert not each.supported
        assert np.isnan(each.difference) == (each.name == "specialisation")


def test_specialisation_leaves_out_domains_of_one_document():
    first, second = (make_trace(domains=("a", "b", "c"), seed=seed) for seed in (0, 1))
    keep_N = (first.domain_N < 2) | (first.document_N == 6)
    found = compare(first.choose(keep_N), second.choose(keep_N), draws=19)
    assert found.domains == ("a", "b", "c")
    assert found.domains_compared == ("a", "b")
    two_N = first.domain_N < 2
    alone = compare(first.choose(two_N), second.choose(two_N), draws=19)
    np.testing.assert_allclose(
        pick(found, "specialisation").first_L, pick(alone, "specialisation").first_L
    )


def test_no_common_document_is_refused():
    with pytest.raises(DataError, match="no document in common"):
        compare(make_trace(), make_trace(domains=("verse",)))
