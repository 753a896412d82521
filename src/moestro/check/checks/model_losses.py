"""Checks of the balance loss that a whole model of transformers adds to its own loss.

The formula, over the real tokens of all layers together: E · Σ_e f_e · P_e, f_e the assignments
of expert e over the tokens (their sum is K), P_e the mean of its probability. What was assigned is
seen where the experts are called, so a loss that supposes another choice is told from the formula.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moestro.check.checks.check import Check
from moestro.check.compare import difference
from moestro.check.filling import SPREAD, drawn, is_choice_bias
from moestro.check.report import Finding, skipped, wrong
from moestro.check.subject import named_tensors
from moestro.check.trial import Trial
from moestro.errors import MoestroError
from moestro.foreign.classes import core
from moestro.foreign.taps import RawChoice, Tap, tapped, taps
from moestro.moe.balance import COEFFICIENTS

LARGEST = 100_000_000  # parameters of a model that is copied


class Passed(NamedTuple):
    """One pass of a model.

    Attributes:
        output: what it returned.
        choices: of each mixture.
        found: the mixtures.
    """

    output: Any
    choices: list[RawChoice]
    found: list[Tap]


def value(trial: Trial) -> Finding:
    """Value, and the gradient of every router."""
    model, ids = _copied(trial), _ids(trial)
    passed = _pass(model, ids)
    loss = passed.output.aux_loss
    if not isinstance(loss, Tensor):
        return wrong(f"asked for, aux_loss is {loss!r}")
    exact = _formula(passed, None)
    finding = trial.verdict([difference("aux_loss", loss, exact)])
    if finding.outcome == "wrong":
        return finding._replace(words=finding.words + _guess(trial, passed, loss))
    weights = [each for tap in passed.found for each in _weights(tap)]
    if not weights:  # all of them are frozen
        return finding
    meant = torch.autograd.grad(exact, weights, retain_graph=True, allow_unused=True)
    if not loss.requires_grad:
        return wrong("aux_loss has no gradient")
    got = torch.autograd.grad(loss, weights, allow_unused=True)
    # All gradients of a loss that is K at balance; those of even use are rounding.
    floor = 1e-3 * float(exact.detach())
    return trial.verdict(
        difference(f"the gradient of aux_loss in router {number}", one, other.double(), floor)
        for number, (one, other) in enumerate(zip(got, meant, strict=True))
        if other is not None
    )


def masked(trial: Trial) -> Finding:
    """A padded row: its padding does not count."""
    model, ids = _copied(trial), _ids(trial)
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] // 2 :] = 0
    passed = _pass(model, ids, attention_mask=mask)
    exact = _formula(passed, mask.bool().flatten())
    finding = trial.verdict([difference("aux_loss", passed.output.aux_loss, exact)])
    if finding.outcome == "wrong":
        words = _guess(trial, passed, passed.output.aux_loss, mask.bool().flatten())
        counted = difference("", passed.output.aux_loss, _formula(passed, None)).relative
        if counted <= trial.allowed():
            words = "; padding is counted"
        return finding._replace(words=finding.words + words)
    return finding


def added(trial: Trial) -> Finding:
    """The loss is the plain one + coefficient · aux_loss."""
    model, ids = _copied(trial), _ids(trial)
    coefficient = _coefficient(model)
    if coefficient is None:
        return skipped("its settings name no coefficient")
    with torch.no_grad():
        plain = _run(model, ids, asked=False).loss.double()
        output = _run(model, ids)
    exact = plain + coefficient * output.aux_loss.double()
    return trial.verdict([difference("the loss", output.loss, exact)])


def kept(trial: Trial) -> Finding:
    """A second batch's is its own."""
    model, ids = _copied(trial), _ids(trial)
    with torch.no_grad():
        _pass(model, ids)
        passed = _pass(model, ids.flip(1) // 2 + 1)
        alone = _pass(_copied(trial), ids.flip(1) // 2 + 1).output.aux_loss
    return trial.verdict([difference("aux_loss", passed.output.aux_loss, alone.double())])


def _of_model(function: Callable[[Trial], Finding]) -> Callable[[Trial], Finding]:
    def checked(trial: Trial) -> Finding:
        model = trial.subject.whole
        if trial.subject.lost:
            raise MoestroError(trial.subject.lost)
        if model is None:
            return skipped("no whole model with a balance loss is given")
        if sum(each.numel() for each in model.parameters()) > LARGEST:
            raise MoestroError("the model is too large to be copied; check its config.json")
        return function(trial)

    return checked


def _copied(trial: Trial) -> Any:
    model = trial.subject.whole
    assert model is not None  # see `_of_model`
    made = copy.deepcopy(model).float().eval()
    with torch.no_grad():  # a bias of zero hides a loss that supposes a choice without it
        tensors = named_tensors(made)
        for name, values in drawn(made, [*filter(is_choice_bias, tensors)], spread=SPREAD).items():
            tensors[name].copy_(values)
    return made


def _ids(trial: Trial) -> Tensor:
    """[2, 8] tokens, the same for every check of a seed."""
    config: Any = trial.subject.whole
    most = min(int(config.config.get_text_config().vocab_size), 1000)
    generator = torch.Generator().manual_seed(trial.seed)
    return torch.randint(3, most, (2, 8), generator=generator, device="cpu")


def _pass(model: Any, ids: Tensor, **more: Any) -> Passed:
    found = [tap for tap in taps(model) if tap.router is not None]
    choices: list[RawChoice] = []

    def see(_: int, choice: RawChoice) -> None:
        choices.append(choice)

    with tapped(found, see):
        output = _run(model, ids, **more)
    shown = getattr(output, "router_logits", None)
    if shown is not None and len(shown) != len(found):
        raise MoestroError(
            f"its aux_loss is of {len(shown)} routers, of which {len(found)} are known: those of "
            "attention, or that hash, are not"
        )
    return Passed(output, choices, found)


def _run(model: Any, ids: Tensor, *, asked: bool = True, **more: Any) -> Any:
    return model(ids, labels=ids, output_router_logits=asked, use_cache=False, **more)


def _formula(
    passed: Passed,
    valid_T: Tensor | None,
    probabilities: Callable[[Tap, Tensor], Tensor | None] = Tap.probabilities,
    *,
    by_logits: bool = False,
) -> Tensor:
    """E · Σ f · P over all layers in float64; `by_logits`: f of the K largest logits."""
    num_experts = passed.found[0].num_experts
    counts_E, probs_E = torch.zeros(2, num_experts, dtype=torch.float64, device="cpu")
    tokens = 0
    for tap, choice in zip(passed.found, passed.choices, strict=True):
        logits_TE = choice.logits_TE
        probs_TE = None if logits_TE is None else probabilities(tap, logits_TE)
        if logits_TE is None or probs_TE is None:
            raise MoestroError(f"what {tap.name} calls probabilities is not known")
        experts_TK = choice.experts_TK.view(len(logits_TE), -1)
        if by_logits:
            experts_TK = logits_TE.topk(experts_TK.shape[1], -1).indices
        if valid_T is not None:
            probs_TE, experts_TK = probs_TE[valid_T], experts_TK[valid_T]
        counts_E = counts_E + torch.bincount(experts_TK.flatten(), minlength=num_experts)
        probs_E = probs_E + probs_TE.double().sum(0)
        tokens += len(experts_TK)
    product_E: Tensor = counts_E / tokens * probs_E / tokens
    return num_experts * product_E.sum()


def _softmax(_: Tap, logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(-1)


def _softmax_twice(_: Tap, logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(-1).softmax(-1)


def _of_sigmoid(_: Tap, logits_TE: Tensor) -> Tensor:
    return logits_TE.sigmoid().softmax(-1)


def _guess(trial: Trial, passed: Passed, loss: Tensor, valid_T: Tensor | None = None) -> str:
    """Which usual mistake gives this value, if one does."""
    for words, rule, by_logits in (
        ("it is of softmax probabilities, and the router's are others", _softmax, False),
        ("it counts the K largest logits, and the model used other experts", Tap.probabilities,
         True),
        ("it supposes a softmax router without bias or groups", _softmax, True),
        ("it takes softmax of softmax", _softmax_twice, False),
        ("it takes softmax of sigmoid scores", _of_sigmoid, False),
        ("it takes softmax of sigmoid scores, and counts another choice", _of_sigmoid, True),
    ):  # fmt: skip
        guess = _formula(passed, valid_T, rule, by_logits=by_logits)
        if difference("", loss, guess).relative <= trial.allowed():
            return f"; {words}"
    return ""


def _coefficient(model: nn.Module) -> float | None:
    config: Any = model.config
    owners = (config, *(getattr(config, name, None) for name in ("text_config", "ffn_config")))
    values = (getattr(owner, name, None) for owner in owners for name in COEFFICIENTS)
    return next((float(value) for value in values if value is not None), None)


def _weights(tap: Tap) -> list[nn.Parameter]:
    assert tap.router is not None
    return [each for each in core(tap.router).parameters() if each.dim() > 1 and each.requires_grad]


CHECKS = tuple(
    Check(name, meaning, looks_like, _of_model(function))
    for name, meaning, looks_like, function in (
        ("model-balance", "A model's aux_loss is its formula of the choices it made, and reaches "
         "its routers.",
         "softmax of a softmax (transformers#45120); another choice than the router's", value),
        ("model-balance-mask", "Padding does not count in a model's aux_loss.",
         "an attention mask that is not handed on (Megatron-LM#1617)", masked),
        ("model-loss", "A model's loss is that of its tokens + coefficient · aux_loss.",
         "a coefficient that is not used, or a return value that is dropped (Automodel#1408)",
         added),
        ("model-balance-state", "Each batch has its own aux_loss.", "losses of layers collected "
         "in a list that lives on (MegaBlocks)", kept),
    )
)  # fmt: skip
