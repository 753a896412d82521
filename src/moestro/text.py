"""Tokenizers: bytes, a trained byte-level BPE, any tokenizer.json.

The byte tokenizer needs nothing on disk and is the default. A document and a prompt are encoded
differently: a document that spells a special token out gets its characters, a prompt the special
token, and what else the tokenizer.json puts around a text. Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moestro.errors import DataError
from moestro.streaming import characters_apart
from moestro.strictjson import read_object

END_OF_TEXT = "<|end_of_text|>"
# What published tokenizers call the token that ends a document, best guess first.
KNOWN_ENDS = (
    END_OF_TEXT, "<|endoftext|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eot_id|>",
    "<|im_end|>", "<｜end▁of▁sentence｜>", "[SEP]",
)  # fmt: skip
SMALLEST_BPE = 257
# Training a BPE takes the square of the longest run of characters without a break (DNA, ====).
_LONG_RUN = re.compile(r"(\S{256}|\s{256})")
NOTE_FILE = "moestro_tokenizer.json"
HF_FILE = "tokenizer.json"
# Tokenizers in forms that transformers converts.
OTHER_FILES = ("tokenizer.model", "tiktoken.model", "spiece.model")
CONVERTERS = "pip install 'moestro[hf]' sentencepiece protobuf tiktoken"
# Files beside a tokenizer.json that say which tokens end a text; the first one's count first.
END_FILES = ("generation_config.json", "config.json")
HF_SETTINGS = "tokenizer_config.json"


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: "bytes", "bpe:SIZE" or "file".
        vocab_size: Ids are in [0, vocab_size).
        end_of_text: The id that ends a document.
        ends: Every id that ends a generated text; `end_of_text` is one of them.
        specials: Tokens that `decode` leaves out, as a prompt spells them.
    """

    name: str
    vocab_size: int
    end_of_text: int
    ends: frozenset[int]
    specials: Mapping[int, str]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no `end_of_text` among them unless the text holds a NUL.

        Raises:
            DataError: the text holds half of a surrogate pair, or what the tokenizer has no
                token for; so it is in `encode_prompt`.
        """

    def encode_prompt(self, text: str, *, templated: bool = False) -> list[int]:
        """Token ids of a prompt, in which special tokens may be spelled out.

        A `templated` prompt spells all of them; any other also gets those that the tokenizer puts
        around a text, such as one for its beginning.
        """

    def encode_placed(self, text: str, *, templated: bool = False) -> tuple[list[int], list[int]]:
        """Token ids as `encode_prompt`, and where in the text each token ends, in characters."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id is not in [0, vocab_size).
        """

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` reads into an existing folder."""


class ByteTokenizer:
    """One token per byte of UTF-8; the NUL byte, 0, ends a document."""

    name = "bytes"
    vocab_size = 256
    end_of_text = 0
    ends = frozenset({0})
    specials: Mapping[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """The bytes of `text` in UTF-8."""
        return list(utf8(text))

    def encode_prompt(self, text: str, *, templated: bool = False) -> list[int]:
        """As `encode`: the only special token is the NUL byte."""
        return self.encode(text)

    def encode_placed(self, text: str, *, templated: bool = False) -> tuple[list[int], list[int]]:
        """The bytes; those of one character all end with it."""
        ids = self.encode(text)
        return ids, [place for place, c in enumerate(text, 1) for _ in c.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes `ids`."""
        _check_ids(ids, self.vocab_size)
        return bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write the tokenizer's name into an existing folder."""
        _write_note(folder, self)


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library: a BPE trained here, or a tokenizer.json."""

    def __init__(
        self, inner: tokenizers.Tokenizer, name: str, end_of_text: int, ends: Iterable[int] = ()
    ) -> None:
        self.name, self.end_of_text = name, end_of_text
        self.ends = frozenset({end_of_text, *ends})
        self.specials: Mapping[int, str] = _specials(inner)
        # Some published vocabularies have gaps, so the number of entries is not enough.
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        decoder = inner.decoder
        self._byte_decoder = decoder if decoder and decoder.decode(["<0x41>"]) == "A" else None

    @cached_property
    def _for_documents(self) -> tokenizers.Tokenizer:
        """The same, but a text that spells a special token out gets its characters."""
        with _library("the tokenizer cannot be copied"):
            twin = tokenizers.Tokenizer.from_str(self._inner.to_str())
        twin.encode_special_tokens = True
        return twin

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the special tokens that a template would add."""
        return self._encoding(self._for_documents, text, special=False).ids

    def encode_prompt(self, text: str, *, templated: bool = False) -> list[int]:
        """Token ids of a prompt; tokenizer.json's post-processor says what is put around it."""
        return self._encoding(self._inner, text, special=not templated).ids

    def encode_placed(self, text: str, *, templated: bool = False) -> tuple[list[int], list[int]]:
        """As tokenizer.json's offsets say; what is put around a text ends at 0 or at its end."""
        encoding = self._encoding(self._inner, text, special=not templated)
        return encoding.ids, [end for _, end in encoding.offsets]

    def _encoding(
        self, inner: tokenizers.Tokenizer, text: str, special: bool
    ) -> tokenizers.Encoding:
        utf8(text)
        with _library("the tokenizer cannot encode this text"):
            # Unlike `encode`, which lets no other thread of Python run until it is done.
            (encoding,) = inner.encode_batch([text], add_special_tokens=special)
            return encoding

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        _check_ids(ids, self.vocab_size)
        with _library("the tokenizer cannot decode these tokens"):
            if self._byte_decoder is None:
                return str(self._inner.decode(list(ids), skip_special_tokens=True))
            tokens = (self._inner.id_to_token(each) for each in ids if each not in self.specials)
            return str(self._byte_decoder.decode(characters_apart(filter(None, tokens))))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and a note with its name and the ids that end a text."""
        self._inner.save(str(folder / HF_FILE))
        _write_note(folder, self)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; every text can be encoded, whatever it was trained on.

    Args:
        texts: Read once, never held whole.
        vocab_size: Most entries: 256 bytes, the end-of-text token, and merges. A small text may
            give fewer; the result's `vocab_size` says.
    """
    _check_bpe_size(vocab_size)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator((piece for text in texts for piece in _LONG_RUN.split(text)), trainer)
    end = inner.token_to_id(END_OF_TEXT)
    assert end is not None
    return SubwordTokenizer(inner, f"bpe:{vocab_size}", end)


def tokenizer_file(path: Path) -> Tokenizer:
    """Read any tokenizer.json.

    The tokens that end a text are those named in the folder's generation_config.json, config.json
    and tokenizer_config.json, each of which may be missing; without any, one with a known name.
    """
    return _of_file(_read_hf(path), path)


def _of_file(inner: tokenizers.Tokenizer, path: Path) -> Tokenizer:
    """See `tokenizer_file`."""
    special = {name: number for number, name in _specials(inner).items()}
    known = [special[name] for name in KNOWN_ENDS if name in special]
    stated = _stated_ends(path.parent, inner)
    # A chat model states several: the end of a turn too. That of a document has a known name.
    choice = [number for number in known if number in stated]
    choice = choice or [number for number in stated if inner.id_to_token(number)] or known
    if not choice:
        raise DataError(
            f"{path} has no token that ends a document: none is stated as eos_token_id beside it, "
            f"known are {', '.join(KNOWN_ENDS)}, its special tokens are "
            f"{', '.join(sorted(special)) or 'none'}; state one, or add one of the known to its "
            "added_tokens as a special token"
        )
    return SubwordTokenizer(inner, "file", choice[0], stated)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read what a tokenizer's `save` wrote, or the tokenizer.json of a published checkpoint.

    One that has only SentencePiece's or tiktoken's file is converted by transformers each time.
    """
    note = folder / NOTE_FILE
    if not note.exists():
        if (folder / HF_FILE).exists():
            return tokenizer_file(folder / HF_FILE)
        for name in OTHER_FILES:
            if (folder / name).is_file():
                return _of_file(_converted(folder / name), folder / name)
        raise DataError(f"no tokenizer in {folder}: neither {NOTE_FILE} nor {HF_FILE} is there")
    values = read_object(note, DataError, "write the tokenizer again")
    try:
        name, end_of_text = str(values["name"]), int(values["end_of_text"])
        ends = [int(number) for number in values.get("ends", ())]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{note} cannot be read ({error}); write the tokenizer again") from None
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    return SubwordTokenizer(_read_hf(folder / HF_FILE), name, end_of_text, ends)


def check_tokenizer(setting: str) -> int | Path | None:
    """What `data.tokenizer` names: the size of a BPE, a path that exists, or (None) bytes."""
    if setting == ByteTokenizer.name:
        return None
    if setting.startswith("bpe:"):
        size = setting.removeprefix("bpe:")
        if not (size.isascii() and size.isdigit()):
            raise DataError(
                f"tokenizer {setting!r}: {size!r} is not a whole number; give the size of the "
                "vocabulary, such as bpe:1024"
            )
        _check_bpe_size(int(size))
        return int(size)
    path = Path(setting).expanduser()
    if not path.exists():
        raise DataError(
            f"tokenizer {setting!r} is not 'bytes', 'bpe:SIZE' (such as bpe:1024), or an existing "
            "tokenizer.json or folder that holds one; give one of these"
        )
    return path


def build_tokenizer(setting: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` describes; only 'bpe:SIZE' reads the texts."""
    wanted = check_tokenizer(setting)
    if wanted is None:
        return ByteTokenizer()
    if isinstance(wanted, int):
        return train_bpe(texts, wanted)
    return load_tokenizer(wanted) if wanted.is_dir() else tokenizer_file(wanted)


def utf8(text: str) -> bytes:
    """The bytes of `text`; half of a surrogate pair, which UTF-8 cannot write, is refused."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text, U+{ord(text[error.start]):04X}, is half of a "
            "surrogate pair and not text; replace it"
        ) from None


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty without the file."""
    return read_object(path, DataError, "fetch it again", finite=False) if path.exists() else {}


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise DataError(
            f"token ids from {min(ids)} to {max(ids)} are not all in [0, {vocab_size}): these "
            "tokens come from a model or tokenizer with another vocabulary"
        )


def _check_bpe_size(size: int) -> None:
    if size < SMALLEST_BPE:
        raise DataError(
            f"a BPE vocabulary of {size} is too small: 256 bytes and the end-of-text token need "
            f"{SMALLEST_BPE}; give at least that, or use 'bytes'"
        )


def _read_hf(path: Path) -> tokenizers.Tokenizer:
    with _library(f"{path} is not a tokenizer.json that the tokenizers library can read"):
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))


def _converted(path: Path) -> tokenizers.Tokenizer:
    """What transformers makes of SentencePiece's or tiktoken's file.

    Raises:
        DataError: it, or what it needs for that, is not installed; or the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader = import_module("transformers").AutoTokenizer
            made = loader.from_pretrained(
                path.parent, local_files_only=True, trust_remote_code=False
            )
        inner = made.backend_tokenizer
    except Exception as error:  # whatever the libraries below it raise
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} is to be converted to {HF_FILE}, which failed ({why}). It "
            f"needs {CONVERTERS}; or put the model's own {HF_FILE} beside it"
        ) from None
    assert isinstance(inner, tokenizers.Tokenizer)
    return inner


@contextmanager
def _library(failure: str) -> Iterator[None]:
    """Turn what the tokenizers library raises on a file that it half understands into DataError."""
    try:
        yield
    except BaseException as error:
        # It raises plain Exception for whatever it dislikes, and a panic is not even one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{failure} ({str(error)[:200]}); use another tokenizer.json") from None


def _specials(inner: tokenizers.Tokenizer) -> dict[int, str]:
    added = inner.get_added_tokens_decoder().items()
    return {number: token.content for number, token in added if token.special}


def _stated_ends(folder: Path, inner: tokenizers.Tokenizer) -> list[int]:
    """Ids that the files beside a tokenizer.json call the end of a text, the likeliest first."""
    found: list[int] = []
    for name in END_FILES:
        value = optional_json(folder / name).get("eos_token_id")
        numbers = value if isinstance(value, list) else [value] if value is not None else []
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise DataError(
                f"{folder / name}: eos_token_id is {value!r}; it is a token's number, or a list "
                "of them"
            )
        found += numbers
    token = optional_json(folder / HF_SETTINGS).get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str) and (number := inner.token_to_id(content)) is not None:
        found.append(number)
    return list(dict.fromkeys(found))


def _write_note(folder: Path, tokenizer: Tokenizer) -> None:
    end, ends = tokenizer.end_of_text, sorted(tokenizer.ends)
    values = {"name": tokenizer.name, "end_of_text": end, "ends": ends}
    (folder / NOTE_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")
