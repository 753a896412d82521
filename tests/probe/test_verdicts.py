"""Verdicts on changes of loss that are drawn, so that it is known what should be found."""

from itertools import combinations

import numpy as np
import pytest

from moestro.probe.ablation import effects
from moestro.probe.ablation.targets import Target
from moestro.probe.ablation.verdicts import Predicted, dealt, judge, measure_row, student

NAMES = ("a", "b", "c")


def make(
    seed, *, documents=(6, 6, 6), length=40, vocabulary=20, tilt=0.0, by_token=0.0,
    rise=(0.0, 0.0, 0.0), noise=(0.2, 0.2, 0.2), draws=299,
):  # fmt: skip
    """Text whose domains prefer tokens by `tilt`, and rises of the loss by domain and token."""
    rng = np.random.default_rng(seed)
    token_W = by_token * rng.normal(size=vocabulary)
    ids, changes, domain_P = [], [], []
    for domain, count in enumerate(documents):
        share = np.exp(tilt * rng.normal(size=vocabulary))
        for _ in range(count):
            size = int(length * rng.uniform(0.5, 1.5))
            read = rng.choice(vocabulary, size, p=share / share.sum())
            level = rise[domain] + noise[domain] * rng.normal()
            ids.append(read)
            changes.append(token_W[read] + level + rng.normal(size=size))
            domain_P.append(domain)
    document_T = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
    id_T = np.concatenate(ids)
    text = Predicted(np.array(domain_P), document_T, id_T, id_T, np.ones(len(id_T)), draws, seed)
    return text, np.concatenate(changes)


def row_of(text, change_T, domain=0, expert=0, control=False):
    ones = np.ones(len(text.domain_P))
    target = Target(0, expert, NAMES[domain], control=control)
    return measure_row(text, target, domain, len(NAMES), change_T, (ones, 2 * ones))


def verdict(**options):
    text, change_T = make(0, **{"draws": 999, **options})
    return judge([row_of(text, change_T)], text)[0]


@pytest.mark.parametrize(
    ("score", "freedom", "chance"),
    # The table of critical values in any textbook.
    [
        (12.7062, 1, 0.05),
        (4.30265, 2, 0.05),
        (3.18245, 3, 0.05),
        (-2.22814, 10, 0.05),
        (4.0321, 5, 0.01),
        (1.96, 1000, 0.05027),
        (0.0, 7, 1.0),
    ],
)
def test_students_t(score, freedom, chance):
    assert student(score, freedom) == pytest.approx(chance, rel=1e-3)


def test_dealing_is_the_share_of_all_deals():
    rng = np.random.default_rng(0)
    size_P, own_P = rng.integers(5, 20, size=7).astype(float), np.arange(7) < 3
    change_P = size_P * (rng.normal(size=7) + 0.8 * own_P)

    def score(own):
        parts = []
        for side in (own, ~own):
            mean = change_P[side].sum() / size_P[side].sum()
            spread = np.square(change_P[side] - mean * size_P[side]).sum()
            variance = spread * side.sum() / (side.sum() - 1) / size_P[side].sum() ** 2
            parts.append((mean, variance))
        return (parts[0][0] - parts[1][0]) / np.sqrt(parts[0][1] + parts[1][1])

    every = [score(np.isin(np.arange(7), each)) for each in combinations(range(7), 3)]
    exact = np.mean(np.array(every) >= score(own_P) - 1e-9)
    deals_ZP = np.argsort(rng.random((20000, 7)), axis=1)
    assert 0.02 < exact < 0.5
    assert dealt(change_P, size_P, own_P, deals_ZP) == pytest.approx(exact, abs=0.015)


def test_documents_alike_in_size_give_the_plain_t_test():
    rng = np.random.default_rng(0)
    mean_P = rng.normal(size=9) + 0.5
    document_T = np.repeat(np.arange(9), 4)
    text = Predicted(np.arange(9) // 5, document_T, document_T, document_T, np.ones(36), 20, 0)
    row = row_of(text, mean_P[document_T]).row
    for p_value, part in ((row.p_own, mean_P[:5]), (row.p_elsewhere, mean_P[5:])):
        score = part.mean() / (part.std(ddof=1) / np.sqrt(len(part)))
        assert p_value == pytest.approx(student(score, len(part) - 1))
    assert row.own == pytest.approx(mean_P[:5].mean())
    assert row.difference == pytest.approx(mean_P[:5].mean() - mean_P[5:].mean())
    assert row.share_M[0] == 0.5


def test_verdicts():
    assert verdict(rise=(1, 0, 0)).verdict == effects.MORE
    assert verdict(rise=(1, 0.3, 0.3)).verdict == effects.MORE
    assert verdict(rise=(1, 1, 1)).verdict == effects.ALIKE
    assert verdict(rise=(0, 1, 1)).verdict == effects.ELSEWHERE
    assert verdict(rise=(-1, 0, 0)).verdict == effects.BETTER
    assert verdict(rise=(0, -1, -1)).verdict == effects.NOTHING  # not harmed, if better off
    # Its documents alike and the others of all kinds.
    unclear = verdict(rise=(0.3, 0, 0), noise=(0.01, 2, 2), length=400)
    assert unclear.verdict == effects.UNCLEAR
    assert verdict(documents=(1, 6, 6), rise=(1, 0, 0)).verdict == effects.ONE_DOCUMENT
    assert verdict(documents=(6, 1, 0), rise=(1, 0, 0)).verdict == effects.ONE_DOCUMENT
    assert verdict(documents=(6, 0, 0), rise=(1, 0, 0)).verdict == effects.ONE_DOMAIN


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rise": (1.0, 1.0, 1.0)},
        {"rise": (1.0, 1.0, 1.0), "documents": (4, 10, 10), "noise": (0.6, 0.2, 0.2)},
    ],
    ids=["no effect", "the same effect", "a domain that varies more"],
)
def test_no_claims_where_domains_are_alike(options):
    """Twelve rows at once, as often wrong as a family-wise 5 % allows."""
    wrong = 0
    for family in range(20):
        text, _ = make(family, draws=299, **options)
        measured = []
        for row in range(12):
            # Other changes of the same kind to the same documents.
            rng = np.random.default_rng((family, row))
            level_M, noise_M = options.get("rise", (0, 0, 0)), options.get("noise", (0.2,) * 3)
            level_P = np.array(level_M)[text.domain_P]
            level_P = level_P + np.array(noise_M)[text.domain_P] * rng.normal(size=len(level_P))
            change_T = level_P[text.document_T] + rng.normal(size=len(text.document_T))
            measured.append(row_of(text, change_T, expert=row))
        wrong += any(row.matters_more for row in judge(measured, text))
    assert wrong <= 3  # 1 expected at most; more than 3 in 1 of 60 honest runs


def test_no_claims_beyond_tokens_where_tokens_explain_all():
    """Domains differ much, by their tokens alone."""
    wrong = different = 0
    for seed in range(80):
        text, change_T = make(seed, tilt=1.5, by_token=1.0)
        row = row_of(text, change_T).row
        wrong += row.by_input.p_value <= 0.05
        different += row.p_more <= 0.05
    assert different > 10
    assert wrong <= 9  # 4 expected


def test_what_goes_beyond_tokens_is_measured():
    found, inside = [], 0
    for seed in range(40):
        text, change_T = make(seed, documents=(10, 10, 10), tilt=1.0, by_token=1.0, rise=(1, 0, 0))
        tokens = row_of(text, change_T).row.by_input
        found.append((tokens.excess, tokens.p_value))
        inside += tokens.excess_interval_2[0] <= 1 <= tokens.excess_interval_2[1]
    assert np.mean([excess for excess, _ in found]) == pytest.approx(1, abs=0.08)
    assert max(p_value for _, p_value in found) < 0.05
    assert inside >= 31  # of 40; a bootstrap of 10 documents holds in about 91 %


def test_excess_is_a_regression_with_a_constant_for_each_token():
    text, change_T = make(0, documents=(4, 5, 3), tilt=1.5, by_token=1.0, rise=(1, 0, 0))
    found = row_of(text, change_T).row.by_input
    own_T = text.domain_P[text.document_T] == 0
    columns = np.column_stack([own_T, np.eye(20)[text.input_T]]).astype(float)
    assert found.excess == pytest.approx(np.linalg.lstsq(columns, change_T, rcond=None)[0][0])
    elsewhere = set(text.input_T[~own_T])
    covered = np.mean([token in elsewhere for token in text.input_T[own_T]])
    assert found.covered == pytest.approx(covered)


def test_one_kind_of_token_identity_is_enough_to_explain_it():
    text, change_T = make(0, documents=(10,) * 3, tilt=1.5, by_token=2.0, draws=999)
    text = text._replace(input_T=np.zeros_like(text.input_T))
    highest = int(np.argmax(row_of(text, change_T).row.change_M))
    (row,) = judge([row_of(text, change_T + 2, highest)], text)
    assert row.verdict == effects.MORE
    assert row.by_input.p_value < 0.05 < row.by_target.p_value
    assert row.tokens_verdict == effects.WITHIN_TOKENS


def test_controls_of_another_domain_do_not_count():
    text, change_T = make(0)
    row, control = row_of(text, change_T), row_of(text, change_T, 1, expert=1, control=True)
    assert np.isnan(judge([row, control], text)[0].control_per_assignment)
    control = row_of(text, change_T + 1, 0, expert=1, control=True)
    assert judge([row, control], text)[0].control_per_assignment == control.row.per_assignment


def test_many_rows_need_more_than_one():
    text, change_T = make(2, draws=999, rise=(0.25, 0, 0))
    strong = row_of(text, change_T)
    assert 0.005 < max(strong.row.p_more, strong.row.p_own) < 0.05
    assert judge([strong], text)[0].matters_more
    nothing = [row_of(text, make(2)[1], expert=1 + n) for n in range(30)]
    judged = judge([strong, *nothing], text)
    assert not any(row.matters_more for row in judged)
    # Controls are no part of that family.
    controls = [row_of(text, make(2)[1], expert=1 + n, control=True) for n in range(30)]
    assert judge([strong, *controls], text)[0].matters_more
