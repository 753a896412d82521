"""Balance within transformers' Trainer: a callback that adds the loss and moves the biases."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from moestro.errors import CheckpointError, ConfigError, MoestroError
from moestro.foreign import hooks
from moestro.train.health import LayerHealth

# What lies beside a checkpoint's weights: biases that the model's own files have no place for.
FILE = "moestro_balance.safetensors"
_IGNORED = -100


class _Balance(Protocol):
    """What is asked of a `moestro.hf.Balance`."""

    model: nn.Module
    parts: dict[str, Tensor]

    @property
    def adds_bias(self) -> bool: ...
    @property
    def waiting(self) -> bool: ...
    def loss(self) -> Tensor: ...
    def step(self) -> None: ...
    def restart(self) -> None: ...
    def health(self) -> dict[str, LayerHealth]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class BalanceCallback(TrainerCallback):
    """Lets a `Balance` work within transformers' Trainer; see docs/balance.md.

    While the Trainer trains, the balance loss is added to the loss in the model's output, by the
    micro-batch's share of the step's labels. After each step of the optimizer the biases move. To
    what is logged come `balance/imbalance` and `balance/entropy` (means over layers),
    `balance/worst` (imbalance), `balance/dead` (all layers) and the losses of the last micro-batch.
    Biases go into `moestro_balance.safetensors` in each checkpoint and come back on resuming.

    Args:
        balance: of the model that the Trainer is given.
        add_loss: False: a loss function of your own (`compute_loss_func`) adds `balance.loss()`.
    """

    def __init__(self, balance: _Balance, add_loss: bool = True) -> None:
        self.balance, self._add_loss = balance, add_loss
        self._adding = ExitStack()
        self._stepped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to add the loss; on resuming, read the biases.

        Raises:
            ConfigError: DataParallel, or a different model than the balanced one.
            CheckpointError: there is no file of biases to resume with.
        """
        model = kwargs["model"]
        if args.n_gpu > 1:
            raise ConfigError(
                f"the Trainer would run {args.n_gpu} GPUs with DataParallel, whose routing cannot "
                "be counted together; start it with torchrun, one process a GPU"
            )
        if self.balance.model not in (model, getattr(model, "module", None)):
            raise ConfigError(
                f"the Trainer trains a {type(model).__name__} that is not the balanced model: call "
                "moestro.hf.balance on the very model that the Trainer is given, adapters included"
            )
        if state.global_step:
            self._take(Path(args.output_dir or "", f"checkpoint-{state.global_step}", FILE))
        self._adding.close()
        # The Trainer begins again where memory did not suffice for a batch (auto_find_batch_size).
        self.balance.restart()
        if self._add_loss:
            register = self.balance.model.register_forward_hook
            self._adding.callback(hooks.add(register, self._add, with_kwargs=True).remove)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Move the biases."""
        self.balance.step()
        self._stepped = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the health of the last step to a log of training."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs or not self._stepped:
            return
        health = self._health()
        logs.update(health)
        state.log_history[-1].update(health)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save the biases beside the model."""
        biases = self.balance.state_dict()
        if biases and state.is_world_process_zero:
            save_file(biases, Path(args.output_dir or "", f"checkpoint-{state.global_step}", FILE))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop adding the loss. Biases stay in force until `balance.remove()`.

        With `load_best_model_at_end` they become those of the best checkpoint, as the weights do.

        Raises:
            CheckpointError: there is no file of biases in it.
        """
        self._adding.close()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._take(Path(state.best_model_checkpoint, FILE))

    def _take(self, path: Path) -> None:
        """The biases of a checkpoint."""
        if path.is_file():
            self.balance.load_state_dict(load_file(path))
        elif self.balance.adds_bias:
            raise CheckpointError(
                f"there is no {path} with the selection biases of this checkpoint, without which "
                "the model routes differently than in training; copy it from where it was saved"
            )

    def _add(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The model's output with the balance loss in its loss."""
        if not self.balance.waiting:
            return None
        as_tuple = isinstance(output, tuple)
        loss = output[0] if as_tuple else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MoestroError(
                "the model's output has no loss to add the balance loss to (label smoothing and "
                "compute_loss_func take the labels away); use balancer.callback(add_loss=False), "
                "and add balancer.loss() in compute_loss_func"
            )
        loss = loss + self.balance.loss().to(loss.device) * _share(model, kwargs)
        if as_tuple:
            return (loss, *output[1:])
        output.loss = loss
        return output

    def _health(self) -> dict[str, float]:
        layers = self.balance.health().values()
        found = {
            "imbalance": sum(layer.imbalance for layer in layers) / len(layers),
            "worst": max(layer.imbalance for layer in layers),
            "dead": float(sum(layer.dead for layer in layers)),
            "entropy": sum(layer.entropy for layer in layers) / len(layers),
            **{name: float(value) for name, value in self.balance.parts.items()},
        }
        return {f"balance/{name}": value for name, value in found.items()}


def _share(model: nn.Module, inputs: dict[str, Any]) -> Tensor | float:
    """How much of a step's loss this micro-batch is; 1 where the Trainer divides by itself."""
    items = inputs.get("num_items_in_batch")
    if items is None:
        return 1.0
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs["labels"]
        # A causal model's loss leaves the first label of a sequence out, and so does the Trainer.
        if LOSS_MAPPING.get(str(getattr(model, "loss_type", ""))) is ForCausalLMLoss:
            labels = labels[..., 1:]
    share: Tensor = (labels != _IGNORED).sum().float() / items  # not in the default dtype
    return share
