"""The training loop: one class that takes a run from its first step, or its last save, to its end.

It prints nothing and reads no command line: the corpus, the folder and the display are given to
it, so that a command, a comparison or a notebook can drive it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moestro.checkpoints.opening import open_adapted, open_checkpoint
from moestro.config import RunConfig
from moestro.data.rows import ChatCorpus
from moestro.data.windows import Corpus, HeldOut
from moestro.errors import TrainingError
from moestro.models.build import Model, new_model
from moestro.models.network import ModelOutput
from moestro.moe import noise
from moestro.moe.balance import update_bias
from moestro.train import parallel, state
from moestro.train.diagnose import first_bad_gradient, first_bad_output, first_bad_parameter
from moestro.train.distributed import ALONE, Ranks
from moestro.train.evaluate import evaluate
from moestro.train.health import CollapseWatch, LayerHealth, Tally
from moestro.train.interrupt import READER_LEFT, StopRequest
from moestro.train.locking import locked
from moestro.train.metrics import METRICS_NAME, MetricsLog, Point, history, read_metrics
from moestro.train.objective import Objective, num_labels
from moestro.train.optim import learning_rate, make_optimizer, set_learning_rate, step_flops
from moestro.train.preflight import check_run
from moestro.train.progress import ProgressDisplay
from moestro.train.saving import Saver
from moestro.train.sharded_state import Share, newest_together
from moestro.train.snapshot import of_whole
from moestro.train.task import Example, check_vocabulary, task_of


class Result(NamedTuple):
    """What a run reached.

    Attributes:
        step: Steps done, less than asked for if it was stopped.
        checkpoint: Folder of the last checkpoint.
        history: Every evaluation, oldest first; those before a resume included.
        stopped_by: Number of the signal that ended it, or 0 if it came to its end.
    """

    step: int
    checkpoint: Path
    history: list[Point]
    stopped_by: int = 0


class StepNumbers(NamedTuple):
    """The numbers of one step, over all ranks."""

    loss: float
    grad_norm: float
    balance: dict[str, float]
    layers: list[LayerHealth]
    seconds: float
    stop: bool


class Trainer:
    """One run: a model, its optimizer, and a folder with everything that was measured and saved.

    Args:
        cfg: The settings, with `model.vocab_size` at least `train.task.vocabulary`.
        folder: The run's folder; made if missing.
        corpus: What to train on.
        progress: Where to show it, already entered; None shows nothing.
        ranks: This process's place among several.
    """

    def __init__(
        self,
        cfg: RunConfig,
        folder: Path,
        corpus: Corpus | ChatCorpus,
        progress: ProgressDisplay | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.device, self.dtype, self.layout = check_run(cfg, ranks)
        check_vocabulary(cfg.model, corpus.tokenizer, cfg.data.seq_len)
        self.cfg, self.folder, self.corpus, self.ranks = cfg, folder, corpus, ranks
        self.progress = progress if ranks.writes else None
        self.model: Model
        self._step_tokens = cfg.train.batch_size * cfg.data.seq_len
        self._step_flops = step_flops(cfg)
        chats = cfg.data.chat is not None
        self._task = task_of(cfg.model, corpus.tokenizer.end_of_text, chats)
        self._objective = Objective(cfg.balance, ranks)

    def train(self, resume: bool = False) -> Result:
        """Train to the last step, saving and evaluating on the way.

        SIGINT, SIGTERM, SIGHUP and a display without a reader end it after the current step,
        with a checkpoint.

        Args:
            resume: Go on from the newest good checkpoint of the folder; bitwise on the CPU.

        Raises:
            ConfigError: the folder holds a run already, another process trains it, or settings
                differ from the saved ones.
            CheckpointError: there are checkpoints to resume from, and all are damaged.
            TrainingError: the loss or a gradient is not finite, or nothing can be written.
        """
        with ExitStack() as stack:
            if self.ranks.writes:
                state.claim_folder(self.folder, resume)
                # What torchrun starts again may come before the disk lets go of a node that died.
                wait_s = self.cfg.parallel.timeout_s / 4 if self.ranks.world > 1 else 0.0
                stack.enter_context(locked(self.folder, wait_s))
            return self._train(resume)

    def _train(self, resume: bool) -> Result:
        self._build(self._open(resume))
        held_out = self.corpus.held_out(self.cfg.train.eval_tokens)
        log = None
        if self.ranks.writes:
            log = MetricsLog(self.folder, self._step, self.cfg.train.runtime.tensorboard)
        with closing(log) if log else nullcontext(), StopRequest() as stop, self._saver:
            return self._run(stop, held_out, log)

    def time_steps(self, number: int) -> float:
        """Median seconds of `number` steps on this machine; nothing is written or kept.

        The first half of the steps, in which kernels are compiled, is not counted.
        """
        self._build(None)
        with StopRequest() as stop:
            seconds = [self._one_step(step, stop).seconds for step in range(number)]
        if stop.signal:
            raise KeyboardInterrupt
        return statistics.median(seconds[number // 2 :])

    def _open(self, resume: bool) -> Path | None:
        """Prepare the folder on the writing rank; every rank gets the checkpoint to go on from."""
        newest = partial(newest_together, ranks=self.ranks)
        if self.ranks.writes:
            checkpoint = state.open_run(self.folder, self.cfg, resume, newest)
        else:
            checkpoint = newest(self.folder)
        self.ranks.wait()
        return checkpoint

    def _build(self, checkpoint: Path | None) -> None:
        """Make or load model, optimizer and routing watch, and wrap the model's forward."""
        cfg, runtime = self.cfg, self.cfg.train.runtime
        self.model = self._model(checkpoint)
        self.model.train()
        self.model.checkpoint_activations = runtime.checkpoint_activations
        if "router" in cfg.optim.freeze:
            for mixture in self.model.mixtures():
                mixture.router.requires_grad_(False)
        self._optimizer = make_optimizer(self.model, cfg.optim)
        self._places = parallel.places_of(self.model, self.layout, self.ranks.rank)
        self._share: Share | None = None
        if self.layout.splits:
            self._share = Share(self.model, self._optimizer, self._places, self.ranks)
        moe, num_mixtures = cfg.model.moe, len(self.model.mixtures())
        self._num_experts = moe.num_experts if moe is not None else 0
        self._watch = CollapseWatch(num_mixtures, self._num_experts, moe.top_k if moe else 1)
        self._step, self._seconds, self._save_failed = 0, 0.0, False
        self._saver = self._new_saver(checkpoint)
        if checkpoint is not None:
            fingerprint = self.corpus.fingerprint
            numbers = state.restore(
                checkpoint, self.model, self._optimizer, fingerprint, self._share
            )
            self._step, self._seconds = numbers.step, numbers.seconds
            self._watch.window_WLE = numbers.window_WLE
            self._watch.collapsed = set(numbers.collapsed)
        forward: nn.Module = self.model
        if runtime.compile:
            forward.compile()
        if self.ranks.world > 1 and not self.layout.splits:
            device_ids = [self.device] if self.device.type == "cuda" else None
            forward = DistributedDataParallel(forward, device_ids=device_ids)
        self._forward = forward

    def _new_saver(self, checkpoint: Path | None) -> Saver:
        """Of a spread model every rank writes its share, of another the first all of it."""
        what, snapshot = state.Saved(self.folder, self.cfg, self.corpus.tokenizer), None
        if self._share is not None:
            what, snapshot = what._replace(ranks=self.ranks), self._share.snapshot
        elif self.ranks.writes:
            snapshot = partial(of_whole, self.model, self._optimizer, self.cfg.lora)
        return Saver(what, self.ranks, snapshot, checkpoint, self.progress)

    def _model(self, checkpoint: Path | None) -> Model:
        """With this rank's weights: the checkpoint's, or new ones."""
        cfg, backend = self.cfg, self.cfg.train.runtime.backend
        weights = torch.float64 if self.dtype == torch.float64 else torch.float32
        torch.manual_seed(cfg.train.seed)
        if self.layout.splits:
            timeout_s = cfg.parallel.timeout_s
            runs = parallel.Runs(self.device, weights, timeout_s)
            return parallel.build(cfg.model, backend, checkpoint, self.layout, runs)
        if checkpoint is None:
            return new_model(cfg.model, backend).to(self.device, weights)
        if cfg.lora is not None:
            adapted = open_adapted(checkpoint, cfg.lora, self.dtype, str(self.device), backend)
            return adapted.double() if self.dtype == torch.float64 else adapted
        opened = open_checkpoint(
            checkpoint, device=str(self.device), backend=backend, verified=True
        )
        return opened.model.to(weights)  # step 0 of --init is fp32 whatever is trained in

    def _run(
        self, stop: StopRequest, held_out: Mapping[str, HeldOut], log: MetricsLog | None
    ) -> Result:
        cfg, stopping = self.cfg.train, False
        while self._step < cfg.steps and not stopping:
            measured = self._one_step(self._step, stop)
            stopping = measured.stop
            record = self._record(measured)
            last = self._step == cfg.steps
            if last or self._step % cfg.eval_every == 0:
                record["bits_per_byte"] = self._evaluate(held_out)
            if log is not None:
                log.write(record)
            if self.progress is not None:
                self.progress.update(record, cfg.steps)
                for message in record.get("warnings", ()):
                    self.progress.warn(f"step {self._step}: {message}")
                if self.progress.lost:  # the next step is the last, on every rank
                    stop.signal = stop.signal or READER_LEFT
            if last or stopping or self._step % cfg.save_every == 0:
                self._save()
            else:  # if it did, the next step is the last, and its save raises
                self._save_failed = self._saver.failed()
        self._saver.finish()
        assert self._saver.checkpoint is not None  # at least one step ran, or it had been the last
        # Another rank may have got the signal that ended this one's loop.
        signal_number = (stop.signal or 15) if stopping and self._step < cfg.steps else 0
        points = history(read_metrics(self.folder / METRICS_NAME))
        return Result(self._step, self._saver.checkpoint, points, signal_number)

    def _evaluate(self, held_out: Mapping[str, HeldOut]) -> dict[str, float]:
        cfg = self.cfg.train
        size = max(1, cfg.batch_size // cfg.accumulate // self.ranks.world)
        bits = evaluate(self.model, held_out, size, self.dtype, self.ranks, self._task)
        if not all(map(math.isfinite, bits.values())):
            raise self._stopped(self._step, "the loss on held-out text")
        return bits

    def _one_step(self, step: int, stop: StopRequest) -> StepNumbers:
        """Forward, backward and update for one step; nothing is updated if a number is bad."""
        started_s = time.perf_counter()
        cfg = self.cfg
        batch = self._batch(step)
        tally = Tally(len(self.model.mixtures()), self._num_experts, self.device)
        names, sums_P = self._backward(step, batch, tally)
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        square = parallel.square(gradients, self._places).reshape(1)
        asked = sums_P.new_tensor([float(stop.signal != 0 or self._save_failed)])
        shared = self.ranks.sum_(torch.cat([sums_P, asked, square]))
        tally.reduce(self.ranks)
        # The step's only copy from the device.
        numbers = torch.cat([shared, tally.packed()]).tolist()
        *sums, stopping, squared = numbers[: len(shared)]
        parts = dict(zip(names, sums, strict=True))
        if not all(map(math.isfinite, (squared, *parts.values()))):
            raise self._not_finite(step, batch, parts)
        grad_norm = math.sqrt(squared)
        if grad_norm > cfg.optim.clip:  # below it, clipping would multiply every gradient by 1
            parallel.scale(gradients.values(), cfg.optim.clip / (grad_norm + 1e-6))
        set_learning_rate(self._optimizer, learning_rate(step, cfg.train.steps, cfg.optim))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if cfg.balance.bias_rate and "router" not in cfg.optim.freeze:
            for moe, counts_E in zip(self.model.mixtures(), tally.counts_LE, strict=True):
                update_bias(cast(Tensor, moe.router.bias), counts_E, cfg.balance.bias_rate)
        self._step, self._counts_LE = step + 1, tally.counts_LE
        seconds = time.perf_counter() - started_s
        self._seconds += seconds
        loss, layers = parts.pop("loss"), tally.unpack(numbers[len(shared) :])
        return StepNumbers(loss, grad_norm, parts, layers, seconds, stopping > 0)

    def _backward(self, step: int, batch: Example, tally: Tally) -> tuple[list[str], Tensor]:
        """Gradients of all micro-batches; this rank's share of the loss's parts, float64."""
        self._seed_noise(step)
        micro_batches, world = batch.chunk(self.cfg.train.accumulate), self.ranks.world
        labels = self.ranks.sum_(num_labels(batch.targets))
        self._objective.restart(labels, len(micro_batches) * world)
        sums: dict[str, Tensor] = {}
        for number, micro in enumerate(micro_batches, 1):
            with self._sync(last=number == len(micro_batches)):
                output = self._predict(micro)
                tally.add(output.routings)
                loss = self._objective(output, micro.targets)
                # DDP averages gradients over the ranks; a model that is spread sums them.
                torch.autograd.backward(loss.total * (1 if self._share else world))
            for name, part in loss.parts.items():
                sums[name] = sums.get(name, 0.0) + part.double()
        return list(sums), torch.stack(list(sums.values()))

    def _predict(self, micro: Example) -> ModelOutput:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            output: ModelOutput = self._forward(*micro.inputs, **micro.noise)
        return output

    def _sync(self, last: bool) -> AbstractContextManager[None]:
        """Gradients travel between ranks with a step's last micro-batch only."""
        if self._share is not None:
            return parallel.synced(self.model, last)
        if last or not isinstance(self._forward, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[None], self._forward.no_sync())

    def _seed_noise(self, step: int) -> None:
        """Make adapters' dropout a function of seed, step and rank: nothing to save."""
        place = step * self.ranks.world + self.ranks.rank
        torch.manual_seed((self.cfg.train.seed * 1_000_000_007 + place + 1) % 2**63)

    def _batch(self, step: int) -> Example:
        rank, world, size = self.ranks.rank, self.ranks.world, self.cfg.train.batch_size
        windows_BS = self.corpus.batch(step, size, rank, world)
        first = step * size + rank * len(windows_BS)
        places = [(self.cfg.train.seed, first + row) for row in range(len(windows_BS))]
        example, moe = self._task.examples(windows_BS, places), self.cfg.model.moe
        if moe is not None and moe.noisy:
            rows_B = torch.arange(first, first + len(windows_BS), device="cpu")
            example = example._replace(noise_B=noise.of_rows(self.cfg.train.seed, rows_B))
        return example.to(self.device)

    def _not_finite(self, step: int, batch: Example, parts: dict[str, float]) -> TrainingError:
        """The error for a step whose loss or gradient is NaN or infinite; names the tensor."""
        bad = [name for name, value in parts.items() if not math.isfinite(value)]
        found = self.ranks.first(first_bad_gradient(self.model)) or "the norm of all gradients"
        if bad:
            value = self.ranks.first(first_bad_parameter(self.model))
            if value is None:
                self._seed_noise(step)
                micro = batch.chunk(self.cfg.train.accumulate)[0]
                output = first_bad_output(
                    self.model, lambda: self.model(*micro.inputs, **micro.noise)
                )
                value = self.ranks.first(output)
            found = value or f"the {'loss' if bad[0] == 'loss' else f'{bad[0]} balance loss'}"
        return self._stopped(step + 1, found)

    def _stopped(self, step: int, found: str) -> TrainingError:
        return TrainingError(
            f"step {step}: {found} is not finite. Nothing of this step was kept. "
            f"{self._saver.last_good()} Lower optim.lr, or lengthen optim.warmup"
            f"{', or set train.dtype = float32' if self.dtype == torch.bfloat16 else ''}"
        )

    def _record(self, measured: StepNumbers) -> dict[str, Any]:
        """One line of metrics.jsonl."""
        step, cfg = self._step, self.cfg
        layers = zip(self.model.moe_layers, measured.layers, strict=True)
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * self._step_tokens,
            "step_tokens": self._step_tokens,
            "seconds": self._seconds,
            "train_flops": step * self._step_flops,
            "loss": measured.loss,
            "lr": learning_rate(step - 1, cfg.train.steps, cfg.optim),
            "grad_norm": measured.grad_norm,
            "tokens_per_s": self._step_tokens / measured.seconds,
            "balance": measured.balance,
            "layers": [{"layer": number, **health._asdict()} for number, health in layers],
        }
        if warnings := self._watch.observe(step, self._counts_LE.cpu()):
            record["warnings"] = warnings
        return record

    def _save(self) -> None:
        """Save, or begin to; weights that went bad are not saved."""
        if bad := self.ranks.first(first_bad_parameter(self.model)):
            raise self._stopped(self._step, f"{bad} after the update")
        watch = self._watch
        numbers = state.Numbers(
            self._step, self._seconds, tuple(sorted(watch.collapsed)), watch.window_WLE.clone(),
            self.corpus.fingerprint,
        )  # fmt: skip
        self._saver.save(numbers)
