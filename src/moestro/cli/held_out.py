"""What to measure a checkpoint on: text or conversations that its run held out, or others."""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moestro.errors import DataError

if TYPE_CHECKING:
    from moestro.config import DataConfig, ModelConfig
    from moestro.data.rows import ChatCorpus
    from moestro.data.windows import Corpus


def open_corpus(
    checkpoint: Path,
    data: Path,
    sources: tuple[str, ...],
    context: int,
    stack: ExitStack,
    least: int = 0,
) -> Corpus | ChatCorpus:
    """What the run held out, or other `sources`: text, split as the run split its own.

    Args:
        checkpoint: its folder.
        data: the run's folder of tokens, which may not exist.
        sources: files, folders or globs; none: the run's own, which may be conversations.
        context: of the model.
        stack: what is made for the time of a call is removed with it.
        least: tokens that the caller needs beside those held out.

    Raises:
        DataError: there is no text, or too little, or what the run held out is gone and cannot be
            made again.
    """
    import typer

    from moestro.config import DataConfig
    from moestro.data.rows import prepare_chats
    from moestro.data.windows import prepare
    from moestro.train.state import corpus_fingerprint, read_run_settings

    own = str(checkpoint)  # its tokenizer is the one it was trained with, not a new one
    cfg = DataConfig(seq_len=min(256, context), held_out=0.5, tokenizer=own)
    of_a_run = (checkpoint / "run.json").exists()
    if of_a_run:
        cfg = read_run_settings(checkpoint).data
        cfg = cfg.model_copy(update={} if cfg.tokenizer == "bytes" else {"tokenizer": own})
    if not sources:
        with suppress(DataError):
            return _as_left(checkpoint, data, cfg)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moestro-")))
    if sources:
        by = "field" if cfg.domains == "field" else "folder"
        # The run did not train on it as far as can be known: half of it is plenty to choose from.
        other = {"sources": sources, "domains": by, "held_out": 0.5, "chat": None}
        return _prepared(cfg.model_copy(update=other), folder, least)
    if not of_a_run:
        typer.echo(
            f"{checkpoint} says of no text that it was held out: measured on built-in text, "
            "which it may have been trained on; --source names other",
            err=True,
        )
    if cfg.chat is None:
        corpus: Corpus | ChatCorpus = prepare(cfg, folder)
    else:
        corpus = prepare_chats(cfg, folder, model=checkpoint)
    if corpus_fingerprint(checkpoint) not in (None, corpus.fingerprint):
        raise DataError(
            f"what the run of {checkpoint} held out is gone from {data}, and what it was made of "
            "has changed since, so text that was trained on might be measured; give --source"
        )
    return corpus


def open_chats(
    checkpoint: Path, sources: tuple[str, ...], model: ModelConfig, stack: ExitStack
) -> ChatCorpus:
    """Other conversations than the run's, half of them held out, read as `moestro tune` does.

    Args:
        checkpoint: its folder, with tokenizer and chat template.
        sources: .jsonl files.
        model: its settings.
        stack: what is made for the time of a call is removed with it.

    Raises:
        DataError: see `moestro.data.rows.prepare_chats`.
    """
    from moestro.config import ChatConfig, DataConfig
    from moestro.data.rows import prepare_chats
    from moestro.models.decoder import cannot_pack

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moestro-")))
    cfg = DataConfig(
        sources=sources, held_out=0.5, tokenizer=str(checkpoint),
        seq_len=min(1024, model.attention.context),
        chat=ChatConfig(pack=cannot_pack(model) is None),
    )  # fmt: skip
    return prepare_chats(cfg, folder)


def _prepared(cfg: DataConfig, folder: Path, least: int) -> Corpus:
    """The text, cut in two; what is wrong with it is said without settings that nobody gave.

    Raises:
        DataError: see `open_corpus`.
    """
    from moestro.data.windows import prepare

    try:
        return prepare(cfg, folder)
    except DataError as error:
        raise _too_short(cfg, least) or error from None


def _too_short(cfg: DataConfig, least: int) -> DataError | None:
    """What to say of sources that cannot be cut in two; None: they have tokens enough."""
    from moestro.data.documents import read_documents
    from moestro.text import build_tokenizer

    tokenizer, counts = build_tokenizer(cfg.tokenizer, ()), Counter[str]()
    each = 4 * (cfg.seq_len + 1)  # twice a window for each half: they part at documents or lines
    enough = max(each, 2 * least)
    for document in read_documents(cfg):
        if counts[document.domain] < enough:
            counts[document.domain] += len(tokenizer.encode(document.text)) + 1
    what, total = f"the text in {', '.join(cfg.sources)}", counts.total()
    why = f"half of it is held out, in windows of {cfg.seq_len + 1:,} tokens"
    if not total:
        return None  # which has an error of its own
    if total < enough:
        if enough > each:
            why += f", and of the other half {least:,} are needed"
        return DataError(f"{what} has {total:,} tokens; give at least {enough:,}: {why}")
    for domain, count in counts.items():
        if count < each:
            return DataError(
                f"domain {domain!r} of {what} has {count:,} tokens; give at least {each:,} of "
                f"each domain, or leave it out: {why}"
            )
    return None


def _as_left(checkpoint: Path, data: Path, cfg: DataConfig) -> Corpus | ChatCorpus:
    """What the run prepared, whatever became of its sources since.

    Raises:
        DataError: it is gone, or not what the checkpoint was trained on.
    """
    from moestro.data.rows import ChatCorpus
    from moestro.data.windows import Corpus
    from moestro.text import load_tokenizer
    from moestro.train.state import corpus_fingerprint

    corpus: Corpus | ChatCorpus
    if cfg.chat is None:
        corpus = Corpus(data)
    else:
        corpus = ChatCorpus(data, load_tokenizer(checkpoint), None)
    if corpus_fingerprint(checkpoint) not in (None, corpus.fingerprint):
        raise DataError(f"{data} is not what {checkpoint} was trained on")
    return corpus
