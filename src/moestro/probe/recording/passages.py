"""Passages: the labelled pieces of text that a model reads, and the batches they form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from moestro.errors import DataError, MoestroError


class Passage(NamedTuple):
    """A piece of text that the model reads in one pass.

    Attributes:
        tokens: its ids, at least one.
        domain: its label.
        document: the independent piece of text that it is part of; several passages may share one.
            Documents of two domains are never the same. Empty: a document of its own.
    """

    tokens: Sequence[int] | Tensor
    domain: str = "text"
    document: str = ""


class Encodes(Protocol):
    """A tokenizer: of this project or of transformers."""

    def encode(self, text: str, /) -> Sequence[int]:
        """Token ids of a text."""
        ...


class Reading(NamedTuple):
    """A passage ready to be read.

    Attributes:
        tokens_S: int64 ids.
        domain: its label.
        document: its document, with the domain before it.
        prompt: how many of the tokens were given; the model wrote the others.
    """

    tokens_S: Tensor
    domain: str
    document: str
    prompt: int


class Batch(NamedTuple):
    """What goes through the model in one pass.

    Attributes:
        readings: its B sequences.
        tokens_BS: int64 ids, padded with 0 on the right to the longest.
        valid_BS: bool, False for padding; None where there is none.
        length_B: int64, tokens of each sequence.
    """

    readings: tuple[Reading, ...]
    tokens_BS: Tensor
    valid_BS: Tensor | None
    length_B: Tensor

    def to(self, device: torch.device) -> Self:
        """The same with tokens and mask on a device."""
        valid_BS = None if self.valid_BS is None else self.valid_BS.to(device)
        return self._replace(tokens_BS=self.tokens_BS.to(device), valid_BS=valid_BS)


def cut(
    texts: Mapping[str, Iterable[str]],
    tokenizer: Encodes,
    length: int,
    most: int | None = None,
) -> list[Passage]:
    """Cut the documents of each domain into passages of at most `length` tokens.

    Args:
        texts: domain → its documents, one string each; empty ones are left out.
        tokenizer: what turns them into ids.
        length: most tokens of a passage.
        most: most tokens of a domain; reading of its documents stops there. None: all.

    Raises:
        MoestroError: `length` or `most` is below 1.
        DataError: a domain has no text, or there is none at all.
    """
    for name, value in (("length", length), ("most", most)):
        if value is not None and value < 1:
            raise MoestroError(f"{name} is {value}; give at least 1")
    if not texts:
        raise DataError("there is no text to cut (no domains); give at least one document")
    passages: list[Passage] = []
    for domain, documents in texts.items():
        before, left = len(passages), most
        for number, text in enumerate(documents):
            if left is not None and left <= 0:
                break
            ids = list(islice(tokenizer.encode(text), left)) if text else []
            name = f"{domain}/{number}"
            passages += [
                Passage(ids[start : start + length], domain, name)
                for start in range(0, len(ids), length)
            ]
            left = None if left is None else left - len(ids)
        if len(passages) == before:
            raise DataError(f"domain {domain!r} has no text; give it some, or leave it out")
    return passages


def prepare(texts: Iterable[Passage | str], tokenizer: Encodes | None) -> list[Reading]:
    """Tokens of every text, and a document for each that names none.

    Raises:
        MoestroError: text without a tokenizer.
        DataError: there is no text, or a passage is empty or not made of token ids.
    """
    readings: list[Reading] = []
    numbers: Counter[str] = Counter()
    if isinstance(texts, str):
        texts = [texts]
    for place, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise MoestroError("text was given as a string; give its tokenizer (tokenizer=)")
            text = Passage(tokenizer.encode(text))
        tokens, domain, document = text
        tokens_S = torch.as_tensor(tokens, device="cpu").detach()
        if not tokens_S.numel():
            raise DataError(f"text {place} ({domain}) has no tokens; leave it out")
        if tokens_S.dim() != 1 or tokens_S.is_floating_point() or tokens_S.dtype == torch.bool:
            raise DataError(
                f"text {place} ({domain}) is {tokens_S.dtype} {list(tokens_S.shape)}; give the ids "
                "of one sequence, int64 [S], or a string and a tokenizer"
            )
        if not document:
            document = f"#{numbers[domain]}"
            numbers[domain] += 1
        if not document.startswith(f"{domain}/"):
            document = f"{domain}/{document}"
        readings.append(Reading(tokens_S.long(), domain, document, len(tokens_S)))
    if not readings:
        raise DataError("there is no text to record; give at least one passage")
    return readings


def in_batches(readings: Sequence[Reading], batch_size: int) -> list[tuple[Reading, ...]]:
    """Batches that mix the domains evenly.

    Under expert choice or a capacity, what happens to a token depends on its batch, and a batch of
    one domain would hide how domains differ.

    Raises:
        MoestroError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise MoestroError(f"batch_size is {batch_size}; give at least 1")
    sizes, seen = Counter(reading.domain for reading in readings), Counter[str]()
    place_N = np.empty(len(readings))
    for n, reading in enumerate(readings):
        # Each at its place in (0, 1) of its own domain.
        place_N[n] = (seen[reading.domain] + 0.5) / sizes[reading.domain]
        seen[reading.domain] += 1
    ordered = [readings[n] for n in np.argsort(place_N, kind="stable")]
    starts = range(0, len(ordered), batch_size)
    return [tuple(ordered[start : start + batch_size]) for start in starts]


def pad(readings: tuple[Reading, ...]) -> Batch:
    """The sequences side by side, padded on the right."""
    tokens_BS = torch.nn.utils.rnn.pad_sequence(
        [reading.tokens_S for reading in readings], batch_first=True
    )
    length_B = tokens_BS.new_tensor([len(reading.tokens_S) for reading in readings])
    width = tokens_BS.shape[1]
    valid_BS = None
    if bool((length_B < width).any()):
        valid_BS = torch.arange(width, device="cpu") < length_B[:, None]
    return Batch(readings, tokens_BS, valid_BS, length_B)
