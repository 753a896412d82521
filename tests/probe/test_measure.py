import json
import math

import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.probe import measure as m
from moestro.probe.record import Recording


def recording(experts_LNSK, domain_N, num_experts, block_N=None, domains=None):
    """A Recording as `record` would make it, with probabilities equal to the choices' shares."""
    experts_LNSK = np.asarray(experts_LNSK, dtype=np.uint8)
    domain_N = np.asarray(domain_N, dtype=np.int64)
    onehot = (experts_LNSK[..., None] == np.arange(num_experts)).sum(axis=(2, 3))
    probs = onehot / onehot.sum(-1, keepdims=True)
    return Recording(
        domains=domains or tuple("abcdefgh"[: domain_N.max() + 1]),
        moe_layers=tuple(range(len(experts_LNSK))),
        top_k=experts_LNSK.shape[-1],
        domain_N=domain_N,
        block_N=np.arange(len(domain_N)) if block_N is None else np.asarray(block_N),
        counts_LNE=onehot.astype(np.int64),
        probs_LNE=probs,
        entropy_LN=np.full(experts_LNSK.shape[:2], 0.5 * math.log(num_experts)),
        dropped_LN=np.zeros(experts_LNSK.shape[:2], dtype=np.int64),
        experts_LNSK=experts_LNSK,
    )


def top_k(rng, p_TE, k):
    """K different experts a token, drawn without replacement in proportion to p."""
    keys = np.log(p_TE) + rng.gumbel(size=p_TE.shape)
    return np.argsort(-keys, axis=-1)[..., :k]


def windowed_loads(rng, num_windows, base_E, sharpness=40.0):
    """One load vector a window: tokens of a window resemble each other."""
    return rng.dirichlet(base_E * sharpness, size=num_windows)


def draw(rng, base_ME, windows_each, seq_len, k=1, sharpness=40.0):
    p_NE = np.concatenate([windowed_loads(rng, windows_each, b, sharpness) for b in base_ME])
    p_NSE = np.repeat(p_NE[:, None], seq_len, axis=1)
    domain_N = np.repeat(np.arange(len(base_ME)), windows_each)
    return top_k(rng, p_NSE, k), domain_N


UNIFORM = np.full(8, 1 / 8)
LEANING = np.array([3, 3, 1, 1, 1, 1, 1, 1]) / 12
CENTRED = np.array([1, 1, 1, 1, 1, 1, 3, 3]) / 12


def test_load_of_a_known_recording():
    # Layer 0: expert 0 takes all. Layer 1: four experts evenly.
    experts = np.zeros((2, 1, 8, 1), dtype=int)
    experts[1, 0, :, 0] = np.arange(8) % 4
    load = m.load(recording(experts, [0], num_experts=4))
    np.testing.assert_allclose(load.share_LE, [[1, 0, 0, 0], [0.25] * 4])
    np.testing.assert_allclose(load.imbalance_L, [4.0, 1.0])
    np.testing.assert_allclose(load.variation_L, [math.sqrt(3), 0.0])
    assert load.dead_L == ((1, 2, 3), ())


def test_dropped_share():
    rec = recording(np.zeros((1, 2, 5, 2), dtype=int), [0, 0], 4)
    rec = rec._replace(dropped_LN=np.array([[3, 2]]))
    assert m.load(rec).dropped_L.tolist() == [5 / 20]


def test_expert_table_is_each_domains_share_by_expert():
    experts = np.array([[[[0], [0], [1], [1]], [[2], [2], [2], [1]], [[2], [2], [2], [2]]]])
    table = m.expert_table(recording(experts, [0, 1, 1], 3))
    np.testing.assert_allclose(table, [[[0.5, 0.5, 0.0], [0.0, 1 / 8, 7 / 8]]])


def test_entropy_tells_balance_from_spread():
    # Each window uses one expert alone, all together use all evenly.
    experts = np.arange(4).reshape(1, 4, 1, 1).repeat(6, axis=2)
    entropy = m.entropy(recording(experts, [0, 0, 1, 1], 4))
    np.testing.assert_allclose(entropy.balance_L, [1.0])
    np.testing.assert_allclose(entropy.balance_LM, [[0.5, 0.5]])
    np.testing.assert_allclose(entropy.spread_L, [0.5])
    np.testing.assert_allclose(entropy.spread_LM, [[0.5, 0.5]])


def test_distance_is_total_variation_from_the_average():
    # Two domains on different halves: the average is uniform, each half of the mass must move.
    experts = np.array([[[[0], [1]], [[0], [1]], [[2], [3]], [[2], [3]]]])
    found = m.specialisation(recording(experts, [0, 0, 1, 1], 4), draws=50)
    np.testing.assert_allclose(found.distance_LM, [[0.5, 0.5]])
    np.testing.assert_allclose(found.mean_L, [0.5])
    np.testing.assert_allclose(found.interval_LM2, [[[0.5, 0.5], [0.5, 0.5]]])
    assert found.blocks_M.tolist() == [2, 2]


def test_planted_specialisation_is_found_in_its_layer_only():
    rng = np.random.default_rng(1)
    plain, domain_N = draw(rng, [UNIFORM, UNIFORM, UNIFORM], 40, 64, k=2)
    special, _ = draw(rng, [LEANING, UNIFORM, CENTRED], 40, 64, k=2)
    found = m.specialisation(recording([plain, special], domain_N, 8), draws=299)
    assert found.supported_L.tolist() == [False, True]
    assert (found.distance_LM[1] > found.chance_high_LM[1])[[0, 2]].all()
    assert found.mean_chance_L[0] > 0.01  # finite text differs by chance, and it is reported


def test_chance_is_claimed_at_no_more_than_the_stated_rate():
    # Windows resemble themselves, so shuffling tokens would claim far more than 5 %.
    rng = np.random.default_rng(2)
    claims, trials = 0, 200
    for trial in range(trials):
        experts, domain_N = draw(rng, [UNIFORM] * 3, 12, 32, sharpness=20.0)
        second, _ = draw(rng, [UNIFORM] * 3, 12, 32, sharpness=20.0)
        rec = recording([experts, second], domain_N, 8)
        claims += m.specialisation(rec, draws=79, seed=trial).supported_L.any()
    assert claims / trials <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / trials)


def blocked(seed):
    """Six documents of 20 windows, three a domain; documents differ, domains do not."""
    rng = np.random.default_rng(seed)
    p_PE = rng.dirichlet(UNIFORM * 8 * 3, size=6)
    p_NSE = np.repeat(p_PE, 20, axis=0)[:, None].repeat(16, axis=1)
    return recording([top_k(rng, p_NSE, 1)], np.repeat([0, 1], 60), 8, np.repeat(np.arange(6), 20))


def test_windows_of_one_document_are_dealt_together():
    trials = range(20)
    by_document = [m.specialisation(blocked(t), draws=79).supported_L[0] for t in trials]
    by_window = [
        m.specialisation(blocked(t)._replace(block_N=np.arange(120)), draws=79).supported_L[0]
        for t in trials
    ]
    assert sum(by_document) <= 4
    assert sum(by_window) >= 15  # what ignoring documents would claim


def test_one_piece_of_text_per_domain_supports_nothing():
    rng = np.random.default_rng(3)
    experts, domain_N = draw(rng, [LEANING, CENTRED], 20, 32)
    found = m.specialisation(recording([experts], domain_N, 8, block_N=domain_N), draws=99)
    assert not found.supported_L.any()
    assert np.isnan(found.interval_LM2).all()


@pytest.mark.parametrize(("strength", "windows"), [(1.0, 30), (0.5, 12)])
def test_interval_covers_the_true_distance(strength, windows):
    # In the second case plain bootstrap quantiles, biased upwards, cover it in 60 % only.
    rng = np.random.default_rng(4)
    base = [strength * b + (1 - strength) * UNIFORM for b in (LEANING, UNIFORM, CENTRED)]
    mean = np.mean(base, axis=0)
    truth = 0.5 * np.abs(base - mean).sum(axis=1)
    covered, trials = 0, 60
    for trial in range(trials):
        experts, domain_N = draw(rng, base, windows, 64, sharpness=20.0)
        found = m.specialisation(recording([experts], domain_N, 8), draws=150, seed=trial)
        low, high = np.moveaxis(found.interval_LM2[0], -1, 0)
        covered += ((low <= truth) & (truth <= high)).sum()
    assert covered / (3 * trials) > 0.8


def test_same_seed_same_findings():
    rng = np.random.default_rng(5)
    experts, domain_N = draw(rng, [UNIFORM, LEANING], 10, 32, k=2)
    rec = recording([experts], domain_N, 8)
    one, two = (m.to_json(m.measure(rec, draws=40, seed=7)) for _ in range(2))
    assert one == two
    assert one != m.to_json(m.measure(rec, draws=40, seed=8))


def test_repetition_of_uniform_routing_matches_mixtrals_nulls():
    rng = np.random.default_rng(6)
    experts, domain_N = draw(rng, [UNIFORM] * 2, 100, 200, k=2, sharpness=1e9)
    found = m.repetition(recording([experts], domain_N, 8))
    assert found.first_uniform == pytest.approx(0.125)
    assert found.any_uniform == pytest.approx(0.464, abs=5e-4)
    np.testing.assert_allclose(found.first_LM, 0.125, atol=0.01)
    np.testing.assert_allclose(found.any_LM, 0.464, atol=0.015)
    np.testing.assert_allclose(found.any_shuffled_LM, 0.464, atol=0.015)
    assert (np.abs(found.first_LM - 0.125) < 4 * found.first_error_LM).all()


def test_repetition_of_known_sequences():
    # Domain a repeats first choices always; domain b shares one expert with the next at every
    # second step only, never the first choice.
    a = [[[0, 1], [0, 2], [0, 3], [0, 1], [0, 2]]]
    b = [[[0, 1], [1, 2], [3, 0], [0, 1], [2, 3]]]
    found = m.repetition(recording([a + b], [0, 1], 4))
    np.testing.assert_allclose(found.first_LM, [[1.0, 0.0]])
    np.testing.assert_allclose(found.any_LM, [[1.0, 0.5]])
    np.testing.assert_allclose(found.first_shuffled_LM, [[1.0, (4 + 1 + 1 + 1) / 25]])
    assert np.isnan(found.first_error_LM).all()


def test_skewed_loads_repeat_by_themselves_and_the_shuffled_null_says_so():
    rng = np.random.default_rng(7)
    experts, domain_N = draw(rng, [np.array([13, 1, 1, 1]) / 16], 60, 100, sharpness=1e9)
    found = m.repetition(recording([experts], domain_N, 4))
    expected = (13**2 + 3) / 256
    assert found.first_uniform == 0.25
    np.testing.assert_allclose(found.first_LM, expected, atol=0.03)
    np.testing.assert_allclose(found.first_shuffled_LM, expected, atol=0.03)
    np.testing.assert_array_equal(found.any_LM, found.first_LM)  # K = 1


def test_measures_that_a_recording_does_not_allow():
    rng = np.random.default_rng(8)
    experts, domain_N = draw(rng, [UNIFORM] * 2, 5, 8)
    rec = recording([experts], domain_N, 8)
    expert_choice = rec._replace(top_k=0, experts_LNSK=None)
    one_domain = recording([experts], domain_N * 0, 8)
    with pytest.raises(MoestroError, match="expert choice"):
        m.repetition(expert_choice)
    with pytest.raises(MoestroError, match="at least two labels"):
        m.specialisation(one_domain)
    with pytest.raises(MoestroError, match="draws"):
        m.specialisation(rec, draws=0)
    assert m.measure(expert_choice, draws=5).repetition is None
    assert m.measure(one_domain, draws=5).specialisation is None
    assert m.measure(recording([experts[:, :1]], domain_N, 8), draws=5).repetition is None


def test_findings_serialise_to_plain_json():
    rng = np.random.default_rng(9)
    experts, domain_N = draw(rng, [UNIFORM, LEANING], 4, 8, k=2)
    rec = recording([experts], domain_N, 8, block_N=domain_N)
    plain = m.to_json(m.measure(rec, draws=5))
    again = json.loads(json.dumps(plain, allow_nan=False))
    assert again == plain
    assert again["domains"] == ["a", "b"]
    assert again["specialisation"]["interval_LM2"] == [[[None, None], [None, None]]]
    assert len(again["table_LME"][0][1]) == 8
    assert isinstance(again["specialisation"]["supported_L"][0], bool)


def test_relabelling_experts_changes_no_distance():
    rng = np.random.default_rng(10)
    experts, domain_N = draw(rng, [UNIFORM, LEANING], 10, 16, k=2)
    names = rng.permutation(8)
    one = m.specialisation(recording([experts], domain_N, 8), draws=20)
    two = m.specialisation(recording([names[experts]], domain_N, 8), draws=20)
    np.testing.assert_allclose(one.distance_LM, two.distance_LM)
    np.testing.assert_allclose(one.p_value_L, two.p_value_L)


def test_a_single_expert_gives_finite_numbers():
    rec = recording(np.zeros((1, 4, 6, 1), dtype=int), [0, 0, 1, 1], 1)
    found = m.measure(rec, draws=5)
    assert found.repetition.first_uniform == 1.0
    assert found.specialisation.mean_L.tolist() == [0.0]
    assert np.isfinite(found.entropy.balance_L).all()
