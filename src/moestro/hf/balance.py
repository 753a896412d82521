"""Balance for mixtures of transformers: losses and loss-free bias updates for any training loop.

See docs/balance.md. Letters: T tokens, E experts, K experts per token, L mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Never, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moestro.config import BalanceConfig
from moestro.errors import CheckpointError, ConfigError, MoestroError
from moestro.foreign import hooks
from moestro.foreign.classes import core, core_kind
from moestro.foreign.taps import Tap, taps
from moestro.hf.balance_callback import BalanceCallback
from moestro.hf.family_loss import OwnLoss, own_switch
from moestro.hf.selection import AddedBias, biases_of, reshard
from moestro.hf.watch import Watch
from moestro.moe.balance import update_bias
from moestro.moe.routing import Routing
from moestro.train.distributed import ALONE, Ranks
from moestro.train.health import LayerHealth, Tally
from moestro.train.objective import Objective

Scope = Literal["micro", "sequence", "global"]


def balance(
    model: nn.Module,
    *,
    switch: float | None = None,
    scope: Scope = "micro",
    z: float = 0.0,
    bias_rate: float = 0.0,
) -> Balance:
    """Watch a model's routers and keep their experts evenly used while any loop trains it.

    Losses are summed over the layers, and the Switch loss of a layer is 1 at perfect balance
    whatever K (`moestro.moe.balance`): a coefficient means the same for every family.

    Args:
        model: of transformers; what the loop calls, or a DistributedDataParallel around it. In
            several processes torch.distributed must be initialised before.
        switch: coefficient of the Switch loss. None takes the family's own from its configuration,
            converted by `converted`; where it names none, 0 if `z` or `bias_rate` is given.
        scope: tokens that the Switch loss counts: a micro-batch, each sequence, or the
            micro-batches of a step so far, of all ranks.
        z: coefficient of the z-loss (Zoph et al. 2022).
        bias_rate: u of the loss-free bias (Wang et al. 2024); 0: biases stay as they are.

    Raises:
        MoestroError: no mixture, a router that is not known, or a bias that cannot be added.
        ConfigError: a coefficient is negative; or none is given, and the family names none or 0.
    """
    if isinstance(model, nn.DataParallel):
        raise ConfigError(
            "the copies of torch.nn.DataParallel cannot be counted together; start one process a "
            "GPU (torchrun) with DistributedDataParallel"
        )
    if isinstance(model, DistributedDataParallel):
        model = model.module
    found = _mixtures(model, bool(z))
    hooks.drop_copied(model)
    if any(isinstance(getattr(each, "__self__", None), Watch) for each in hooks.functions(model)):
        raise MoestroError("this model is balanced already; call remove() on the first balancer")
    if switch is None:
        switch = own_switch(model, found)
        if not (switch or z or bias_rate):
            what = "names no coefficient for a balance loss"
            if switch is not None:
                what = "says that the coefficient of the balance loss is 0"
            raise ConfigError(
                f"the configuration of {type(model).__name__} {what}; "
                "give switch= (0.01 is usual), z= or bias_rate="
            )
    cfg = BalanceConfig(switch=switch or 0.0, scope=scope, z=z, bias_rate=bias_rate)
    return Balance(model, found, cfg)


class Balance:
    """The balance of one model in training; made by `balance`.

    Attributes:
        model: whose forward passes are watched.
        cfg: the coefficients, converted.
        parts: of the last `loss`, each loss unweighted, as a mean over layers: 1 is perfect for
            `switch`. Detached.
    """

    def __init__(self, model: nn.Module, found: list[Tap], cfg: BalanceConfig) -> None:
        self.model, self.cfg = model, cfg
        self.parts: dict[str, Tensor] = {}
        self._mixtures, self._ranks = found, _ranks()
        self._objective = Objective(cfg, self._ranks)
        self._has_losses = bool(cfg.switch or cfg.z)
        self._pending: tuple[list[Routing], int] | None = None
        self._tally: Tally | None = None
        self._last: Tally | None = None
        self._reached: bool | None = None  # whether a backward pass came through a loss; None: none
        self._biases = biases_of(model, found) if cfg.bias_rate else {}
        self._own = OwnLoss(model)
        self._watch = Watch(model, found, self._begins, self._seen, self._has_losses)

    def loss(self) -> Tensor:
        """The balance losses of the last forward pass, to be added to its loss. fp32 scalar.

        Under accumulation it is one micro-batch's, to be divided as that micro-batch's own loss is.

        Raises:
            MoestroError: no forward pass in training mode since the last call, or no gradient.
        """
        if self._pending is None:
            raise MoestroError(
                "there is no forward pass to take the balance loss of: call loss() once after "
                "each, in training mode and with gradients on"
            )
        (routings, num_sequences), self._pending = self._pending, None
        self.parts = {}
        if not self._has_losses:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        total = routings[0].logits_TE.new_zeros(())
        for name, weight, values_L in self._objective.balance(routings, num_sequences):
            total = total + weight * values_L.sum()
            self.parts[name] = values_L.detach().mean()
        if not total.requires_grad:
            raise MoestroError(
                "the balance loss has no gradient: neither a router nor anything before one is "
                "trained; set switch and z to 0, or train the routers"
            )
        self._reached = bool(self._reached)
        # torch leaves `register_hook` without annotations.
        total.register_hook(self._reach)  # type: ignore[no-untyped-call]
        return total

    def valid(self, mask: Tensor) -> None:
        """Say which tokens of the next forward pass are real, where its attention mask does not.

        It holds for that pass alone, in training or not.

        Args:
            mask: nonzero for real tokens, one place for each token that is routed, sequence by
                sequence: [B, S] or [T].
        """
        self._watch.valid(mask)

    def step(self) -> None:
        """After the optimizer's step, on every rank: sum up the counts, move the biases.

        The counts are those of all micro-batches since the last step, over all ranks.

        Raises:
            MoestroError: there was no forward pass since, or no backward pass through its loss.
        """
        if self._tally is None:
            raise MoestroError(
                "step() without a forward pass since the last: call it once after each "
                "optimizer.step(), with the model in training mode"
            )
        self._refuse_untaken()
        if self._reached is False:
            raise MoestroError(
                "loss() was called, but no backward pass of this step came through what it "
                "returned: add it to the loss that backward() is called on"
            )
        self._tally.reduce(self._ranks)
        if self.cfg.bias_rate:
            reshard(self.model)
            for bias, counts_E in zip(self._biases.values(), self._tally.counts_LE, strict=True):
                value_E = bias.value_E.to(counts_E.device, copy=True)
                update_bias(value_E, counts_E, self.cfg.bias_rate)
                bias.set(value_E)
        self._last = self._tally
        self.restart()

    def restart(self) -> None:
        """Forget the forward passes since the last step, of a step that failed and is repeated."""
        self._pending = self._tally = self._reached = None
        self._objective.restart()

    def health(self) -> dict[str, LayerHealth]:
        """How each mixture's experts were used in the last step, over all ranks, by name.

        Raises:
            MoestroError: there was no step yet.
        """
        if self._last is None:
            raise MoestroError("there is no step to report on yet: call step() first")
        layers = self._last.unpack(self._last.packed().tolist())
        return {tap.name: layer for tap, layer in zip(self._mixtures, layers, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """The biases by mixture, fp32 [E]; empty without. To be saved between steps.

        Under FSDP call it on every rank, as the model's own: a family's bias may be sharded.
        """
        return {name: bias.value_E.cpu().clone() for name, bias in self._biases.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, with a `bias_rate` of 0 too: to use a trained model.

        Raises:
            CheckpointError: it is not of a model of these mixtures.
        """
        if state or self._biases:
            given = {name: tuple(value.shape) for name, value in state.items()}
            wanted = {tap.name: (tap.num_experts,) for tap in self._mixtures}
            if given != wanted:
                name, shape = sorted(given.items() ^ wanted.items())[0]
                raise CheckpointError(
                    f"the state is not of the biases of this model: {name} with {shape} is in one "
                    "and not in the other"
                )
            self._biases = self._biases or biases_of(self.model, self._mixtures)
        reshard(self.model)
        for name, bias in self._biases.items():
            bias.set(state[name])

    def callback(self, *, add_loss: bool = True) -> BalanceCallback:
        """For `Trainer(..., callbacks=[balancer.callback()])`; see `BalanceCallback`."""
        return BalanceCallback(self, add_loss)

    def remove(self, *, keep_bias: bool = False) -> None:
        """Stop watching, and switch the family's own loss on again if it was.

        Args:
            keep_bias: keep choosing with the biases that the family does not have itself. Without
                them the model routes differently than in training.
        """
        self._watch.remove()
        self._own.remove()
        self.restart()
        if not keep_bias:
            for bias in self._biases.values():
                bias.remove()

    def __reduce__(self) -> Never:
        raise MoestroError(
            "a balancer belongs to one model and cannot be copied or pickled. Copy the model, call "
            "moestro.hf.balance on the copy, and take the biases over by state_dict()"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def adds_bias(self) -> bool:
        """Whether there are biases that are neither part of the model nor saved with it."""
        return any(isinstance(bias, AddedBias) for bias in self._biases.values())

    @property
    def waiting(self) -> bool:
        """Whether a forward pass waits for its `loss` to be taken."""
        return self._pending is not None

    def _begins(self) -> None:
        if _ranks() != self._ranks:
            raise MoestroError(
                "torch.distributed was initialised after moestro.hf.balance, which counts this "
                "rank alone; balance the model after init_process_group"
            )
        self._refuse_untaken()

    def _seen(self, routings: list[Routing], num_sequences: int) -> None:
        if self._tally is None:
            device = routings[0].logits_TE.device
            self._tally = Tally(len(routings), routings[0].num_experts, device)
        self._tally.add(routings)
        # Without a loss to take, nothing of the graph may be held on to.
        self._pending = (routings if self._has_losses else []), num_sequences

    def _reach(self, _: Tensor) -> None:
        self._reached = True

    def _refuse_untaken(self) -> None:
        if self._has_losses and self._pending is not None:
            self._pending = None
            raise MoestroError(
                "the balance loss of the last forward pass was never taken: add balancer.loss() to "
                "each training loss, and run passes that are not trained on under torch.no_grad()"
            )


def _mixtures(model: nn.Module, z: bool) -> list[Tap]:
    """Every mixture of a model; refused is one that cannot be balanced."""
    found = taps(model)
    sizes = sorted({tap.num_experts for tap in found})
    if len(sizes) > 1:
        raise MoestroError(f"mixtures of {sizes} experts in one model cannot be balanced together")
    for tap in found:
        if tap.router is None or tap.scoring is None:
            raise MoestroError(
                f"how {tap.name} ({core_kind(tap.router or tap.experts)}) chooses is not known: no "
                "router of a known class is beside it, so it cannot be balanced"
            )
        if z and tap.scoring == "none":
            name = core_kind(tap.router)
            raise MoestroError(f"{name} shows probabilities and no logits: set z to 0")
        if getattr(core(tap.experts), "_is_expert_parallel", False):
            raise MoestroError(
                f"the experts of {tap.name} are spread over processes, which count them by local "
                "numbers; balance works with whole experts on each rank"
            )
    return found


def _ranks() -> Ranks:
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())
