"""Relative positions of T5: a learned bias per head for each bucket of distances.

Letters: S queries, P keys, N distances between them, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moestro.errors import ConfigError


def bucket(distance_N: Tensor, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Which bucket each distance falls into (Raffel et al. 2020, §2.1).

    Half of the buckets hold one distance each, the other half grow with the logarithm up to
    `max_distance`; all beyond it share the last. Of both directions each gets half of them.
    The logarithm is fp32, as in the models that were trained with it: in fp64 a few distances that
    lie on a border would fall into another bucket.

    Args:
        distance_N: int64, key position minus query position.
        buckets: how many there are.
        max_distance: from which all distances are one.
        bidirectional: whether keys after the query count; else they are distance 0.

    Returns:
        int64, from 0 to buckets - 1, like distance_N.
    """
    if bidirectional:
        buckets //= 2
        first_N, away_N = (distance_N > 0) * buckets, distance_N.abs()
    else:
        first_N, away_N = torch.zeros_like(distance_N), (-distance_N).clamp_min(0)
    exact = buckets // 2
    ratio_N = away_N.clamp_min(exact).float() / exact
    growth_N = ratio_N.log() / math.log(max_distance / exact) * (buckets - exact)
    far_N = (exact + growth_N.long()).clamp_max(buckets - 1)
    return first_N + torch.where(away_N < exact, away_N, far_N)


class RelativeBias(nn.Module):
    """A bias for each head and bucket, added to the scores of attention.

    Args:
        buckets: rows of the table.
        max_distance: from which all distances are one.
        num_heads: H.
        bidirectional: True in an encoder, False where only earlier keys are seen.

    Raises:
        ConfigError: the buckets of one distance each already reach max_distance.
    """

    def __init__(
        self, buckets: int, max_distance: int, num_heads: int, bidirectional: bool
    ) -> None:
        super().__init__()
        single = buckets // 4 if bidirectional else buckets // 2
        if max_distance <= single:
            raise ConfigError(
                f"max_distance is {max_distance}, but the first {single} of {buckets} buckets hold "
                "one distance each; raise max_distance or lower buckets"
            )
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(buckets, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No preference for any distance."""
        nn.init.zeros_(self.weight)

    def forward(self, queries: range, keys: range) -> Tensor:
        """The bias of each query for each key, [H, S, P] in the dtype of the weight.

        Args:
            queries: positions of the queries, one apart.
            keys: positions of the keys, one apart.
        """
        # Distances repeat along the diagonals: S + P - 1 rows of the table make the whole square.
        distance_N = torch.arange(
            keys.start - queries.stop + 1, keys.stop - queries.start, device=self.weight.device
        )
        bucket_N = bucket(distance_N, len(self.weight), self.max_distance, self.bidirectional)
        bias_HN = self.weight[bucket_N].t()
        if len(queries) == 1:
            return bias_HN[:, None]
        return bias_HN.unfold(1, len(keys), 1).flip(1)
