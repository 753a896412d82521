"""How fast a model runs, and what bounds it: rounds of prefill and decoding, and memory bandwidth.

Decoding reads every active weight once per token, so its bound is the bandwidth of memory, which is
measured between the rounds of the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moestro.checkpoints.streamed import residency_of
from moestro.infer.decoding import decoding_of
from moestro.infer.sampling import SamplingConfig, new_generator, next_tokens
from moestro.kernels import native_cpu
from moestro.kernels.residency import Reads
from moestro.machine import Energy
from moestro.models.decoder import Decoder
from moestro.moe.layer import MoE
from moestro.moe.packed import Packed

# Far larger than any cache, far smaller than main memory.
READ_BYTES = 512 * 2**20


class Round(NamedTuple):
    """One prompt and the tokens after it.

    Attributes:
        prefill_s: seconds that the prompt took.
        first_s: until the first token was chosen.
        decode_s: of the tokens after it.
        joules: of the decoding; None if the machine does not report them.
        reads: of experts in a file during the decoding; None: all are in memory.
        peak_bytes: the most memory that another process held; None: it ran in this one.
    """

    prefill_s: float
    first_s: float
    decode_s: float
    joules: float | None = None
    reads: Reads | None = None
    peak_bytes: int | None = None


class Speed(NamedTuple):
    """Medians over the rounds.

    Attributes:
        prefill_per_s: tokens of the prompt per second.
        decode_per_s: tokens per second after it.
        first_s: seconds to the first token.
        weight_bytes: weights read per decoded token.
        read_per_s: bytes per second of plain reading, measured between the rounds; None where
            nothing was measured.
        share: of it that decoding used, round by round.
        peak_bytes: the most memory that it held, without the others measured beside it.
        joules: per decoded token; None if the machine does not report them.
        hit_rate: of the experts that decoding wanted, the share that was in memory; None where
            all are.
        file_bytes: read from the file per decoded token.
    """

    prefill_per_s: float
    decode_per_s: float
    first_s: float
    weight_bytes: float
    read_per_s: float | None
    share: float | None
    peak_bytes: int
    joules: float | None
    hit_rate: float | None = None
    file_bytes: float | None = None


class Variant(NamedTuple):
    """One of the things measured side by side.

    Attributes:
        name: of the program.
        weights: their format.
        run: one round.
        weight_bytes: weights read per decoded token.
        peak: the most memory that it held, in bytes; None: its rounds say it.
        reads: whether its share of plain reading is wanted.
    """

    name: str
    weights: str
    run: Callable[[], Round]
    weight_bytes: float
    peak: int | None
    reads: bool = True


def by_turns(
    variants: Sequence[Variant], prompt: int, tokens: int, rounds: int, read: Callable[[], float]
) -> list[Speed]:
    """Measure variants that take turns, so that what else the machine does hits all alike.

    Args:
        variants: each has had a round to warm up.
        prompt: tokens of the prompt of a round.
        tokens: tokens decoded in a round.
        rounds: of each.
        read: measures plain reading in bytes per second, before each round that wants it.
    """
    made: list[list[Round]] = [[] for _ in variants]
    reads: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds):
        for variant, its_rounds, its_reads in zip(variants, made, reads, strict=True):
            if variant.reads:
                its_reads.append(read())
            its_rounds.append(variant.run())
    return [_speed(*each, prompt, tokens) for each in zip(variants, made, reads, strict=True)]


def _speed(
    variant: Variant, made: list[Round], reads: list[float], prompt: int, tokens: int
) -> Speed:
    pairs = zip(made, reads, strict=False)  # none read: no pairs
    shares = [variant.weight_bytes * tokens / each.decode_s / rate for each, rate in pairs]
    reads_of = [each.reads for each in made if each.reads is not None]
    energies = [each.joules / tokens for each in made if each.joules is not None]
    return Speed(
        prefill_per_s=median(prompt / each.prefill_s for each in made),
        decode_per_s=median(tokens / each.decode_s for each in made),
        first_s=median(each.first_s for each in made),
        weight_bytes=variant.weight_bytes,
        read_per_s=median(reads) if reads else None,
        share=median(shares) if shares else None,
        peak_bytes=variant.peak or max(each.peak_bytes or 0 for each in made),
        joules=median(energies) if energies else None,
        hit_rate=median(each.hit_rate for each in reads_of) if reads_of else None,
        file_bytes=median(each.bytes / tokens for each in reads_of) if reads_of else None,
    )


def rounds_of(model: Decoder, prompt: int, tokens: int, seed: int = 0) -> Callable[[], Round]:
    """Rounds of one of our models.

    Tokens are random, the same in each round: they rotate the experts, whatever the model
    would have generated.

    Args:
        model: in evaluation mode.
        prompt: tokens of the prompt.
        tokens: tokens decoded after it.
        seed: of the tokens.
    """
    decoding, energy, residency = decoding_of(model), Energy(), residency_of(model)
    generator = torch.Generator().manual_seed(seed)
    length, vocab = (prompt + tokens,), model.cfg.vocab_size
    ids = torch.randint(0, vocab, length, generator=generator, device="cpu").tolist()
    greedy = SamplingConfig(temperature=0.0)

    def run() -> Round:
        start = time.perf_counter()
        past, passed = decoding.begin(ids[:prompt])
        prefilled = time.perf_counter()
        next_tokens(passed.logits_NV.float(), greedy, [new_generator(greedy)])
        first = time.perf_counter()
        joules, read = energy.joules(), residency and residency.reads()
        begun = time.perf_counter()
        for token in ids[prompt:]:
            decoding.step([[token]], [past])
        decode_s = time.perf_counter() - begun
        used = energy.since(joules)
        reads = residency.reads().since(read) if residency and read else None
        return Round(prefilled - start, first - start, decode_s, used, reads)

    return run


def weight_bytes(model: nn.Module) -> float:
    """Bytes of weights that decoding one token reads: K of E experts; no row of the embedding."""
    modules = list(model.modules())
    shares: dict[nn.Module, float] = {
        each.experts: each.cfg.top_k / each.cfg.num_experts
        for each in modules
        if isinstance(each, MoE)
    }
    total = 0.0
    for module in modules:
        if isinstance(module, Packed):
            size = module.parts()["packed"].numel()
        elif isinstance(module, nn.Embedding):
            continue  # a tied head has the same tensor, and is counted
        else:
            tensors = module.parameters(recurse=False)
            size = sum(each.numel() * each.element_size() for each in tensors)
        total += size * shares.get(module, 1.0)
    return total


class ReadBandwidth:
    """Plain reading of a large buffer: the memory bandwidth at this moment.

    Args:
        size: of the buffer, in bytes.
    """

    def __init__(self, size: int = READ_BYTES) -> None:
        self.size = size
        native = native_cpu.available() is None
        self._buffer: Tensor = (
            native_cpu.aligned(size).fill_(1)
            if native
            else torch.ones(size // 4, dtype=torch.float32, device="cpu")
        )
        self._read: Callable[[], object] = (
            (lambda: native_cpu.read(self._buffer)) if native else self._buffer.sum
        )

    def __call__(self) -> float:
        """Bytes per second, the best of three."""
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            self._read()
            best = min(best, time.perf_counter() - start)
        return self.size / best
