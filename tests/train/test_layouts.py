"""What cannot be split so, and what is said of it."""

import pytest

from moestro.config import ParallelConfig
from moestro.errors import ConfigError


def test_layouts_that_do_not_fit_are_refused_with_those_that_do():
    for parallel, ranks, experts, words in (
        ({"expert": 4}, 6, 8, "parallel.expert = 2, or start 4 or 8 processes"),
        ({"expert": 3}, 6, 8, "expert = 2"),
        ({"expert": 2}, 2, None, "a model without experts"),
        ({"expert": 2, "shard": 3}, 12, 8, "set it to 2 or 4"),
        ({"shard": 5}, 8, 8, "set it to 4 or 8"),
    ):
        with pytest.raises(ConfigError, match=words):
            ParallelConfig(**parallel).layout(ranks, experts)
    layout = ParallelConfig(expert=4, shard="auto").layout(16, 8)
    assert (layout.replicas, layout.expert_shard, layout.expert_replicas) == (1, 4, 1)
    layout = ParallelConfig(expert=4, shard=2).layout(16, 8)
    assert (layout.replicas, layout.expert_shard, layout.expert_replicas) == (8, 1, 4)
