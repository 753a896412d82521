"""How many experts a token misses at once, beside the mean rates of `caching`."""

import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.probe.measures.caching import caching
from moestro.probe.measures.misses import misses

from .traces import make_trace

TRACE = make_trace(lengths=(40,), experts=6, top_k=3, skew=0.5, by_token=2.0).end_to_end()


def test_their_mean_is_the_hit_rate_of_the_simulated_cache():
    rate_LE = caching(TRACE, draws=1).lru.rate_LE
    for kept in range(1, 7):
        share_LM = misses(TRACE, [kept, kept], filling=0)
        assert share_LM.sum(axis=1) == pytest.approx([1, 1])
        assert 1 - share_LM @ np.arange(4) / 3 == pytest.approx(rate_LE[:, kept - 1])


def test_each_layer_has_its_own_size_and_filling_counts_for_nothing():
    share_LM = misses(TRACE, [6, 1])
    assert share_LM[0].tolist() == [1, 0, 0, 0]  # all are there once the cache is full
    assert share_LM[1, 0] == 0  # three experts pass through one place
    assert misses(TRACE, [6, 1], most_work=6 * 5).sum(axis=1) == pytest.approx([1, 1])
    with pytest.raises(MoestroError, match="1 sizes of caches were given for 2 layers"):
        misses(TRACE, [3])
