"""Text for the report's reader: a passage of every domain, and where each expert is used most."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.probe.recording.traces import Trace
from moestro.probe.report.token_text import TokenText

SNIPPET = 24  # tokens of a passage that shows one expert
_LONGEST, _SHORTEST = 192, 24  # tokens of a passage to read


class Samples:
    """Passages of a trace, and the text that they share."""

    def __init__(self, trace: Trace, layers: tuple[int, ...], token_text: TokenText) -> None:
        """Take the trace, the L of its mixture layers to show, as indices, and text of tokens."""
        self.trace, self.layers, self.token_text = trace, list(layers), token_text
        self.strings: dict[str, int] = {}  # text -> its number
        self._starts_N = np.cumsum(trace.length_N) - trace.length_N

    def number(self, text: str) -> int:
        """The number that stands for a text."""
        return self.strings.setdefault(text, len(self.strings))

    def passages(self, most_bytes: int = 750_000) -> list[dict[str, Any]]:
        """Passages to read, evenly from the documents of each domain, with their whole routing.

        They are taken by their place alone, never because they look good.

        Args:
            most_bytes: Of the routing of all of them.

        Returns:
            Each with `domain` and `document`; `pieces`, the text of its tokens; and, in base64,
            `experts` [T, L, K] (bytes, or 16 bits from 255 experts on), `weights` [T, L, K] (bytes,
            255 the largest weight of the page), `margin` and `entropy` [T, L] (bytes: from −1 to 1,
            and of the largest possible one, up to 254; 255 unknown).
        """
        trace = self.trace
        top_k = trace.experts_TLK.shape[2]
        wide = 2 if trace.subject.num_experts > 254 else 1
        one_token = len(self.layers) * (top_k * (wide + 1) + 2)
        domains = [m for m in range(len(trace.domains)) if (trace.domain_N == m).any()]
        affordable = most_bytes // max(1, one_token * len(domains))
        each = 3 if affordable >= 3 * 128 else 2 if affordable >= 2 * 96 else 1
        length = int(np.clip(affordable // each, _SHORTEST, _LONGEST))
        most = max(1, most_bytes // (one_token * length * each))
        chosen: list[int] = []
        for domain in _evenly(domains, most):
            own = np.flatnonzero(trace.domain_N == domain)
            # A sequence too short to read, such as a document's last few tokens, only if all are.
            long = own[trace.length_N[own] >= min(_SHORTEST, int(trace.length_N[own].max()))]
            first = long[np.unique(trace.document_N[long], return_index=True)[1]]
            chosen += _evenly((first if len(first) >= each else long).tolist(), each)
        return [self._passage(n, length) for n in chosen]

    def snippets(self, most_tokens: int = 120_000) -> list[list[list[dict[str, Any]]]]:
        """For each shown layer and expert: the short passages in which it has the most weight.

        What a domain is must not be shown by what the model wrote itself, so that is left out.

        Args:
            most_tokens: Of all of them.

        Returns:
            By layer and expert, each passage with `d`, its domain; `s`, its text as numbers of
            `strings`; and `w`, a digit a token: the expert's weight there in tenths, rounded up.
        """
        trace = self.trace.choose_tokens(~self.trace.generated_T)
        num_experts = trace.subject.num_experts
        each = min(3, most_tokens // (SNIPPET * len(self.layers) * num_experts))
        if each == 0:
            return []
        return [
            [
                [self._snippet(trace, layer, expert, start) for start in starts]
                for expert, starts in enumerate(_heaviest(trace, layer, each))
            ]
            for layer in self.layers
        ]

    def _passage(self, n: int, length: int) -> dict[str, Any]:
        """The start of a sequence, to read; see `passages`."""
        trace, num_experts = self.trace, self.trace.subject.num_experts
        start = int(self._starts_N[n])
        span = slice(start, start + min(length, int(trace.length_N[n])))
        written_T = trace.generated_T[span]
        wide = np.uint16 if num_experts > 254 else np.uint8
        largest = max(1.0, float(trace.weights_TLK.max(initial=0.0)))
        most = np.log(num_experts) if num_experts > 1 else 1.0
        return {
            "domain": int(trace.domain_N[n]),
            "document": trace.documents[trace.document_N[n]],
            "generated": int(written_T.argmax()) if written_T.any() else None,
            "pieces": self.token_text.passage(trace.tokens_T[span].tolist()),
            "experts": packed(trace.experts_TLK[span][:, self.layers].astype(wide)),
            "weights": quantised(trace.weights_TLK[span][:, self.layers] / largest, 255, np.uint8),
            "margin": quantised((trace.margin_TL[span][:, self.layers] + 1) / 2, 254, np.uint8),
            "entropy": quantised(trace.entropy_TL[span][:, self.layers] / most, 254, np.uint8),
        }

    def _snippet(self, trace: Trace, layer: int, expert: int, start: int) -> dict[str, Any]:
        """One passage that shows an expert; see `snippets`."""
        n = int(np.searchsorted(np.cumsum(trace.length_N), start, side="right"))
        end = min(start + SNIPPET, int(trace.length_N[: n + 1].sum()))
        weight_K = trace.weights_TLK[start:end, layer]
        weight_T = (weight_K * (trace.experts_TLK[start:end, layer] == expert)).sum(axis=1)
        total_T = np.maximum(weight_K.sum(axis=1), 1e-9)
        tenths = np.ceil(9 * np.clip(weight_T / total_T, 0, 1)).astype(int)
        text = self.token_text.passage(trace.tokens_T[start:end].tolist())
        return {
            "d": int(trace.domain_N[n]),
            "s": list(map(self.number, text)),
            "w": "".join(map(str, tenths.tolist())),
        }


def without_dropped(trace: Trace) -> Trace:
    """The trace with empty places for the assignments that found no room."""
    if trace.kept_TLK is None:
        return trace
    return trace._replace(
        experts_TLK=np.where(trace.kept_TLK, trace.experts_TLK, trace.subject.num_experts),
        weights_TLK=np.where(trace.kept_TLK, trace.weights_TLK, np.float32(0)),
    )


def _heaviest(trace: Trace, layer: int, each: int) -> list[list[int]]:
    """Starts of the chunks in which each expert has the most weight, from different documents.

    Chunks are `SNIPPET` tokens of one sequence.
    """
    new_T = trace.position_T % SNIPPET == 0
    chunk_T, first_C = np.cumsum(new_T) - 1, np.flatnonzero(new_T)
    num_experts, chunks = trace.subject.num_experts, len(first_C)
    experts_TK, weights_TK = trace.experts_TLK[:, layer], trace.weights_TLK[:, layer]
    total_T = np.maximum(weights_TK.sum(axis=1), 1e-9)
    cell_TK = chunk_T[:, None] * (num_experts + 1) + experts_TK
    weight = np.bincount(
        cell_TK.ravel(), (weights_TK / total_T[:, None]).ravel(), chunks * (num_experts + 1)
    )
    weight_CE = weight.reshape(chunks, -1)[:, :num_experts]
    document_C, found = trace.document_T[first_C], []
    for weight_C in weight_CE.T:
        likely = np.argsort(-weight_C, kind="stable")[: 40 * each]
        likely = likely[weight_C[likely] > 0]
        different = np.sort(np.unique(document_C[likely], return_index=True)[1])
        found.append(first_C[likely[different[:each]]].tolist())
    return found


def _evenly(values: list[int], most: int) -> list[int]:
    """At most `most` of the values, evenly spaced."""
    if len(values) <= most:
        return values
    return [values[index * len(values) // most] for index in range(most)]


def quantised(values: NDArray[np.floating[Any]], full: int, dtype: type[np.integer[Any]]) -> str:
    """Values from 0 to 1 as integers up to `full`, in base64; NaN as the largest of the type."""
    known = np.isfinite(values)
    scaled = np.rint(np.clip(np.where(known, values, 0), 0, 1) * full)
    return packed(np.where(known, scaled, np.iinfo(dtype).max).astype(dtype))


def packed(values: NDArray[Any]) -> str:
    """Little-endian bytes in base64."""
    little = values.astype(values.dtype.newbyteorder("<"))
    return base64.b64encode(np.ascontiguousarray(little).tobytes()).decode("ascii")
