"""A trace of what a server answered: the experts and weights that it returned with its texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from moestro.errors import DataError
from moestro.probe.recording.tracecheck import check
from moestro.probe.recording.traces import Subject, Trace, fingerprint, smallest_dtype


class Answered(NamedTuple):
    """A prompt and what was written after it, each token with its experts.

    Attributes:
        tokens: Ids of the T tokens that passed through the model: all but one that ends the text.
        prompt: How many of them are the prompt's.
        experts_TLK: As `return_routed_experts` gives them, the prompt's first.
        weights_TLK: As `return_routed_weights` does.
        domain: A label.
    """

    tokens: Sequence[int]
    prompt: int
    experts_TLK: Any
    weights_TLK: Any
    domain: str = "answers"


def trace_of_answers(
    model: nn.Module, moe_layers: Sequence[int], num_experts: int, answers: Sequence[Answered]
) -> Trace:
    """The trace of answers, each a document and a batch by itself, for `tracefile.write_parts`.

    What a server does not tell of its routers, entropy, margin and mean probabilities, is NaN.

    Args:
        model: The one that was served, for its fingerprint.
        moe_layers: Numbers of its mixtures, as /v1/models has them.
        num_experts: Of each.
        answers: At least one.

    Raises:
        DataError: an answer's sizes do not fit together; names the field.
    """
    if not answers:
        raise DataError("no answer was given; give at least one")
    lengths, places = [len(each.tokens) for each in answers], np.arange(len(answers))
    wanted = smallest_dtype(num_experts)
    experts = [np.asarray(each.experts_TLK, np.int64) for each in answers]
    fits = [
        each.ndim == 3 and len(each) == length
        for each, length in zip(experts, lengths, strict=True)
    ]
    if not all(fits) or len({each.shape[1:] for each in experts}) != 1:
        raise DataError(
            "the experts of an answer are [token, mixture, choice], for each of its tokens; "
            f"given {[each.shape for each in experts][:3]} for {lengths[:3]} tokens"
        )
    experts_TLK = np.concatenate(experts)
    tokens, (mixtures, top_k) = sum(lengths), experts_TLK.shape[1:]
    domains = tuple(dict.fromkeys(each.domain for each in answers))
    trace = Trace(
        subject=Subject(
            type(model).__name__, fingerprint(model), tuple(moe_layers), num_experts, top_k
        ),
        domains=domains,
        documents=tuple(f"answer {number}" for number in places),
        domain_N=np.array([domains.index(each.domain) for each in answers], np.int64),
        document_N=places,
        batch_N=places,
        length_N=np.array(lengths, np.int64),
        tokens_T=np.concatenate([np.asarray(each.tokens, np.int32) for each in answers]),
        generated_T=np.concatenate(
            [np.arange(len(each.tokens)) >= each.prompt for each in answers]
        ),
        experts_TLK=np.where(experts_TLK < 0, num_experts, experts_TLK).astype(wanted),
        weights_TLK=np.concatenate([np.asarray(each.weights_TLK, np.float32) for each in answers]),
        kept_TLK=None,
        entropy_TL=np.full((tokens, mixtures), np.nan, np.float32),
        margin_TL=np.full((tokens, mixtures), np.nan, np.float32),
        probs_NLE=np.full((len(answers), mixtures, num_experts), np.nan, np.float32),
    )
    check(trace, "these answers")
    return trace
