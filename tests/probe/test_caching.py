"""Caches against obvious simulations, the oracle against all there is, and what chance gives."""

from itertools import combinations

import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.probe.measures.caching import POLICIES, caching
from moestro.probe.recording.traces import join

from .traces import make_trace


def wanted(trace, sequence, layer):
    """The experts of each token of one sequence, first choice first."""
    start = int(trace.length_N[:sequence].sum())
    rows = trace.experts_TLK[start : start + trace.length_N[sequence], layer]
    return [[e for e in row.tolist() if e < trace.subject.num_experts] for row in rows]


def value(policy, tokens, now, expert):
    """What a policy thinks of an expert after token `now`: larger stays longer."""
    uses = [t for t, experts in enumerate(tokens) if expert in experts]
    past, future = [t for t in uses if t <= now], [t for t in uses if t > now]
    recent = (past[-1], -tokens[past[-1]].index(expert))
    if policy == "lru":
        return recent
    if policy == "lfu":
        return (len(past), *recent)
    return (-min(future, default=len(tokens)), recent)


def simulate(policy, tokens, size):
    """Hits of one cache, one token at a time."""
    cache, hits = set(), 0
    for now, experts in enumerate(tokens):
        hits += len(cache & set(experts))
        if len(experts) >= size:
            others, places, kept = set(experts), size, set()
        else:
            others, places, kept = cache - set(experts), size - len(experts), set(experts)
        ranked = sorted(others, key=lambda e: value(policy, tokens, now, e), reverse=True)
        cache = kept | set(ranked[:places])
    return hits


def best(tokens, size):
    """The most hits of any cache: every choice of what to keep is tried."""
    hits = {frozenset(): 0}
    for experts in map(frozenset, tokens):
        after = {}
        for cache, so_far in hits.items():
            old = experts if len(experts) >= size else cache - experts
            kept = frozenset() if len(experts) >= size else experts
            places = min(size - len(kept), len(old))
            for chosen in combinations(old, places):
                fresh = kept | frozenset(chosen)
                after[fresh] = max(after.get(fresh, 0), so_far + len(cache & experts))
        hits = after
    return max(hits.values())


TRACES = {
    "top 1": {"top_k": 1},
    "top 2": {"top_k": 2},
    "top 3 of 5": {"top_k": 3, "experts": 5, "skew": 1.0},
    "all": {"top_k": 4},
    "varying": {"top_k": 3, "experts": 5, "empty": 0.4},
    "one expert": {"experts": 1, "top_k": 1},
    "uneven": {"experts": 8, "skew": 2.0, "lengths": (40, 1, 9)},
}


@pytest.mark.parametrize("options", TRACES.values(), ids=TRACES)
def test_every_policy_is_what_it_says(options):
    trace = make_trace(**options)
    found = caching(trace, draws=9)
    sequences, layers = len(trace.length_N), len(trace.subject.moe_layers)
    for layer in range(layers):
        texts = [wanted(trace, sequence, layer) for sequence in range(sequences)]
        total = sum(len(experts) for tokens in texts for experts in tokens)
        for policy in POLICIES:
            expected = [
                sum(simulate(policy, tokens, size) for tokens in texts) / total
                for size in range(1, trace.subject.num_experts + 1)
            ]
            rates = getattr(found, policy).rate_LE[layer]
            np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_k": 2, "skew": 1.0}, {"top_k": 3, "experts": 5, "empty": 0.4}],
    ids=["top 1", "top 2", "varying"],
)
def test_nothing_beats_the_oracle(options):
    trace = make_trace(documents=2, lengths=(14, 9), layers=1, **options)
    texts = [wanted(trace, sequence, 0) for sequence in range(len(trace.length_N))]
    total = sum(len(experts) for tokens in texts for experts in tokens)
    sizes = range(1, trace.subject.num_experts + 1)
    expected = [sum(best(tokens, size) for tokens in texts) / total for size in sizes]
    found = caching(trace, draws=9)
    np.testing.assert_allclose(found.oracle.rate_LE[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", TRACES.values(), ids=TRACES)
def test_order_of_policies_and_sizes(options):
    found = caching(make_trace(**options), draws=9)
    for rates in (found.lru, found.lfu, found.oracle):
        assert (np.diff(rates.rate_LE, axis=1) >= -1e-12).all()
        np.testing.assert_allclose(rates.rate_LE[:, -1], 1 - found.first_L, atol=1e-12)
        assert (found.oracle.rate_LE >= rates.rate_LE - 1e-12).all()
        assert (found.oracle.shuffled_LE >= rates.shuffled_LE - 1e-12).all()
        assert (found.oracle.uniform_E >= rates.uniform_E - 1e-12).all()
        np.testing.assert_allclose(rates.mean_E, rates.rate_LE.mean(axis=0))
        np.testing.assert_allclose(rates.shuffled_E, rates.shuffled_LE.mean(axis=0))


def test_first_touches():
    trace = make_trace(layers=3, lengths=(9, 30))
    touched = [
        [len({e for experts in wanted(trace, n, layer) for e in experts}) for layer in range(3)]
        for n in range(len(trace.length_N))
    ]
    total = 2 * len(trace.tokens_T)
    np.testing.assert_allclose(caching(trace, draws=9).first_L, np.sum(touched, axis=0) / total)


@pytest.mark.parametrize(("experts", "top_k"), [(16, 2), (8, 1)])
def test_uniform_routing_hits_as_often_as_the_cache_is_large(experts, top_k):
    """The only misses beyond size / E are first touches, at most E of each sequence."""
    trace = make_trace(lengths=(2000,), documents=2, sequences=1, experts=experts, top_k=top_k)
    found = caching(trace, draws=9)
    np.testing.assert_allclose(found.full_E, np.arange(1, experts + 1) / experts)
    requests = len(trace.tokens_T) * top_k
    error = 4.5 * np.sqrt(found.full_E * (1 - found.full_E) / requests)
    cold = experts / (2000 * top_k)
    for rates in (found.lru, found.lfu):
        for measured in (*rates.rate_LE, *rates.shuffled_LE, rates.uniform_E):
            assert (measured <= found.full_E + error).all()
            assert (measured >= found.full_E - error - cold).all()


def test_order_of_text_is_told_from_uneven_loads():
    """A domain that keeps its experts hits more than its tokens in random order."""
    options = {"documents": 4, "lengths": (200,), "experts": 8, "top_k": 1}
    kept = caching(make_trace(by_domain=2.0, **options), draws=99)
    assert (kept.lru.mean_interval_E2[:4, 0] > kept.lru.shuffled_E[:4] + 0.05).all()
    uneven = caching(make_trace(skew=2.0, **options), draws=99)
    gap = np.abs(uneven.lru.mean_E - uneven.lru.shuffled_E)
    assert (gap < 4.5 * np.sqrt(2 * 0.25 / (2 * 3200))).all()
    assert (uneven.lru.mean_E[:4] > uneven.lru.uniform_E[:4] + 0.05).all()


def test_intervals_hold_the_rate_and_narrow_with_text():
    widths = []
    for documents in (4, 64):
        trace = make_trace(documents=documents, lengths=(40,), by_domain=1.0)
        found = caching(trace, draws=199).lru
        for rate, limits in (
            (found.rate_LE, found.interval_LE2),
            (found.mean_E, found.mean_interval_E2),
        ):
            assert (limits[..., 0] <= rate).all()
            assert (rate <= limits[..., 1]).all()
        widths.append(np.ptp(found.mean_interval_E2[1]))
    assert widths[1] < widths[0] / 2


def test_one_document_has_no_interval():
    found = caching(make_trace(domains=("code",), documents=1), draws=9)
    assert found.documents == 1
    for rates in (found.lru, found.lfu, found.oracle):
        assert np.isnan(rates.interval_LE2).all()
        assert np.isnan(rates.mean_interval_E2).all()
        assert np.isfinite(rates.rate_LE).all()


def test_same_seed_same_numbers_and_blocks_do_not_matter(monkeypatch):
    trace = make_trace(lengths=(3, 11, 5))
    first = caching(trace, draws=9, seed=4)
    monkeypatch.setattr("moestro.probe.measures.caching._SIDE_BY_SIDE", 1)
    second = caching(trace, draws=9, seed=4)
    for policy in POLICIES:
        for here, there in zip(getattr(first, policy), getattr(second, policy), strict=True):
            np.testing.assert_array_equal(here, there)


def test_large_traces_are_sampled():
    trace = make_trace(experts=32, top_k=4, documents=20, lengths=(600, 100), layers=1)
    cost = 9 * 32 * 4
    found = caching(trace, draws=9, most_work=cost * 3000)
    assert found.tokens_recorded == len(trace.tokens_T) == 80 * 350
    assert 2000 < found.tokens <= 3000
    assert found.sequences >= 8
    assert found.documents > 5
    everything = caching(trace, draws=9)
    assert everything.tokens == everything.tokens_recorded
    assert everything.sequences == 80
    error = 4.5 * np.sqrt(0.25 / (4 * found.tokens)) + 32 / (4 * 100)
    assert np.abs(found.lru.mean_E - everything.lru.mean_E).max() < error
    assert caching(trace, draws=9, most_work=1).tokens == 1


def test_one_long_sequence_is_cut():
    trace = make_trace(domains=("a",), documents=1, sequences=1, lengths=(5000,), layers=1)
    found = caching(trace, draws=9, most_work=9 * 4 * 2 * 300)
    assert (found.tokens, found.sequences) == (256, 1)
    alone = trace._replace(
        length_N=np.array([256]),
        **{name: getattr(trace, name)[:256] for name in ("tokens_T", "experts_TLK")},
    )
    np.testing.assert_array_equal(found.lru.rate_LE, caching(alone, draws=9).lru.rate_LE)


def test_joined_traces_count_as_one():
    parts = [make_trace(seed=seed) for seed in (1, 2)]
    rates = [caching(part, draws=9).lru.rate_LE for part in (*parts, join(parts))]
    np.testing.assert_allclose(rates[2], (rates[0] + rates[1]) / 2)


def test_no_work_is_refused():
    with pytest.raises(MoestroError, match="most_work is 0"):
        caching(make_trace(), most_work=0)
