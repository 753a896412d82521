"""Conversations in rows of a fixed length: packed, masked, split, and the same again on resume.

`prepare_chats` writes one file; `ChatCorpus` reads it, and the Trainer takes that in place of a
`Corpus`. What a corpus cuts into windows [B, S + 1] comes here as rows [B, 3, S]: tokens, targets
(the next token where it is a label, else -100), and the number of each token's document in its row,
-1 for padding. No document is cut in two; one that is longer than a row loses its end.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from moestro.chat import ChatTemplate, load_chat
from moestro.config import DataConfig
from moestro.data.chats import read_chats
from moestro.data.documents import source_state, stable_hash
from moestro.data.masks import Labelled, label
from moestro.data.windows import IGNORED, HeldOut, permutation
from moestro.errors import DataError
from moestro.files import whole_file
from moestro.text import Tokenizer, build_tokenizer, utf8

FILE = "chats.safetensors"
FORMAT = 1
DOMAIN = "chats"
_SIDES = ("train", "held")


class Side(NamedTuple):
    """Documents one after another: all tokens, which are labels, and where each document ends."""

    tokens_T: NDArray[np.int32]
    labels_T: NDArray[np.bool_]
    ends_D: NDArray[np.int64]

    def rows(self, seq_len: int, pack: bool, seed: int) -> list[list[int]]:
        """Numbers of the documents of each row; packed, each in the fullest row with room."""
        lengths = np.diff(self.ends_D, prepend=0).tolist()
        order = permutation(len(lengths), "chats", seed).tolist()
        if not pack:
            return [[document] for document in order]
        rows: list[list[int]] = []
        room: list[tuple[int, int]] = []  # left in each row that is not full, ascending
        for document in order:
            length = lengths[document]
            place = bisect_left(room, (length, 0))
            left, row = room.pop(place) if place < len(room) else (seq_len, len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(document)
            if left > length:
                insort(room, (left - length, row))
        return rows

    def predicted(self) -> NDArray[np.bool_]:
        """The labels that something comes before: all but a document's first token."""
        wanted_T = self.labels_T.copy()
        wanted_T[np.concatenate([[0], self.ends_D[:-1]])] = False
        return wanted_T

    def read(self, documents: Sequence[int], out: NDArray[np.int64]) -> None:
        """Fill a row [3, S] with documents."""
        out[0], out[1], out[2] = 0, IGNORED, -1
        at = 0
        for number, document in enumerate(documents):
            first = int(self.ends_D[document - 1]) if document else 0
            last = int(self.ends_D[document])
            end = at + last - first
            out[0, at:end], out[2, at:end] = self.tokens_T[first:last], number
            labels = self.labels_T[first + 1 : last]
            out[1, at : end - 1][labels] = self.tokens_T[first + 1 : last][labels]
            at = end


class ChatCorpus:
    """Conversations on disk, read in rows; see `Corpus` for what both have.

    Attributes:
        notes: Sentences for a person: what was cut or left out.
        num_labels: Labels of one epoch.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        """Open what `prepare_chats` wrote.

        Raises:
            DataError: it is missing or damaged.
        """
        path = folder / FILE
        self.tokenizer, self.template = tokenizer, template
        try:
            with safe_open(str(path), "numpy") as file:
                meta = json.loads(file.metadata()["moestro"])
                train, held = (
                    Side(*(file.get_tensor(f"{side}.{name}") for name in Side._fields))
                    for side in _SIDES
                )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}); prepare the data again") from None
        self.inputs, self.fingerprint = meta["inputs"], meta["fingerprint"]
        self.seq_len, self.notes, self._seed = meta["seq_len"], tuple(meta["notes"]), meta["seed"]
        self.domains = (DOMAIN,)
        self._bytes_per_label = meta["bytes_per_label"]
        self._train, self._held = train, held
        self._rows = train.rows(self.seq_len, meta["pack"], self._seed)
        self._held_rows = held.rows(self.seq_len, meta["pack"], self._seed)
        self.num_train_tokens, self.num_labels = len(train.tokens_T), int(train.predicted().sum())
        self.domain_tokens = {DOMAIN: self.num_train_tokens}
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def windows_per_epoch(self) -> int:
        """Rows that one pass over the conversations gives."""
        return len(self._rows)

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        """The rows of one step, as `Corpus.batch` counts them: int64 [batch_size / world, 3, S]."""
        rows = batch_size // world
        first = step * batch_size + rank * rows
        found = np.empty((rows, 3, self.seq_len), dtype=np.int64)
        for place in range(rows):
            epoch, number = divmod(first + place, len(self._rows))
            if epoch not in self._orders:
                self._orders = {**dict(list(self._orders.items())[-1:]), epoch: self._order(epoch)}
            self._train.read(self._rows[self._orders[epoch][number]], found[place])
        return torch.from_numpy(found)

    def held_out(self, max_tokens: int) -> dict[str, HeldOut]:
        """Held-out rows, the same ones each time, at even distances; at least one."""
        there = len(self._held_rows)
        wanted = min(there, max(1, max_tokens // self.seq_len))
        found = np.empty((wanted, 3, self.seq_len), dtype=np.int64)
        for place in range(wanted):
            self._held.read(self._held_rows[place * there // wanted], found[place])
        return {DOMAIN: HeldOut(torch.from_numpy(found), self._bytes_per_label)}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return permutation(len(self._rows), "rows", self._seed, epoch)


def prepare_chats(
    cfg: DataConfig, folder: Path, trained: str | None = None, model: Path | None = None
) -> ChatCorpus:
    """Tokenise and mask the conversations into `folder`, or reuse what is there.

    Args:
        cfg: With `chat`.
        folder: Made if missing; the file in it appears whole or not at all.
        trained: The fingerprint of what a run goes on with: reused whatever became of the sources.
        model: The folder with the chat template; None: that of the tokenizer.

    Raises:
        DataError: see `read_chats` and `masks.label`; or too few conversations are left.
    """
    tokenizer = build_tokenizer(cfg.tokenizer, ())
    template = _template(model or Path(cfg.tokenizer))
    if (folder / FILE).exists():
        there = ChatCorpus(folder, tokenizer, template)
        if there.fingerprint == trained or there.inputs == _inputs(cfg):
            return there
    tensors, meta = _build(cfg, tokenizer, template)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / FILE) as file:
            file.write(save(tensors, metadata={"moestro": json.dumps(meta)}))
    except OSError as error:
        raise DataError(
            f"cannot write the prepared conversations to {folder} ({error.strerror or error}); "
            "give a folder that can be written and has room"
        ) from None
    return ChatCorpus(folder, tokenizer, template)


def _template(model: Path) -> ChatTemplate | None:
    """The model's chat template; None for one that has none, such as a base model."""
    try:
        return load_chat(model)
    except DataError:
        return None


def _inputs(cfg: DataConfig) -> str:
    """Fingerprint of the settings and the files' state."""
    made_of = [FORMAT, cfg.model_dump(mode="json"), source_state(cfg)]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


class _Cut:
    """Documents cut to the length of a row, and what that cost."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.cut = self.tokens = self.labels = self.emptied = self.dropped = 0

    def __call__(self, document: Labelled) -> Labelled | None:
        """The document, shorter if need be; None if no label is left."""
        tokens, labels = document.tokens[: self.seq_len], document.labels[: self.seq_len]
        self.cut += len(document.tokens) > self.seq_len
        self.tokens += len(document.tokens) - len(tokens)
        self.labels += sum(document.labels) - sum(labels)
        if any(labels[1:]):
            return Labelled(tokens, labels)
        if any(document.labels[1:]):
            self.emptied += 1
        else:
            self.dropped += 1
        return None

    def notes(self, number: int) -> list[str]:
        """What a person should know."""
        found = []
        if self.cut:
            found.append(
                f"{self.cut:,} of {number:,} documents are longer than {self.seq_len} tokens and "
                f"lost their end, {self.tokens:,} tokens with {self.labels:,} labels; raise "
                "data.seq_len to keep it"
            )
        if self.emptied:
            found.append(
                f"{self.emptied:,} of {number:,} documents have their first label after "
                f"{self.seq_len} tokens and are left out; raise data.seq_len to learn them"
            )
        if self.dropped:
            found.append(f"{self.dropped:,} of {number:,} documents have no label and are left out")
        return found


def _build(
    cfg: DataConfig, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    assert cfg.chat is not None
    cut, number, conversations = _Cut(cfg.seq_len), 0, []
    for chat in read_chats(cfg):
        documents = list(label(chat, tokenizer, template, cfg.chat))
        number += len(documents)
        kept = [short for document in documents if (short := cut(document)) is not None]
        if kept:
            conversations.append(kept)
    notes = cut.notes(number)
    sides = _split(cfg, conversations, notes)
    tensors: dict[str, NDArray[Any]] = {}
    digest = hashlib.sha256()
    for name, side in zip(_SIDES, sides, strict=True):
        for part, values in side._asdict().items():
            tensors[f"{name}.{part}"] = values
            digest.update(values.tobytes())
    made_of = [FORMAT, cfg.seed, cfg.seq_len, cfg.chat.pack, digest.hexdigest()]
    meta = {
        "inputs": _inputs(cfg), "seq_len": cfg.seq_len, "seed": cfg.seed, "pack": cfg.chat.pack,
        "fingerprint": hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
        "notes": notes, "bytes_per_label": _bytes_per_label(sides[1], tokenizer),
    }  # fmt: skip
    return tensors, meta


def _split(
    cfg: DataConfig, conversations: Sequence[Sequence[Labelled]], notes: Sequence[str]
) -> tuple[Side, Side]:
    """Training and held-out documents; equal conversations lie on one side.

    `notes` say what became of the others.

    Raises:
        DataError: there are not two different ones.
    """
    hashes = [stable_hash(cfg.seed, *(each.tokens for each in one)) for one in conversations]
    ranked = sorted(set(hashes))
    if len(ranked) < 2:
        raise DataError(
            f"{len(ranked)} different conversations with labels are left; one is to be learned "
            f"and another held out, so give at least 2{''.join(f'. {each}' for each in notes)}"
        )
    wanted = min(max(1, round(cfg.held_out * len(ranked))), len(ranked) - 1)
    sides: tuple[list[Labelled], list[Labelled]] = ([], [])
    for own, conversation in zip(hashes, conversations, strict=True):
        sides[own < ranked[wanted]].extend(conversation)
    train, held = (
        Side(
            np.concatenate([np.asarray(each.tokens, np.int32) for each in side]),
            np.concatenate([np.asarray(each.labels, np.bool_) for each in side]),
            np.cumsum([len(each.tokens) for each in side], dtype=np.int64),
        )
        for side in sides
    )
    return train, held


def _bytes_per_label(side: Side, tokenizer: Tokenizer) -> float:
    """Of the text that is predicted; a special token counts as one byte."""
    ids = side.tokens_T[side.predicted()].tolist()
    special = sum(token in tokenizer.specials for token in ids)
    return (len(utf8(tokenizer.decode(ids))) + special) / len(ids)
