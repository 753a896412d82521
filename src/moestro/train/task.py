"""What a model learns from windows of text: the next token, or the spans that were hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moestro.config import NetworkConfig
from moestro.data.spans import corrupt, hidden
from moestro.data.windows import IGNORED
from moestro.errors import ConfigError
from moestro.models.count import sides
from moestro.models.encdec import START_TOKEN
from moestro.text import Tokenizer

Place = tuple[object, ...]


class Example(NamedTuple):
    """A batch as the model takes it.

    Attributes:
        inputs: What its `forward` is called with, int64 [B, ·] each.
        targets: int64 [B, T], what its logits [B, T, V] are to predict.
        noise_B: int64 keys of the rows, where the model draws random numbers in training.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor
    noise_B: Tensor | None = None

    @property
    def noise(self) -> dict[str, Tensor]:
        """What `forward` is given by name in training."""
        return {} if self.noise_B is None else {"noise_B": self.noise_B}

    def to(self, device: torch.device) -> Example:
        """The same on another device."""
        inputs = tuple(tensor.to(device, non_blocking=True) for tensor in self.inputs)
        noise_B = None if self.noise_B is None else self.noise_B.to(device, non_blocking=True)
        return Example(inputs, self.targets.to(device, non_blocking=True), noise_B)

    def chunk(self, pieces: int) -> list[Example]:
        """Cut into micro-batches of B / pieces rows."""
        columns = zip(*(tensor.chunk(pieces) for tensor in self.inputs), strict=True)
        targets = self.targets.chunk(pieces)
        noise = [None] * len(targets) if self.noise_B is None else self.noise_B.chunk(pieces)
        return [Example(*each) for each in zip(columns, targets, noise, strict=True)]


class NextToken:
    """A decoder predicts each token of a window from those before it."""

    def predicted(self, windows_NS: Tensor) -> int:
        """Tokens of the windows' text that their targets are worth: all but the first of each."""
        return windows_NS[:, 1:].numel()

    def examples(self, windows_BS: Tensor, places: Sequence[Place]) -> Example:
        """Windows of seq_len + 1 tokens [B, S+1], whatever their places."""
        return Example((windows_BS[:, :-1],), windows_BS[:, 1:])


class FillSpans:
    """An encoder-decoder reads a window with spans hidden, and writes them; see `data.spans`.

    Args:
        vocab_size: The model's, whose last ids are the sentinels.
        end: The id that ends source and target.
    """

    def __init__(self, vocab_size: int, end: int) -> None:
        self._vocab_size, self._end = vocab_size, end

    def predicted(self, windows_NS: Tensor) -> int:
        """Tokens hidden; the targets' bits encode what they are and where each span ends."""
        return len(windows_NS) * hidden(windows_NS.shape[1] - 1).tokens

    def examples(self, windows_BS: Tensor, places: Sequence[Place]) -> Example:
        """Windows of seq_len + 1 tokens; the last is left out, since the next window has it.

        Args:
            windows_BS: int64 [B, S+1], on the CPU.
            places: What each window's hidden spans are a function of.
        """
        pairs = [
            corrupt(window_S, self._vocab_size, self._end, place)
            for window_S, place in zip(windows_BS[:, :-1].numpy(), places, strict=True)
        ]
        source_BS = torch.from_numpy(np.stack([pair.source for pair in pairs]))
        target_BT = torch.from_numpy(np.stack([pair.target for pair in pairs]))
        before_BT = target_BT.roll(1, dims=1)
        before_BT[:, 0] = START_TOKEN
        return Example((source_BS, before_BT), target_BT)


class NextLabel:
    """A decoder predicts the labels among the tokens of packed documents; see `data.rows`."""

    def predicted(self, rows_N3S: Tensor) -> int:
        """Labels: other targets are ignored."""
        return int((rows_N3S[:, 1] != IGNORED).sum())

    def examples(self, rows_B3S: Tensor, places: Sequence[Place]) -> Example:
        """Rows of tokens, targets and documents [B, 3, S], whatever their places."""
        tokens_BS, targets_BS, documents_BS = rows_B3S.unbind(1)
        return Example((tokens_BS, documents_BS), targets_BS)


Task = NextToken | FillSpans | NextLabel
NEXT_TOKEN = NextToken()


def task_of(cfg: NetworkConfig, end_of_text: int, chats: bool = False) -> Task:
    """What a model of these settings learns, of text or of conversations."""
    if chats:
        return NextLabel()
    if cfg.has_encoder:
        return FillSpans(cfg.vocab_size, end_of_text)
    return NEXT_TOKEN


def vocabulary(cfg: NetworkConfig, tokenizer: Tokenizer, seq_len: int) -> int:
    """Ids that a model of these settings needs: the tokenizer's, and the sentinels."""
    spans = hidden(seq_len).spans if cfg.has_encoder else 0
    return tokenizer.vocab_size + spans


def check_vocabulary(cfg: NetworkConfig, tokenizer: Tokenizer, seq_len: int) -> None:
    """Refuse a model with too small a vocabulary.

    Raises:
        ConfigError: says how large it must be.
    """
    needed = vocabulary(cfg, tokenizer, seq_len)
    if cfg.vocab_size < needed:
        spans = needed - tokenizer.vocab_size
        more = f", and each of {spans} hidden spans needs one" if spans else ""
        raise ConfigError(
            f"model.vocab_size is {cfg.vocab_size}, but the tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} tokens{more}; set model.vocab_size = {needed}"
        )


def train_flops(cfg: NetworkConfig, seq_len: int) -> float:
    """FLOPs of one window of text in training."""
    if not cfg.has_encoder:
        return example_train_flops(cfg, seq_len)
    tokens, spans = hidden(seq_len)
    return example_train_flops(cfg, seq_len - tokens + spans + 1, tokens + spans + 1)


def example_train_flops(cfg: NetworkConfig, *lengths: int) -> float:
    """FLOPs in training of one text of `lengths` tokens, or of a source and its target."""
    texts = zip(sides(cfg), lengths, strict=True)
    return sum(length * side.train_flops(length, source=lengths[0]) for side, length in texts)
