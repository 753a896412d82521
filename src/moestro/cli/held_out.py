"""The text to measure a checkpoint on: what its run held out, or other sources."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moestro.errors import DataError

if TYPE_CHECKING:
    from moestro.data.windows import Corpus


def open_corpus(
    checkpoint: Path, data: Path, sources: tuple[str, ...], context: int, stack: ExitStack
) -> Corpus:
    """The text that the run held out, or other `sources` split as the run split its own.

    Args:
        checkpoint: its folder.
        data: the run's folder of tokens, which may not exist.
        sources: files, folders or globs; none: the run's own.
        context: of the model.
        stack: what is made for the time of a call is removed with it.

    Raises:
        DataError: there is no text.
    """
    from moestro.config import DataConfig
    from moestro.data.windows import Corpus, prepare
    from moestro.train.state import corpus_fingerprint, read_run_settings

    if not sources:
        with suppress(DataError):
            corpus = Corpus(data)  # as the run left it, whatever became of its sources since
            if corpus_fingerprint(checkpoint) in (None, corpus.fingerprint):
                return corpus
    own = str(checkpoint)  # its tokenizer is the one it was trained with, not a new one
    if (checkpoint / "run.json").exists():
        cfg = read_run_settings(checkpoint).data
        cfg = cfg.model_copy(update={} if cfg.tokenizer == "bytes" else {"tokenizer": own})
    else:
        cfg = DataConfig(seq_len=min(256, context), held_out=0.5, tokenizer=own)
    if sources:
        by = "field" if cfg.domains == "field" else "folder"
        # The run did not train on it as far as can be known: half of it is plenty to choose from.
        cfg = cfg.model_copy(update={"sources": sources, "domains": by, "held_out": 0.5})
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moestro-")))
    return prepare(cfg, folder)
