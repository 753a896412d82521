"""One checkpoint at a time: written while training waits, or by a thread while it goes on.

Both write by `state.save`. The thread writes a copy, and exchanges through a group of its own, so
that nothing of it mixes with training. What fails there is raised by `finish`, on every rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from moestro.errors import TrainingError
from moestro.train import state
from moestro.train.distributed import Ranks
from moestro.train.progress import ProgressDisplay
from moestro.train.snapshot import Snapshot


class Saver:
    """Saves a run's checkpoints, as `train.runtime.save` says; entered for as long as it trains.

    Args:
        what: the run, and who writes it together.
        ranks: that train. All call everything but `failed` at the same steps.
        snapshot: makes what this rank writes of the running model; None: it writes nothing.
        checkpoint: the newest good one there is.
        progress: told of each that is whole.

    Attributes:
        checkpoint: the newest that is known to be whole.
    """

    def __init__(
        self,
        what: state.Saved,
        ranks: Ranks,
        snapshot: Callable[[], Snapshot] | None,
        checkpoint: Path | None,
        progress: ProgressDisplay | None,
    ) -> None:
        self.checkpoint = checkpoint
        self._what, self._ranks, self._snapshot, self._progress = what, ranks, snapshot, progress
        self._in_background = what.cfg.train.runtime.save == "background"
        self._timeout_s = what.cfg.parallel.timeout_s
        self._target: Path | None = None  # of the save that `finish` has not seen yet
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        if self._in_background:
            self._what = self._what._replace(ranks=self._what.ranks.apart(self._timeout_s))
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        """Wait for what is still written, but not for long where another rank may be gone."""
        if kind is None:
            self._what.ranks.leave()
        elif self._thread is not None and issubclass(kind, Exception):
            self._thread.join(self._timeout_s)
            if self._error is not None and isinstance(raised[0], Exception):
                raised[0].add_note(f"The last save failed too: {self._error}")

    def save(self, numbers: state.Numbers) -> None:
        """Write a checkpoint, or begin to, once the one before is finished.

        Args:
            numbers: of the step; later steps leave them as they are.

        Raises:
            TrainingError: it, or the one before, cannot be written. What fails in the background
                is raised by the next call of `save` or `finish`.
        """
        self.finish()
        copied = self._copied() if self._in_background else None
        self._target = state.checkpoint_folder(self._what.run, numbers.step)
        if copied is not None:
            given = copied, numbers, self.checkpoint
            # Daemon: a second Ctrl-C ends the process, and what is half-written does no harm.
            self._thread = threading.Thread(target=self._run, args=given, daemon=True)
            self._thread.start()
        elif self._snapshot is not None and not self._in_background:
            self._run(self._snapshot(), numbers, self.checkpoint)
        if not self._in_background:
            self.finish()

    def failed(self) -> bool:
        """Whether the save in the background has failed here; notes one that is whole."""
        if self._thread is not None and not self._thread.is_alive() and self._error is None:
            self._whole()
        return self._error is not None

    def finish(self) -> None:
        """Return once the running save is done on all ranks, if there is one.

        Raises:
            TrainingError: it failed on one of them.
        """
        if self._target is None:
            return
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None and not isinstance(error, TrainingError):
            raise error  # another rank is gone, or a bug: this one ends, and so do the others
        found = self._ranks.first(None if error is None else str(error))
        if found is None:
            self._whole()
        self._target = None
        if found is not None:
            raise error or TrainingError(found)

    def last_good(self) -> str:
        """A sentence or more on the newest good checkpoint, once the running save is done."""
        try:
            self.finish()
        except TrainingError as error:
            return f"Before that, it {error}."
        except Exception as error:  # another rank is gone: what is told now is why
            return f"Before that, a save failed: {error}."
        return state.describe_last_good(self.checkpoint)

    def _copied(self) -> Snapshot | None:
        """What this rank writes, on all ranks or on none."""
        copied, trouble = None, None
        try:
            copied = self._snapshot().copied() if self._snapshot is not None else None
        except (MemoryError, RuntimeError) as error:  # of Python, and of torch
            why, last = str(error) or "not enough memory", self.checkpoint
            trouble = (
                f"could not copy what the checkpoint holds on rank {self._ranks.rank}: {why}. "
                f"{state.describe_last_good(last)} Set train.runtime.save to wait, which copies "
                "nothing"
            )
        trouble = self._ranks.first(trouble)
        if trouble is not None:
            raise TrainingError(trouble)
        return copied

    def _run(self, snapshot: Snapshot, numbers: state.Numbers, last: Path | None) -> None:
        try:
            state.save(self._what, snapshot, numbers, last)
        except Exception as error:
            self._error = error

    def _whole(self) -> None:
        if self.checkpoint != self._target:
            self.checkpoint = self._target
            if self._progress is not None:
                self._progress.note(f"saved {self.checkpoint}")
