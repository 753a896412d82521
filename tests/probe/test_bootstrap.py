import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.probe.measures import bootstrap as b

from .worlds import trace_of

DOMAINS = np.array([0, 0, 0, 1, 2, 2, -1])


def test_each_domain_keeps_its_number_of_documents():
    weights = b.document_weights(DOMAINS, 400, seed=1)
    assert weights.shape == (400, 7)
    for domain, size in enumerate((3, 1, 2)):
        assert (weights[:, domain == DOMAINS].sum(axis=1) == size).all()
    assert (weights[:, 3] == 1).all()
    assert (weights[:, 6] == 0).all()
    # Multinomial: a count of mean 1 and variance 1 - 1/3.
    np.testing.assert_allclose(weights[:, 0].mean(), 1, atol=0.15)
    np.testing.assert_allclose(weights[:, 0].var(), 2 / 3, atol=0.15)
    np.testing.assert_array_equal(weights, b.document_weights(DOMAINS, 400, seed=1))
    with pytest.raises(MoestroError, match="draws is 0"):
        b.document_weights(DOMAINS, 0, seed=1)


def test_single_documents_are_put_together_where_domains_do_not_matter():
    assert b.lonely(DOMAINS, 4).tolist() == [False, True, False, True]
    strata = b.strata(DOMAINS)
    assert strata[3] == strata[4] == strata[5] != strata[0]
    assert strata[6] == -1
    assert len(set(b.strata(np.arange(5)).tolist())) == 1
    assert np.isnan(b.pooled_weights(np.array([0]), 5, 0)).all()
    assert (b.pooled_weights(np.arange(2), 50, 0)[:, 0] != 1).any()


def test_intervals():
    samples = np.linspace(0, 1, 1001)[:, None] * [1.0, 2.0]
    np.testing.assert_allclose(b.interval(samples), [[0.025, 0.975], [0.05, 1.95]])
    np.testing.assert_allclose(b.interval(samples, level=0.5)[0], [0.25, 0.75])
    # Quantiles 0.2 and 0.5 above the measured 0.1 become as far below, and are cut at 0.
    np.testing.assert_allclose(
        b.reflected(np.linspace(0.3, 0.6, 1001), np.array(0.5)), [0.4075, 0.6925]
    )
    np.testing.assert_allclose(b.reflected(np.linspace(0.3, 0.6, 1001), np.array(0.1)), [0, 0])


def test_p_values_count_the_measured_text_as_one_of_the_draws():
    draws = np.arange(99.0)[:, None]
    found = b.p_values(draws, np.array([98.5, 94.0, np.nan]))
    np.testing.assert_allclose(found, [0.01, 0.06, np.nan])
    np.testing.assert_allclose(
        b.largest_p_values(draws[:, 0], np.array([[98.5, 94.0]])), [[0.01, 0.06]]
    )


def test_holm_steps_down():
    # Bonferroni would only take the first; unknown p-values support nothing.
    assert b.holm(np.array([0.012, 0.001, 0.02, 0.6])).tolist() == [True, True, True, False]
    assert b.holm(np.array([0.012, 0.03, 0.03, 0.6])).tolist() == [True, False, False, False]
    assert b.holm(np.array([np.nan, 0.02])).tolist() == [False, True]


def test_signs_are_even():
    signs = b.signs(5, 2000, seed=0)
    assert set(signs.ravel().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.05
    with pytest.raises(MoestroError, match="draws is 0"):
        b.signs(5, 0, seed=0)


def test_a_label_without_text_has_no_part_in_the_average():
    counts = np.array([[[4.0, 0.0]], [[0.0, 2.0]]])
    apart = b.distances(np.array([[1.0, 0], [0, 1], [0, 0]]), counts)
    np.testing.assert_allclose(apart, [[0.5], [0.5], [np.nan]])


def test_a_document_in_two_domains_is_refused():
    trace = trace_of(np.zeros((4, 1, 1)), [2, 2], [0, 1], 2, document_N=[0, 0])
    with pytest.raises(MoestroError, match=r"'document 0' has text in the domains 'a' and 'b'"):
        b.document_domains(trace)
    assert b.document_domains(trace.choose(np.array([True, False]))).tolist() == [0]
