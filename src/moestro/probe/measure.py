"""What a Recording says: load, experts by domain, specialisation, entropy, repetition.

Pure functions of a Recording in numpy; every measure comes with what chance alone would give.
Letters beside those of docs/shapes.md: N windows, M domains, X the layers' experts side by side,
P independent pieces (blocks) of text, Z random draws.
An array's axes are named by the end of its name, in the JSON too.
"""

from __future__ import annotations

from math import comb
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moestro.errors import MoestroError
from moestro.probe.record import Recording

Floats = NDArray[np.float64]
SIGNIFICANCE = 0.05


class Load(NamedTuple):
    """How evenly the experts of each layer are used, over all domains together.

    Attributes:
        share_LE: Each expert's share of the layer's assignments, before any drop; rows sum to 1.
        imbalance_L: Largest load over mean load; 1 is perfect balance, E the worst.
        variation_L: Coefficient of variation of the loads: standard deviation over mean.
        dead_L: The experts that received nothing at all.
        dropped_L: Share of the assignments that found no room.
    """

    share_LE: Floats
    imbalance_L: Floats
    variation_L: Floats
    dead_L: tuple[tuple[int, ...], ...]
    dropped_L: Floats


class Specialisation(NamedTuple):
    """How far each domain's use of experts lies from the average over domains, and chance.

    The distance is total variation: the share of a domain's assignments that would have to go to
    another expert for its use of experts to equal the average (0 to 1). Even domains that are
    treated alike lie some way apart in finite text: `chance` is what remains of the distance when
    the pieces of text are dealt to the domains at random.

    Attributes:
        distance_LM: Distance of each domain.
        chance_LM: Its mean when pieces of text are dealt at random.
        chance_high_LM: The distance that chance exceeds in 5 % of the deals.
        interval_LM2: 95 % interval of the distance with the upward bias of sampling taken off,
            from a bootstrap over pieces of text; NaN for a domain of one piece. It tells the size
            of a difference; near 0 it lies too high, so whether there is one, `p_value_L` tells.
        mean_L: The layer's distance: the mean over domains.
        mean_chance_L: Its mean under chance.
        mean_chance_high_L: Its 95 % quantile under chance.
        p_value_L: Share of deals at least as far apart as measured.
        supported_L: Whether the layer's distance is beyond chance at a family-wise rate of 5 %
            over all layers (Holm).
        blocks_M: Independent pieces of text in each domain.
    """

    distance_LM: Floats
    chance_LM: Floats
    chance_high_LM: Floats
    interval_LM2: Floats
    mean_L: Floats
    mean_chance_L: Floats
    mean_chance_high_L: Floats
    p_value_L: Floats
    supported_L: NDArray[np.bool_]
    blocks_M: NDArray[np.int64]


class Entropy(NamedTuple):
    """Entropy of the router's probabilities, as a share of log E: 0 one expert, 1 all alike.

    Attributes:
        balance_L: Of the probabilities averaged over tokens: 1 if experts share the work evenly.
        balance_LM: The same within each domain.
        spread_L: Of each token's own, averaged over tokens: 0 if the router is sure of one expert.
        spread_LM: The same within each domain.
    """

    balance_L: Floats
    balance_LM: Floats
    spread_L: Floats
    spread_LM: Floats


class Repetition(NamedTuple):
    """How often neighbouring tokens go to the same experts (Mixtral, table 5), and chance.

    Attributes:
        first_LM: P(first choice is the same at positions i and i + 1).
        any_LM: P(the K choices at i and i + 1 share at least one expert).
        first_error_LM: Standard error of `first_LM` over pieces of text; NaN for one piece.
        any_error_LM: The same of `any_LM`.
        first_uniform: `first_LM` if experts were drawn uniformly: 1 / E.
        any_uniform: `any_LM` if they were: 1 − C(E − K, K) / C(E, K).
        first_shuffled_LM: `first_LM` with the domain's tokens in random order, Σ p² over its loads
            p; the fair comparison, since uneven loads repeat by themselves.
        any_shuffled_LM: The same of `any_LM`, from random pairs of the domain's tokens.
    """

    first_LM: Floats
    any_LM: Floats
    first_error_LM: Floats
    any_error_LM: Floats
    first_uniform: float
    any_uniform: float
    first_shuffled_LM: Floats
    any_shuffled_LM: Floats


class Findings(NamedTuple):
    """All measures of one Recording.

    Attributes:
        domains: The M labels.
        moe_layers: The layer number of each of the L mixture layers.
        num_experts: E.
        top_k: K, or 0 for expert choice.
        windows_M: Windows of text in each domain.
        load: Load of experts.
        table_LME: Share of each domain's assignments on each expert; rows sum to 1.
        entropy: Entropy of the router's probabilities.
        specialisation: None where there is one domain only.
        repetition: None for expert choice, where a token has no ranked choices, and for windows
            of a single token.
    """

    domains: tuple[str, ...]
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    windows_M: NDArray[np.int64]
    load: Load
    table_LME: Floats
    entropy: Entropy
    specialisation: Specialisation | None
    repetition: Repetition | None


def measure(recording: Recording, *, draws: int = 999, seed: int = 0) -> Findings:
    """Every measure of a recording that it allows.

    Args:
        recording: From `moestro.probe.record.record`.
        draws: Random deals (and bootstrap samples) behind the sampling noise.
        seed: Of those draws; the same seed gives the same findings.
    """
    choices_NSK = recording.experts_LNSK
    has_pairs = choices_NSK is not None and choices_NSK.shape[2] > 1
    several = len(recording.domains) > 1
    return Findings(
        domains=recording.domains,
        moe_layers=recording.moe_layers,
        num_experts=recording.num_experts,
        top_k=recording.top_k,
        windows_M=np.bincount(recording.domain_N, minlength=len(recording.domains)),
        load=load(recording),
        table_LME=expert_table(recording),
        entropy=entropy(recording),
        specialisation=specialisation(recording, draws=draws, seed=seed) if several else None,
        repetition=repetition(recording, seed=seed) if has_pairs else None,
    )


def load(recording: Recording) -> Load:
    """Load per layer and expert, over all domains together."""
    counts_LE = recording.counts_LNE.sum(axis=1)
    total_L = np.maximum(counts_LE.sum(axis=1), 1)
    share_LE = counts_LE / total_L[:, None]
    return Load(
        share_LE=share_LE,
        imbalance_L=share_LE.max(axis=1) * recording.num_experts,
        variation_L=share_LE.std(axis=1) * recording.num_experts,
        dead_L=tuple(tuple(np.flatnonzero(row == 0).tolist()) for row in counts_LE),
        dropped_L=recording.dropped_LN.sum(axis=1) / total_L,
    )


def expert_table(recording: Recording) -> Floats:
    """Share of each domain's assignments on each expert. [L, M, E], rows sum to 1."""
    member_MN = _membership(recording.domain_N, len(recording.domains))
    return _shares(np.einsum("mn,lne->lme", member_MN, recording.counts_LNE))


def entropy(recording: Recording) -> Entropy:
    """Entropy of the mean probabilities (balance), and mean of each token's own (spread)."""
    member_MN = _membership(recording.domain_N, len(recording.domains))
    mean_MN = member_MN / member_MN.sum(axis=1, keepdims=True)
    probs_LME = np.einsum("mn,lne->lme", mean_MN, recording.probs_LNE)
    most = np.log(recording.num_experts) if recording.num_experts > 1 else 1.0
    return Entropy(
        balance_L=_entropy(recording.probs_LNE.mean(axis=1)) / most,
        balance_LM=_entropy(probs_LME) / most,
        spread_L=recording.entropy_LN.mean(axis=1) / most,
        spread_LM=np.einsum("mn,ln->lm", mean_MN, recording.entropy_LN) / most,
    )


def specialisation(recording: Recording, *, draws: int = 999, seed: int = 0) -> Specialisation:
    """Distance of each domain's use of experts from the average, beside its sampling noise.

    Whole pieces of text (`Recording.block_N`) are dealt and resampled, never single tokens:
    tokens of one document resemble each other, and dealing them singly would understate chance.

    Args:
        recording: With at least two domains.
        draws: Random deals, and bootstrap samples; at least 20 for each layer if a finding is to
            be possible at all after the correction for the number of layers.
        seed: Of the draws.

    Raises:
        MoestroError: there is one domain only, or fewer than one draw is asked for.
    """
    num_domains = len(recording.domains)
    if num_domains < 2:
        raise MoestroError(
            f"specialisation compares domains, but the recording has only {recording.domains}; "
            "give text with at least two labels"
        )
    if draws < 1:
        raise MoestroError(f"draws is {draws}; give at least 1")
    starts_P = _block_starts(recording)
    domain_P = recording.domain_N[starts_P]
    counts_PX = np.concatenate(
        list(np.add.reduceat(recording.counts_LNE, starts_P, axis=1).astype(np.float64)), axis=1
    )
    shape = (num_domains, len(recording.moe_layers), recording.num_experts)
    member_MP = _membership(domain_P, num_domains)
    blocks_M = member_MP.sum(axis=1).astype(np.int64)
    distance_LM = _distances(member_MP, counts_PX, shape)
    chance_ZLM, resampled_ZLM = _draw(member_MP, counts_PX, shape, draws, seed)
    mean_L = distance_LM.mean(axis=1)
    # A resample carries the noise of sampling twice, so its quantiles are reflected about the
    # measured distance: that takes the upward bias off instead of adding it again.
    low_LM, high_LM = np.quantile(resampled_ZLM, (0.025, 0.975), axis=0)
    interval_LM2 = np.clip(2 * distance_LM[..., None] - np.stack((high_LM, low_LM), -1), 0.0, 1.0)
    interval_LM2[:, blocks_M < 2] = np.nan
    mean_chance_ZL = chance_ZLM.mean(axis=2)
    # The tolerance keeps deals that only swap the domains' names from counting as less far apart.
    p_value_L = (1 + (mean_chance_ZL >= mean_L - 1e-12).sum(axis=0)) / (1 + draws)
    return Specialisation(
        distance_LM=distance_LM,
        chance_LM=chance_ZLM.mean(axis=0),
        chance_high_LM=np.quantile(chance_ZLM, 0.95, axis=0),
        interval_LM2=interval_LM2,
        mean_L=mean_L,
        mean_chance_L=mean_chance_ZL.mean(axis=0),
        mean_chance_high_L=np.quantile(mean_chance_ZL, 0.95, axis=0),
        p_value_L=p_value_L,
        supported_L=_holm(p_value_L),
        blocks_M=blocks_M,
    )


def repetition(recording: Recording, *, seed: int = 0) -> Repetition:
    """How often neighbouring tokens share their first, or any, expert; and the nulls.

    Raises:
        MoestroError: experts chose tokens (expert choice), or windows hold a single token.
    """
    if recording.experts_LNSK is None:
        raise MoestroError(
            "repetition compares each token's choices, but under expert choice the experts choose; "
            "probe a token-choice model for it"
        )
    if recording.experts_LNSK.shape[2] < 2:
        raise MoestroError("repetition needs windows of at least 2 tokens; give longer windows")
    rng = np.random.default_rng(seed)
    num_experts, top_k = recording.num_experts, recording.top_k
    shape = (len(recording.moe_layers), len(recording.domains))
    first, any_, shuffled, shuffled_any = (np.empty(shape) for _ in range(4))
    first_error, any_error = np.empty(shape), np.empty(shape)
    for layer, experts_NSK in enumerate(recording.experts_LNSK):
        for domain in range(shape[1]):
            at, chosen_N = (layer, domain), recording.domain_N == domain
            own_NSK, block_N = experts_NSK[chosen_N], recording.block_N[chosen_N]
            same_N, shared_N = _repeats(own_NSK[:, :-1], own_NSK[:, 1:])
            first[at], first_error[at] = same_N.mean(), _standard_error(same_N, block_N)
            any_[at], any_error[at] = shared_N.mean(), _standard_error(shared_N, block_N)
            tokens_1TK = own_NSK.reshape(1, -1, top_k)
            used_E = np.bincount(tokens_1TK[0, :, 0], minlength=num_experts)
            shuffled[at] = np.square(used_E / used_E.sum()).sum()
            pairs = (rng.permutation(tokens_1TK, axis=1) for _ in range(4))
            shuffled_any[at] = np.mean([_repeats(tokens_1TK, other)[1] for other in pairs])
    return Repetition(
        first_LM=first,
        any_LM=any_,
        first_error_LM=first_error,
        any_error_LM=any_error,
        first_uniform=1 / num_experts,
        any_uniform=1 - comb(num_experts - top_k, top_k) / comb(num_experts, top_k),
        first_shuffled_LM=shuffled,
        any_shuffled_LM=shuffled if top_k == 1 else shuffled_any,
    )


def to_json(result: Any) -> Any:
    """Turn findings, or any part of them, into plain dicts, lists and numbers; NaN becomes None."""
    if isinstance(result, tuple) and hasattr(result, "_asdict"):
        return {name: to_json(value) for name, value in result._asdict().items()}
    if isinstance(result, np.ndarray):
        return to_json(result.tolist())
    if isinstance(result, list | tuple):
        return [to_json(value) for value in result]
    if isinstance(result, float) and not np.isfinite(result):
        return None
    return result


def _membership(label_N: NDArray[np.int64], num_labels: int) -> Floats:
    """1 where window (or block) n has label m, else 0. [M, N]."""
    return np.equal(label_N, np.arange(num_labels)[:, None]).astype(np.float64)


def _block_starts(recording: Recording) -> NDArray[np.int64]:
    """First window of each block; blocks are numbered in order and lie together."""
    return np.unique(recording.block_N, return_index=True)[1]


def _shares(counts: NDArray[Any]) -> Floats:
    """Counts along the last axis as shares; all zeros stay zeros."""
    shares: Floats = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return shares


def _entropy(p: Floats) -> Floats:
    """Entropy along the last axis, in nats."""
    surprise: Floats = -np.log(np.where(p > 0, p, 1.0))
    entropies: Floats = (p * surprise).sum(axis=-1)
    return entropies


def _distances(weights_MP: Floats, counts_PX: Floats, shape: tuple[int, int, int]) -> Floats:
    """Total variation of each weighted domain from the mean over domains. [L, M]."""
    shares_MLE = _shares((weights_MP @ counts_PX).reshape(shape))
    apart_ML: Floats = 0.5 * np.abs(shares_MLE - shares_MLE.mean(axis=0)).sum(axis=-1)
    return apart_ML.T


def _draw(
    member_MP: Floats, counts_PX: Floats, shape: tuple[int, int, int], draws: int, seed: int
) -> tuple[Floats, Floats]:
    """Distances with blocks dealt to domains at random, and resampled within domains. [Z, L, M]."""
    rng = np.random.default_rng(seed)
    dealt, resampled = [], []
    for _ in range(draws):
        order_P = rng.permutation(member_MP.shape[1])
        dealt.append(_distances(member_MP[:, order_P], counts_PX, shape))
        weights_MP = np.zeros_like(member_MP)
        for row_P, own_P in zip(weights_MP, member_MP > 0, strict=True):
            size = int(own_P.sum())
            row_P[own_P] = rng.multinomial(size, np.full(size, 1 / size))
        resampled.append(_distances(weights_MP, counts_PX, shape))
    return np.stack(dealt), np.stack(resampled)


def _holm(p_value_L: Floats) -> NDArray[np.bool_]:
    """Which p-values hold at a family-wise `SIGNIFICANCE` (Holm's step-down)."""
    order_L = np.argsort(p_value_L)
    limits_L = SIGNIFICANCE / np.arange(len(p_value_L), 0, -1)
    passed_L = np.zeros(len(p_value_L), dtype=np.bool_)
    passed_L[order_L] = np.logical_and.accumulate(p_value_L[order_L] <= limits_L)
    return passed_L


def _repeats(
    here_NSK: NDArray[np.unsignedinteger[Any]], there_NSK: NDArray[np.unsignedinteger[Any]]
) -> tuple[Floats, Floats]:
    """By window: share of positions with the same first choice, and with any shared choice."""
    same_NS = here_NSK[..., 0] == there_NSK[..., 0]
    shared_NS = same_NS.copy()
    for choice in range(here_NSK.shape[2]):
        shared_NS |= (here_NSK[..., choice : choice + 1] == there_NSK).any(axis=2)
    return same_NS.mean(axis=1), shared_NS.mean(axis=1)


def _standard_error(rate_N: Floats, block_N: NDArray[np.int64]) -> float:
    """Standard error of the mean rate, with whole blocks as the independent pieces."""
    starts_P = np.unique(block_N, return_index=True)[1]
    if len(starts_P) < 2:
        return float("nan")
    sums_P = np.add.reduceat(rate_N - rate_N.mean(), starts_P)
    blocks = len(starts_P)
    return float(np.sqrt(np.square(sums_P).sum() * blocks / (blocks - 1)) / len(rate_N))
