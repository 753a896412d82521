"""What runs in an amount of memory: experts kept in it, bytes read for a token.

Plain arithmetic on sizes, for a plan and for a run alike; how fast that is: `models.pace`.

A token wants K of E experts in each mixture; all together are its cycle. Of these a share h, the
hit rate, is in memory, and the rest is read: (1 - h) · cycle bytes a token.

Letters: B sequences, S context, T tokens that pass together, D width, L layers, G key/value heads,
A head width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from moestro.config import CacheKind, NetworkConfig, RelativeConfig
from moestro.errors import ConfigError
from moestro.kernels.formats import UNGATED, UNPACKED, packed_at_once
from moestro.models.passing import CHUNK, MOST_LOGITS, chunked, lacks

# What a process that has torch loaded takes before it opens a model, and what it grows by later:
# code that is first used, threads, small objects.
PROCESS, GROWTH = 260 << 20, 32 << 20
_SLACK = 8 << 20
_TILE = 16  # rows to which each expert's are rounded up
_ROWS = 256  # queries of a text that attention takes at once where it needs a mask
_SCORING = 8  # logits' worth of what one token's probabilities are made with
_MARKING = 24  # bytes for each of them and each position, for masks and while an indexer chooses
_PART = 8  # of what is left, for caches of earlier texts, and for longer chunks of a prompt
_CHOICE = 36  # bytes of each choice of an expert: number, weight, and copies to count it


class Mixture(NamedTuple):
    """The experts of one layer."""

    slab_bytes: int  # of an expert
    experts: int  # E
    top_k: int  # K


class Use(NamedTuple):
    """How a model is used."""

    context: int | None = None  # tokens of each text, its prompt included; None: the model's most
    texts: int = 1  # at once
    kept_bytes: int = 0  # for the caches of earlier texts
    kept_shrinks: bool = False  # that is the most: an eighth of what else is left, if less
    prompt: int | None = None  # tokens of the longest; None: not known, up to the whole context
    chunk: int | None = None  # the most of a prompt at once, if it may be cut; None: all of it
    tokens: int | None = None  # that pass together; None: as prompts are read, one at a time
    scored: bool = False  # the logits of all of them are wanted, not of each text's last alone
    echoed: bool = False  # those of a prompt may be wanted, as many at once as `MOST_LOGITS` allows
    cache: CacheKind = "as-is"  # how keys and values are kept


class Needs(NamedTuple):
    """Bytes of a running model by what they are for."""

    process: int  # the program and its libraries
    dense: int  # weights that every token needs
    cache: int  # keys and values, or states
    buffers: int  # what a step computes with
    mixtures: tuple[Mixture, ...]
    spare: int = 0  # the most for caches of earlier texts that get an eighth of what is left
    token: int = 0  # of buffers for each token of a prompt that passes together with `CHUNK` others
    more: int = 0  # how many such tokens a prompt has
    packing: int = 0  # beside the process, while a packed file is written that is missing

    @property
    def fixed(self) -> int:
        """All but experts."""
        return self.process + self.dense + self.cache + self.buffers

    @property
    def cycle(self) -> int:
        """Bytes of the experts that a token wants."""
        return sum(each.top_k * each.slab_bytes for each in self.mixtures)

    @property
    def all_experts(self) -> int:
        """Bytes of all experts."""
        return sum(each.experts * each.slab_bytes for each in self.mixtures)


class Budget(NamedTuple):
    """What an amount of memory holds."""

    memory: int
    needs: Needs
    kept: tuple[int, ...]  # experts of each mixture

    @property
    def kept_bytes(self) -> int:
        """Bytes of the experts that are kept."""
        pairs = zip(self.needs.mixtures, self.kept, strict=True)
        return sum(each.slab_bytes * kept for each, kept in pairs)

    @property
    def share(self) -> float:
        """The part of all experts that is kept, by bytes."""
        return self.kept_bytes / max(1, self.needs.all_experts)

    @property
    def together(self) -> int:
        """Tokens of a prompt that pass together, where it may be cut anywhere."""
        return CHUNK + self.needs.more

    @property
    def below_cycle(self) -> bool:
        """Whether some mixture keeps fewer experts than one token wants."""
        pairs = zip(self.needs.mixtures, self.kept, strict=True)
        return any(kept < each.top_k for each, kept in pairs)

    def read_bytes(self, hit: float) -> float:
        """Bytes read for a token at a hit rate."""
        return (1 - hit) * self.needs.cycle


def fit(needs: Needs, memory: int) -> Budget:
    """Keep as many experts as fit: of each mixture the same number, of the first ones one more.

    Caches of earlier texts get an eighth of what is left at most; then, where experts would have to
    be read for each chunk of a prompt, so do buffers to pass more of it together. The needs of the
    result have both as they are.

    Raises:
        ConfigError: not even one expert of each mixture fits; says the smallest budget that works.
    """
    left, mixtures = memory - needs.fixed, needs.mixtures
    least = sum(each.slab_bytes for each in mixtures)
    if left >= least and memory < needs.process + needs.packing:
        raise ConfigError(
            f"a budget of {memory / 2**20:,.0f} MiB is too small to write the packed form: the "
            f"process takes {needs.process / 2**20:,.0f} MiB, and a layer's packed experts with "
            f"numbers on their way {needs.packing / 2**20:,.0f} MiB; give at least "
            f"{smallest(needs) // 2**20}MiB once. When the file is there, "
            f"{smallest(needs._replace(packing=0)) // 2**20}MiB are enough"
        )
    if left < least:
        parts = (needs.process, needs.dense, needs.cache, needs.buffers, least)
        sizes = [f"{each / 2**20:,.0f} MiB" for each in parts]
        raise ConfigError(
            f"a budget of {memory / 2**20:,.0f} MiB is too small: the process takes {sizes[0]}, "
            f"weights that every token needs {sizes[1]}, the cache {sizes[2]}, buffers {sizes[3]}, "
            f"and one expert of each mixture {sizes[4]}; give at least "
            f"{smallest(needs) // 2**20}MiB, or use fewer or shorter texts (serve: --max-live and "
            "--context; generate: --max-tokens)"
        )
    room, more = left - least, 0
    earlier = min(needs.spare, room // _PART)
    if needs.more and left - earlier < needs.all_experts:
        more = min(needs.more, (room - earlier) // _PART // needs.token)
    cache, buffers = needs.cache + earlier, needs.buffers + more * needs.token
    needs = needs._replace(cache=cache, buffers=buffers, spare=earlier, more=more)
    left = memory - needs.fixed
    kept = [0] * len(mixtures)
    for number in range(max((each.experts for each in mixtures), default=0)):
        for n, each in enumerate(mixtures):
            if number < each.experts and each.slab_bytes <= left:
                left -= each.slab_bytes
                kept[n] += 1
    return Budget(memory, needs, tuple(kept))


def smallest(needs: Needs) -> int:
    """A budget that works, in whole 16 MiB: another process may hold a little more than this."""
    least = needs.fixed + sum(each.slab_bytes for each in needs.mixtures)
    least = max(least, needs.process + needs.packing)
    return -(-(least + _SLACK) // (2 * _SLACK)) * (2 * _SLACK)


def needs(
    cfg: NetworkConfig,
    number: int,
    dense: int,
    mixtures: Sequence[Mixture],
    use: Use,
    process: int = PROCESS,
) -> Needs:
    """What a model takes.

    Args:
        cfg: its settings.
        number: bytes of one number of the cache and of weights that are not packed.
        dense: bytes of all weights but those of the mixtures' experts.
        mixtures: those.
        use: how it is used.
        process: bytes that the process has before the model is opened.
    """
    context = min(use.context or cfg.attention.context, cfg.attention.context)
    spare = use.kept_bytes if use.kept_shrinks else 0
    cache = use.texts * text_bytes(cfg, context, number, use.cache) + use.kept_bytes - spare
    cuts = use.tokens is None and chunked(cfg) and lacks(cfg) is None
    use = use._replace(context=context, tokens=_together(cfg, use, context))
    buffers = _buffers(cfg, use, number, mixtures)
    if lacks(cfg) is not None:
        buffers += _in_python(cfg, use, number)
    if use.cache == "int8" and (use.scored or lacks(cfg) is not None):
        buffers += use.texts * _read_back(cfg, context, number)
    token = more = 0
    chunk = use.prompt if use.chunk is None else use.chunk
    if chunk is not None and cuts:
        more = max(0, min(chunk, context) - CHUNK)
        longer = use._replace(tokens=CHUNK + 1)
        token = _buffers(cfg, longer, number, mixtures) - buffers
    return Needs(process + GROWTH, dense, cache, buffers, tuple(mixtures), spare, token, more)


def packing_bytes(cfg: NetworkConfig, mixtures: Sequence[Mixture]) -> int:
    """What writing a packed file takes: a layer's packed experts, and numbers on their way."""
    moe, hidden = cfg.moe, [cfg.dense.hidden_dim]
    experts = max((each.experts for each in mixtures), default=1)
    wide = _heads(cfg) * cfg.dim
    if moe is not None:
        hidden.append(0 if moe.shared is None else moe.shared.hidden_dim)
        one = 3 * cfg.dim * moe.hidden_dim
        wide = max(wide, one * packed_at_once(one, min(experts, os.cpu_count() or 1)))
    numbers = max(wide, 3 * cfg.dim * max(hidden))
    packed = max((each.experts * each.slab_bytes for each in mixtures), default=0)
    return packed + UNPACKED * numbers


def text_bytes(cfg: NetworkConfig, context: int, number: int, cache: CacheKind = "as-is") -> int:
    """The cache of one text; buffers grow by half, up to 9/8 of the most (`cache.LayerCache`)."""
    most = min(context + context // 2, cfg.attention.context * 9 // 8) + 16
    return cache_bytes(cfg, most, 1, number, cache)


def _together(cfg: NetworkConfig, use: Use, context: int) -> int:
    """Tokens that pass together beside the next one of each text."""
    if use.tokens is not None:
        return use.tokens
    return CHUNK if chunked(cfg) else min(use.prompt or context, context)


def _buffers(cfg: NetworkConfig, use: Use, number: int, mixtures: Sequence[Mixture]) -> int:
    """What `native/step.cpp` computes with: rows, those of experts, scores, logits."""
    tokens, dim = (use.tokens or 0) + use.texts, cfg.dim
    total = tokens * 4 * (6 * dim + 3 * _heads(cfg))
    moe = cfg.moe
    if moe is not None:
        layers = sum(len(each.layers) for each in cfg.stacks())
        rows = tokens * moe.top_k
        total += rows * layers * _CHOICE
        rows += min(moe.num_experts, rows) * (_TILE - 1)
        # What enters a matrix as bytes with scales, or as bf16 and fp32; what leaves it as fp32.
        weights = (2 if moe.activation in UNGATED else 3) * dim * moe.hidden_dim
        whole = all(each.slab_bytes < 1.5 * weights for each in mixtures)
        row = 4 + (2 if whole else 6)
        total += rows * row * (dim + moe.hidden_dim) + tokens * 4 * moe.num_experts
        if number < 4:  # routers and norms as fp32
            total += 4 * dim * moe.num_experts * layers
        shared = 0 if moe.shared is None else moe.shared.hidden_dim
        total += tokens * 4 * (2 * dim + 3 * shared)
    logits = 3 * tokens if use.scored else 2 * use.texts
    if use.echoed and lacks(cfg) is None:  # layers in Python make all of them anyway
        most = MOST_LOGITS // cfg.vocab_size if chunked(cfg) else tokens
        logits += max(1, min(tokens, most)) + _SCORING
    scores = 64 * (use.context or 0) * cfg.attention.num_heads
    return total + 4 * (logits * cfg.vocab_size + scores)


def _heads(cfg: NetworkConfig) -> int:
    """Width of queries, keys and values together."""
    return (cfg.attention.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim


def _in_python(cfg: NetworkConfig, use: Use, number: int) -> int:
    """What torch's tensors take beside that where layers run in Python.

    Rows, what routers say until all layers have passed, the logits of all of them, and what
    attention makes for blocks of queries.
    """
    tokens, context = (use.tokens or 0) + use.texts, use.context or 0
    total = tokens * number * (6 * cfg.dim + 3 * _heads(cfg))
    if cfg.moe is not None:
        layers = sum(len(each.layers) for each in cfg.stacks())
        total += tokens * layers * 4 * (2 * cfg.moe.num_experts + 7 * cfg.moe.top_k)
    logits = use.texts if cfg.has_encoder else tokens
    total += logits * cfg.vocab_size * (number if number == 4 else number + 4)
    total += _choosing(cfg, use, number)
    latent, heads = cfg.attention.latent, cfg.attention.num_heads
    if latent is not None:  # each head's keys and values, of one width where a kernel wants it
        width = latent.nope_dim + latent.rope_dim
        most = max(width, latent.value_dim)
        made = latent.nope_dim + latent.value_dim + width
        total += context * heads * number * (made + (2 * most if width != latent.value_dim else 0))
    if isinstance(cfg.attention.positions, RelativeConfig):  # scores' biases, and a block's masked
        rows = tokens if cfg.has_encoder else min(tokens, _ROWS)
        total += heads * context * number * (tokens + rows)
    return total


def _choosing(cfg: NetworkConfig, use: Use, number: int) -> int:
    """Scores and marks of a block's rows; an indexer's keys in fp32."""
    latent, context = cfg.attention.latent, use.context or 0
    keys = 0
    if latent is not None and latent.indexer is not None and number < 4:
        keys = 4 * use.texts * context * latent.indexer.head_dim
    rows = min((use.tokens or 0) + use.texts, _ROWS * use.texts)
    return keys + rows * context * _MARKING


def _read_back(cfg: NetworkConfig, context: int, number: int) -> int:
    """What layers in Python make of one text's cache of int8, one at a time: numbers, and fp32."""
    seen = [min(context, each.window or context) for s in cfg.stacks() for each in s.layers]
    rows, widths = _row(cfg)
    return max(seen) * sum(widths) * (rows * number + 8 * max(1, rows // 2))


def _row(cfg: NetworkConfig) -> tuple[int, list[int]]:
    """(vectors of each kind, the kinds' widths) that a layer with attention keeps of a position."""
    latent = cfg.attention.latent
    if latent is None:
        return 2 * cfg.num_kv_heads, [cfg.head_dim]
    widths = [latent.kv_rank + latent.rope_dim]
    if latent.indexer is not None:
        widths.append(latent.indexer.head_dim)
    return 1, widths


def position_bytes(cfg: NetworkConfig, number: int, cache: CacheKind = "as-is") -> list[int]:
    """What a layer with attention keeps of a position: its keys and values together.

    Of latent attention its vector; and where there is an indexer, the key of that.
    """
    rows, widths = _row(cfg)
    return [rows * (width + 4 if cache == "int8" else width * number) for width in widths]


def cache_bytes(
    cfg: NetworkConfig, context: int, batch: int, number: int, cache: CacheKind = "as-is"
) -> int:
    """Keys and values of B sequences after S positions, of `number` bytes each.

    A layer keeps 2 · G · A numbers for each position that it can still look back on: at most its
    window, and never more than the model's context. Latent attention keeps kv_rank + rope_dim
    (DeepSeek-V2, §2.1.2), and the key of an indexer. An encoder-decoder keeps them for S target and
    S source positions in each layer of its decoder; its encoder keeps nothing. A delta layer keeps
    its state in fp32, and like a short convolution its last inputs, however long the text.

    A cache of int8 keeps one byte a number, and four for the scale of each head's keys and of its
    values, or of each latent vector; what cross attention sees stays as it is.
    """
    positions = states = crossed = 0
    for stack in cfg.stacks():
        if stack.causal:
            looking = [layer for layer in stack.layers if not layer.state]
            states += len(stack.layers) - len(looking)
            positions += sum(min(context, layer.window or context) for layer in looking)
        if stack.cross:
            crossed += context * len(stack.layers)
    rows, widths = _row(cfg)
    kept = positions * sum(position_bytes(cfg, number, cache))
    kept += crossed * rows * widths[0] * number
    delta = cfg.attention.delta
    if delta is not None:
        inputs = (delta.conv_width - 1) * delta.conv_channels
        kept += states * (4 * delta.value_width * delta.key_dim + inputs * number)
    conv = cfg.attention.conv
    if conv is not None:
        kept += states * (conv.width - 1) * cfg.dim * number
    return batch * kept


def hit_bounds(budget: Budget) -> tuple[float, float]:
    """Hit rates between which trained routers lie, where none was measured.

    Random routing finds exactly the share s that is kept. Published caches of trained models, each
    layer's last used, lie below 1 - (1 - s)^9: 0.28 and 0.67 at s = 1/8, 0.81 at 1/4, 0.68 at 3/8,
    0.90 to 0.95 at 0.4 (colibri's report on OLMoE; llama.cpp #27861; imp #1359 on Qwen3-30B-A3B).
    """
    share = budget.share
    return share, 1 - (1 - share) ** 9
