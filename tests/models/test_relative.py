"""Relative positions: buckets by hand and against transformers, the bias entry by entry."""

import math
import warnings

import pytest
import torch

from moestro.errors import ConfigError
from moestro.models.relative import RelativeBias, bucket

CASES = [(32, 128, True), (32, 128, False), (8, 20, False), (8, 20, True), (4, 128, True)]


def bucket_by_hand(distance, buckets, max_distance, bidirectional):
    """One distance at a time, as §2.1 of the T5 paper says it."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        away = abs(distance)
    else:
        away = max(0, -distance)
    exact = buckets // 2
    if away < exact:
        return first + away
    grown = math.log(away / exact) / math.log(max_distance / exact) * (buckets - exact)
    if abs(grown - round(grown)) < 1e-6:
        return None  # on a border: the rounding of fp32 decides
    return first + min(buckets - 1, exact + int(grown))


@pytest.mark.parametrize(("buckets", "max_distance", "bidirectional"), CASES)
def test_buckets_by_hand(buckets, max_distance, bidirectional):
    distance_N = torch.arange(-300, 301)
    actual = bucket(distance_N, buckets, max_distance, bidirectional).tolist()
    assert set(actual) == set(range(buckets)) - ({buckets // 2} if bidirectional else set())
    compared = 0
    for distance, got in zip(distance_N.tolist(), actual, strict=True):
        expected = bucket_by_hand(distance, buckets, max_distance, bidirectional)
        assert expected is None or got == expected, distance
        compared += expected is not None
    assert compared > 580


@pytest.mark.parametrize(("buckets", "max_distance", "bidirectional"), CASES)
def test_buckets_of_transformers(buckets, max_distance, bidirectional):
    """Every distance, those on the borders too: published weights were trained with these."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance_N = torch.arange(-2000, 2001)
    expected_N = t5.T5Attention._relative_position_bucket(
        distance_N, bidirectional, buckets, max_distance
    )
    assert torch.equal(bucket(distance_N, buckets, max_distance, bidirectional), expected_N)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (range(0, 9), range(0, 9)),
        (range(9, 10), range(0, 10)),
        (range(40, 41), range(30, 41)),
        (range(7, 12), range(3, 12)),
        (range(0, 3), range(0, 8)),
        (range(2, 6), range(4, 5)),
    ],
)
def test_bias_entry_by_entry(bidirectional, queries, keys):
    table = RelativeBias(8, 20, 3, bidirectional)
    torch.nn.init.normal_(table.weight)
    bias_HSP = table(queries, keys)
    assert bias_HSP.shape == (3, len(queries), len(keys))
    for s, query in enumerate(queries):
        for p, key in enumerate(keys):
            row = bucket(torch.tensor(key - query), 8, 20, bidirectional)
            assert torch.equal(bias_HSP[:, s, p], table.weight[row]), (query, key)


def test_gradients():
    table = RelativeBias(8, 20, 2, False).double()
    torch.nn.init.normal_(table.weight)

    def bias(weight):
        return torch.func.functional_call(table, {"weight": weight}, (range(3, 7), range(0, 7)))

    assert torch.autograd.gradcheck(bias, (table.weight,))


def test_layout():
    table = RelativeBias(32, 128, 12, True)
    assert {name: tuple(p.shape) for name, p in table.named_parameters()} == {"weight": (32, 12)}
    assert RelativeBias(32, 128, 12, True).to("meta")(range(4), range(4)).shape == (12, 4, 4)


def test_buckets_that_leave_nothing_to_grow():
    with pytest.raises(ConfigError, match=r"max_distance is 16.*first 16 of 32"):
        RelativeBias(32, 16, 2, False)
    assert RelativeBias(32, 16, 2, True)(range(40), range(40)).isfinite().all()
