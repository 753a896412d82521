"""Tokenizers: bytes, a trained byte-level BPE, any tokenizer.json; and decoding as a stream.

The byte tokenizer needs nothing on disk and is the default. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moestro.errors import DataError

END_OF_TEXT = "<|end_of_text|>"
# What published tokenizers call the token that ends a document, best guess first.
KNOWN_ENDS = (
    END_OF_TEXT, "<|endoftext|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eot_id|>",
    "<|im_end|>", "[SEP]",
)  # fmt: skip
SMALLEST_BPE = 257
NOTE_FILE = "moestro_tokenizer.json"
HF_FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: "bytes", "bpe:SIZE" or "file".
        vocab_size: Ids are in [0, vocab_size).
        end_of_text: The id that ends a document.
    """

    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no `end_of_text` among them unless the text holds a NUL."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` reads into an existing folder."""


class ByteTokenizer:
    """One token per byte of UTF-8; the NUL byte, 0, ends a document."""

    name = "bytes"
    vocab_size = 256
    end_of_text = 0

    def encode(self, text: str) -> list[int]:
        """The bytes of `text` in UTF-8.

        Raises:
            DataError: the text holds half of a surrogate pair.
        """
        return list(utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes `ids`; what is not UTF-8 becomes U+FFFD.

        Raises:
            DataError: an id is not in [0, 256).
        """
        _check_ids(ids, self.vocab_size)
        return bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write the tokenizer's name into an existing folder."""
        _write_note(folder, self)


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library: a BPE trained here, or a tokenizer.json."""

    def __init__(self, inner: tokenizers.Tokenizer, name: str, end_of_text: int) -> None:
        self.name = name
        self.end_of_text = end_of_text
        # Some published vocabularies have gaps, so the number of entries is not enough.
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        inner.no_truncation()
        inner.no_padding()
        # A document that spells a special token out gets its characters, not the special id.
        inner.encode_special_tokens = True
        self._inner = inner

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the special tokens that a template would add.

        Raises:
            DataError: the text holds half of a surrogate pair.
        """
        utf8(text)
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out; what is not UTF-8 becomes U+FFFD.

        Raises:
            DataError: an id is not in [0, vocab_size).
        """
        _check_ids(ids, self.vocab_size)
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and a note with its name and end-of-text id."""
        self._inner.save(str(folder / HF_FILE))
        _write_note(folder, self)


class StreamDecoder:
    """Decodes tokens one at a time, holding back a character until all its bytes are there.

    The pushed pieces and the flushed rest, joined, are what `decode` gives for all tokens.
    """

    # A character spans at most 4 tokens; a few more give decoders that look at their left
    # neighbour (a leading space, for one) the context they need.
    _keep, _most = 8, 32

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._recent: list[int] = []
        self._given = 0  # characters of the recent tokens' text already handed out

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty within a multi-byte character."""
        self._recent.append(token)
        # Only a last U+FFFD can still turn into something else.
        text = self._tokenizer.decode(self._recent).removesuffix(_REPLACEMENT)
        new = text[self._given :]
        self._given = max(self._given, len(text))
        if len(self._recent) > self._most:
            self._recent = self._recent[-self._keep :]
            text = self._tokenizer.decode(self._recent)
            self._given = len(text.removesuffix(_REPLACEMENT))
        return new

    def flush(self) -> str:
        """What is still held back; the decoder is then as new."""
        rest = self._tokenizer.decode(self._recent)[self._given :]
        self._recent, self._given = [], 0
        return rest


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; every text can be encoded, whatever it was trained on.

    Args:
        texts: Read once, never held whole.
        vocab_size: Most entries: 256 bytes, the end-of-text token, and merges. A small text may
            give fewer; the result's `vocab_size` tells.

    Raises:
        DataError: `vocab_size` leaves no room for the bytes.
    """
    _check_bpe_size(vocab_size, str(vocab_size))
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    end = inner.token_to_id(END_OF_TEXT)
    assert end is not None
    return SubwordTokenizer(inner, f"bpe:{vocab_size}", end)


def tokenizer_file(path: Path) -> Tokenizer:
    """Read any tokenizer.json.

    Raises:
        DataError: it cannot be read, or no token in it is known to end a document.
    """
    inner = _read_hf(path)
    special = {
        token.content: number
        for number, token in inner.get_added_tokens_decoder().items()
        if token.special
    }
    for known in KNOWN_ENDS:
        if known in special:
            return SubwordTokenizer(inner, "file", special[known])
    raise DataError(
        f"{path} has no token that ends a document: known are {', '.join(KNOWN_ENDS)}, its special "
        f"tokens are {', '.join(sorted(special)) or 'none'}; add one of the known to its "
        "added_tokens as a special token"
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read what a tokenizer's `save` wrote, or a folder with just a tokenizer.json.

    Raises:
        DataError: there is no tokenizer in the folder, or it is damaged.
    """
    note = folder / NOTE_FILE
    if not note.exists():
        if (folder / HF_FILE).exists():
            return tokenizer_file(folder / HF_FILE)
        raise DataError(f"no tokenizer in {folder}: neither {NOTE_FILE} nor {HF_FILE} is there")
    try:
        values = json.loads(note.read_text(encoding="utf-8"))
        name, end_of_text = str(values["name"]), int(values["end_of_text"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{note} cannot be read ({error}); write the tokenizer again") from None
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    return SubwordTokenizer(_read_hf(folder / HF_FILE), name, end_of_text)


def check_tokenizer(setting: str) -> None:
    """Refuse a bad `data.tokenizer` before any text is read.

    Raises:
        DataError: it is neither 'bytes', 'bpe:SIZE' with a size that works, nor a file.
    """
    if setting == ByteTokenizer.name:
        return
    if setting.startswith("bpe:"):
        size = setting.removeprefix("bpe:")
        _check_bpe_size(int(size) if size.isascii() and size.isdigit() else None, size)
    elif not Path(setting).expanduser().is_file():
        raise DataError(
            f"tokenizer {setting!r} is not 'bytes', 'bpe:SIZE' (such as bpe:1024), or an existing "
            "tokenizer.json; give one of these"
        )


def build_tokenizer(setting: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` describes; only 'bpe:SIZE' reads the texts.

    Raises:
        DataError: as in `check_tokenizer`, or the file is not a usable tokenizer.
    """
    check_tokenizer(setting)
    if setting == ByteTokenizer.name:
        return ByteTokenizer()
    if setting.startswith("bpe:"):
        return train_bpe(texts, int(setting.removeprefix("bpe:")))
    return tokenizer_file(Path(setting).expanduser())


def utf8(text: str) -> bytes:
    """The bytes of `text`.

    Raises:
        DataError: the text holds half of a surrogate pair, which UTF-8 cannot write.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text, U+{ord(text[error.start]):04X}, is half of a "
            "surrogate pair and not text; replace it"
        ) from None


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise DataError(
            f"token ids from {min(ids)} to {max(ids)} are not all in [0, {vocab_size}): these "
            "tokens come from a model or tokenizer with another vocabulary"
        )


def _check_bpe_size(size: int | None, given: str) -> None:
    if size is None:
        raise DataError(
            f"tokenizer 'bpe:{given}': {given!r} is not a whole number; "
            "give the size of the vocabulary, such as bpe:1024"
        )
    if size < SMALLEST_BPE:
        raise DataError(
            f"a BPE vocabulary of {size} is too small: 256 bytes and the end-of-text token need "
            f"{SMALLEST_BPE}; give at least that, or use 'bytes'"
        )


def _read_hf(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for whatever it dislikes
        raise DataError(
            f"{path} is not a tokenizer.json that the tokenizers library can read ({error})"
        ) from None


def _write_note(folder: Path, tokenizer: Tokenizer) -> None:
    values = {"name": tokenizer.name, "end_of_text": tokenizer.end_of_text}
    (folder / NOTE_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")
