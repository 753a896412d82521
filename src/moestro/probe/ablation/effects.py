"""What an ablation finds: the loss with and without an expert, beside chance and token identity.

Letters beside those of docs/shapes.md: M domains, X numbers of masked choices; an axis of 2 is
[low, high].
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

    Attributes:
        covered: share of the domain's tokens whose id occurs elsewhere.
        here: mean change of those ids in the domain, bits per token.
        alike: mean change of the same ids elsewhere.
        excess: here − alike.
        excess_interval_2: its 95 % interval over documents.
        p_value: share of deals with an excess as strong, once each id's mean is taken off: the
            null that token identity alone explains the change.
    """

    covered: float
    here: float
    alike: float
    excess: float
    excess_interval_2: Floats
    p_value: float


class Ablation(NamedTuple):
    """What one changed expert did to the loss. Changes are in the unit of `Ablations`.

    "Elsewhere" is the tokens of all other domains together.

    Attributes:
        layer: its layer number in the model.
        expert: its number in that layer.
        other: the expert it was swapped with; None in the other modes.
        domain: the domain that it is thought to serve.
        control: it is here for comparison, and not thought to be special.
        change_M: rise of the loss in each domain.
        change_interval_M2: its 95 % interval over documents; NaN for one document.
        own: the rise in its own domain.
        elsewhere: the rise elsewhere.
        elsewhere_interval_2: its interval.
        difference: own − elsewhere.
        difference_interval_2: its interval.
        p_own: Student's t over documents, two-sided: chance of `own` if there were no effect.
        p_elsewhere: the same of `elsewhere`.
        p_more: share of deals of documents to domains with a difference as large (by its t).
        share_M: share of each domain's assignments in the layer that the change touched.
        per_assignment: rise in its own domain for each assignment touched, bits; NaN if none.
        per_assignment_elsewhere: the same elsewhere.
        per_assignment_interval_2: interval of the difference of the two.
        control_per_assignment: the mean of `per_assignment` of the layer's controls for this
            domain; NaN without controls.
        control_interval_2: interval of per_assignment − control_per_assignment.
        by_input: beside the same tokens read elsewhere.
        by_target: beside the same tokens predicted elsewhere.
        verdict: one of the sentences at the top of this file, after Holm's correction for all
            rows (controls by themselves). "Matters as much elsewhere" says that the loss rises
            elsewhere too and is not shown to rise more in its domain.
        tokens_verdict: whether token identity explains the difference; both kinds of it must fail
            to. Empty unless the verdict is "matters more to its domain".
        matters_more: the verdict is that it matters more to its domain.
    """

    layer: int
    expert: int
    other: int | None
    domain: str
    control: bool
    change_M: Floats
    change_interval_M2: Floats
    own: float
    elsewhere: float
    elsewhere_interval_2: Floats
    difference: float
    difference_interval_2: Floats
    p_own: float
    p_elsewhere: float
    p_more: float
    share_M: Floats
    per_assignment: float
    per_assignment_elsewhere: float
    per_assignment_interval_2: Floats
    control_per_assignment: float
    control_interval_2: Floats
    by_input: TokenIdentity
    by_target: TokenIdentity
    verdict: str = ""
    tokens_verdict: str = ""
    matters_more: bool = False


class Ablations(NamedTuple):
    """Experts changed one at a time, and the loss on the same text with and without.

    Attributes:
        fingerprint: of the model.
        mode: what was done to each: a key of `moestro.probe.ablation.ablate.MODES`.
        unit: of losses and changes: "bits per token" or "bits per byte".
        domains: the M labels.
        tokens_M: predicted tokens.
        documents_M: documents, the independent pieces of text.
        bytes_M: bytes that the predicted tokens stand for; None where they were not given.
        baseline_M: loss of the unchanged model.
        baseline_interval_M2: its 95 % interval over documents.
        rows: the experts that look special first, then controls.
        passes: forward passes that it took.
        draws: random draws behind intervals and p-values.
    """

    fingerprint: str
    mode: str
    unit: str
    domains: tuple[str, ...]
    tokens_M: Ints
    documents_M: Ints
    bytes_M: Ints | None
    baseline_M: Floats
    baseline_interval_M2: Floats
    rows: tuple[Ablation, ...]
    passes: int
    draws: int


class Masked(NamedTuple):
    """The loss when every token loses the experts that its router weighs most.

    Attributes:
        fingerprint: of the model.
        mode: "mask_top" or "mask_top_renormalised"; see `moestro.probe.ablation.ablate.mask_top`.
        layers: the mixture layers masked, by layer number.
        unit: "bits per token" or "bits per byte".
        domains: the M labels.
        tokens_M: predicted tokens.
        documents_M: documents.
        top_k: K.
        masked_X: choices masked of each token's K, from 0.
        loss_XM: loss of each domain.
        loss_interval_XM2: its 95 % interval over documents; NaN for one document.
        change_XM: the loss less that of the unchanged model.
        change_interval_XM2: its interval, of the same documents with and without.
        passes: forward passes that it took.
    """

    fingerprint: str
    mode: str
    layers: tuple[int, ...]
    unit: str
    domains: tuple[str, ...]
    tokens_M: Ints
    documents_M: Ints
    top_k: int
    masked_X: Ints
    loss_XM: Floats
    loss_interval_XM2: Floats
    change_XM: Floats
    change_interval_XM2: Floats
    passes: int
