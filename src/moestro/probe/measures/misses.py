"""How many of a token's experts are missing at once, in caches of each layer's last used experts.

What `checkpoints.streamed` keeps in memory, replayed on a trace. Mean hit rates of every policy and
size: `caching`.

Letters beside those of docs/shapes.md: M = K + 1 numbers of misses, from none to all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.errors import MoestroError
from moestro.probe.measures.bootstrap import Floats
from moestro.probe.recording.traces import Trace

# Wanted experts that are looked up, about half a microsecond each.
MOST_WORK = 2 * 10**6


def misses(
    trace: Trace, kept_L: Sequence[int], most_work: int = MOST_WORK, filling: float = 0.1
) -> Floats:
    """The share of tokens that miss so many of their experts, by layer. [L, M].

    Sequences follow each other through the same caches, as texts do in a process.

    Args:
        trace: its first tokens are used.
        kept_L: experts in the cache of each layer, at least 1.
        most_work: tokens × layers × experts per token that are looked at.
        filling: the part of them, at the beginning, whose misses do not count.

    Raises:
        MoestroError: there is not a size for each layer.
    """
    layers, top_k = trace.experts_TLK.shape[1:]
    if len(kept_L) != layers:
        raise MoestroError(f"{len(kept_L)} sizes of caches were given for {layers} layers")
    tokens = max(1, min(len(trace.experts_TLK), most_work // max(1, layers * top_k)))
    first, empty = int(tokens * filling), trace.subject.num_experts
    counts_LM: Floats = np.zeros((layers, top_k + 1))
    for layer, kept in enumerate(kept_L):
        held: dict[int, None] = {}  # the one used last at the end
        for place, experts_K in enumerate(trace.experts_TLK[:tokens, layer].tolist()):
            wanted = [expert for expert in reversed(experts_K) if expert != empty]
            missed = sum(expert not in held for expert in wanted)
            for expert in wanted:
                held.pop(expert, None)
                held[expert] = None
            while len(held) > kept:
                del held[next(iter(held))]
            counts_LM[layer, missed] += place >= first
    share_LM: Floats = counts_LM / max(1, tokens - first)
    return share_LM
