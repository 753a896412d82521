"""Token files and batches: documents become memory-mapped tokens, tokens become windows.

`prepare` writes a folder once; `Corpus` reads it. In training, each epoch lays the documents out
in a new order, cuts that stream into windows of seq_len + 1 tokens (neighbours share one token,
so each token is predicted once) and deals the windows in a new order too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor

from moestro.config import DataConfig
from moestro.config.number import Positive
from moestro.data.documents import source_state, stable_hash
from moestro.data.domains import check_domains
from moestro.data.tokenfiles import (
    ENDS_FILE,
    HELD_FILE,
    TRAIN_FILE,
    TokenFiles,
    write_token_files,
)
from moestro.errors import DataError
from moestro.files import write_json
from moestro.strictjson import read_object
from moestro.text import HF_FILE, Tokenizer, check_tokenizer, load_tokenizer

FORMAT = 1
META_FILE = "meta.json"
IGNORED = -100  # a target that is no label: nothing of it is learned


class HeldOut(NamedTuple):
    """Held-out windows of one domain.

    Attributes:
        tokens_NS: int64 [N, seq_len + 1]; of conversations rows [N, 3, seq_len], see `rows`.
        bytes_per_token: Of all the domain's held-out text, the end of a document counted as one
            byte; bits per token over this are bits per byte. Of conversations: per label.
    """

    tokens_NS: Tensor
    bytes_per_token: float


class _Meta(TokenFiles):
    """What meta.json says of a data folder, checked against itself and the sizes of the files."""

    format: Literal[1]
    inputs: str
    fingerprint: str
    seq_len: Positive
    seed: int
    files: dict[str, int]

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        size = np.dtype(self.dtype).itemsize
        for name, tokens in ((TRAIN_FILE, self.train_tokens), (HELD_FILE, self.held_tokens)):
            if self.files.get(name) != sum(tokens.values()) * size:
                raise ValueError(f"{name} has another size")
        for by_domain in (self.train_tokens, self.held_tokens, self.held_bytes):
            if by_domain.keys() != set(self.domains):
                raise ValueError("not all domains are counted")
        if self.fingerprint != _fingerprint(self.seed, self.seq_len, self.digest):
            raise ValueError("the fingerprint is another")
        return self


def _fingerprint(seed: int, seq_len: int, digest: str) -> str:
    return hashlib.sha256(f"{FORMAT} {seed} {seq_len} {digest}".encode()).hexdigest()


class Corpus:
    """Tokens on disk, read in windows.

    Attributes:
        tokenizer: What made the tokens.
        domains: Labels, sorted.
        seq_len: S; windows have S + 1 tokens.
        fingerprint: Of the tokens, their order and the windows: equal means equal batches.
        num_train_tokens: Of one epoch.
        domain_tokens: Training tokens by domain.
        notes: Sentences that a person should read, such as on a domain of one document.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `prepare` wrote.

        Raises:
            DataError: the folder is incomplete or altered, or one of several domains is "all".
        """
        meta = _read_meta(folder)
        if meta is None:
            raise DataError(f"{folder} is not a complete data folder; prepare it again")
        check_domains(meta.domains)
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.domains, self.notes, self.seq_len = meta.domains, meta.notes, meta.seq_len
        self.fingerprint = meta.fingerprint
        self.domain_tokens: dict[str, int] = meta.train_tokens
        self.num_train_tokens = sum(meta.train_tokens.values())
        self._meta = meta
        self._train = np.memmap(folder / TRAIN_FILE, dtype=meta.dtype, mode="r")
        self._held = np.memmap(folder / HELD_FILE, dtype=meta.dtype, mode="r")
        self._ends = np.fromfile(folder / ENDS_FILE, dtype=np.int64)
        sizes = np.diff(self._ends, prepend=0)
        if sizes.min(initial=0) < 0 or sizes.sum() != self.num_train_tokens:
            raise DataError(f"{folder / ENDS_FILE} was altered; prepare the text again")
        self._epochs: dict[int, _Epoch] = {}

    @property
    def windows_per_epoch(self) -> int:
        """Windows that one pass over the training text gives."""
        return (self.num_train_tokens - 1) // self.seq_len

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        """The training windows of one step: a function of the arguments and the corpus alone.

        Windows are numbered from step · batch_size on, through all epochs, so that micro-batches
        line up with whole ones and the ranks' parts, joined, are the whole batch.

        Args:
            step: From 0.
            batch_size: Windows over all ranks.
            rank: This process's part, in [0, world).
            world: Number of processes.

        Returns:
            int64 [batch_size / world, seq_len + 1].
        """
        if not (step >= 0 and batch_size >= 1 and 0 <= rank < world):
            raise DataError(
                f"no batch has step {step}, batch_size {batch_size}, rank {rank} of {world}; "
                "step counts from 0, batch_size from 1, rank from 0 to world - 1"
            )
        if batch_size % world:
            raise DataError(
                f"a batch of {batch_size} does not split over {world} processes; "
                f"use a multiple of {world}"
            )
        rows = batch_size // world
        first = step * batch_size + rank * rows
        tokens = np.empty((rows, self.seq_len + 1), dtype=np.int64)
        for row in range(rows):
            epoch, number = divmod(first + row, self.windows_per_epoch)
            self._epoch(epoch).read(self._train, number, tokens[row])
        return torch.from_numpy(tokens)

    def held_out(self, max_tokens: int) -> dict[str, HeldOut]:
        """Held-out windows by domain: the same ones each time, none across two domains.

        Each domain gets an equal share of `max_tokens` (predicted tokens), at least one window,
        taken at even distances from all its held-out text.
        """
        windows = max(1, max_tokens // len(self.domains) // self.seq_len)
        result, start = {}, 0
        for domain in self.domains:
            length = self._meta.held_tokens[domain]
            there = (length - 1) // self.seq_len
            wanted = min(windows, there)
            starts_N = start + np.arange(wanted) * there // wanted * self.seq_len
            tokens_NS = self._held[starts_N[:, None] + np.arange(self.seq_len + 1)]
            bytes_per_token = self._meta.held_bytes[domain] / length
            result[domain] = HeldOut(torch.from_numpy(tokens_NS.astype(np.int64)), bytes_per_token)
            start += length
        return result

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a batch may lie across two
                del self._epochs[min(self._epochs)]
            windows, seed = self.windows_per_epoch, self._meta.seed
            self._epochs[epoch] = _Epoch.shuffled(self._ends, windows, self.seq_len, seed, epoch)
        return self._epochs[epoch]


class _Epoch(NamedTuple):
    """One shuffle of the documents, and of the windows cut from them.

    Attributes:
        places_N: Where in the stream the n-th window begins.
        sources_D: Where in the file the d-th document of the stream begins.
        ends_D: Where in the stream it ends.
    """

    places_N: NDArray[np.int64]
    sources_D: NDArray[np.int64]
    ends_D: NDArray[np.int64]

    @classmethod
    def shuffled(
        cls, file_ends_D: NDArray[np.int64], windows: int, seq_len: int, seed: int, epoch: int
    ) -> _Epoch:
        starts_D = np.concatenate(([0], file_ends_D[:-1]))
        order_D = permutation(len(starts_D), "documents", seed, epoch)
        return cls(
            permutation(windows, "windows", seed, epoch) * seq_len,
            starts_D[order_D],
            np.cumsum((file_ends_D - starts_D)[order_D]),
        )

    def read(self, tokens: NDArray[Any], number: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with window `number`, document by document."""
        place, filled = int(self.places_N[number]), 0
        document = int(np.searchsorted(self.ends_D, place, side="right"))
        while filled < len(out):
            start = int(self.ends_D[document - 1]) if document else 0
            source = int(self.sources_D[document]) + place - start
            count = min(int(self.ends_D[document]) - place, len(out) - filled)
            out[filled : filled + count] = tokens[source : source + count]
            filled, place, document = filled + count, place + count, document + 1


def prepare(cfg: DataConfig, folder: Path) -> Corpus:
    """Tokenise the sources into `folder`, or reuse what is there if nothing has changed.

    The folder appears whole or not at all: it is written under another name first. One that holds
    something else is left alone.
    """
    check_tokenizer(cfg.tokenizer)
    inputs = _inputs(cfg)
    if _is_current(folder, inputs):
        return Corpus(folder)
    temporary = _beside(folder, "new")
    try:
        ours = folder.is_dir() and ((folder / META_FILE).exists() or not any(folder.iterdir()))
        if folder.exists() and not ours:
            raise DataError(
                f"{folder} holds something other than prepared text and is left alone; "
                "give a folder that is new or empty"
            )
        _remove_abandoned(folder)
        temporary.mkdir(parents=True)
        _build(cfg, temporary, inputs)
        _publish(temporary, folder, inputs)
    except OSError as error:
        raise DataError(
            f"cannot write the prepared text to {folder} ({error.strerror or error}); "
            "give a folder that can be written and has room"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Corpus(folder)


def permutation(length: int, *seed: object) -> NDArray[np.int64]:
    """The numbers below `length` in an order that depends on nothing but the seed."""
    # The raw bits of a bit generator are the same in every NumPy; its shuffles need not be.
    bits_N = np.random.PCG64(stable_hash(*seed)).random_raw(length)
    return np.argsort(bits_N, kind="stable").astype(np.int64)


def _inputs(cfg: DataConfig) -> str:
    """Fingerprint of all that the token files are made from: settings, and the files' state."""
    tokenizer = Path(cfg.tokenizer).expanduser()
    tokenizer = tokenizer / HF_FILE if tokenizer.is_dir() else tokenizer
    state = [tokenizer.stat().st_size, tokenizer.stat().st_mtime_ns] if tokenizer.is_file() else []
    made_of = [FORMAT, cfg.model_dump(mode="json"), source_state(cfg), state]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _build(cfg: DataConfig, folder: Path, inputs: str) -> None:
    written = write_token_files(cfg, folder)
    files = sorted(folder.iterdir())
    meta = {
        "format": FORMAT, "inputs": inputs,
        "fingerprint": _fingerprint(cfg.seed, cfg.seq_len, written.digest),
        "seq_len": cfg.seq_len, "seed": cfg.seed, **written.model_dump(),
        "files": {path.name: path.stat().st_size for path in files},
    }  # fmt: skip
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    write_json(folder / META_FILE, meta)


def _read_meta(folder: Path) -> _Meta | None:
    """The meta file of a folder whose files are all there in full; else None."""
    try:
        meta = _Meta(**read_object(folder / META_FILE, DataError, "prepare the text again"))
        sizes = {name: (folder / name).stat().st_size for name in meta.files}
    except (OSError, ValueError):
        return None
    return meta if sizes == meta.files else None


def _is_current(folder: Path, inputs: str) -> bool:
    meta = _read_meta(folder)
    return meta is not None and meta.inputs == inputs


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}-{platform.node()}-{os.getpid()}")


def _publish(temporary: Path, folder: Path, inputs: str) -> None:
    """Rename into place; what was there before goes first."""
    old = _beside(folder, "old")
    try:
        if folder.exists() and not _is_current(folder, inputs):
            folder.rename(old)
        temporary.rename(folder)
    except OSError:
        # Another process may have been faster with the same text.
        if not _is_current(folder, inputs):
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes of this machine left beside the folder."""
    if os.name != "posix":  # elsewhere there is no harmless way to ask for a process
        return
    for kind in ("new", "old"):
        for path in folder.parent.glob(f".{folder.name}.{kind}-{platform.node()}-*"):
            with contextlib.suppress(ValueError, PermissionError):
                process = int(path.name.rpartition("-")[2])
                try:
                    if process != os.getpid():
                        os.kill(process, 0)
                        continue
                except ProcessLookupError:
                    pass
                shutil.rmtree(path, ignore_errors=True)
