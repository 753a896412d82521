"""Labelled passages of much text: what a run held out, or documents of files, evenly of each label.

Letters beside those of docs/shapes.md: N windows.
"""

from __future__ import annotations

import zlib
from heapq import heappush, heappushpop
from typing import Literal

from torch import Tensor

from moestro.config import DataConfig
from moestro.data.documents import Document, read_documents
from moestro.data.rows import DOMAIN, ChatCorpus
from moestro.data.windows import Corpus
from moestro.errors import DataError
from moestro.probe.recording.passages import Encodes, Passage

Domains = Literal["folder", "field"]

# Times as much text is looked at as is used, to see where documents end between the windows.
POOL = 64
# Of a domain with more documents, this many are drawn; of a longer one the beginning is read.
MOST_DOCUMENTS = 512
MOST_CHARACTERS = 200_000


def held_out_passages(corpus: Corpus | ChatCorpus, tokens: int) -> list[Passage]:
    """Held-out windows of a run's text, at most so many tokens in all, evenly from all domains.

    Of a run that learned conversations, each is a passage.

    Raises:
        DataError: there is no text.
    """
    passages = []
    if isinstance(corpus, ChatCorpus):
        for row, (tokens_S, _, numbers_S) in enumerate(corpus.held_out(tokens)[DOMAIN].tokens_NS):
            for number in range(int(numbers_S.max()) + 1):
                own_S = tokens_S[numbers_S == number]
                passages.append(Passage(own_S, DOMAIN, f"{DOMAIN}/{row}.{number}"))
        return passages
    pool = corpus.held_out(POOL * tokens)
    wanted = max(1, tokens // len(pool) // corpus.seq_len)
    for domain, (tokens_NS, _) in pool.items():
        # Where documents end shows only in text that lies together, so all of it is numbered.
        # A window's last token is the next one's first: without its first each counts once.
        numbers_N = _documents(tokens_NS[:, 1:], corpus.tokenizer.end_of_text)
        for n in _evenly(len(tokens_NS), wanted):
            passages.append(Passage(tokens_NS[n, :-1].clone(), domain, f"{domain}/{numbers_N[n]}"))
    return passages


def source_passages(
    sources: tuple[str, ...], tokenizer: Encodes, tokens: int, length: int, by: Domains = "folder"
) -> list[Passage]:
    """Pieces of the documents of files, folders or globs, evenly from all domains and documents.

    Args:
        sources: as for training; a NUL byte ends a document.
        tokenizer: the model's.
        tokens: most tokens in all.
        length: most tokens of a passage.
        by: where the labels come from.

    Raises:
        DataError: a source is missing or holds no text.
    """
    drawn = _draw(sources, by)
    wanted = max(1, tokens // len(drawn) // length)
    passages: list[Passage] = []
    for domain in sorted(drawn):
        documents, left = drawn[domain], wanted
        for place, document in enumerate(documents):
            if left <= 0:
                break
            pieces = _pieces(document, tokenizer, length, -(-left // (len(documents) - place)))
            passages += pieces
            left -= len(pieces)
    return passages


def _documents(tokens_NS: Tensor, end_of_text: int) -> list[int]:
    """Number windows so that those of one document share a number.

    For windows in text order: one in which no document ends belongs together with the next. Where
    text between windows was skipped this can only join too much, never too little, so noise
    estimated over documents is not understated.
    """
    ends_N = (tokens_NS == end_of_text).any(dim=1).long()
    numbers: list[int] = (ends_N.cumsum(0) - ends_N).tolist()
    return numbers


def _draw(sources: tuple[str, ...], by: Domains) -> dict[str, list[Document]]:
    """Documents of each domain, at most `MOST_DOCUMENTS`, drawn by their names."""
    heaps: dict[str, list[tuple[int, int, Document]]] = {}
    for number, document in enumerate(read_documents(DataConfig(sources=sources, domains=by))):
        heap = heaps.setdefault(document.domain, [])
        document = document._replace(text=document.text[:MOST_CHARACTERS])
        entry = (-zlib.crc32(document.name.encode("utf-8", "surrogateescape")), -number, document)
        if len(heap) < MOST_DOCUMENTS:
            heappush(heap, entry)
        else:
            heappushpop(heap, entry)
    if not heaps:
        raise DataError(f"there is no text in {', '.join(sources)}; give other sources")
    return {
        domain: [document for *_, document in sorted(heap, reverse=True)]
        for domain, heap in heaps.items()
    }


def _pieces(document: Document, tokenizer: Encodes, length: int, most: int) -> list[Passage]:
    """At most so many pieces of one document, evenly over it; a short end is left out."""
    ids = list(tokenizer.encode(document.text))
    starts = list(range(0, max(1, len(ids) - length // 2), length)) if ids else []
    name = f"{document.domain}/{document.name}"
    return [
        Passage(ids[starts[n] : starts[n] + length], document.domain, name)
        for n in _evenly(len(starts), most)
    ]


def _evenly(there: int, most: int) -> list[int]:
    """At most so many of the numbers below `there`, evenly spaced."""
    count = min(most, there)
    return [place * there // count for place in range(count)]
