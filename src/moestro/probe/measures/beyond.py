"""Beyond tokens: how differently labels of text route the same token ids.

Letters beside those of docs/shapes.md: M labels, P documents, Z random draws, U different token
ids, C different ids of one document.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moestro.probe.measures.bootstrap import (
    Bools,
    Floats,
    Ints,
    beside_chance,
    distances,
    document_weights,
    lonely,
    membership,
    reflected,
    signs,
)
from moestro.probe.recording.traces import Trace


class BeyondTokens(NamedTuple):
    """What a label's token ids do not explain of its use of experts.

    About the label's tokens whose id also occurs under another label only: for the others it is
    undecidable whether the token or the topic chose the expert. A label without any has NaN. The
    null is that token identity explains everything; the rest is as in `Specialisation`.
    """

    shared_M: Floats  # share of each label's tokens whose id also occurs under another label
    distance_LM: Floats  # total variation, over those tokens, from the mean over labels
    # The distance that those tokens would give if each id were routed under every label as it is
    # on average over all its occurrences; in its interval the routing of each id is held fixed.
    tokens_LM: Floats
    tokens_interval_LM2: Floats
    # Share of the label's assignments of those tokens that go to other experts than the same ids
    # do on average: total variation between what is and what tokens alone give.
    excess_LM: Floats
    chance_LM: Floats
    chance_high_LM: Floats
    interval_LM2: Floats
    mean_L: Floats  # over labels with shared ids and two documents or more
    mean_chance_L: Floats
    mean_chance_high_L: Floats
    p_value_L: Floats
    supported_L: Bools


class _Vocabulary(NamedTuple):
    """The shared token ids of a trace, and where they occur."""

    used_T: Bools  # whether the token's id occurs under two labels or more
    id_T: Ints  # number of its id among all U ids of labelled text
    count_U: Floats
    label_UM: Floats  # share of an id's occurrences that lie under each label
    shared_M: Floats  # share of each label's tokens that are used


class _LayerCounts(NamedTuple):
    """One layer's assignments of shared tokens, by document."""

    seen_PE: Floats
    told_PE: Floats  # what the documents' token ids predict of them
    score_PME: Floats  # what each document adds to the difference of the two for each label
    noise_PME: Floats  # the same, compared with the other documents only


def beyond_tokens(
    trace: Trace, label_P: Ints, labels: int, *, draws: int = 999, seed: int = 0
) -> BeyondTokens:
    """Compare each label's use of experts with what its token ids predict.

    An id predicts the mean routing of all its occurrences under any label. What a label's
    assignments differ from that is a sum over documents: each document of the label adds what it
    has beyond its ids, and, since they took part in the means, documents of other labels take off
    their part (the effective score; Hemerik, Goeman and Finos 2020). Under the null that ids
    explain all, a document deviates from its ids in no particular direction, so the null draws a
    random sign for each document's contribution.

    Preserved by the draws: which ids occur in which document and under which label, how often; how
    far the tokens of one document deviate together, over all ids, experts and labels, which is
    what makes text cluster. Not preserved: the direction of a document's deviation. It is assumed
    that documents are independent and, where a label has few of them, that deviations are
    symmetric. Permuting each id's documents over the labels would keep less: it tears documents
    apart, and any habit of a single document would pass for one of its label. In the draws a
    document deviates from what the other documents say of its ids: its own part in the means
    would hide some of the noise. That makes the test a little careful: on text without any
    excess it rejects in 1 to 5 % instead of 5.

    Documents of a label below 0 are left out.
    """
    vocabulary = _vocabulary(trace, label_P, labels)
    member_MP, alone_M = membership(label_P, labels), lonely(label_P, labels)
    weights_ZP = document_weights(label_P, draws, seed)
    sign_ZP = signs(len(label_P), draws, seed + 1)
    shape = (trace.experts_TLK.shape[1], labels)
    excess_LM, chance_ZLM, drawn_ZLM = np.empty(shape), *np.empty((2, draws, *shape))
    seen, told = [], []
    for index in range(shape[0]):
        layer = _layer(trace, index, vocabulary, label_P)
        seen.append(layer.seen_PE)
        told.append(layer.told_PE)
        assigned_M = member_MP @ layer.seen_PE.sum(axis=1)
        difference_ME = layer.score_PME.sum(axis=0)
        noise_PX = layer.noise_PME.reshape(len(label_P), -1)
        null_ZME = (sign_ZP @ noise_PX).reshape(draws, *difference_ME.shape)
        moved_ZME = ((weights_ZP - 1) @ noise_PX).reshape(null_ZME.shape)
        excess_LM[index] = _excess(difference_ME, assigned_M)
        chance_ZLM[:, index] = _excess(null_ZME, assigned_M)
        drawn_ZLM[:, index] = _excess(difference_ME + moved_ZME, assigned_M)
    told_PLE, shared_M = np.stack(told, axis=1), vocabulary.shared_M
    told_LM, asked_M = distances(member_MP, told_PLE).T, ~alone_M & (shared_M > 0)
    told_ZLM = np.stack([distances(member_MP * w_P, told_PLE).T for w_P in weights_ZP])
    told_LM2 = reflected(told_ZLM, told_LM)
    told_LM2[:, ~asked_M] = np.nan
    chance_ZLM[:, :, shared_M == 0] = np.nan
    return BeyondTokens(
        shared_M=shared_M,
        distance_LM=distances(member_MP, np.stack(seen, axis=1)).T,
        tokens_LM=told_LM,
        tokens_interval_LM2=told_LM2,
        excess_LM=excess_LM,
        **beside_chance(excess_LM, drawn_ZLM, chance_ZLM, asked_M),
    )


def _vocabulary(trace: Trace, label_P: Ints, labels: int) -> _Vocabulary:
    label_T = label_P[trace.document_T]
    ids_U, id_T = np.unique(trace.tokens_T, return_inverse=True)
    there_T = label_T >= 0
    cell_T = id_T * labels + label_T
    count_UM = np.bincount(cell_T[there_T], minlength=len(ids_U) * labels).reshape(-1, labels)
    shared_U = (count_UM > 0).sum(axis=1) > 1
    count_U = count_UM.sum(axis=1)
    return _Vocabulary(
        used_T=there_T & shared_U[id_T],
        id_T=id_T,
        count_U=count_U.astype(np.float64),
        label_UM=count_UM / np.maximum(count_U, 1)[:, None],
        shared_M=count_UM[shared_U].sum(axis=0) / np.maximum(count_UM.sum(axis=0), 1),
    )


def _layer(trace: Trace, index: int, vocabulary: _Vocabulary, label_P: Ints) -> _LayerCounts:
    """Document by document, so that ids times experts of one document is the most in memory."""
    num_experts, labels = trace.subject.num_experts, vocabulary.label_UM.shape[1]
    used = np.flatnonzero(vocabulary.used_T)
    document_T, id_T = trace.document_T[used], vocabulary.id_T[used]
    experts_TK = trace.experts_TLK[used, index].astype(np.int64)
    mean_UE = _table(id_T, experts_TK, len(vocabulary.count_U), num_experts)
    mean_UE /= np.maximum(vocabulary.count_U, 1)[:, None]
    order = np.argsort(document_T, kind="stable")
    ends = np.searchsorted(document_T[order], np.arange(len(label_P) + 1))
    seen, told = np.zeros((2, len(label_P), num_experts))
    score, noise = np.zeros((2, len(label_P), labels, num_experts))
    for document in np.flatnonzero(np.diff(ends)):
        own = order[ends[document] : ends[document + 1]]
        id_C, place, count_C = np.unique(id_T[own], return_inverse=True, return_counts=True)
        seen_CE = _table(place, experts_TK[own], len(id_C), num_experts)
        told_CE = count_C[:, None] * mean_UE[id_C]
        seen[document], told[document] = seen_CE.sum(axis=0), told_CE.sum(axis=0)
        others_C = 1 - count_C / vocabulary.count_U[id_C]  # above 0: the id has another label
        own_CM = (np.arange(labels) == label_P[document]) - vocabulary.label_UM[id_C]
        score[document] = own_CM.T @ (seen_CE - told_CE)
        noise[document] = own_CM.T @ ((seen_CE - told_CE) / others_C[:, None])
    return _LayerCounts(seen, told, score, noise)


def _table(row_T: Ints, experts_TK: Ints, rows: int, num_experts: int) -> Floats:
    """How often each row has each expert; empty places do not count. [rows, E]."""
    cell_TK = row_T[:, None] * (num_experts + 1) + experts_TK
    flat = np.bincount(cell_TK.ravel(), minlength=rows * (num_experts + 1))
    return flat.reshape(rows, num_experts + 1)[:, :num_experts].astype(np.float64)


def _excess(difference_ME: Floats, assigned_M: Floats) -> Floats:
    """Total variation from differences of counts, [..., M, E] -> [..., M]; NaN without any."""
    apart_M: Floats = 0.5 * np.abs(difference_ME).sum(axis=-1)
    return np.where(assigned_M > 0, apart_M / np.maximum(assigned_M, 1), np.nan)
