"""A subject from a layer and its description: parameters by their names, rules as stated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.check import definition
from moestro.check.definition import Choice, Weights
from moestro.check.description import AdapterNames, Description, ExpertNames, RouterRule
from moestro.check.subject import Adapters, Ran, Subject, named_tensors
from moestro.errors import ConfigError
from moestro.kernels.reference import GATED, Biases


def described(module: nn.Module, about: Description, title: str = "") -> Subject:
    """A layer and its description.

    Raises:
        ConfigError: the description does not fit the layer.
    """
    tensors = named_tensors(module)
    weight = _named(tensors, about.router.weight)
    if weight.dim() != 2:
        raise ConfigError(f"{about.router.weight} is {list(weight.shape)}; a router is [E, D]")
    num_experts, dim = weight.t().shape if about.router.transposed else weight.shape
    weights = _experts(tensors, about, num_experts)
    hidden_dim = weights.down_EDF.shape[2]
    height = hidden_dim * (2 if about.experts.activation in GATED else 1)
    fits = weights.up_EHD.shape == (num_experts, height, dim)
    if not fits or weights.down_EDF.shape != (num_experts, dim, hidden_dim):
        raise ConfigError(
            f"experts of {about.experts.activation} with a router [{num_experts}, {dim}] are "
            f"[E, {height}, D] and [E, D, {hidden_dim}]; the description gives "
            f"{list(weights.up_EHD.shape)} and {list(weights.down_EDF.shape)}"
        )
    rule = about.router
    _fit(rule, num_experts)

    pairs = _pair_names(about, num_experts)

    def part(name: str) -> str:
        if name in pairs:
            return "adapters"
        if name in (rule.weight, rule.logit_bias, rule.choice_bias):
            return "router"
        shared = about.shared
        if shared and (name == shared.gate or name.startswith(f"{shared.module}.")):
            return "shared"
        return "experts" if name in _expert_names(about.experts, num_experts) else "other"

    return Subject(
        title or type(module).__name__, module, dim, hidden_dim, num_experts, rule.top_k,
        lambda module, x, valid: _run(about, module, x, valid),
        lambda module, x: _define(about, num_experts, module, x),
        part,
        lambda module, x_TD: _choose(about, named_tensors(module), x_TD),
        None if pairs else lambda module, order: _relabel(about, module, order),
        lambda module: _experts(named_tensors(module), about, num_experts),
        rule, about.training, about.takes_mask, about.capacity is not None,
        adapters=_adapters(about, num_experts), spread=about.spread,
        norm=about.norm, choice_biases=(rule.choice_bias,) if rule.choice_bias else (),
        score=rule.score, zeros=_zeros(about, num_experts, pairs),
    )  # fmt: skip


def _fit(rule: RouterRule, num_experts: int) -> None:
    if rule.top_k > num_experts or num_experts % rule.num_groups:
        raise ConfigError(f"top_k and num_groups do not fit {num_experts} experts")
    if rule.top_groups > rule.num_groups:
        raise ConfigError(f"top_groups is {rule.top_groups}; give at most num_groups")
    size = num_experts // rule.num_groups
    if rule.top_k > rule.top_groups * size:
        raise ConfigError(
            f"top_k is {rule.top_k}; top_groups = {rule.top_groups} of {size} experts each hold "
            f"{rule.top_groups * size}: lower top_k, or raise top_groups"
        )


def _zeros(about: Description, num_experts: int, pairs: set[str]) -> tuple[str, ...]:
    """All that is learned of the router, the experts and their adapters."""
    router = {name for name in (about.router.weight, about.router.logit_bias) if name}
    return tuple(sorted(router | _expert_names(about.experts, num_experts) | pairs))


def _named(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ConfigError(f"the layer has no parameter {name}; it has {', '.join(tensors)}")
    return tensors[name]


def _stacked(tensors: dict[str, Tensor], name: str, num_experts: int) -> Tensor:
    if "{e}" not in name:
        return _named(tensors, name)
    return torch.stack([_named(tensors, name.format(e=e)) for e in range(num_experts)])


def _expert_names(names: ExpertNames, num_experts: int) -> set[str]:
    given = (names.gate_up, names.gate, names.up, names.down, names.up_bias, names.down_bias)
    return {name.format(e=e) for name in given if name for e in range(num_experts)}


def _pair_names(about: Description, num_experts: int) -> set[str]:
    given = (name for each in about.adapters for name in (each.a, each.b))
    return {name.format(e=e) for name in given for e in range(num_experts)}


def _adapters(about: Description, num_experts: int) -> Adapters | None:
    if not about.adapters:
        return None

    def isolate(module: nn.Module, weight: str, expert: int | None) -> None:
        tensors = named_tensors(module)
        with torch.no_grad():
            for names in about.adapters:
                for e in range(num_experts):
                    if names.weight == weight and e == expert:
                        continue
                    b = tensors[names.b.format(e=e)]
                    (b if "{e}" in names.b else _of_expert(b, names, e, num_experts)).zero_()

    return Adapters(
        tuple(each.weight for each in about.adapters),
        about.merge or (lambda module: _merge(about, module, num_experts)),
        isolate,
    )


def _of_expert(b: Tensor, names: AdapterNames, expert: int, num_experts: int) -> Tensor:
    return b[:, expert::num_experts] if names.flat else b[expert]


def _delta(tensors: dict[str, Tensor], names: AdapterNames, num_experts: int) -> Tensor:
    """Scale · B_e A_e, [E, O, I]."""
    a, b = (_stacked(tensors, name, num_experts) for name in (names.a, names.b))
    if names.flat:
        a, b = a.view(num_experts, -1, a.shape[-1]), b.view(len(b), -1, num_experts)
        b = b.permute(2, 0, 1)
    if a.dim() != 3 or b.dim() != 3 or a.shape[1] != b.shape[2]:
        raise ConfigError(
            f"{names.a} {list(a.shape)} and {names.b} {list(b.shape)} are not "
            "[E, N, I] and [E, O, N]"
        )
    return names.scale * (b @ a)


def _merge(about: Description, module: nn.Module, num_experts: int) -> None:
    """Add every pair to its weight, and zero its B."""
    tensors = named_tensors(module)
    with torch.no_grad():
        for names in about.adapters:
            added = _delta(tensors, names, num_experts)
            added = added.transpose(1, 2) if about.experts.transposed else added
            for e, each in enumerate(added) if "{e}" in names.weight else ():
                tensors[names.weight.format(e=e)].add_(each)
            if "{e}" not in names.weight:
                tensors[names.weight].add_(added)
            for e in range(num_experts):
                tensors[names.b.format(e=e)].zero_()


def _experts(tensors: dict[str, Tensor], about: Description, num_experts: int) -> Weights:
    names = about.experts
    adapters = {each.weight: each for each in about.adapters}

    def read(name: str | None) -> Tensor | None:
        if name is None:
            return None
        found = _stacked(tensors, name, num_experts)
        if name not in adapters:
            return found
        added = _delta(tensors, adapters[name], num_experts)
        added = added.transpose(1, 2) if names.transposed else added
        if added.shape != found.shape:
            raise ConfigError(
                f"the adapter of {name} is {list(added.shape)}, it {list(found.shape)}"
            )
        return found + added

    def matrix(name: str | None) -> Tensor | None:
        found = read(name)
        return found if found is None or not names.transposed else found.transpose(1, 2)

    whole, gate, up, down = map(matrix, (names.gate_up, names.gate, names.up, names.down))
    if whole is None:
        assert up is not None
        whole = up if gate is None else torch.cat([gate, up], 1)
    assert down is not None
    if names.interleaved:
        whole = torch.cat([whole[:, ::2], whole[:, 1::2]], 1)
    up_EH, down_ED = read(names.up_bias), read(names.down_bias)
    if names.interleaved and up_EH is not None:
        up_EH = torch.cat([up_EH[:, ::2], up_EH[:, 1::2]], 1)
    biases = None
    if up_EH is not None or down_ED is not None:
        biases = Biases(
            whole.new_zeros(whole.shape[:2]) if up_EH is None else up_EH,
            down.new_zeros(down.shape[:2]) if down_ED is None else down_ED,
        )
    return Weights(whole, down, names.activation, biases, names.weigh_input)


def _run(about: Description, module: nn.Module, x: Tensor, valid: Tensor | None) -> Ran:
    masked = about.takes_mask and valid is not None
    output = about.call(module, x, valid) if masked else about.call(module, x)
    balance = about.balance(module, output) if about.balance else None
    z = about.z(module, output) if about.z else None
    balance = None if balance is None else balance / about.balance_at_even
    return Ran(about.output(output), balance, z=z)


def _choose(about: Description, tensors: dict[str, Tensor], x_TD: Tensor) -> Choice:
    rule = about.router
    weight_ED = tensors[rule.weight].t() if rule.transposed else tensors[rule.weight]
    logits_TE = x_TD @ weight_ED.t()
    if rule.logit_bias:
        logits_TE = logits_TE + tensors[rule.logit_bias]
    bias_E = tensors[rule.choice_bias].double() if rule.choice_bias else None
    return definition.choose(rule, logits_TE, bias_E)


def _define(about: Description, num_experts: int, module: nn.Module, x: Tensor) -> Ran:
    tensors = named_tensors(module)
    x_TD = x.reshape(-1, x.shape[-1])
    choice = _choose(about, tensors, x_TD)
    capacity = about.capacity
    kept_TK = definition.kept(capacity, choice, num_experts) if capacity else None
    experts = _experts(tensors, about, num_experts)
    y_TD = definition.mix(x_TD, choice, experts, kept_TK)
    if about.shared:
        shared_TD = module.get_submodule(about.shared.module)(x_TD)
        if about.shared.gate:
            shared_TD = shared_TD * (x_TD @ tensors[about.shared.gate].t()).sigmoid()
        y_TD = y_TD + shared_TD
    losses = definition.switch_loss(choice), definition.z_loss(choice)
    return Ran(y_TD.view(x.shape), losses[0], choice, losses[1])


def _relabel(about: Description, module: nn.Module, order: list[int]) -> None:
    tensors, names = named_tensors(module), about.experts
    router = about.router
    given = (router.logit_bias, router.choice_bias, names.gate_up, names.gate,
             names.up, names.down, names.up_bias, names.down_bias)  # fmt: skip
    with torch.no_grad():
        for name in filter(None, given):
            stacked = _stacked(tensors, name, len(order))[order].clone()
            for e in range(len(order)) if "{e}" in name else ():
                tensors[name.format(e=e)].copy_(stacked[e])
            if "{e}" not in name:
                tensors[name].copy_(stacked)
        weight = tensors[router.weight]
        weight.copy_(weight[:, order].clone() if router.transposed else weight[order].clone())
