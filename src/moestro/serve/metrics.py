"""/metrics for Prometheus: what vLLM's mean has vLLM's name behind `moestro:`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response

from moestro.infer.writing import Piece
from moestro.serve.engine import EngineThread, Job
from moestro.serve.errors import ApiError

_PREFIX = "moestro:"
_LABELS = ("model_name",)
# Seconds, of steps between tokens and of whole requests.
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The figures of one server."""

    def __init__(self, name: str, engine: EngineThread, layers: Sequence[int] = ()) -> None:
        """Begin at zero.

        Args:
            name: the model's.
            engine: whose figures they are.
            layers: numbers of its mixtures.
        """
        self._registry, self._name = CollectorRegistry(), name
        load = Gauge(
            f"{_PREFIX}expert_load_max_over_mean",
            "Tokens of a mixture's busiest expert beside an equal share, since the server began.",
            (*_LABELS, "layer"), registry=self._registry,
        )  # fmt: skip
        for place, layer in enumerate(layers):
            load.labels(name, str(layer)).set_function(partial(_imbalance, engine, place))
        self._gauge("num_requests_running", "Texts being read or written.", engine, "running")
        self._gauge("num_requests_waiting", "Texts that wait for their turn.", engine, "waiting")
        self._gauge("prefix_cache_queries", "Tokens looked up.", engine, "prefix_queries")
        self._gauge("prefix_cache_hits", "Tokens that were known.", engine, "prefix_hits")
        self._gauge("prefix_cache_bytes", "Memory of earlier texts.", engine, "cache_bytes")
        if engine.reads is not None:
            for field, what in (
                ("hits", "Experts wanted that were in memory."),
                ("misses", "Experts wanted that were not."),
                ("bytes", "Read of the file of experts."),
            ):
                read = partial(_read, engine, field)
                gauge = Gauge(f"{_PREFIX}expert_{field}", what, _LABELS, registry=self._registry)
                gauge.labels(name).set_function(read)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("generation_tokens", "Tokens written.")
        self._first = self._histogram(
            "time_to_first_token_seconds", "To a text's beginning.", _LONG
        )
        self._queue = self._histogram("request_queue_time_seconds", "Of waiting.", _LONG)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From a text's turn to its beginning.", _LONG
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From a text's beginning to its end.", _LONG
        )
        self._between = self._histogram("inter_token_latency_seconds", "Between tokens.", _SHORT)
        self._whole = self._histogram("e2e_request_latency_seconds", "Of a whole text.", _LONG)
        self._success = Counter(
            f"{_PREFIX}request_success", "Texts written to their end.",
            (*_LABELS, "finished_reason"), registry=self._registry,
        )  # fmt: skip
        self._failed = self._counter("request_failure", "Texts that ended with an error.")

    def _gauge(self, name: str, what: str, engine: EngineThread, field: str) -> None:
        gauge = Gauge(f"{_PREFIX}{name}", what, _LABELS, registry=self._registry)
        gauge.labels(self._name).set_function(lambda: getattr(engine, field))

    def _counter(self, name: str, what: str) -> Counter:
        counter = Counter(f"{_PREFIX}{name}", what, _LABELS, registry=self._registry)
        return counter.labels(self._name)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        found = Histogram(
            f"{_PREFIX}{name}", what, _LABELS, registry=self._registry, buckets=buckets
        )
        return found.labels(self._name)

    def watch(self, job: Job) -> Callable[[int, Piece | ApiError], None]:
        """Count a request that has been taken; returns what counts its events as they come."""
        self._prompt.inc(sum(len(ask.tokens) for ask in job.asks))
        asked, firsts, lasts = time.monotonic(), dict[int, float](), dict[int, float]()

        def event(index: int, what: Piece | ApiError) -> None:
            now = time.monotonic()
            if isinstance(what, ApiError):
                self._failed.inc()
                return
            if index not in lasts:
                firsts[index] = now
                self._first.observe(now - asked)
                self._queue.observe(job.began[index] - asked)
                self._prefill.observe(now - job.began[index])
            else:
                self._between.observe(now - lasts[index])
            lasts[index] = now
            self._piece(what, now - asked, now - firsts[index])

        return event

    def _piece(self, piece: Piece, since_asked: float, since_first: float) -> None:
        self._generated.inc()
        if piece.finish is not None:
            self._whole.observe(since_asked)
            self._decode.observe(since_first)
            reason = "length" if piece.finish == "length" else "stop"
            self._success.labels(self._name, reason).inc()

    def response(self) -> Response:
        """All of it in Prometheus' format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


def _read(engine: EngineThread, field: str) -> float:
    """One of the counts of experts that are read from a file."""
    return float(getattr(engine.reads, field))


def _imbalance(engine: EngineThread, place: int) -> float:
    """The most that an expert of a mixture took, over the mean; 0 before anything was taken."""
    load_LE = engine.load_LE
    if load_LE is None:
        return 0.0
    taken_E = load_LE[place].double()
    return float(taken_E.max() / taken_E.mean())
