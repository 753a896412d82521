"""Traces of which the truth is known, since it was put in: `world` and `trace_of`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moestro.probe.recording.traces import Subject, Trace, smallest_dtype


def world(
    seed: int,
    *,
    documents: Sequence[int] = (8, 8, 8),
    length: int = 40,
    experts: int = 8,
    top_k: int = 1,
    layers: int = 1,
    vocabulary: int = 60,
    dialect: float = 0.0,
    by_token: float = 0.0,
    by_document: float = 0.0,
    by_domain: float = 0.0,
) -> Trace:
    """Text of Zipf's law, routed by the largest of random logits.

    Args:
        seed: of everything.
        documents: of each domain.
        length: mean tokens of a document, which has one sequence; lengths vary twofold.
        experts: E.
        top_k: K.
        layers: L.
        vocabulary: different token ids.
        dialect: how differently the domains use the ids; 0 alike, 1 a factor e each way.
        by_token: size of what a token's id adds to its logits.
        by_document: size of what its document adds.
        by_domain: size of what its domain adds.
    """
    rng = np.random.default_rng(seed)
    domain_N = np.repeat(np.arange(len(documents)), documents)
    length_N = rng.integers(2 * length // 3, 4 * length // 3 + 1, size=len(domain_N))
    document_T = np.repeat(np.arange(len(domain_N)), length_N)
    domain_T = domain_N[document_T]
    frequency_MV = np.exp(dialect * rng.normal(size=(len(documents), vocabulary)))
    frequency_MV /= np.arange(1, vocabulary + 1)
    below_MV = np.cumsum(frequency_MV / frequency_MV.sum(axis=1, keepdims=True), axis=1)[:, :-1]
    tokens_T = (rng.random((len(domain_T), 1)) > below_MV[domain_T]).sum(axis=1)
    shape = (layers, experts)
    logits_TLE = (
        rng.gumbel(size=(len(tokens_T), *shape))
        + by_token * rng.normal(size=(vocabulary, *shape))[tokens_T]
        + by_document * rng.normal(size=(len(domain_N), *shape))[document_T]
        + by_domain * rng.normal(size=(len(documents), *shape))[domain_T]
    )
    experts_TLK = np.argsort(-logits_TLE, axis=-1)[..., :top_k]
    return trace_of(experts_TLK, length_N, domain_N, num_experts=experts, tokens_T=tokens_T)


def trace_of(
    experts_TLK: Any,
    length_N: Any,
    domain_N: Any,
    num_experts: int,
    *,
    tokens_T: Any = None,
    document_N: Any = None,
    top_k: int | None = None,
) -> Trace:
    """A trace of given choices; each sequence is a document unless `document_N` says otherwise.

    Probabilities are the shares of each sequence's choices, each token's entropy is half of log E.
    """
    experts_TLK, length_N, domain_N = map(np.asarray, (experts_TLK, length_N, domain_N))
    total, layers, places = experts_TLK.shape
    document_N = np.arange(len(length_N)) if document_N is None else np.asarray(document_N)
    onehot_TLE = (experts_TLK[..., None] == np.arange(num_experts)).sum(axis=2)
    starts_N = np.cumsum(length_N) - length_N
    probs_NLE = np.add.reduceat(onehot_TLE, starts_N, axis=0).astype(np.float32)
    return Trace(
        subject=Subject(
            "known", "0" * 32, tuple(range(layers)), num_experts, places if top_k is None else top_k
        ),
        domains=tuple("abcdefghijklmnopqr"[: domain_N.max() + 1]),
        documents=tuple(f"document {number}" for number in range(document_N.max() + 1)),
        domain_N=domain_N,
        document_N=document_N,
        batch_N=np.zeros(len(length_N), dtype=np.int64),
        length_N=length_N,
        tokens_T=np.zeros(total, np.int32) if tokens_T is None else tokens_T.astype(np.int32),
        generated_T=np.zeros(total, dtype=np.bool_),
        experts_TLK=experts_TLK.astype(smallest_dtype(num_experts)),
        weights_TLK=np.full(experts_TLK.shape, 1 / places, dtype=np.float32),
        kept_TLK=None,
        entropy_TL=np.full((total, layers), 0.5 * np.log(num_experts), dtype=np.float32),
        margin_TL=np.full((total, layers), 0.25, dtype=np.float32),
        probs_NLE=probs_NLE / probs_NLE.sum(axis=-1, keepdims=True),
    )
