"""Small random traces, made by hand: `make_trace`."""

from collections.abc import Sequence

import numpy as np

from moestro.probe.recording.traces import Subject, Trace, smallest_dtype


def make_trace(
    *,
    domains: Sequence[str] = ("code", "prose"),
    documents: int = 3,
    sequences: int = 2,
    lengths: Sequence[int] = (7, 5, 12),
    layers: int = 2,
    experts: int = 4,
    top_k: int = 2,
    vocabulary: int = 50,
    skew: float = 0.0,
    by_domain: float = 0.0,
    by_token: float = 0.0,
    generated: int = 0,
    dropped: float = 0.0,
    empty: float = 0.0,
    logits: bool = True,
    name: str = "tiny",
    fingerprint: str = "0" * 32,
    seed: int = 0,
) -> Trace:
    """A random trace; routing is independent and uniform unless an option says otherwise.

    Args:
        domains: each has `documents` documents called "domain/number".
        documents: of each domain.
        sequences: of each document.
        lengths: tokens of the sequences, taken in turn.
        layers: L.
        experts: E.
        top_k: K.
        vocabulary: token ids are below it.
        skew: random logits are added to all tokens, this times a normal draw for each expert.
        by_domain: the same, drawn for each domain.
        by_token: the same, drawn for each token id.
        generated: the last tokens of each sequence, marked as written by the model.
        dropped: share of assignments that found no room; 0 gives a `kept_TLK` of None.
        empty: share of places that hold no expert, the last ones of a token first; the subject's
            `top_k` is then 0, as for expert choice.
        logits: False gives NaN where a trace has values of the router's probabilities.
        name: of the model.
        fingerprint: of the model.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    count = len(domains) * documents * sequences
    document_N = np.repeat(np.arange(len(domains) * documents), sequences)
    domain_N = document_N // documents
    length_N = np.resize(np.array(lengths, dtype=np.int64), count)
    total = int(length_N.sum())
    tokens_T = rng.integers(vocabulary, size=total, dtype=np.int32)
    domain_T = np.repeat(domain_N, length_N)
    logits_TLE = (
        rng.gumbel(size=(total, layers, experts))
        + skew * rng.normal(size=(layers, experts))
        + by_domain * rng.normal(size=(len(domains), layers, experts))[domain_T]
        + by_token * rng.normal(size=(vocabulary, layers, experts))[tokens_T]
    )
    probs_TLE = np.exp(logits_TLE - logits_TLE.max(axis=-1, keepdims=True))
    probs_TLE /= probs_TLE.sum(axis=-1, keepdims=True)
    order_TLE = np.argsort(-probs_TLE, axis=-1)
    sorted_TLE = np.take_along_axis(probs_TLE, order_TLE, axis=-1)
    experts_TLK, weights_TLK = order_TLE[..., :top_k], sorted_TLE[..., :top_k]
    weights_TLK = weights_TLK / weights_TLK.sum(axis=-1, keepdims=True)
    entropy_TL = -(probs_TLE * np.log(probs_TLE)).sum(axis=-1)
    lowest_TL = sorted_TLE[..., top_k - 1]
    margin_TL = lowest_TL - sorted_TLE[..., top_k] if top_k < experts else lowest_TL
    starts_N = np.cumsum(length_N) - length_N
    probs_NLE = np.add.reduceat(probs_TLE, starts_N, axis=0) / length_N[:, None, None]
    if empty:
        filled_TL = top_k - rng.binomial(top_k, empty, size=(total, layers))
        none_TLK = np.arange(top_k) >= filled_TL[..., None]
        experts_TLK = np.where(none_TLK, experts, experts_TLK)
        weights_TLK = np.where(none_TLK, 0.0, weights_TLK)
    if not logits:
        entropy_TL, margin_TL, probs_NLE = (
            np.full_like(values, np.nan) for values in (entropy_TL, margin_TL, probs_NLE)
        )
    position_T = np.arange(total) - np.repeat(starts_N, length_N)
    return Trace(
        subject=Subject(name, fingerprint, tuple(range(layers)), experts, 0 if empty else top_k),
        domains=tuple(domains),
        documents=tuple(f"{domain}/{number}" for domain in domains for number in range(documents)),
        domain_N=domain_N,
        document_N=document_N,
        batch_N=np.arange(count) // 4,
        length_N=length_N,
        tokens_T=tokens_T,
        generated_T=position_T >= np.repeat(length_N - generated, length_N),
        experts_TLK=experts_TLK.astype(smallest_dtype(experts)),
        weights_TLK=weights_TLK.astype(np.float32),
        kept_TLK=rng.random(experts_TLK.shape) >= dropped if dropped else None,
        entropy_TL=entropy_TL.astype(np.float32),
        margin_TL=margin_TL.astype(np.float32),
        probs_NLE=probs_NLE.astype(np.float32),
    )
