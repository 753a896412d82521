import math
import os
import shutil
import signal
from functools import partialmethod

import pytest
import torch

from moestro.checkpoints.adapters import OWN_FILE
from moestro.checkpoints.folders import newest_checkpoint
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.tensor_files import read_tensors
from moestro.config import LoraConfig
from moestro.data.windows import DataConfig, prepare
from moestro.errors import ConfigError, TrainingError
from moestro.models.build import new_model
from moestro.train.initial import save_step_zero
from moestro.train.loop import Trainer
from moestro.train.metrics import METRICS_NAME, read_metrics
from moestro.train.preflight import check_run
from moestro.train.progress import ProgressDisplay
from moestro.train.tuning import new_adapters

TIMES = ("seconds", "tokens_per_s")
BIASED = {"router": {"selection_bias": True}}
NOISY = {
    "router": {"jitter": 0.1, "selection_bias": True},
    "experts": {"dropout": 0.2},
    "capacity": {"factor": 1.0},
}


def records(folder):
    """The metrics of a run without what a clock says."""
    found = read_metrics(folder / METRICS_NAME)
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


def assert_same_checkpoint(one, other):
    for name in ("model.safetensors", "optimizer.safetensors", "trainer.safetensors"):
        left, right = read_tensors(one / name), read_tensors(other / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


class Steps(ProgressDisplay):
    """Shows nothing; calls a function after each step."""

    def __init__(self, call):
        super().__init__()
        self.call, self.warnings = call, []

    def update(self, record, steps):
        self.call(record["step"])

    def note(self, text):
        pass

    def warn(self, text):
        self.warnings.append(text)


def test_a_run_learns_and_reports(tiny_settings, tiny_corpus, tmp_path):
    cfg = tiny_settings(train={"steps": 40, "eval_every": 20}, optim={"lr": 1e-2})
    result = Trainer(cfg, tmp_path / "run", tiny_corpus).train()
    assert (result.step, result.stopped_by) == (40, 0)
    assert [point.step for point in result.history] == [20, 40]
    first, last = result.history
    assert last.tokens == 40 * 4 * 16
    assert last.train_flops == 2 * first.train_flops > 0
    assert last.seconds > first.seconds > 0
    assert last.bits_per_byte.keys() == {"all", "words", "sums"}
    assert last.bits_per_byte["all"] < first.bits_per_byte["all"] < 8
    seen = records(tmp_path / "run")
    assert [record["step"] for record in seen] == list(range(1, 41))
    assert seen[0]["balance"].keys() == {"switch", "z"}
    assert [layer["layer"] for layer in seen[0]["layers"]] == [0, 1]
    assert seen[0]["layers"][0].keys() == {"layer", "imbalance", "dead", "dropped", "entropy"}
    assert result.checkpoint == newest_checkpoint(tmp_path / "run")


# With widths of 32, bfloat16 goes to AMX tiles where the processor has them.
@pytest.mark.parametrize(
    ("moe", "dtype", "matrices"),
    [(NOISY, "float32", "muon"), ({**BIASED, "hidden_dim": 32}, "bfloat16", "adamw")],
)
def test_a_resumed_run_equals_a_straight_one_bitwise(
    tiny_settings, tiny_corpus, tmp_path, moe, dtype, matrices
):
    cfg = tiny_settings(
        moe,
        model={"dim": 32},
        train={"accumulate": 2, "dtype": dtype},
        balance={"scope": "global", "bias_rate": 1e-2},
        optim={"matrices": matrices},
    )
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    Trainer(cfg, straight, tiny_corpus).train()
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-000006")
    result = Trainer(cfg, resumed, tiny_corpus).train(resume=True)
    assert_same_checkpoint(straight / "checkpoints/step-000006", result.checkpoint)
    assert records(straight) == records(resumed)
    assert [point.step for point in result.history] == [3, 6]
    assert len(records(resumed)) == 6


def test_noise_differs_between_steps_and_seeds(tiny_settings, tiny_corpus, tmp_path):
    losses = []
    for seed in (0, 1):
        cfg = tiny_settings({"experts": {"dropout": 0.5}}, train={"seed": seed, "steps": 2})
        Trainer(cfg, tmp_path / str(seed), tiny_corpus).train()
        losses += [record["loss"] for record in records(tmp_path / str(seed))]
    assert len(set(losses)) == 4


def test_dense_models_train_too(tiny_settings, tiny_corpus, tmp_path):
    cfg = tiny_settings(model={"moe": None, "num_layers": 1, "dim": 8})
    result = Trainer(cfg, tmp_path / "run", tiny_corpus).train()
    assert records(tmp_path / "run")[0]["layers"] == []
    assert Trainer(cfg, tmp_path / "run", tiny_corpus).train(resume=True) == result


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_accumulation_equals_one_large_batch(tiny_settings, tiny_corpus, tmp_path, scope):
    found = []
    for accumulate in (1, 2):
        cfg = tiny_settings(
            {"router": {"selection_bias": True}},
            train={"accumulate": accumulate, "steps": 2},
            balance={"scope": scope, "switch": 0.0, "bias_rate": 0.01},
        )
        folder = tmp_path / f"{scope}{accumulate}"
        checkpoint = Trainer(cfg, folder, tiny_corpus).train().checkpoint
        found.append((records(folder), read_tensors(checkpoint / "model.safetensors")))
    (one, weights), (two, other) = found
    for left, right in zip(one, two, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
        for a, b in zip(left["layers"], right["layers"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    bias = [name for name in weights if name.endswith("router.bias")]
    assert len(bias) == 2
    assert all(torch.equal(weights[name], other[name]) for name in bias)


def test_recomputed_activations_change_neither_loss_nor_counts(
    tiny_settings, tiny_corpus, tmp_path
):
    found = []
    for on in (False, True):
        runtime = {"device": "cpu", "checkpoint_activations": on}
        cfg = tiny_settings(NOISY, train={"runtime": runtime}, balance={"bias_rate": 0.01})
        checkpoint = Trainer(cfg, tmp_path / str(on), tiny_corpus).train().checkpoint
        found.append((records(tmp_path / str(on)), read_tensors(checkpoint / "model.safetensors")))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], value) for name, value in found[1][1].items())


def test_bfloat16_trains_and_keeps_weights_in_float32(tiny_settings, tiny_corpus, tmp_path):
    cfg = tiny_settings(train={"dtype": "bfloat16"})
    result = Trainer(cfg, tmp_path / "run", tiny_corpus).train()
    assert all(math.isfinite(record["loss"]) for record in records(tmp_path / "run"))
    weights = read_tensors(result.checkpoint / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_trains_and_resumes(tiny_settings, tiny_corpus, tmp_path):
    runtime = {"device": "cuda"}
    cfg = tiny_settings(NOISY, train={"dtype": "auto", "runtime": runtime})
    Trainer(cfg, tmp_path / "run", tiny_corpus).train()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    before = records(tmp_path / "run")
    Trainer(cfg, tmp_path / "run", tiny_corpus).train(resume=True)
    for old, new in zip(before, records(tmp_path / "run"), strict=True):
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-3)


def test_the_bias_moves_by_its_rate_each_step(tiny_settings, tiny_corpus, tmp_path):
    cfg = tiny_settings(
        {"router": {"kind": "sigmoid", "selection_bias": True}},
        train={"steps": 1},
        balance={"bias_rate": 0.5},
    )
    model = open_checkpoint(Trainer(cfg, tmp_path / "run", tiny_corpus).train().checkpoint).model
    for mixture in model.mixtures():
        bias_E = mixture.router.bias  # 0.5 · (s - mean s), each s one of -1, 0, 1
        assert bias_E.sum() == 0
        assert set((bias_E - bias_E[0]).abs().tolist()) <= {0.0, 0.5, 1.0}
        assert bias_E.abs().sum() > 0


def test_every_balance_loss_is_logged(tiny_settings, tiny_corpus, tmp_path):
    cfg = tiny_settings(
        {"router": {"kind": "noisy_top_k"}},
        balance={"importance": 0.1, "load": 0.1, "scope": "sequence"},
    )
    Trainer(cfg, tmp_path / "run", tiny_corpus).train()
    for record in records(tmp_path / "run"):
        assert record["balance"].keys() == {"switch", "importance", "load", "z"}


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_later(tiny_settings, tiny_corpus, tmp_path, which):
    cfg = tiny_settings()
    handler = signal.getsignal(which)
    stop = Steps(lambda step: os.kill(os.getpid(), which) if step == 1 else None)
    result = Trainer(cfg, tmp_path / "run", tiny_corpus, stop).train()
    assert (result.step, result.stopped_by) == (2, which)
    assert result.checkpoint.name == "step-000002"
    assert signal.getsignal(which) == handler
    final = Trainer(cfg, tmp_path / "run", tiny_corpus).train(resume=True)
    Trainer(cfg, tmp_path / "straight", tiny_corpus).train()
    assert_same_checkpoint(tmp_path / "straight/checkpoints/step-000006", final.checkpoint)


def test_a_second_ctrl_c_aborts_at_once(tiny_settings, tiny_corpus, tmp_path):
    def twice(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny_settings(), tmp_path / "run", tiny_corpus, Steps(twice)).train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def poisoned(trainer_of, poison):
    """Train until `poison(model)` was called after step 4; return the error."""
    box = []
    progress = Steps(lambda step: poison(box[0].model) if step == 4 else None)
    box.append(trainer_of(progress))
    with pytest.raises(TrainingError) as caught:
        box[0].train()
    return str(caught.value)


def bad_parameter(model):
    model.blocks[1].ffn.experts.down.data[0, 0, 0] = float("nan")


def bad_gradient(model):
    model.blocks[0].ffn_norm.weight.register_hook(lambda gradient: gradient * float("inf"))


def bad_activation(model):
    model.blocks[1].attention_norm.weight.data.fill_(1e38)


@pytest.mark.parametrize(
    ("poison", "named"),
    [
        (bad_parameter, "the parameter blocks.1.ffn.experts.down"),
        (bad_gradient, "the gradient of blocks.0.ffn_norm.weight"),
        (bad_activation, "the output of blocks.1."),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run(
    tiny_settings, tiny_corpus, tmp_path, poison, named
):
    run = tmp_path / "run"
    message = poisoned(lambda show: Trainer(tiny_settings(), run, tiny_corpus, show), poison)
    assert message.startswith(f"step 5: {named}")
    assert str(run / "checkpoints" / "step-000003") in message
    assert newest_checkpoint(run).name == "step-000003"
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4]
    weights = read_tensors(newest_checkpoint(run) / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_before_the_first_checkpoint_the_error_says_so(tiny_settings, tiny_corpus, tmp_path):
    cfg = tiny_settings(train={"save_every": 100})
    message = poisoned(lambda show: Trainer(cfg, tmp_path, tiny_corpus, show), bad_parameter)
    assert "no good checkpoint yet" in message


def test_collapse_is_shown_and_logged_once(tiny_settings, tiny_corpus, tmp_path):
    show = Steps(lambda step: None)
    cfg = tiny_settings(
        # A bias that outweighs every score sends all tokens to the first expert.
        {"top_k": 1, "router": {"selection_bias": True}},
        train={"steps": 30, "save_every": 100},
    )
    trainer = Trainer(cfg, tmp_path / "run", tiny_corpus, show)

    def push(step):
        for mixture in trainer.model.mixtures():
            mixture.router.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))

    show.call = push
    trainer.train()
    logged = [(r["step"], r["warnings"]) for r in records(tmp_path / "run") if "warnings" in r]
    assert len(logged) <= 2
    assert sum(len(warnings) for _, warnings in logged) == 2
    assert len(show.warnings) == 2
    assert "expert collapse" in show.warnings[0]
    assert records(tmp_path / "run")[-1]["layers"][0]["dead"] == 3


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny_settings, tiny_corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"set model\.vocab_size = 256"):
        Trainer(tiny_settings(model={"vocab_size": 100}), tmp_path / "run", tiny_corpus)


def test_another_text_is_refused_on_resume(tiny_settings, tiny_corpus, tiny_text, tmp_path):
    cfg = tiny_settings(train={"steps": 3})
    Trainer(cfg, tmp_path / "run", tiny_corpus).train()
    (tmp_path / "texts").mkdir()
    shutil.copytree(tiny_text / "words", tmp_path / "texts" / "words")
    data = DataConfig(sources=(str(tmp_path / "texts"),), seq_len=16, held_out=0.2)
    other = prepare(data, tmp_path / "tokens")
    with pytest.raises(ConfigError, match="the text is not the one"):
        Trainer(cfg, tmp_path / "run", other).train(resume=True)


@pytest.mark.parametrize("evaluate_first", [True, False])
def test_weights_that_an_update_ruined_are_never_saved(
    tiny_settings, tiny_corpus, tmp_path, evaluate_first
):
    """The loss and the gradients were finite; the update was not."""
    every = 1 if evaluate_first else 100
    cfg = tiny_settings(
        optim={"lr": 1e38, "warmup": 0.0}, train={"save_every": 1, "eval_every": every}
    )
    with pytest.raises(TrainingError, match=r"step \d+: the .* is not finite"):
        Trainer(cfg, tmp_path, tiny_corpus).train()
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        weights = read_tensors(folder / "model.safetensors")
        assert all(torch.isfinite(value).all() for value in weights.values()), folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own, about graph breaks
def test_a_compiled_run_learns_the_same(tiny_settings, tiny_corpus, tmp_path, monkeypatch):
    """With a capacity, which depends on the number of tokens; the evaluation has another one.

    All of the compiler but its last step, C++, which takes a minute.
    """
    in_torch = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", in_torch)
    finals = []
    for compiled in (False, True):
        train = {"steps": 2, "batch_size": 6, "runtime": {"compile": compiled, "device": "cpu"}}
        cfg = tiny_settings({"capacity": {}}, train=train)
        result = Trainer(cfg, tmp_path / str(compiled), tiny_corpus).train()
        finals.append(result.history[-1].bits_per_byte["all"])
    assert finals[0] == pytest.approx(finals[1], rel=1e-4)


def test_float64_from_weights_in_fp32(tiny_settings, tiny_corpus, tmp_path):
    """A step 0 of other weights is fp32: what goes on from it is what it would be from theirs."""
    cfg = tiny_settings(BIASED, train={"dtype": "float64", "steps": 2})
    torch.manual_seed(cfg.train.seed)
    save_step_zero(tmp_path / "begun", cfg, new_model(cfg.model), tiny_corpus)
    for name in ("begun", "new"):
        Trainer(cfg, tmp_path / name, tiny_corpus).train(resume=name == "begun")
    begun, new = (newest_checkpoint(tmp_path / name) for name in ("begun", "new"))
    assert open_checkpoint(begun).model.embed.weight.dtype == torch.float64
    assert_same_checkpoint(begun, new)


def test_adapters_in_float64(tiny_settings, tiny_corpus, tmp_path):
    cfg = tiny_settings(train={"dtype": "float64", "steps": 2})
    base = save_step_zero(tmp_path / "base", cfg, new_model(cfg.model), tiny_corpus)
    cfg = cfg.model_copy(update={"lora": LoraConfig(base=str(base), rank=2)})
    save_step_zero(tmp_path / "run", cfg, new_adapters(base, cfg), tiny_corpus)
    checkpoint = Trainer(cfg, tmp_path / "run", tiny_corpus).train(resume=True).checkpoint
    for name in (OWN_FILE, "optimizer.safetensors"):
        tensors = read_tensors(checkpoint / name).values()
        assert {each.dtype for each in tensors if each.ndim} == {torch.float64}
    packed = cfg.model_copy(update={"lora": cfg.lora.model_copy(update={"weights": "int8"})})
    with pytest.raises(ConfigError, match=r"do not compute in float64; set train\.dtype"):
        check_run(packed)
