"""The one thread that owns the model: requests go in, pieces of their answers come out."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from moestro.checkpoints.streamed import residency_of
from moestro.errors import MoestroError
from moestro.infer.decoding import Routed
from moestro.infer.engine import Session
from moestro.infer.sampling import SamplingConfig
from moestro.infer.writing import Constraint, Piece, Scored
from moestro.kernels.residency import Reads
from moestro.models.build import Model
from moestro.serve import errors
from moestro.serve.errors import ApiError
from moestro.serve.settings import ServeSettings
from moestro.text import Tokenizer

LOG = logging.getLogger(__name__)


class Ask(NamedTuple):
    """One text that is wanted; see `Session.add`."""

    tokens: Sequence[int]
    sampling: SamplingConfig
    special: bool | Collection[str] = False
    constraint: Constraint | None = None
    routed: bool = False
    top: int | None = None
    prompt_scored: bool = False
    adapter: str | None = None


class Event(NamedTuple):
    """What became of one of a job's texts."""

    number: int
    what: Piece | ApiError


class Job:
    """The texts that one request asked for, and a queue of what becomes of them.

    A context manager: who leaves it wants no more of what is not done.

    Attributes:
        asks: What was asked for.
        routed: Of texts that are done and asked for it, the experts of every token that passed.
        cached: Of texts that have begun, how many tokens of the prompt were known before.
        began: Of texts that have begun, when their first step did, by time.monotonic.
        scored: Of texts whose prompt is read and that asked for it, how likely its tokens were.
        watch: Sees every event as it comes, in the loop's thread.
    """

    watch: Callable[[int, Piece | ApiError], None] | None = None

    def __init__(self, engine: EngineThread, asks: Sequence[Ask]) -> None:
        self.asks = asks
        self.routed: dict[int, list[Routed]] = {}
        self.scored: dict[int, list[Scored]] = {}
        self.cached: dict[int, int] = {}
        self.began: dict[int, float] = {}
        self.loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._engine, self._left = engine, len(asks)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self._left:
            self._engine.drop(self)

    async def next(self, timeout_s: float | None = None) -> tuple[int, Piece] | None:
        """The next (number of the text, Piece); None once every text is done.

        Raises:
            ApiError: a text ends with an error, and the others with it.
            TimeoutError: nothing came for `timeout_s`.
        """
        if not self._left:
            return None
        async with asyncio.timeout(timeout_s):
            index, what = await self._events.get()
        if isinstance(what, ApiError):
            raise what
        self._left -= what.finish is not None
        return index, what

    def put(self, event: Event) -> None:
        """Take an event, in the loop's own thread."""
        if self.watch is not None:
            self.watch(*event)
        self._events.put_nowait(event)


class EngineThread:
    """Answers requests of many, a step of all at a time."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        settings: ServeSettings,
        adapted: Mapping[str, Model] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._adapted = adapted
        self._session, self._residency = self._new_session(), residency_of(model)
        self._texts: dict[int, tuple[Job, int]] = {}  # by their number in the session
        self._changed = threading.Condition()
        self._added: list[Job] = []
        self._dropped: list[Job] = []
        self._open = 0  # texts that are not done
        self._closed = self._stopped = False
        self._deadline = float("inf")
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="moestro-engine", daemon=True)

    def _new_session(self) -> Session:
        most, memory = self._settings.max_live, self._settings.cache_bytes
        return Session(self._model, self._tokenizer, most, memory, self._adapted)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def refuse(self) -> None:
        """Take no more requests; those that are taken end within the settings' `drain_s`.

        May be called by a signal's handler.
        """
        if not self._closed:
            self._deadline = time.monotonic() + self._settings.drain_s
            self._closed = True

    def stop(self) -> None:
        """End the thread after its present step, and what it has not answered with an error."""
        self._closed = True
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def running(self) -> int:
        """Texts that are being read or written."""
        return min(self._open, self._settings.max_live)

    @property
    def waiting(self) -> int:
        """Texts that wait for their turn."""
        return max(0, self._open - self._settings.max_live)

    @property
    def load_LE(self) -> Tensor | None:
        """How often each expert of each mixture was chosen so far; None before any was."""
        return self._session.load_LE

    @property
    def reads(self) -> Reads | None:
        """What was read of experts that are in a file; None: all are in memory."""
        return None if self._residency is None else self._residency.reads()

    @property
    def prefix_queries(self) -> int:
        """Tokens of prompts that were looked up among earlier texts."""
        found = self._session.prefixes
        return 0 if found is None else found.asked

    @property
    def prefix_hits(self) -> int:
        """Of these, those that were known."""
        found = self._session.prefixes
        return 0 if found is None else found.hits

    @property
    def cache_bytes(self) -> int:
        """Memory that earlier texts take."""
        found = self._session.prefixes
        return 0 if found is None else found.nbytes

    @property
    def closed(self) -> bool:
        """Whether no more requests are taken."""
        return self._closed

    def step_s(self) -> float:
        """For how long the present step has been going on; infinite if the thread has ended."""
        if not self._thread.is_alive():
            return float("inf")
        return time.monotonic() - self._beat if self._open else 0.0

    def submit(self, asks: Sequence[Ask]) -> Job:
        """Take what one request asks for: all of it or nothing.

        Raises:
            ApiError: too many wait, it asks for more than ever fits, or the server is about to end.
        """
        if self._closed:
            raise errors.closing()
        most = self._settings.max_live + self._settings.max_waiting
        if len(asks) > most:
            raise errors.refused(
                f"the request asks for {len(asks)} texts, and this server takes {most} at once; "
                "ask for fewer"
            )
        job = Job(self, asks)
        with self._changed:
            if self._open + len(asks) > most:
                raise errors.full(self.waiting)
            if not self._open:
                self._beat = time.monotonic()
            self._open += len(asks)
            self._added.append(job)
            self._changed.notify()
        return job

    def drop(self, job: Job) -> None:
        """Forget a request; its place is free within a step."""
        with self._changed:
            self._dropped.append(job)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._added or self._dropped or self._texts or self._stopped):
                    self._changed.wait()
                added, self._added = self._added, []
                dropped, self._dropped = self._dropped, []
            self._beat = time.monotonic()
            for job in added:
                self._add(job)
            for job in dropped:
                self._forget(number for number, (its, _) in self._texts.items() if its is job)
            if self._stopped or self._beat > self._deadline:
                self._fail_all(errors.closing())
            if self._stopped:
                return
            if self._session.live:
                self._step()

    def _add(self, job: Job) -> None:
        for index, ask in enumerate(job.asks):
            try:
                number = self._session.add(*ask)
            except MoestroError as error:
                self._deliver([(job, Event(index, errors.refused(str(error))))])
                self._close(1)
            else:
                self._texts[number] = (job, index)

    def _step(self) -> None:
        try:
            made = self._session.step()
            failed, self._session.failed = self._session.failed, {}
        except Exception:  # one request must not end all that come later
            LOG.exception("a step failed; the requests of that step get an error")
            self._session = self._new_session()
            self._fail_all(ApiError(500, "this server failed to compute a step; try again"))
            return
        found = []
        for number, routed in self._session.routed.items():
            job, index = self._texts[number]
            job.routed[index] = routed
        for number, scored in self._session.scored.items():
            job, index = self._texts[number]
            job.scored[index] = scored
        for number, cached in self._session.cached.items():
            job, index = self._texts[number]
            job.cached[index], job.began[index] = cached, self._beat
        for told in (self._session.routed, self._session.scored, self._session.cached):
            told.clear()
        for number, piece in made:
            job, index = self._texts[number]
            found.append((job, Event(index, piece)))
        for number, error in failed.items():
            job, index = self._texts[number]
            if isinstance(error, errors.GrammarError):
                answer = errors.refused(str(error), code="no_choice")
            else:
                LOG.error("a request ends with an error: %s", error)
                answer = ApiError(500, str(error), code="no_choice")
            found.append((job, Event(index, answer)))
        ended = [number for number, piece in made if piece.finish is not None]
        self._forget([*ended, *failed])  # first, so that who has the answer finds the place free
        self._deliver(found)

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            self._session.drop(number)
            del self._texts[number]
            self._close(1)

    def _fail_all(self, error: ApiError) -> None:
        found = [(job, Event(index, error)) for job, index in self._texts.values()]
        self._forget(self._texts)
        self._deliver(found)

    def _close(self, count: int) -> None:
        with self._changed:
            self._open -= count

    def _deliver(self, found: Sequence[tuple[Job, Event]]) -> None:
        """Hand events over to the loops that wait for them, one call for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Event]]] = defaultdict(list)
        for job, event in found:
            by_loop[job.loop].append((job, event))
        for loop, theirs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, theirs)
            except RuntimeError:  # the loop is closed: nobody waits any more
                for job, _ in theirs:
                    self.drop(job)


def _put_all(found: Sequence[tuple[Job, Event]]) -> None:
    for job, event in found:
        job.put(event)
