"""What an ablation finds: the loss with and without an expert, beside chance and token identity.

Letters beside those of docs/shapes.md: M domains, X numbers of masked choices; an axis of 2 is
[low, high]. Intervals are of 95 %, over documents; NaN for a single document.
"""

from __future__ import annotations

from typing import NamedTuple

from moestro.probe.measures.bootstrap import Floats, Ints

MORE = "matters more to its domain"
ALIKE = "matters as much elsewhere"
ELSEWHERE = "matters elsewhere, and not beyond noise to its domain"
UNCLEAR = "matters, but whether more to its domain cannot be told"
BETTER = "its domain does better without it"
NOTHING = "no effect beyond noise"
ONE_DOCUMENT = "cannot be told (one document)"
ONE_DOMAIN = "cannot be told (one domain)"

BEYOND_TOKENS = "more than its tokens suffer elsewhere"
WITHIN_TOKENS = "its tokens alone may explain it"
OTHER_TOKENS = "cannot be told (its tokens are not found elsewhere)"
LEAST_COVERED = 0.25  # of a domain's tokens must occur elsewhere for a word on them


class TokenIdentity(NamedTuple):
    """The change in the domain beside the change that the same token ids suffer elsewhere.

    A regression of the change on "in the domain" and token id: every id found on both sides, n
    times in the domain and n' times elsewhere, counts n·n' / (n + n').
    """

    covered: float  # share of the domain's tokens whose id occurs elsewhere
    here: float  # mean change of those ids in the domain, bits per token
    alike: float  # mean change of the same ids elsewhere
    excess: float  # here − alike
    excess_interval_2: Floats
    # Share of deals with an excess as strong, once each id's mean is taken off: the null that
    # token identity alone explains the change.
    p_value: float


class Ablation(NamedTuple):
    """What one changed expert did to the loss. Changes are in the unit of `Ablations`.

    "Elsewhere" is the tokens of all other domains together.
    """

    layer: int  # its layer number in the model
    expert: int
    other: int | None  # the expert it was swapped with; None in the other modes
    domain: str  # that it is thought to serve
    control: bool  # it is here for comparison, and not thought to be special
    change_M: Floats  # rise of the loss in each domain
    change_interval_M2: Floats
    own: float  # the rise in its own domain
    elsewhere: float
    elsewhere_interval_2: Floats
    difference: float  # own − elsewhere
    difference_interval_2: Floats
    p_own: float  # Student's t over documents, two-sided: chance of `own` without any effect
    p_elsewhere: float
    p_more: float  # share of deals of documents to domains with a difference as large (by its t)
    share_M: Floats  # of each domain's assignments in the layer that the change touched
    per_assignment: float  # rise in its own domain for each assignment touched, bits; NaN if none
    per_assignment_elsewhere: float
    per_assignment_interval_2: Floats  # of the difference of the two
    # Mean of `per_assignment` of the layer's controls for this domain; NaN without controls.
    control_per_assignment: float
    control_interval_2: Floats  # of per_assignment − control_per_assignment
    by_input: TokenIdentity  # beside the same tokens read elsewhere
    by_target: TokenIdentity  # beside the same tokens predicted elsewhere
    # One of the sentences at the top of this file, after Holm's correction for all rows (controls
    # by themselves). "Matters as much elsewhere" says that the loss rises elsewhere too and is not
    # shown to rise more in its domain.
    verdict: str = ""
    # Whether token identity explains the difference; both kinds of it must fail to. Empty unless
    # the verdict is "matters more to its domain".
    tokens_verdict: str = ""
    matters_more: bool = False  # the verdict is that it matters more to its domain


class Ablations(NamedTuple):
    """Experts changed one at a time, and the loss on the same text with and without."""

    fingerprint: str  # of the model
    mode: str  # what was done to each: a key of `moestro.probe.ablation.ablate.MODES`
    unit: str  # of losses and changes: "bits per token" or "bits per byte"
    domains: tuple[str, ...]
    tokens_M: Ints  # predicted tokens
    documents_M: Ints
    bytes_M: Ints | None  # that the predicted tokens stand for; None where they were not given
    baseline_M: Floats  # loss of the unchanged model
    baseline_interval_M2: Floats
    rows: tuple[Ablation, ...]  # the experts that look special first, then controls
    passes: int  # forward passes that it took
    draws: int  # random draws behind intervals and p-values


class Masked(NamedTuple):
    """The loss when every token loses the experts that its router weighs most."""

    fingerprint: str  # of the model
    mode: str  # "mask_top" or "mask_top_renormalised"; see `ablate.mask_top`
    layers: tuple[int, ...]  # the mixture layers masked, by layer number
    unit: str  # "bits per token" or "bits per byte"
    domains: tuple[str, ...]
    tokens_M: Ints  # predicted tokens
    documents_M: Ints
    top_k: int
    masked_X: Ints  # choices masked of each token's K, from 0
    loss_XM: Floats
    loss_interval_XM2: Floats
    change_XM: Floats  # the loss less that of the unchanged model
    change_interval_XM2: Floats  # of the same documents with and without
    passes: int  # forward passes that it took
